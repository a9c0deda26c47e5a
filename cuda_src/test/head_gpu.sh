#!/bin/sh
# Builds the persistent head's check and time programs for Hopper, runs the check, then the times. Everything it makes is
# under the folder given (default build/head, of the current folder); may be started anywhere. Stops at the first
# program that fails; no wait inside the kernel lasts longer than 2 s.
#   sh test/head_gpu.sh [FOLDER] [build|check|time|all]
set -e
out=${1:-build/head}
what=${2:-all}
mkdir -p "$out"
out=$(cd "$out" && pwd)
cd "$(dirname "$0")/.."
flags="-std=c++20 -O3 -gencode=arch=compute_90a,code=sm_90a --expt-relaxed-constexpr -lineinfo -I."
jobs=""
for f in cuda/head/kernel.cu cuda/head/build.cc \
  cuda/small/pack.cu cuda/small/linear.cu cuda/small/rotate.cu cuda/small/product_sm90.cu cuda/small/product.cu \
  cuda/small/attention.cu cuda/large/tensor_map.cc test/head_check.cu test/head_persist_time.cu; do
  o="$out/$(echo "$f" | tr / _).o"
  if [ ! -f "$o" ] || [ -n "$(find cuda ops test ./*.h -newer "$o" -name '*.[ch]*' | head -n 1)" ]; then
    (nvcc $flags -c "$f" -o "$o.new" && mv "$o.new" "$o") &
    jobs="$jobs $!"
  fi
done
for j in $jobs; do wait "$j"; done
head=""
for o in "$out"/cuda_head_*.o; do head="$head $o"; done
link="nvcc -gencode=arch=compute_90a,code=sm_90a"
$link $head "$out/test_head_check.cu.o" -o "$out/head_check"
$link $head "$out"/cuda_small_*.o "$out/cuda_large_tensor_map.cc.o" "$out/test_head_persist_time.cu.o" \
  -o "$out/head_persist_time"
date
if [ "$what" = check ] || [ "$what" = all ]; then
  timeout 60 "$out/head_check" quick
  timeout 240 "$out/head_check"
fi
if [ "$what" = time ] || [ "$what" = all ]; then
  timeout 120 "$out/head_persist_time" all smolvla
  timeout 180 "$out/head_persist_time" all pi
fi
date
