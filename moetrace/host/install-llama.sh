#!/bin/sh
# Builds and installs the pinned llama.cpp into a Python environment: the libraries, llama-server and the other
# tools, and the Python bindings, all from one source release of llama-cpp-python.
#
#   moetrace/host/install-llama.sh [cpu|cuda|metal|vulkan] [PYTHON]      (what `moetrace setup` runs)
#
# PYTHON (default: python3) is the interpreter of the environment. pip caches the built wheel, so that a second
# environment takes seconds. Further CMake flags can be given in CMAKE_ARGS.
set -eu

here=$(cd "$(dirname "$0")" && pwd)
backend=${1:-cpu}
python=${2:-python3}
pin=$(cat "$here/pin.txt")

flags='-DLLAVA_BUILD=OFF -DLLAMA_BUILD_TOOLS=ON -DLLAMA_BUILD_SERVER=ON -DLLAMA_TOOLS_INSTALL=ON'
flags="$flags -DLLAMA_USE_PREBUILT_UI=OFF"
case $(uname -s) in
    Darwin) flags="$flags -DCMAKE_INSTALL_RPATH=@loader_path/../lib" ;;
    *)      flags="$flags -DCMAKE_INSTALL_RPATH=\$ORIGIN/../lib" ;;
esac
case $backend in
    cpu)    flags="$flags -DGGML_METAL=OFF" ;;
    cuda)   flags="$flags -DGGML_CUDA=ON" ;;
    metal)  flags="$flags -DGGML_METAL=ON" ;;
    vulkan) flags="$flags -DGGML_VULKAN=ON" ;;
    *)      echo "unknown backend '$backend': cpu, cuda, metal or vulkan" >&2; exit 2 ;;
esac

# whether the pinned version is installed, with its server
is_installed() {
    "$python" - "$pin" <<'PY' 2>/dev/null
import importlib.metadata, importlib.util, pathlib, sys
name, version = sys.argv[1].split("==")
folder = pathlib.Path(importlib.util.find_spec("llama_cpp").origin).parent.parent
sys.exit(0 if importlib.metadata.version(name) == version and (folder / "bin" / "llama-server").exists() else 1)
PY
}

if [ "$backend" = cpu ] && is_installed; then
    exit 0
fi

# measured: 11 minutes of one core's time; a GPU's kernels take longer
cores=$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1)
case $backend in
    cpu|metal) estimate="about $((11 / cores + 1)) minutes if this machine's $cores cores have nothing else to do" ;;
    *)         estimate="ten minutes and more" ;;
esac
echo "Building llama.cpp ($pin, $backend): once, $estimate" >&2
log=$(mktemp)
trap 'rm -f "$log"' EXIT

# pip prints a line per compiled file: show how far it is, keep the log for the case that it fails
build() {
    CMAKE_ARGS="$flags ${CMAKE_ARGS:-}" "$python" -m pip install --verbose --no-binary llama-cpp-python \
        --force-reinstall --no-deps "$@" "$pin" >"$log" 2>&1 &
    pid=$!
    while kill -0 "$pid" 2>/dev/null; do
        if [ -t 2 ]; then
            printf '\r  %s ' "$(grep -oE '^ *\[[0-9]+/[0-9]+\]' "$log" | tail -n 1)" >&2
        fi
        sleep 2
    done
    if [ -t 2 ]; then printf '\r' >&2; fi
    if ! wait "$pid"; then
        tail -n 40 "$log" >&2
        echo "llama.cpp could not be built; a C++17 compiler and make or ninja are needed" >&2
        exit 1
    fi
}

# pip's cache does not tell builds with different flags apart: use it for the plain build only, and look at what it gave
if [ "$backend" = cpu ] && [ -z "${CMAKE_ARGS:-}" ]; then
    build
    is_installed || build --no-cache-dir
else
    build --no-cache-dir
fi
"$python" -m pip install --quiet "$pin"
