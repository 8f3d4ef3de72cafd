#!/usr/bin/env bash
# Runs one benchmark and prints a table with a peer or a physical limit beside each figure.
#
#   tests/bench/run.sh NAME [--runs N] [--json FILE] [benchmark's own flags; --help tells]
#
#   recovery    the same script under everstep and torchrun, SIGKILLed, interleaved
#   startup     `everstep run --standalone` of a trivial script beside torchrun's
#   capture     what Checkpointer.step() costs, in plain memcpys of the same bytes, two nodes
#   controller  heartbeats a second, decision p99, memory
#   pipeline    everstep.Pipeline beside torch.distributed.pipelining by hand; survivors of a loss and of a join
#   planner     templates for every number of nodes, which of them N nodes run, and plans after a loss
#   placement   copies of 1,024 nodes' state placed over four levels of failure domains, and what they survive
#   parity      parity of shards made and used, beside a memcpy of the same bytes
#   restore     a state from the node's own memory and from a peer's, and N nodes from one holder
#   rivals      one state saved and restored by Everstep and by others, each in an environment of its own
#   scenarios   nine things that happen to a checkpoint system, against Everstep and the same others
#   store       synced batches a second beside the disk's fsync rate
#   transfer    a slot from agent to agent beside iperf3 with as many streams
set -euo pipefail
cd "$(dirname "$0")/../.."
name=${1:-}
case $name in
  recovery | startup | capture | pipeline | restore | rivals | scenarios) shift; exec .venv/bin/python "tests/bench/$name.py" "$@" ;;
  controller | parity | placement | planner | store | transfer) shift; exec "build/release/tests/${name}_bench" "$@" ;;
  *) sed -n '2,18p' "$0" | sed 's/^# \{0,1\}//' >&2; [ -z "$name" ] || echo "error: no benchmark '$name'" >&2; exit 2 ;;
esac
