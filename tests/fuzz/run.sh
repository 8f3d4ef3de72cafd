#!/usr/bin/env bash
# Builds the fuzzers (clang's libFuzzer with AddressSanitizer) and runs each for some seconds.
#
#   tests/fuzz/run.sh [--seconds N] [--only NAME]      default 60 seconds each
#
# A finding ends with exit 1; its input is left in build/fuzz/findings and the command that replays it is printed.
# Corpora grow in build/fuzz/corpus/NAME; tests/fuzz/seeds/NAME, where there is one, is what they start from.
set -euo pipefail
cd "$(dirname "$0")/../.."
seconds=60 only=
while [ $# -gt 0 ]; do
  case $1 in
    --seconds) seconds=${2:?--seconds wants a number}; shift 2 ;;
    --only) only=${2:?--only wants a name}; shift 2 ;;
    *) echo "error: unknown argument '$1'; see the head of tests/fuzz/run.sh" >&2; exit 2 ;;
  esac
done
command -v clang++-14 > /dev/null && compgen -G '/usr/lib/llvm-14/lib/clang/*/lib/linux/libclang_rt.fuzzer-*.a' > /dev/null || {
  echo "error: the fuzzers need clang 14 with its runtimes: apt-get install clang-14 libclang-rt-14-dev libfuzzer-14-dev" >&2
  exit 1
}
cmake --preset fuzz > /dev/null
cmake --build --preset fuzz --target everstep_fuzzers
mkdir -p build/fuzz/findings
ran=0
for program in build/fuzz/fuzz/*; do
  [ -x "$program" ] || continue
  name=$(basename "$program")
  [ -z "$only" ] || [ "$only" = "$name" ] || continue
  corpus=build/fuzz/corpus/$name
  mkdir -p "$corpus"
  seeds=(); [ ! -d "tests/fuzz/seeds/$name" ] || seeds=("tests/fuzz/seeds/$name")
  echo "== $name, $seconds s"
  if ! "$program" -max_total_time="$seconds" -timeout=10 -rss_limit_mb=2048 -max_len=16384 -print_final_stats=1 \
       -artifact_prefix=build/fuzz/findings/"$name"- "$corpus" "${seeds[@]}" > "build/fuzz/$name.log" 2>&1; then
    tail -40 "build/fuzz/$name.log"
    finding=$(ls -t build/fuzz/findings/"$name"-* | head -1)
    echo "error: $name found something; again: $program $finding" >&2
    exit 1
  fi
  grep -E 'number_of_executed_units|average_exec_per_sec' "build/fuzz/$name.log" | sed 's/^/   /'
  ran=$((ran + 1))
done
[ "$ran" -gt 0 ] || { echo "error: no fuzzer is called '$only'" >&2; exit 2; }
echo "fuzz: $ran fuzzers, nothing found"
