#!/usr/bin/env bash
# Builds lfq under sanitizers and runs tests in that build.
#
#   tests/sanitize.sh address [pytest arguments]             AddressSanitizer; the whole suite by default
#   tests/sanitize.sh undefined [pytest arguments]           UBSan; the whole suite by default
#   tests/sanitize.sh address,undefined [pytest arguments]   both in one build
#   tests/sanitize.sh thread [pytest arguments]              ThreadSanitizer; what uses threads by default
#   tests/sanitize.sh quick                                  both, of liblfq alone (bindings: those of the lfq that
#                                                            is installed), on kernels, damaged files and threads:
#                                                            a minute or two of two cores
#
# LFQ_ISAS picks the instruction sets ("v3" by default, "v2;v3;v4" for all), OPTIMIZE the level (-O0), PYTHON the
# interpreter, BUILD the directory, JOBS how many compilers run at once. Needs GCC, CMake, and a Python that has pybind11
# and the test dependencies. Where GCC has no sanitizers it says so, and the exit status is 77.
set -euo pipefail
kind=${1:?address, undefined, address,undefined, thread or quick}
shift
root=$(cd "$(dirname "$0")/.." && pwd)
python=$(command -v "${PYTHON:-python}")
quick= fewer=
if [ "$kind" = quick ]; then
  quick=1 kind=address,undefined
  # Checks of every pointer: a third of the compiler's time, and most of what they would find AddressSanitizer finds.
  fewer=-fno-sanitize=null,alignment,object-size,pointer-overflow
  # Kernels against the reference, damaged files, threads within threads; one way over the largest lattices.
  set -- "$root"/tests/test_{kernels,threads}.py "$root/tests/test_fuzz.py::test_damaged_files" -n 2 --max-worker-restart=2 \
    -k "leapfrog-13 or not (10240 or 1200)" "$@"
fi
case $kind in
  address) libraries="libasan.so" ;;
  undefined) libraries="libubsan.so" ;;
  address,undefined) libraries="libasan.so libubsan.so" ;;
  thread) libraries="libtsan.so" ;;
  *) echo "sanitize.sh: $kind is none of address, undefined, address,undefined, thread, quick" >&2; exit 2 ;;
esac
preload=
for library in $libraries libstdc++.so; do
  path=$(gcc -print-file-name=$library)
  case $path in
    */*) preload+=$path: ;;
    *) echo "sanitize.sh: no $library here: NOTHING WAS CHECKED" >&2; exit 77 ;;
  esac
done
build=${BUILD:-$root/build/sanitize-${kind/,/-}${quick:+-quick}}
# LFQ_PLAIN_INLINE: most of an unoptimized compiler's time would go into forced inlining.
bindings=(-DLFQ_PYTHON=OFF)
[ -n "$quick" ] || bindings=("-DPython_EXECUTABLE=$python" "-Dpybind11_DIR=$("$python" -m pybind11 --cmakedir)")
cmake -S "$root" -B "$build" -DCMAKE_BUILD_TYPE=None "-DLFQ_OPTIMIZE=${OPTIMIZE:--O0}" "-DLFQ_ISAS=${LFQ_ISAS:-v3}" \
  -DLFQ_CUDA=OFF "-DCMAKE_CXX_FLAGS=-DLFQ_PLAIN_INLINE -fsanitize=$kind $fewer -fno-omit-frame-pointer -g1" "${bindings[@]}"
cmake --build "$build" --parallel "${JOBS:-2}"
[ -z "$quick" ] || cp "$(cd / && "$python" -c 'import lfq._core; print(lfq._core.__file__)')" "$build"
# A package of its own, so that the sources' one keeps its libraries. Removed first: another run may have them loaded.
mkdir -p "$build/package/lfq"
cp --remove-destination "$root"/lfq/*.{py,pyi,toml,cc} "$build/package/lfq/"
if [ -n "$quick" ]; then
  cp --remove-destination "$build"/_core*.so "$build"/liblfq.so "$build/package/lfq/"
  mkdir -p "$build/package/lfq/include" && cp -r "$root/csrc/include/lfq" "$build/package/lfq/include/"
else
  rm -f "$build"/package/lfq/*.so
  cmake --install "$build" --prefix "$build/package" >/dev/null
fi
if [ $# -eq 0 ]; then
  # Left out: tests that look at the symbols of a plain build, or bound the memory of a process.
  set -- -k "not symbol and not resident and not templates_come_from and not instruction_set_is_compiled"
  set -- "$root/tests" "$@"
  [ "$kind" != thread ] || set -- "$root/tests/test_threads.py"
fi
# Not the sources: their package would be found first.
cd "$build"
# Leaks are Python's own. Interceptors see the whole process, but only lfq is instrumented. Reports go to files, since
# pytest would swallow those that end its process, and so that one of a child process counts too.
rm -f report.*
to="log_path=$build/report"
status=0
PYTHONPATH=$build/package:${PYTHONPATH:-} LD_PRELOAD=$preload NUMBA_CACHE_DIR=$build/numba \
  ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1:$to UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1:$to \
  TSAN_OPTIONS=halt_on_error=1:report_signal_unsafe=0:$to \
  "$python" -m pytest -q -p no:cacheprovider "$@" || status=$?
for report in report.*; do
  [ -e "$report" ] || continue
  # Of the fibres that CUDA's threads are emulated with.
  grep -qv "doesn't fully support makecontext" "$report" || continue
  cat "$report" >&2
  [ $status -ne 0 ] || status=1
done
exit $status
