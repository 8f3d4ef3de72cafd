"""What a pipeline job tells its controller, on a real cluster: the ledger is whole after losses, a drain, a join and the
controller's death, and `everstep job plan` foretells what then happens.

    5 nodes --node killed--> 4 --controller killed and back--> 4 --one drains--> 3 --and comes back--> 4 --> end

Links are so slow that a step has time for one layer: who comes back gets its layers while the others train.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from cli_test import Shell, shell  # noqa: F401
from launch import wait_for

SCRIPT = Path(__file__).parent / "scripts/pipeline.py"


@pytest.fixture
def cluster(shell: Shell) -> Iterator[Shell]:  # noqa: F811
    shell.ok("cluster", "up", "--nodes", 5)
    (shell.work / "lines").mkdir()
    shell.env |= {"LINES": str(shell.work / "lines"), "OMP_NUM_THREADS": "1", "PAUSE": "0.004", "TOLD": "1", "LINK": "1e-5"}
    yield shell


def ledger(shell: Shell, *flags: str) -> dict:  # noqa: F811
    return json.loads(shell.run("job", "ledger", "pipe", *flags, "-o", "json").stdout or "{}")


def reach(shell: Shell, generation: int, more: int = 5) -> dict:  # noqa: F811
    """The ledger, once a generation from this one on has told `more` steps."""

    def there() -> dict:
        told = ledger(shell).get("ledger", {})
        runs = told.get("runs", [])
        newest = runs[-1] if runs else {}
        done = int(newest.get("end", 0)) - int(newest.get("first", 0))
        return told if int(newest.get("generation", 0)) >= generation and done >= more else {}

    try:
        return wait_for(f"{more} steps in generation {generation}", there, 90)
    except AssertionError as error:
        raise AssertionError(f"{error}\n{shell.run('job', 'ledger', 'pipe').stdout}\n{shell.told()}") from None


def test_the_ledger_is_whole_after_losses_a_drain_and_a_controller_kill(cluster: Shell) -> None:
    run = cluster.submit("pipe", "--nnodes", "2:5", script=SCRIPT)
    first = reach(cluster, 1)
    members = cluster.json("job", "show", "pipe")["members"]
    assert len(members) == 5
    # What would become of the plan, and what does.
    lost = members[2]
    foretold = cluster.json("job", "plan", "pipe", "--lose", lost)
    seats = [stage["node"] for p in foretold["pipelines"] for stage in p["stages"]]
    assert sorted(seats) == sorted(set(members) - {lost}) and foretold["seconds"] >= foretold["secondsBefore"]
    refused = cluster.run("job", "plan", "pipe", "--lose", "n77")
    assert refused.returncode == 3 and "its nodes: " in refused.stderr
    cluster.ok("cluster", "kill", "node", lost, "--for", "120s")
    reach(cluster, int(first["generation"]) + 1)
    after = cluster.json("job", "plan", "pipe")
    assert after["pipelines"] == foretold["pipelines"], "the ranks planned otherwise"
    # The controller is away for a while: what is told meanwhile is told when it is back.
    cluster.ok("cluster", "kill", "controller", "--for", "3s")
    before = time.monotonic()
    again = reach(cluster, int(first["generation"]) + 1, more=40)
    assert time.monotonic() - before < 80 and int(again["missing"]) == 0
    drained = next(node for node in members if node not in (lost, members[0]))
    cluster.ok("node", "drain", drained, "--reason", "drill")
    less = int(reach(cluster, int(again["generation"]) + 1)["generation"])
    cluster.ok("node", "undrain", drained)

    def runs() -> list[dict]:
        return [run for run in ledger(cluster)["ledger"]["runs"] if int(run["generation"]) > less]

    # Steps by the pipelines of the generation before, until its layers are there; then by the new plan's.
    filled, own = wait_for("steps by the new plan", lambda: len(runs()) == 2 and runs(), 60)
    assert {int(part["generation"]) for part in filled["parts"]} == {less} and not own.get("parts")
    assert int(filled["end"]) > int(filled["first"]) + 1
    (cluster.work / "lines/end").touch()
    assert run.wait(90) == 0, cluster.told()
    whole = cluster.run("job", "ledger", "pipe", "--verify")
    assert whole.returncode == 0 and "is in exactly once" in whole.stdout, whole.stdout + whole.stderr + cluster.told()
    told = ledger(cluster, "--verify")
    assert told["whole"] and told["state"] == "SUCCEEDED"
    # As many steps as the ranks say that they took, each once.
    steps = {json.loads(line)["step"] for file in (cluster.work / "lines").glob("*.jsonl")
             for line in file.read_text().splitlines()}
    assert steps == set(range(int(told["ledger"]["next"])))
    assert "NODE" in cluster.ok("job", "plan", "pipe", "--join", 2) and lost in whole.stdout


def test_a_job_of_another_kind_has_told_nothing(cluster: Shell) -> None:
    cluster.submit("train")
    for verb in (("ledger", "train", "--verify"), ("plan", "train")):
        said = cluster.run("job", *verb)
        assert said.returncode == 6 and "job train has told no" in said.stderr, said
