#!/bin/sh
# Builds llama.cpp for CUDA and runs the device tests and the overhead benchmark there. Needs an NVIDIA GPU with its
# compiler (nvcc), and no network:
#
#   benchmarks/gpu-check.sh FOLDER
#
# FOLDER holds the source package llama_cpp_python-*.tar.gz of moetrace/host/pin.txt and the wheels of what moetrace
# needs and the machine's Python lacks (pip download -d FOLDER ...). Everything is built under build/gpu.
set -eu

cd "$(dirname "$0")/.."
sources=${1:?a folder with the source package of llama-cpp-python and the wheels that are needed}
venv=build/gpu/venv
python=$venv/bin/python
jobs=$(getconf _NPROCESSORS_ONLN)

nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
mkdir -p build/gpu
python3 -m venv --system-site-packages "$venv"
export PIP_NO_INDEX=1 PIP_FIND_LINKS="$sources" PIP_NO_BUILD_ISOLATION=1 CMAKE_BUILD_PARALLEL_LEVEL="$jobs"
"$python" -m pip install --quiet '.[test]'
CMAKE_ARGS="-DCMAKE_CUDA_ARCHITECTURES=native" PIP_NO_BINARY='' moetrace/host/install-llama.sh cuda "$python"
"$venv/bin/moetrace" doctor

# libggml-cuda may bring parts of a C++ library along, which Python would find before the system's
LD_PRELOAD=$(cc -print-file-name=libstdc++.so.6)
export LD_PRELOAD MOETRACE_TEST_GPU=1

# every architecture, in each placement of layers, experts and routers; then a server with overlapping requests
"$python" -m pytest -q tests/device/test_gpu.py
LLAMA_ARG_N_GPU_LAYERS=99 "$python" -m pytest -q -m "not slow" tests/integration/test_server.py

"$python" benchmarks/bench_device.py --make build/gpu/model.gguf
"$python" benchmarks/bench_device.py --model build/gpu/model.gguf --threads "$jobs" --write
