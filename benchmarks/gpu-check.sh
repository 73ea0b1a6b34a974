#!/bin/sh
# Builds llama.cpp for CUDA and runs the device tests and the overhead benchmark there. Needs an NVIDIA GPU, and no
# network:
#
#   benchmarks/gpu-check.sh FOLDER [tests]
#
# FOLDER holds the wheels of what moetrace and its tests need and the machine's Python lacks (pip download -d FOLDER
# ...) and the source package llama_cpp_python-*.tar.gz of moetrace/host/pin.txt, which needs nvcc here and takes most
# of the time; or FOLDER/site, where pip installed it (--target) after it was built for CUDA elsewhere. Everything is
# put under build/gpu. With "tests", nothing is measured. MODEL is a file to measure with instead of one that is
# written, REPEATS how often, TESTERS how many tests run beside each other, WHEEL moetrace built elsewhere.
set -eu

cd "$(dirname "$0")/.."
sources=$(cd "${1:?a folder with the wheels that are needed and llama-cpp-python}" && pwd)
venv=build/gpu/venv
python=$venv/bin/python
jobs=$(getconf _NPROCESSORS_ONLN)

say() { printf '\n%s %s\n' "$(date +%T)" "$*"; }

nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
mkdir -p build/gpu
python3 -m venv "$venv"
# what python3 has, which may itself be a virtual environment, and the llama.cpp that was built
around=$(echo "$venv"/lib/python3*/site-packages)/around.pth
python3 -c 'import sysconfig; print(sysconfig.get_path("purelib"))' >"$around"
if [ -d "$sources/site" ]; then echo "$sources/site" >>"$around"; fi
export PIP_NO_INDEX=1 PIP_FIND_LINKS="$sources" PIP_DISABLE_PIP_VERSION_CHECK=1 CMAKE_BUILD_PARALLEL_LEVEL="$jobs"
"$python" -m pip install --quiet --no-build-isolation "${WHEEL:-.}" pytest pytest-timeout pytest-xdist
if [ ! -d "$sources/site" ]; then
    export PIP_NO_BUILD_ISOLATION=0 # to pip this means that there is none
    CMAKE_ARGS="-DCMAKE_CUDA_ARCHITECTURES=native" PIP_NO_BINARY='' moetrace/host/install-llama.sh cuda "$python"
fi
say "$("$venv/bin/moetrace" doctor 2>&1 || true)"

# libggml-cuda may bring parts of a C++ library along, which Python would find before the system's
LD_PRELOAD=$(cc -print-file-name=libstdc++.so.6)
export LD_PRELOAD MOETRACE_TEST_GPU=1 MOETRACE_HOSTS=docs/hosts.json
# what was installed, not the sources in this folder
safe() { PYTHONSAFEPATH=1 "$python" "$@"; }

say "the model to measure with is written meanwhile"
model=${MODEL:-build/gpu/model.gguf}
if [ ! -f "$model" ]; then "$python" benchmarks/bench_device.py --make "$model" & fi

say "every architecture, in each placement of layers, experts and routers; servers with overlapping requests"
failed=0
safe -m pytest -q -n "${TESTERS:-$((jobs / 2))}" tests/device/test_gpu.py || failed=1
"$python" docs/hosts.py
wait
if [ "${2:-}" = tests ]; then exit "$failed"; fi

say "what it costs"
"$python" benchmarks/bench_device.py --model "$model" --threads "$jobs" --repeats "${REPEATS:-5}" --write
exit "$failed"
