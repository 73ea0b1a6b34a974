#!/bin/sh
# Builds llama-server and llama-imatrix of older and newer llama.cpp releases, to see which of them moetrace can
# trace: FOLDER/NAME-VERSION/bin/ holds the two programs with their shared libraries.
#
#   llama.cpp/releases.sh FOLDER [NAME==VERSION ...]
#
# Without names, all of releases.txt but the pinned one, which `moetrace setup` builds. A release that is there already is
# left alone. About ten minutes each on two cores; JOBS (default 2) is how many files are compiled at once. PYTHON
# (default python3) fetches the sources.
set -eu

here=$(cd "$(dirname "$0")" && pwd)
if [ $# -lt 1 ]; then
    sed -n 's/^# \{0,1\}//p' "$0" | sed -n 2,9p >&2
    exit 2
fi
mkdir -p "$1"
folder=$(cd "$1" && pwd)
shift
if [ $# -eq 0 ]; then
    set -- $(grep -v -e '^#' -e "^$(cat "$here/../moetrace/host/pin.txt") " "$here/releases.txt" | cut -d' ' -f1)
fi
python=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

build() {
    set -e
    "$python" -m pip download --no-deps --no-binary "$name" --dest "$work" "$release"
    archive=$(ls "$work"/*.tar.gz)
    mkdir "$work/source"
    tar xzf "$archive" -C "$work/source" --strip-components 1
    rm "$archive"
    # what the package says of its llama.cpp: a commit in the change log, or a build number as its version
    commit=$(sed -n 's|.*Update llama.cpp to .*@\([0-9a-f]\{9\}\).*|\1|p' "$work/source/CHANGELOG.md" 2>/dev/null | head -n 1)
    if [ -d "$work/source/vendor/llama.cpp" ]; then llama=$work/source/vendor/llama.cpp; else llama=$work/source/llama.cpp; fi
    # options that a release does not know are ignored by cmake
    cmake -S "$llama" -B "$work/build" -DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=ON -DLLAMA_BUILD_TESTS=OFF \
        -DLLAMA_BUILD_EXAMPLES=ON -DLLAMA_BUILD_TOOLS=ON -DLLAMA_BUILD_SERVER=ON -DLLAMA_BUILD_COMMON=ON \
        -DLLAMA_BUILD_WEBUI=OFF -DLLAMA_BUILD_UI=OFF -DLLAMA_USE_PREBUILT_UI=OFF -DLLAMA_CURL=OFF \
        -DLLAMA_OPENSSL=OFF -DCMAKE_BUILD_WITH_INSTALL_RPATH=ON -DCMAKE_INSTALL_RPATH='$ORIGIN'
    cmake --build "$work/build" --parallel "${JOBS:-2}" --target llama-server llama-imatrix
    mkdir -p "$target.part/bin"
    find "$work/build" \( -name 'lib*.so*' -o -name 'lib*.dylib' \) -exec cp -P {} "$target.part/bin/" \;
    cp "$work/build/bin/llama-server" "$work/build/bin/llama-imatrix" "$target.part/bin/"
    echo "${commit:-b${version%%.*}}" >"$target.part/llama.cpp.txt"
    mv "$target.part" "$target"
}

failed=0
for release in "$@"; do
    name=${release%%==*}
    version=${release##*==}
    target=$folder/$name-$version
    if [ -x "$target/bin/llama-server" ]; then
        continue
    fi
    echo "Building $release: about ten minutes on two cores" >&2
    rm -rf "$target.part" "$work"/*
    # not as a condition: the shell would go on after an error in it
    set +e
    (build) >"$folder/$name-$version.log" 2>&1
    code=$?
    set -e
    if [ $code -ne 0 ]; then
        echo "$release could not be built; $folder/$name-$version.log says why" >&2
        failed=1
    fi
done
exit $failed
