#!/bin/sh
# Builds the native kernels with AddressSanitizer and UBSan in a directory of their own and runs what tests them.
set -eu
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
build=build/sanitize
cmake -S . -B "$build" -DCMAKE_BUILD_TYPE=Release -DKVBUDGET_SANITIZE=ON -DPython_EXECUTABLE="$(command -v "$python")" \
  -Dnanobind_DIR="$("$python" -m nanobind --cmake_dir)"
cmake --build "$build" --parallel
# The interpreter itself is not instrumented: its leaks are not ours, and the runtime has to be loaded before it.
PYTHONPATH="$PWD/src" KVBUDGET_NATIVE_DIR="$PWD/$build" ASAN_OPTIONS=detect_leaks=0 OMP_NUM_THREADS=2 \
  LD_PRELOAD="$(c++ -print-file-name=libasan.so) $(c++ -print-file-name=libubsan.so)" \
  "$python" -m pytest tests/kernels tests/segments -q -p no:cacheprovider
