#!/usr/bin/env bash
# Sets up everything, builds, and runs the tests.
#
#   tests/run.sh                    setup, build, then every part below in its short form
#   tests/run.sh unit               C++ unit, data-driven and property tests
#   tests/run.sh sim [--seeds N] [--from S] [--bug NAME]
#                                   the simulator: N worlds from seed S on (20000 take some minutes)
#   tests/run.sh integration        real processes: keeper, agent, arena under SIGKILL
#   tests/run.sh e2e                real PyTorch: conformance with torchrun, recovery, CLI
#   tests/run.sh soak [--faults N] [--job pipeline]
#                                   N random real faults on a running job of four nodes (1000 take about two hours), or on
#                                   an everstep.Pipeline on five
#   tests/run.sh kills [--seed S]   SIGKILL at every labelled point of the checkpoint plane, in real jobs; --list
#   tests/run.sh fuzz [--seconds N] [--only NAME]
#                                   libFuzzer on each parser (needs clang); 600 seconds each are the long form
#   tests/run.sh asan               all C++ tests, the programs they start, and whole jobs under faults, under
#                                   AddressSanitizer with UBSan
#   tests/run.sh tsan               under ThreadSanitizer what links no gRPC: data plane, keeper, cores, mailbox
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
integration() { labelled integration integration -j 2 "$@"; }
e2e() { pytests e2e tests/e2e "$@"; }

# sanitizer PRESET LABELS: builds with it, runs the ctest entries with one of LABELS, for asan also whole jobs under
# faults. Every instrumented process, those that tests start too, writes what is found to build/PRESET/reports; one
# finding there fails the part. Not instrumented: Python (workers, fork servers) and the libeverstep.so it loads, whose
# sources are tested by client_abi_test and capture_kill_test.
sanitizer() {
  local preset=$1 labels=$2 reports=$PWD/build/$1/reports failed=0 began=$SECONDS
  cmake --preset "$preset" > /dev/null
  cmake --build --preset "$preset"
  if [ "$preset" = asan ]; then  # Python loads the libeverstep.so of build/release
    cmake --preset release > /dev/null
    cmake --build --preset release
  fi
  say "$preset: built in $((SECONDS - began)) s"
  rm -rf "$reports"; mkdir -p "$reports"
  export ASAN_OPTIONS=log_path=$reports/found UBSAN_OPTIONS=log_path=$reports/found:print_stacktrace=1
  # capture_kill_test forks trainers, which start a thread, from a process that has some.
  export TSAN_OPTIONS=log_path=$reports/found:second_deadlock_stack=1:die_after_fork=0
  ctest --test-dir "build/$preset" -L "$labels" --no-tests=error -j 2 || failed=1
  if [ "$preset" = asan ]; then
    export EVERSTEP_PROGRAMS=$PWD/build/asan/bin
    $python -m pytest -q -p no:cacheprovider tests/e2e/run_test.py tests/e2e/nodes_test.py || failed=1
    $python tests/integration/soak.py --faults 12 || failed=1
  fi
  # A leak check that meets a thread on its way out says so in a file, too; that is no finding.
  if grep -lE 'ERROR: |runtime error: |WARNING: ThreadSanitizer' -r "$reports" > "$reports/../findings"; then
    failed=1
    xargs head -n 60 < "$reports/../findings"
  fi
  [ $failed -eq 0 ] || { echo "$preset: not clean, after $((SECONDS - began)) s; what the sanitizer found is in $reports" >&2; exit 1; }
  echo "$preset: clean, in $((SECONDS - began)) s"
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
    echo "not run here: soak; kills; fuzz; asan; tsan; lint (each is tests/run.sh NAME)"
    ;;
  unit) unit "$@" ;;
  sim) if [ $# -eq 0 ]; then set -- --seeds 2000; fi; simulate "$@" ;;
  integration) integration "$@" ;;
  e2e) e2e "$@" ;;
  soak)
    [ -f tests/integration/soak.py ] || { echo "error: the soak (tests/integration/soak.py) is not written yet" >&2; exit 1; }
    exec $python tests/integration/soak.py "$@"
    ;;
  kills) exec $python tests/integration/kills.py "$@" ;;
  fuzz)
    [ -f tests/fuzz/run.sh ] || { echo "error: the fuzzers (tests/fuzz) are not written yet" >&2; exit 1; }
    exec tests/fuzz/run.sh "$@"
    ;;
  asan) sanitizer asan 'unit|datadriven|property|sim|integration' ;;
  tsan) sanitizer tsan 'unit|datadriven|property|threads' ;;
  lint) lint "$@" ;;
  -h | --help | help) sed -n '2,23p' "$0" | sed 's/^# \{0,1\}//' ;;
  *) echo "error: tests/run.sh has no part '$part'" >&2; sed -n '4,21p' "$0" | sed 's/^# \{0,1\}//' >&2; exit 2 ;;
esac
