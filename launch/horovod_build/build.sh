#!/usr/bin/env bash
# Installs Horovod 0.28.1, built from its source distribution and patched, into the Python that is named.
#
#   bash launch/horovod_build/build.sh .venv/bin/python
#
# That Python must have TensorFlow, against which Horovod's libraries are linked: another TensorFlow needs
# another build. The build takes three minutes on two idle cores. The wheel is kept in ~/.cache/warmstate,
# named by the versions and a hash of this folder's files: the next virtual environment takes seconds.
# Needs g++ 9 or later, make and patch; neither MPI nor ssh.
#
# MPI: with HOROVOD_CPU_OPERATIONS=MPI processes that mpirun starts sum and gather by MPI, which must be there
# with its compiler (Debian, Ubuntu: libopenmpi-dev openmpi-bin). Gloo is built in too.
#
# GPU: with HOROVOD_GPU_OPERATIONS=NCCL sums go from GPU to GPU. CUDA's compiler and NCCL come from the package
# index in the versions of cuda.txt, unless HOROVOD_CUDA_HOME and HOROVOD_NCCL_HOME name others. The build takes
# 10 to 13 minutes on two idle cores and no GPU; running it needs a driver of version 580 or later, for CUDA 13.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
VERSION=$(sed -nE 's/^horovod==([0-9.]+) .*/\1/p' "$here/requirements.txt")
python=${1:?usage: build.sh PYTHON}
python=$(cd "$(dirname "$python")" && pwd)/$(basename "$python")
pip=("$python" -m pip --quiet --disable-pip-version-check)

say() { echo "horovod: $*"; }
fail() { say "$*" >&2; exit 1; }

gpu=${HOROVOD_GPU_OPERATIONS:-}
mpi=$([[ ${HOROVOD_CPU_OPERATIONS:-} == MPI ]] && echo -mpi) || true
works() {
    (cd / && "$python" -c "import horovod.tensorflow as h; assert h.gloo_built(); \
assert not '$gpu' or h.nccl_built(); assert not '$mpi' or h.mpi_built()") 2>&1
}

tensorflow=$("$python" -c 'from importlib.metadata import version; print(version("tensorflow"))' 2>/dev/null) ||
    fail "$python has no TensorFlow; run make venv first"
