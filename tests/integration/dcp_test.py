"""everstep.dcp under stock dcp.save and dcp.load: a real arena (everstep_arena_host holds it), and folders of files."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import everstep
import pytest
import torch
import torch.distributed.checkpoint as dcp
from checkpointer_test import BUILD, Node, inside, node, outside, same  # noqa: F401
from everstep.dcp import Found, Stager, StorageReader, StorageWriter, _arena, _plans
from torch import nn

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled", "ignore:everstep")
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
          torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.complex64, torch.complex128, torch.int64, torch.int8,
          torch.uint8, torch.uint16, torch.uint64, torch.bool]


@pytest.fixture(autouse=True)
def detached() -> Iterator[None]:
    yield
    _arena.close()
    _plans._tables.clear()
    _plans._plans.clear()


def tensor_of(dtype: torch.dtype) -> torch.Tensor:
    raw = torch.randint(0, 2 if dtype == torch.bool else 100, (6 * dtype.itemsize,), dtype=torch.uint8)
    return raw.view(dtype).reshape(2, 3)


def everything(seed: int = 0) -> dict[str, Any]:
    torch.manual_seed(seed)
    weight = torch.rand(4, 3)
    return {"model": {"w": weight, "tied": weight, "across": torch.rand(5, 7).t(), "empty": torch.empty(0, 3),
                      "scalar": torch.tensor(2.5), **{str(d): tensor_of(d) for d in DTYPES}},
            "plain": {"step": 3, "big": 1 << 80, "nan": math.nan, "inf": -math.inf, "text": "é\n", "none": None,
                      "bytes": b"\0\xff", "tuple": (1, (2.5, True)), "complex": 1j, "dtype": torch.bfloat16},
            "list": [torch.arange(3), {"deep": torch.ones(2)}, 7]}


def blank(value: Any) -> Any:
    """The same shapes with nothing in them."""
    if isinstance(value, torch.Tensor):
        return torch.zeros_like(value)
    if isinstance(value, dict):
        return {k: blank(v) for k, v in value.items()}
    if type(value) is list:
        return [blank(v) for v in value]
    return None


def save(state: dict[str, Any], id_: str | Path | None, writer: StorageWriter | None = None, **how: Any) -> None:
    dcp.save(state, checkpoint_id=id_, storage_writer=writer or StorageWriter(), **how)


def begin(node: Node, monkeypatch: pytest.MonkeyPatch, generation: int = 1, step: int = -1) -> None:  # noqa: F811
    _arena.close()
    node.say(f"activate {generation} 1 {step} 0")
    inside(monkeypatch, node, generation)


# --- in the node's memory ---


def test_stock_save_and_load_keep_everything_in_memory(node: Node, monkeypatch: pytest.MonkeyPatch,  # noqa: F811
                                                       tmp_path: Path) -> None:
    begin(node, monkeypatch)
    assert StorageReader().newest() is None
    save(everything(1), "ckpt/step-5")
    save(everything(2), "ckpt/step-8")
    assert node.steps() == [5, 8]
    begin(node, monkeypatch, 2, 8)
    assert StorageReader().newest() == Found("ckpt/step-8", 8, "memory")
    assert StorageReader("ckpt").newest() == StorageReader("ckpt/step-8/").newest()
    back = blank(everything())
    dcp.load(back, storage_reader=StorageReader("ckpt"))
    assert same(back, everything(2))
    assert not (tmp_path / "ckpt").exists() and not Path("ckpt").exists()


def test_an_older_save_is_loaded_by_its_id_while_memory_has_it(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    begin(node, monkeypatch)
    for n in (1, 2, 3):
        save({"x": torch.full((2,), float(n))}, f"run/{n}")
    for n in (3, 2):
        back = {"x": torch.zeros(2)}
        dcp.load(back, checkpoint_id=f"run/{n}", storage_reader=StorageReader())
        assert back["x"].tolist() == [n, n]
    with pytest.raises(dcp.api.CheckpointException, match=r"memory has step 3, 'run/3', and step 2, 'run/2'"):
        dcp.load({"x": torch.zeros(2)}, checkpoint_id="run/1", storage_reader=StorageReader())


def test_saves_without_a_number_are_counted_on(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    begin(node, monkeypatch)
    writer = StorageWriter("latest")
    for _ in range(3):
        dcp.save({"x": torch.ones(1)}, storage_writer=writer)
    assert node.steps() == [1, 2]
    begin(node, monkeypatch, 2, 2)
    save({"x": torch.ones(1)}, "latest")
    save({"x": torch.ones(1)}, "step-1")  # behind what was saved: still a newer save
    assert node.steps() == [3, 4]


def test_async_save_stages_by_the_writer(node: Node, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:  # noqa: F811
    import torch.distributed as dist

    begin(node, monkeypatch)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        writer = StorageWriter()
        weight = torch.zeros(300, 1000)
        for n in range(1, 4):
            weight.fill_(n)
            future = dcp.async_save({"w": weight, "n": n}, checkpoint_id=f"a/{n}", storage_writer=writer)
            weight.fill_(-1)  # training goes on
            assert future.result() is not None
            back: dict[str, Any] = {"w": torch.zeros_like(weight), "n": 0}
            dcp.load(back, storage_reader=StorageReader())
            assert (back["w"] == n).all() and back["n"] == n
        assert len(writer._pools) == 1, "its memory is used again"
        with pytest.raises(TypeError, match="AsyncCheckpointerType.THREAD"):
            writer.__getstate__()
    finally:
        dist.destroy_process_group()


def test_two_kinds_of_state_in_one_arena_are_refused_by_name(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    begin(node, monkeypatch)
    save({"x": torch.ones(1)}, "c/1")
    with pytest.raises(RuntimeError, match=r"keeps its state by everstep\.dcp already"):
        everstep.Checkpointer({"x": torch.ones(1)})
    begin(node, monkeypatch, 2, 1)
    with everstep.Checkpointer({"x": torch.ones(1)}) as ck:
        with pytest.raises(RuntimeError, match=r"holds what everstep\.dcp saved"):
            ck.restore()
        assert ck.step(2)
    begin(node, monkeypatch, 3, 2)
    with pytest.raises(RuntimeError, match="what a Checkpointer captured"):
        StorageReader().newest()


def test_ranks_that_save_alone_are_told(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    node.say("activate 1 2 -1 0 1")
    inside(monkeypatch, node, 1, 0, 2)
    with pytest.raises(dcp.api.CheckpointException, match="1 of the job's 2 ranks save"):
        save({"x": torch.ones(1)}, "c/1")


# --- as files ---


def test_files_hold_everything_and_no_pickle(tmp_path: Path) -> None:
    folder = tmp_path / "step-12"
    save(everything(4), folder)
    assert sorted(p.name for p in folder.iterdir()) == ["manifest.json", "rank-00000-of-00001.safetensors"]
    back = blank(everything())
    reader = StorageReader(tmp_path)
    assert reader.newest() == Found(str(folder), 12, "files")
    dcp.load(back, storage_reader=reader)
    assert same(back, everything(4))
    data = (folder / "rank-00000-of-00001.safetensors").read_bytes()
    assert b"\x80\x02" not in data and b"PK\x03\x04" not in data


def test_a_folder_is_saved_into_again_and_is_whole_at_any_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "latest"
    for n in range(3):
        save({"x": torch.full((2,), float(n))}, folder)
        assert len(list(folder.iterdir())) == 2
    real, calls = os.fsync, [0]

    def full(fd: int) -> None:
        calls[0] += 1
        if calls[0] > 2:  # the rank's file and its folder; then the manifest
            raise OSError(28, "No space left on device")
        real(fd)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(dcp.api.CheckpointException, match="No space left"):
            save({"x": torch.full((2,), 9.0)}, folder)
    back = {"x": torch.zeros(2)}
    dcp.load(back, checkpoint_id=folder, storage_reader=StorageReader())
    assert back["x"].tolist() == [2, 2]


@pytest.mark.parametrize("where", ["tensor", "head", "manifest", "cut"])
def test_a_damaged_file_is_named_and_not_loaded(tmp_path: Path, where: str) -> None:
    for n in (1, 2):
        save({"x": torch.full((5000,), float(n)), "n": n}, tmp_path / f"step-{n}")
    file = tmp_path / "step-2" / ("manifest.json" if where == "manifest" else "rank-00000-of-00001.safetensors")
    data = bytearray(file.read_bytes())
    if where == "cut":
        del data[-1:]
    else:
        data[{"tensor": len(data) - 100, "head": 300, "manifest": 150}[where]] ^= 1
    file.write_bytes(data)
    back = {"x": torch.zeros(5000), "n": 0}
    told = {"tensor": "tensor x has CRC", "head": "fails its checksum", "manifest": "checksum is wrong", "cut": "written were"}
    with pytest.raises(dcp.api.CheckpointException, match=told[where]):
        dcp.load(back, checkpoint_id=tmp_path / "step-2", storage_reader=StorageReader())
    assert not back["x"].any()
    if where == "manifest":  # of several the newest that is one
        dcp.load(back, storage_reader=StorageReader(tmp_path))
        assert back["n"] == 1


def test_everstep_reads_verifies_and_exports_the_folder(tmp_path: Path) -> None:
    name = "step-000000000007.gen-0"
    save(everything(5), tmp_path / "dir" / name)
    cli = BUILD / "bin/everstep"
    verified = subprocess.run([cli, "ckpt", "verify", tmp_path / "dir"], capture_output=True, text=True)
    assert verified.returncode == 0, verified.stdout + verified.stderr
    assert "good" in verified.stdout or "whole" in verified.stdout or name in verified.stdout, verified.stdout
    from everstep.export import main

    assert main([str(tmp_path / "dir" / name), str(tmp_path / "stock"), "--format", "dcp"]) == 0
    back = blank(everything())
    dcp.load(back, checkpoint_id=tmp_path / "stock")  # as anybody would
    assert same(back, everything(5))


def test_other_tools_load_its_tensors(tmp_path: Path) -> None:
    save({"m": {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(3, dtype=torch.bfloat16)}}, tmp_path / "x")
    raw = (tmp_path / "x/rank-00000-of-00001.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:8 + length])
    a = header["m.a"]
    assert a["dtype"] == "F32" and a["shape"] == [2, 3] and header["m.b"]["dtype"] == "BF16"
    begin_, end = a["data_offsets"]
    assert torch.frombuffer(bytearray(raw[8 + length + begin_:8 + length + end]), dtype=torch.float32).tolist() == list(range(6))


# --- what is refused, and what a load checks ---


class Thing:
    """Nothing a checkpoint could keep."""


@pytest.mark.parametrize(("value", "told"), [
    (Thing(), r"bad\.inner: cannot checkpoint an object of type .*Thing"),
    ({1, 2}, r"bad\.inner: cannot checkpoint an object of type set"),
    ([1, {2}], r"bad\.inner.*: cannot checkpoint an object of type set"),
    (torch.zeros(2).to_sparse(), r"bad\.inner: cannot checkpoint a Tensor of layout torch\.sparse_coo"),
    (torch.zeros(2, device="meta"), r"bad\.inner: cannot checkpoint .* on meta"),
])
def test_what_cannot_be_kept_is_refused_by_its_name(tmp_path: Path, value: Any, told: str) -> None:
    with pytest.raises(dcp.api.CheckpointException, match=told):
        save({"ok": torch.ones(2), "bad": {"inner": value}}, tmp_path / "s")
    assert StorageReader(tmp_path).newest() is None


def test_a_planner_that_pickles_by_itself_is_refused(tmp_path: Path) -> None:
    class Own(dcp.DefaultSavePlanner):
        def transform_object(self, write_item: Any, object: Any) -> Any:
            return super().transform_object(write_item, object)

    with pytest.raises(dcp.api.CheckpointException, match="n: the planner Own makes bytes of its own"):
        save({"n": 1}, tmp_path / "s", planner=Own())


def test_plan_caching_and_a_state_that_grows(tmp_path: Path) -> None:
    planner = dcp.DefaultSavePlanner(enable_plan_caching=True)
    writer = StorageWriter()
    state: dict[str, Any] = {"x": torch.ones(2)}
    try:
        for n in range(4):
            state["x"].fill_(n)
            if n == 2:
                state["y"] = torch.ones(3)
            save(state, tmp_path / str(n), writer, planner=planner)
            back = blank(state)
            dcp.load(back, checkpoint_id=tmp_path / str(n), storage_reader=StorageReader())
            assert same(back, state)
    finally:
        for cache in ("_cached_save_plan", "_cached_final_save_plan", "_cached_all_plans", "_cached_global_plan", "_cached_metadata"):
            getattr(dcp.planner.SavePlanner, cache, {}).clear()


def test_a_key_that_is_not_there_and_another_shape(tmp_path: Path) -> None:
    save({"x": torch.ones(2)}, tmp_path / "s")
    with pytest.raises(dcp.api.CheckpointException, match="Missing key in checkpoint state_dict: y"):
        dcp.load({"y": torch.ones(2)}, checkpoint_id=tmp_path / "s", storage_reader=StorageReader())
    with pytest.raises(dcp.api.CheckpointException, match="Size mismatch"):
        dcp.load({"x": torch.ones(3)}, checkpoint_id=tmp_path / "s", storage_reader=StorageReader())
    part = {"x": torch.zeros(2), "y": torch.full((1,), 5.0)}
    dcp.load(part, checkpoint_id=tmp_path / "s", storage_reader=StorageReader(),
             planner=dcp.DefaultLoadPlanner(allow_partial_load=True))
    assert part["x"].tolist() == [1, 1] and part["y"].item() == 5


def test_without_launcher_and_folder_it_says_what_to_do() -> None:
    with pytest.raises(dcp.api.CheckpointException, match="give dcp.save a checkpoint_id or StorageWriter a path"):
        dcp.save({"x": torch.ones(1)}, storage_writer=StorageWriter())
    with pytest.raises(dcp.api.CheckpointException, match="not started by `everstep run`, and no folder was named"):
        dcp.load({"x": torch.ones(1)}, storage_reader=StorageReader())


# --- staging ---


def test_a_stage_is_a_copy_in_memory_that_is_used_again() -> None:
    from torch.distributed.checkpoint.staging import AsyncStager

    stager = Stager()
    assert isinstance(stager, AsyncStager) and isinstance(StorageWriter(), AsyncStager)
    state = everything(6)
    expected = everything(6)
    staged = stager.stage(state)
    assert same(staged, expected) and staged["model"]["tied"] is staged["model"]["w"]
    state["model"]["w"].zero_()
    assert same(staged, expected)
    first = staged["model"]["w"].data_ptr()
    other = stager.stage(state)  # the first is still held
    assert other["model"]["w"].data_ptr() != first and not other["model"]["w"].any()
    assert same(staged, expected)
    del staged
    assert stager.stage(state)["model"]["w"].data_ptr() == first
    assert len(stager._pools) == 2


def test_modules_given_whole_are_asked_for_their_state(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    dcp.save({"model": model}, checkpoint_id=tmp_path / "s", storage_writer=StorageWriter())
    other = nn.Linear(3, 2)
    dcp.load({"model": other}, checkpoint_id=tmp_path / "s", storage_reader=StorageReader())
    assert torch.equal(other.weight, model.weight) and torch.equal(other.bias, model.bias)


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
