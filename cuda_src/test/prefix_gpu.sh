#!/bin/sh
# Builds the persistent prefix's check and time programs for Hopper, runs the check, then the times. Everything it makes is
# under the folder given (default build/prefix, of the current folder); may be started anywhere. Stops at the first
# program that fails; no wait inside the kernel lasts longer than 2 s.
#   sh test/prefix_gpu.sh [FOLDER] [build|check|time|all]
set -e
out=${1:-build/prefix}
what=${2:-all}
mkdir -p "$out"
out=$(cd "$out" && pwd)
cd "$(dirname "$0")/.."
flags="-std=c++20 -O3 -gencode=arch=compute_90a,code=sm_90a --expt-relaxed-constexpr -lineinfo -I."
jobs=""
for f in cuda/prefix/kernel.cu cuda/prefix/build.cc cuda/large/attention.cu cuda/large/attention_sm90.cu cuda/large/attention_tiles_sm90.cu cuda/large/attention_pairs_sm90.cu \
  cuda/large/linear.cu cuda/large/product_sm80.cu cuda/large/product_sm90.cu cuda/large/product_sm90_e4m3.cu \
  cuda/large/rows.cu cuda/large/tensor_map.cc test/prefix_check.cu test/prefix_time.cu; do
  o="$out/$(echo "$f" | tr / _).o"
  if [ ! -f "$o" ] || [ -n "$(find cuda ops test ./*.h -newer "$o" -name '*.[ch]*' | head -n 1)" ]; then
    (nvcc $flags -c "$f" -o "$o.new" && mv "$o.new" "$o") &
    jobs="$jobs $!"
  fi
done
for j in $jobs; do wait "$j"; done
link="nvcc -gencode=arch=compute_90a,code=sm_90a"
$link "$out"/cuda_prefix_*.o "$out/test_prefix_check.cu.o" -o "$out/prefix_check"
$link "$out"/cuda_prefix_*.o "$out"/cuda_large_*.o "$out/test_prefix_time.cu.o" -o "$out/prefix_time"
date
if [ "$what" = check ] || [ "$what" = all ]; then
  timeout 60 "$out/prefix_check" quick
  timeout 240 "$out/prefix_check"
fi
if [ "$what" = time ] || [ "$what" = all ]; then
  timeout 180 "$out/prefix_time" all
fi
date