tag=$("$python" -c 'import sys; print("cp%d%d" % sys.version_info[:2])')
source=$(cat "$here"/*.patch "$here"/*.txt "$here/build.sh" | sha256sum | cut -c1-12)
key=horovod-$VERSION-tf$tensorflow-$tag-$(uname -m)-${gpu:-cpu}$mpi-$source
wheels=${XDG_CACHE_HOME:-$HOME/.cache}/warmstate/$key

install() {
    "${pip[@]}" install -c "$here/../../constraints.txt" cloudpickle packaging psutil pyyaml
    if [[ $gpu == NCCL ]]; then
        grep nvidia-nccl "$here/cuda.txt" | "${pip[@]}" install --require-hashes --no-deps -r /dev/stdin
    fi
    "${pip[@]}" install --no-deps --force-reinstall "$wheels"/horovod-*.whl
    report=$(works) || fail "$wheels was built and does not work here:"$'\n'"$report"
}

if compgen -G "$wheels/horovod-*.whl" >/dev/null; then
    install
    say "installed from $wheels"
    exit
fi

for tool in g++ make patch; do
    command -v "$tool" >/dev/null ||
        fail "cannot be built: there is no $tool on this machine (Debian, Ubuntu: apt-get install g++ make patch;" \
            "make test HOROVOD=0 does without)"
done
[[ -z $mpi ]] || command -v mpicxx >/dev/null ||
    fail "cannot be built with MPI: there is no mpicxx on this machine (Debian, Ubuntu: apt-get install libopenmpi-dev openmpi-bin)"
(($(g++ -dumpversion | cut -d. -f1) >= 9)) ||
    fail "cannot be built: g++ is version $(g++ -dumpversion), TensorFlow's headers need 9 or later"

work=$(mktemp -d "${TMPDIR:-/tmp}/horovod-build.XXXXXX")
trap 'rm -rf "$work"' EXIT

# What only the build needs goes into a folder of its own, not into the virtual environment: setup.py
# wants pkg_resources and an egg_info step that setuptools 81 and later no longer have.
"${pip[@]}" install --target "$work/tools" 'setuptools<81' wheel cloudpickle packaging psutil pyyaml
export PYTHONPATH=$work/tools
cmake_version=$(cmake --version 2>/dev/null | sed -n '1s/[^0-9]*//p') || true
if [[ $(printf '%s\n' 3.13 "${cmake_version:-0}" | sort -V | head -1) != 3.13 ]]; then
    say "cmake is ${cmake_version:-not there}; taking one from pip"
    "${pip[@]}" install --target "$work/cmake" cmake
    export HOROVOD_CMAKE=$work/cmake/bin/cmake PYTHONPATH=$PYTHONPATH:$work/cmake
fi

"${pip[@]}" download --require-hashes --no-deps --no-binary horovod --no-build-isolation -d "$work" \
    -r "$here/requirements.txt" || fail "the source distribution is not there, or not the one that was tested"
tar -xzf "$work/horovod-$VERSION.tar.gz" -C "$work"
cd "$work/horovod-$VERSION"
for each in "$here"/*.patch; do
    patch --quiet -p1 <"$each" || fail "$(basename "$each") does not apply"
done

export HOROVOD_WITH_TENSORFLOW=1 HOROVOD_WITHOUT_PYTORCH=1 HOROVOD_WITHOUT_MXNET=1
export HOROVOD_WITH_GLOO=1 HOROVOD_CPU_OPERATIONS=${HOROVOD_CPU_OPERATIONS:-GLOO} HOROVOD_WITHOUT_NVTX=1
if [[ $mpi ]]; then export HOROVOD_WITH_MPI=1; else export HOROVOD_WITHOUT_MPI=1; fi
if [[ $gpu == NCCL && -z ${HOROVOD_CUDA_HOME:-} ]]; then
    "${pip[@]}" install --require-hashes --no-deps --target "$work/cuda" -r "$here/cuda.txt"
    export HOROVOD_CUDA_HOME=$work/cuda/nvidia/cu13 HOROVOD_NCCL_HOME=$work/cuda/nvidia/nccl
    ln -s lib "$HOROVOD_CUDA_HOME/lib64"
    ln -s libcudart.so.13 "$HOROVOD_CUDA_HOME/lib/libcudart.so"
    ln -s libnccl.so.2 "$HOROVOD_NCCL_HOME/lib/libnccl.so"
    export HOROVOD_BUILD_CUDA_CC_LIST=${HOROVOD_BUILD_CUDA_CC_LIST:-75,80,86,89,90,100,120}
    # Loaded from where pip puts TensorFlow's NCCL, so that one process has one.
    export LDFLAGS="${LDFLAGS:-} -Wl,-rpath,'\$ORIGIN/../../nvidia/nccl/lib'"
fi
# Fixed, so that a wheel does not depend on the processor that built it; TensorFlow needs AVX anyway.
if [[ $(uname -m) == x86_64 ]]; then
    export HOROVOD_BUILD_ARCH_FLAGS=${HOROVOD_BUILD_ARCH_FLAGS--mavx -mf16c -mfma}
fi
export MAKEFLAGS=-j$(nproc)                         # not those of the make that called this, nor setup.py's -j8
export CMAKE_POLICY_VERSION_MINIMUM=3.5             # Gloo asks for CMake 2.8.12, which CMake 4 refuses
export CXXFLAGS="${CXXFLAGS:-} -include cstdint"    # Gloo forgets it, which g++ 13 minds
export TF_CPP_MIN_LOG_LEVEL=3 CUDA_VISIBLE_DEVICES= # CMake imports TensorFlow
say "building $VERSION for TensorFlow $tensorflow on $(nproc) cores, ${gpu:-CPU}: some minutes"
"$python" -m pip wheel --disable-pip-version-check -v --no-build-isolation --no-deps -w "$work/wheels" . \
    >"$work/log" 2>&1 || {
    mkdir -p "$(dirname "$wheels")"
    cp "$work/log" "$wheels.log"
    grep -m 5 -E '(error|Error|ERROR):' "$work/log" >&2 || true
    fail "the build failed; the first of its faults are above, all of it is in $wheels.log"
}
mkdir -p "$(dirname "$wheels")"
rm -rf "$wheels"
mv "$work/wheels" "$wheels"
unset PYTHONPATH
cd /
install
say "built and installed; kept in $wheels"
