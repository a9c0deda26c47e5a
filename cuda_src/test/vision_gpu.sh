#!/bin/sh
# Builds the persistent vision encoder's check and time programs for Hopper, runs the check, then the times. Everything it makes is
# under the folder given (default build/vision, of the current folder); may be started anywhere. Stops at the first
# program that fails; no wait inside the kernel lasts longer than 2 s.
#   sh test/vision_gpu.sh [FOLDER] [build|check|time|all]
set -e
out=${1:-build/vision}
what=${2:-all}
mkdir -p "$out"
out=$(cd "$out" && pwd)
cd "$(dirname "$0")/.."
flags="-std=c++20 -O3 -gencode=arch=compute_90a,code=sm_90a --expt-relaxed-constexpr -lineinfo -I."
jobs=""
for f in cuda/vision/kernel.cu cuda/vision/build.cc cuda/large/attention.cu cuda/large/attention_sm90.cu \
  cuda/large/attention_pairs_sm90.cu cuda/large/attention_tiles_sm90.cu \
  cuda/large/linear.cu cuda/large/product_sm80.cu cuda/large/product_sm90.cu cuda/large/product_sm90_e4m3.cu \
  cuda/large/rows.cu cuda/large/tensor_map.cc test/vision_check.cu test/vision_time.cu; do
  o="$out/$(echo "$f" | tr / _).o"
  if [ ! -f "$o" ] || [ -n "$(find cuda ops test ./*.h -newer "$o" -name '*.[ch]*' | head -n 1)" ]; then
    (nvcc $flags -c "$f" -o "$o.new" && mv "$o.new" "$o") &
    jobs="$jobs $!"
  fi
done
for j in $jobs; do wait "$j"; done
link="nvcc -gencode=arch=compute_90a,code=sm_90a"
$link "$out"/cuda_vision_*.o "$out"/cuda_large_*.o "$out/test_vision_check.cu.o" -o "$out/vision_check"
$link "$out"/cuda_vision_*.o "$out"/cuda_large_*.o "$out/test_vision_time.cu.o" -o "$out/vision_time"
date
if [ "$what" = check ] || [ "$what" = all ]; then
  timeout 60 "$out/vision_check" quick
  timeout 240 "$out/vision_check"
fi
if [ "$what" = time ] || [ "$what" = all ]; then
  timeout 180 "$out/vision_time" all
fi
date
