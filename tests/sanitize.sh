#!/usr/bin/env bash
# Builds lfq under sanitizers and runs tests in that build.
#
#   tests/sanitize.sh address [pytest arguments]             AddressSanitizer; the whole suite by default
#   tests/sanitize.sh undefined [pytest arguments]           UBSan; the whole suite by default
#   tests/sanitize.sh address,undefined [pytest arguments]   both in one build
#   tests/sanitize.sh thread [pytest arguments]              ThreadSanitizer; what uses threads by default
#
# LFQ_ISAS picks the instruction sets ("v3" by default, "v2;v3;v4" for all), OPTIMIZE the level (-O0), PYTHON the
# interpreter, BUILD the directory. Needs GCC, and a Python that has the test dependencies.
set -euo pipefail
kind=${1:?address, undefined, address,undefined or thread}
shift
root=$(cd "$(dirname "$0")/.." && pwd)
build=${BUILD:-$root/build/sanitize-${kind/,/-}}
python=$(command -v "${PYTHON:-python}")
case $kind in
  address) libraries="libasan.so" ;;
  undefined) libraries="libubsan.so" ;;
  address,undefined) libraries="libasan.so libubsan.so" ;;
  thread) libraries="libtsan.so" ;;
  *) echo "sanitize.sh: $kind is none of address, undefined, address,undefined, thread" >&2; exit 2 ;;
esac
cmake -S "$root" -B "$build" -DCMAKE_BUILD_TYPE=None "-DLFQ_OPTIMIZE=${OPTIMIZE:--O0}" "-DLFQ_ISAS=${LFQ_ISAS:-v3}" \
  -DLFQ_CUDA=OFF \
  "-DCMAKE_CXX_FLAGS=-fsanitize=$kind -fno-omit-frame-pointer -g1" \
  "-DPython_EXECUTABLE=$python" "-Dpybind11_DIR=$("$python" -m pybind11 --cmakedir)"
cmake --build "$build" --parallel "${JOBS:-1}"
# A package of its own, so that the sources' one keeps its libraries.
mkdir -p "$build/package/lfq"
cp "$root"/lfq/*.{py,pyi,toml} "$build"/_core*.so "$build"/liblfq.so "$build/package/lfq/"
mkdir -p "$build/package/lfq/include" && cp -r "$root/csrc/include/lfq" "$build/package/lfq/include/"
preload=
for library in $libraries libstdc++.so; do
  preload+=$(gcc -print-file-name=$library):
done
if [ $# -eq 0 ]; then
  # Left out: tests that look at the symbols of a plain build, or bound the memory of a process.
  set -- -k "not symbol and not resident and not templates_come_from and not instruction_set_is_compiled"
  set -- "$root/tests" "$@"
  [ "$kind" != thread ] || set -- "$root/tests/test_threads.py"
fi
# Not the sources: their package would be found first.
cd "$build"
# Leaks are Python's own. Interceptors see the whole process, but only lfq is instrumented.
PYTHONPATH=$build/package:${PYTHONPATH:-} LD_PRELOAD=$preload NUMBA_CACHE_DIR=$build/numba \
  ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
  TSAN_OPTIONS=halt_on_error=1:report_signal_unsafe=0 \
  "$python" -m pytest -q -p no:cacheprovider "$@"
