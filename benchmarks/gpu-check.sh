#!/bin/sh
# Builds llama.cpp for CUDA and runs the referees and the overhead benchmark there. Needs an NVIDIA GPU with its
# compiler (nvcc), and no network:
#
#   benchmarks/gpu-check.sh FOLDER
#
# FOLDER holds the source package llama_cpp_python-*.tar.gz of llama.cpp/pin.txt and the wheels of what moetrace
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
CMAKE_ARGS="-DCMAKE_CUDA_ARCHITECTURES=native" PIP_NO_BINARY='' llama.cpp/install.sh cuda "$python"
"$venv/bin/moetrace" doctor

# each placement of the layers and experts; llama.cpp's tools and ours read these variables
check() {
    echo "== $1"
    shift
    env "$@" "$python" -m pytest -q -m "not slow" tests/integration/test_capture.py tests/integration/test_server.py \
        tests/integration/test_tools.py tests/integration/test_attention.py
}
check 'all layers on the GPU'           LLAMA_ARG_N_GPU_LAYERS=99 MOETRACE_GPU_LAYERS=99
check 'experts on the CPU'              LLAMA_ARG_N_GPU_LAYERS=99 LLAMA_ARG_CPU_MOE=1 MOETRACE_CPU_MOE=1
check 'experts of two layers on the CPU' LLAMA_ARG_N_GPU_LAYERS=99 LLAMA_ARG_N_CPU_MOE=2 MOETRACE_N_CPU_MOE=2

"$python" benchmarks/bench_overhead.py --threads "$jobs" --section gpu --write
