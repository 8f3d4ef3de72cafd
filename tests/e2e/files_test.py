"""The file tier: everything dies and the job goes on from its checkpoint directory, to the last bit."""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from launch import PYTHON, ROOT, Run, clean_environment, wait_for

KEPT = Path(__file__).parent / "scripts" / "kept.py"
STEPS = 60


@pytest.fixture
def work() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="esf-", dir="/tmp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def start(work: Path, name: str, ckpt: Path, pace: float = 0.0, *flags: object) -> Run:
    env = {"PROGRESS": str(work / f"{name}.progress"), "STEPS": str(STEPS), "PACE": str(pace)}
    return Run(work, "--standalone", "--nproc-per-node", 2, "--name", "kept", "--ckpt-dir", ckpt, "--ckpt-every", "5steps",
               *flags, KEPT, name=name, env=env)


def losses(work: Path, name: str) -> dict[tuple[int, int], str]:
    file = work / f"{name}.progress"
    lines = [line.split() for line in file.read_text().splitlines()] if file.exists() else []
    return {(int(step), int(rank)): loss for step, rank, loss in lines}


def checkpoints(ckpt: Path) -> dict[int, Path]:
    """Complete ones by step."""
    return {int(p.parent.name[5:17]): p.parent for p in ckpt.glob("step-*/manifest.json") if not (p.parent / "damaged").exists()}


def killed_after(work: Path, ckpt: Path, step: int) -> Run:
    """A run of which nothing is left but its checkpoint directory, which has `step`."""
    first = start(work, "first", ckpt, 0.1, "--ckpt-keep", 0)
    wait_for(f"step {step} in {ckpt}", lambda: max(checkpoints(ckpt), default=-1) >= step, 120)
    first.stop()
    return first


@pytest.fixture(scope="module")
def undisturbed() -> Iterator[dict[tuple[int, int], str]]:
    folder = Path(tempfile.mkdtemp(prefix="esf-", dir="/tmp"))
    run = start(folder, "whole", folder / "ckpt")
    assert run.wait(180) == 0, run.told()
    told = losses(folder, "whole")
    # Its last breath: the final step is in the directory, and of the older ones the newest are.
    assert max(checkpoints(folder / "ckpt")) == STEPS - 1
    assert len(checkpoints(folder / "ckpt")) == 3
    shutil.rmtree(folder)
    assert len(told) == 2 * STEPS
    yield told


def test_after_everything_died_the_job_goes_on_from_its_files_with_equal_bits(work: Path, undisturbed: dict) -> None:
    ckpt = work / "ckpt"
    killed_after(work, ckpt, 10)
    newest = max(checkpoints(ckpt))
    again = start(work, "again", ckpt)
    assert again.wait(180) == 0, again.told()
    told = losses(work, "again")
    assert min(step for step, _ in told) == newest + 1, again.told()
    assert told == {key: loss for key, loss in undisturbed.items() if key[0] > newest}
    again.assert_nothing_left()


def test_a_flipped_byte_is_named_and_an_older_checkpoint_is_taken(work: Path, undisturbed: dict) -> None:
    ckpt = work / "ckpt"
    killed_after(work, ckpt, 15)
    steps = sorted(checkpoints(ckpt), reverse=True)
    file = checkpoints(ckpt)[steps[0]] / "rank-00001-of-00002.safetensors"
    with file.open("r+b") as f:
        f.seek(-100, 2)
        byte = f.read(1)
        f.seek(-100, 2)
        f.write(bytes([byte[0] ^ 1]))
    again = start(work, "again", ckpt)
    assert again.wait(180) == 0, again.told()
    told = losses(work, "again")
    assert min(step for step, _ in told) == steps[1] + 1, again.told()
    assert told == {key: loss for key, loss in undisturbed.items() if key[0] > steps[1]}


def test_the_files_load_with_the_stock_package_and_hold_no_pickle(work: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    ckpt = work / "ckpt"
    killed_after(work, ckpt, 5)
    folder = checkpoints(ckpt)[max(checkpoints(ckpt))]
    for file in folder.glob("*.safetensors"):
        state = safetensors.load_file(file)
        assert state["model.0.weight"].shape == (64, 16)
        assert state["optimizer.state.0.exp_avg"].dtype == torch.float32
        assert "__rng__.torch" in state
    export = [str(PYTHON), "-m", "everstep.export", str(folder)]
    for form in ("safetensors", "dcp"):
        done = subprocess.run([*export, str(work / form), "--format", form], env=clean_environment(), capture_output=True,
                              text=True, timeout=120, check=False, cwd=ROOT)
        assert done.returncode == 0, done.stderr
    model = safetensors.load_file(work / "safetensors/model.safetensors")
    assert set(model) == {"0.weight", "0.bias", "3.weight", "3.bias"}
    assert json.loads((work / "safetensors/state.json").read_text())["history"]["names"] == ["a", 1.5]
    import torch.distributed.checkpoint as dcp

    target = {"model": {"0.weight": torch.zeros(64, 16), "3.bias": torch.zeros(1)}}
    dcp.load(target, checkpoint_id=str(work / "dcp"), no_dist=True)
    assert torch.equal(target["model"]["0.weight"], model["0.weight"])
