#!/usr/bin/env bash
# Sets up everything, builds, and runs the tests.
#
#   tests/run.sh                    setup, build, then every part below in its short form
#   tests/run.sh unit               C++ unit, data-driven and property tests
#   tests/run.sh sim [--seeds N] [--from S] [--bug NAME]
#                                   the simulator: N worlds from seed S on (20000 take some minutes)
#   tests/run.sh integration        real processes: keeper, agent, arena under SIGKILL
#   tests/run.sh e2e                real PyTorch: conformance with torchrun, recovery, CLI
#   tests/run.sh soak [--faults N]  N random real faults on a running job (200 take about half an hour)
#   tests/run.sh fuzz [--seconds N] libFuzzer on each parser (needs clang)
#   tests/run.sh asan | tsan        the same tests under AddressSanitizer with UBSan, under ThreadSanitizer
#   tests/run.sh lint [--since REF] [FOLDER ...]
#                                   formatting, clang-tidy, ruff, mypy. Sources that were clean are not looked at
#                                   again; --since looks only at what differs from a git commit
#
# Flags after the part go to its runner (pytest's -k, ctest's -R, ...).
set -euo pipefail
cd "$(dirname "$0")/.."
export CTEST_OUTPUT_ON_FAILURE=1
part=${1:-all}
[ $# -eq 0 ] || shift

say() { printf '\n#### %s\n' "$*"; }
python=.venv/bin/python

ran=() absent=()

# labelled PART LABELS [ctest flags]: the ctest entries with one of LABELS. A part without any is named at the end.
labelled() {
  local part=$1 labels=$2; shift 2
  if ctest --test-dir build/release -N -L "$labels" | grep -q '^Total Tests: 0$'; then
    absent+=("$part")
  else
    ctest --test-dir build/release -L "$labels" --no-tests=error "$@"
    ran+=("$part")
  fi
}
# pytests PART FOLDER [pytest flags]: the Python tests of FOLDER.
pytests() {
  local part=$1 folder=$2; shift 2
  if compgen -G "$folder/*_test.py" > /dev/null; then
    $python -m pytest -q "$folder" "$@"
    ran+=("$part")
  else
    absent+=("$part")
  fi
}
unit() { labelled unit,datadriven,property 'unit|datadriven|property' -j 2 "$@"; }
simulate() {
  [ -x build/release/tests/everstep_sim ] || { echo "error: no simulator in build/release/tests: run tests/run.sh once" >&2; exit 1; }
  build/release/tests/everstep_sim "$@"
}
integration() { labelled integration integration "$@"; }
e2e() { pytests e2e tests/e2e "$@"; }

sanitizer() {  # preset, ctest label pattern
  cmake --preset "$1" > /dev/null
  cmake --build --preset "$1"
  ctest --test-dir "build/$1" -L "$2" --no-tests=error -j 2
}

lint() {
  command -v clang-tidy-14 > /dev/null || { echo "error: lint needs clang-14 and clang-tidy-14: apt-get install clang-14 clang-tidy-14 clang-format-14" >&2; exit 1; }
  cmake --preset lint > /dev/null
  cmake --build --preset lint --target everstep_keeper_proto everstep_proto > /dev/null
  git ls-files '*.cc' '*.h' | xargs clang-format-14 --dry-run --Werror
  [ -x .venv/bin/ruff ] && [ -x .venv/bin/mypy ] || $python -m pip install -q --disable-pip-version-check ruff mypy
  .venv/bin/ruff check --quiet worker/python deploy tests
  .venv/bin/mypy worker/python/everstep
  $python tests/lint.py build/lint "$@"
  echo "lint: clean"
}

case $part in
  all)
    began=$SECONDS
    bash deploy/setup.sh
    say "unit, data-driven, property";  unit
    say "simulator (short; tests/run.sh sim --seeds 20000 is the long form)"
    labelled 'sim (short)' sim
    say "integration";                  integration
    say "end to end";                   e2e
    list() { local IFS=';'; echo "${*:-nothing}" | sed 's/;/; /g'; }
    say "ran in $((SECONDS - began)) s: $(list "${ran[@]}")"
    echo "no tests yet: $(list "${absent[@]}")"
    echo "not run here: soak; fuzz; asan; tsan; lint (each is tests/run.sh NAME)"
    ;;
  unit) unit "$@" ;;
  sim) if [ $# -eq 0 ]; then set -- --seeds 2000; fi; simulate "$@" ;;
  integration) integration "$@" ;;
  e2e) e2e "$@" ;;
  soak)
    [ -f tests/integration/soak.py ] || { echo "error: the soak (tests/integration/soak.py) is not written yet" >&2; exit 1; }
    exec $python tests/integration/soak.py "$@"
    ;;
  fuzz)
    [ -f tests/fuzz/run.sh ] || { echo "error: the fuzzers (tests/fuzz) are not written yet" >&2; exit 1; }
    exec tests/fuzz/run.sh "$@"
    ;;
  asan) sanitizer asan 'unit|datadriven|property|sim' ;;
  tsan) sanitizer tsan 'unit|datadriven|property' ;;
  lint) lint "$@" ;;
  -h | --help | help) sed -n '2,17p' "$0" | sed 's/^# \{0,1\}//' ;;
  *) echo "error: tests/run.sh has no part '$part'" >&2; sed -n '4,15p' "$0" | sed 's/^# \{0,1\}//' >&2; exit 2 ;;
esac
