#!/bin/sh
# Builds the check and time programs of the large kernels for Hopper and runs them: a quick check, times, the whole
# check in E4M3 and in bf16, sanitizers. Everything it makes is under the folder given (default build/fp8); run from
# cuda_src. Stops at the first program that fails; says little, the whole output is in FOLDER/*.log.
#   sh test/fp8_gpu.sh [FOLDER] [quick|time|check|sanitize|all]
# Programs that are in FOLDER already are not built again: remove them to do that.
set -e
out=${1:-build/fp8}
what=${2:-all}
mkdir -p "$out"
wants() { [ "$what" = all ] || [ "$what" = "$1" ]; }

if [ ! -x "$out/e4m3_check" ] || [ ! -x "$out/large_check" ] || [ ! -x "$out/large_time" ]; then
  flags="-std=c++20 -O3 -gencode=arch=compute_90a,code=sm_90a --expt-relaxed-constexpr -lineinfo -I."
  jobs=""
  for f in cuda/large/product_sm90_e4m3.cu cuda/large/product_sm90.cu cuda/large/attention_sm90.cu cuda/large/attention_tiles_sm90.cu cuda/large/attention_pairs_sm90.cu cuda/large/attention.cu \
    cuda/large/product_sm80.cu cuda/large/rows.cu cuda/large/linear.cu cuda/large/image_patches.cu \
    cuda/large/tensor_map.cc check/promote.cu check/e4m3_check.cu check/e4m3_others.cu check/large_check.cu \
    check/large_time.cu; do
    o="$out/$(echo "$f" | tr / _).o"
    (nvcc $flags -c "$f" -o "$o.new" && mv "$o.new" "$o") &
    jobs="$jobs $!"
  done
  for j in $jobs; do wait "$j"; done
  link="nvcc -gencode=arch=compute_90a,code=sm_90a"
  $link "$out"/cuda_large_*.o "$out/check_promote.cu.o" "$out"/check_e4m3_*.o -o "$out/e4m3_check"
  $link "$out"/cuda_large_*.o "$out/check_large_check.cu.o" -o "$out/large_check"
  $link "$out"/cuda_large_*.o "$out/check_promote.cu.o" "$out/check_large_time.cu.o" -o "$out/large_time"
fi
date

# Runs a program with a time limit and shows what failed, the table of errors by k and the last line.
run() {
  name=$1
  seconds=$2
  shift 2
  status=0
  timeout "$seconds" "$@" >"$out/$name.log" 2>&1 || status=$?
  grep -E '^FAIL|^error of sums| never |^ +[0-9]+ +[0-9.]+e|:[0-9]+: ' "$out/$name.log" | head -40 || true
  echo "$name: exit $status, $(grep -c '^ok' "$out/$name.log" || true) ok; $(tail -n 1 "$out/$name.log" | cut -c1-200)"
  return $status
}
# The same in eight processes, each an eighth of the cases.
run_parts() {
  name=$1
  seconds=$2
  program=$3
  jobs=""
  for i in 0 1 2 3 4 5 6 7; do
    run "$name.$i" "$seconds" "$program" "$i" 8 &
    jobs="$jobs $!"
  done
  for j in $jobs; do wait "$j"; done
}

if wants quick || wants check; then run quick 90 "$out/e4m3_check" quick; fi
if wants time; then
  run time 150 "$out/large_time"
  cat "$out/time.log"
fi
if wants check; then
  run_parts e4m3 180 "$out/e4m3_check"
  run_parts bf16 180 "$out/large_check"
fi
if wants sanitize; then
  for tool in memcheck initcheck synccheck racecheck; do
    status=0
    timeout 100 compute-sanitizer --tool $tool --error-exitcode 9 "$out/e4m3_check" quick >"$out/$tool.log" 2>&1 || status=$?
    echo "$tool: exit $status; $(grep -E 'not supported|ERROR SUMMARY|RACECHECK SUMMARY|failures' "$out/$tool.log" | tail -n 2 | tr '\n' ' ')"
    # a machine whose driver compute-sanitizer refuses is no failure of the kernels, nor is running out of time
    if grep -q 'not supported' "$out/$tool.log" || [ $status = 124 ]; then continue; fi
    [ $status = 0 ]
  done
fi
date
