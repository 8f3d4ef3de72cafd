"""everstep.Pipeline in fixed worlds: what is trained does not depend on the layout.

    1 rank, plain loop   ==   1 pipeline of 3   ==   3 + 2 side by side   ==   6 x 1        (deterministic: the same bits)

Worlds are forks of this process (worlds.py); layouts are forced by profiles whose nodes have little memory.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from everstep.pipeline import Pipeline, _agree, _ledger
from torch import nn
from worlds import RankError, world

WIDTH, SAMPLES, STEPS = 24, 96, 5


class Noisy(nn.Module):
    """With dropout, so that random streams matter."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)
        self.drop = nn.Dropout(0.2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.drop(torch.tanh(self.inner(x)))


LAYERS: list[Callable[[], nn.Module]] = [lambda: nn.Linear(8, WIDTH), Noisy, Noisy, nn.Tanh, Noisy,
                                         lambda: nn.Linear(WIDTH, 3)]
PARAMETERS = [8 * WIDTH + WIDTH, *[WIDTH * WIDTH + WIDTH] * 2, 0, WIDTH * WIDTH + WIDTH, 3 * WIDTH + 3]


def profile(least_nodes: int, parameters: list[int] = PARAMETERS) -> str:
    """Of layers that weigh the same; a node holds the model (1) or nearly (2: pipelines have two stages or more)."""
    rows = "".join(f"{i},1,2,0.1,1,0.1,{count}\n" for i, count in enumerate(parameters))
    most = {1: 0, 2: len(parameters) - 0.5, 9: 1}[least_nodes]
    return (f"everstep-profile 1\nmodel = toy\ndevice-memory-mib = {most}\nlayer,forward_ms,backward_ms,optimizer_ms,"
            f"activation_mib,output_mib,parameters\n{rows}")


class Data(torch.utils.data.Dataset[Any]):
    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(5)
        self.x = torch.randn(SAMPLES, 8, generator=generator)
        self.y = torch.randn(SAMPLES, 3, generator=generator)

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.x[i], self.y[i]


def adamw(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-2)


def train(rank: int, steps: int = STEPS, **options: Any) -> dict[str, Any]:
    """Losses, checksums of the layers this rank holds, and the plan."""
    options = {"layers": LAYERS, "loss": nn.functional.mse_loss, "optimizer": adamw, "dataset": Data(), "batch": 24,
               "microbatch": 4, "faults": 0} | options
    losses: list[float] = []
    on_step = options.pop("on_step", lambda report: losses.append(report.loss))
    save = options.pop("save", None)
    pipeline = Pipeline(options.pop("layers"), **options)
    pipeline.run(steps, on_step=on_step, save=save)
    return {"losses": losses, "plan": pipeline.plan,
            "layers": {i: {n: t.clone() for n, t in m.state_dict().items()} for i, m in pipeline.layers.items()}}


def weights(results: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Of the whole model. Every holder of a layer must have the same bits."""
    out: dict[str, torch.Tensor] = {}
    for result in results:
        assert result["losses"] == results[0]["losses"]
        for index, state in result["layers"].items():
            for name, value in state.items():
                if f"{index}.{name}" in out:
                    assert torch.equal(out[f"{index}.{name}"], value), f"holders of layer {index} differ in {name}"
                out[f"{index}.{name}"] = value
    return out


@functools.lru_cache(maxsize=1)
def alone() -> tuple[dict[str, torch.Tensor], list[float]]:
    results = world(1, lambda rank: train(rank, deterministic=True, profile=profile(1)))
    return weights(results), results[0]["losses"]


@pytest.mark.parametrize(("size", "least"), [(3, 2), (5, 2), (6, 1)])
def test_every_layout_gives_the_same_bits(size: int, least: int) -> None:
    results = world(size, lambda rank: train(rank, deterministic=True, profile=profile(least)))
    expected, losses = alone()
    got = weights(results)
    assert results[0]["losses"] == losses
    assert got.keys() == expected.keys()
    for name, value in got.items():
        assert torch.equal(value, expected[name]), name


def test_it_trains_as_a_plain_loop_does() -> None:
    """Without dropout, against a loop of six lines."""
    layers = [LAYERS[0], nn.Tanh, lambda: nn.Linear(WIDTH, WIDTH), LAYERS[-1]]
    sizes = [PARAMETERS[0], 0, WIDTH * WIDTH + WIDTH, PARAMETERS[-1]]
    data = Data()

    def work(rank: int) -> dict[str, Any]:
        return train(rank, layers=layers, profile=profile(2, sizes), clip=0.5, microbatch=3,
                     scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5))

    got = world(4, work)

    def plain(rank: int) -> dict[str, Any]:
        from everstep import _samples
        from everstep.pipeline._layer import Recipe

        recipe = Recipe(layers, adamw, None, 0)
        model = nn.Sequential(*[recipe.module(i) for i in range(len(layers))])
        optimizer = adamw(list(model.parameters()))
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
        losses = []
        for step in range(STEPS):
            picked = _samples.share(step, samples=SAMPLES, batch=24, rank=0, world=1).indices
            loss = nn.functional.mse_loss(model(data.x[picked]), data.y[picked])
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            scheduler.step()
            losses.append(loss.detach())
        return {"losses": torch.stack(losses), "weights": {n: p.detach() for n, p in model.named_parameters()}}

    (expected,) = world(1, plain)
    torch.testing.assert_close(torch.tensor(got[0]["losses"]), expected["losses"])
    torch.testing.assert_close(weights(got), expected["weights"], rtol=1e-4, atol=1e-5)


class Embed(nn.Embedding):
    def __init__(self) -> None:
        super().__init__(11, WIDTH)


class Unembed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(11, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight.T


class Words(Data):
    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.tensor([i % 11, i % 7]), torch.tensor([i % 7, i % 11])


def cross_entropy(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten())


def test_tied_parameters_stay_one_on_every_layout() -> None:
    def tied(shared: bool, least: int) -> Callable[[int], dict[str, Any]]:
        def work(rank: int) -> dict[str, Any]:
            layers: list[Any] = [Embed, Noisy, Noisy, Unembed]
            more: dict[str, Any] = {"tied": [("0.weight", "3.weight")]}
            if shared:
                torch.manual_seed(3)
                layers, more = [layer() for layer in layers], {}
                layers[3].weight = layers[0].weight
            sizes = [11 * WIDTH, PARAMETERS[1], PARAMETERS[1], 11 * WIDTH]
            return train(rank, layers=layers, loss=cross_entropy, dataset=Words(), deterministic=True, clip=1.0,
                         profile=profile(least, sizes), **more)

        return work

    for shared in (False, True):
        got = [world(size, tied(shared, least)) for size, least in ((1, 1), (5, 2))]
        first, second = (weights(results) for results in got)
        assert got[0][0]["losses"] == got[1][0]["losses"]
        assert got[0][0]["losses"][0] > got[0][0]["losses"][-1]
        assert torch.equal(first["0.weight"], first["3.weight"])
        assert all(torch.equal(value, first[name]) for name, value in second.items())


def test_the_ledger_has_every_microbatch_once(tmp_path: Path) -> None:
    world(5, lambda rank: train(rank, profile=profile(2), ledger=tmp_path))
    lines = (tmp_path / "ledger.jsonl").read_text().splitlines()

    def samples(step: int) -> int:
        return _ledger.expected(step, samples=SAMPLES, batch=24, microbatches=6)

    verdict = _ledger.verify(lines, samples)
    assert verdict.ok and verdict.steps == STEPS and verdict.generations == 1, verdict
    assert "never" in _ledger.verify([line for line in lines if '"step":2,' not in line or "begin" in line]).faults[0]
    twice = _ledger.verify([*lines, lines[2]])
    assert "twice" in twice.faults[0]
    other = _ledger.verify([line.replace('"parts":[[0,', '"parts":[[1,') for line in lines])
    assert "microbatch 0 never" in other.faults[0]
    assert "other samples" in _ledger.verify(lines, lambda step: zlib.crc32(b"%d" % step)).faults[0]


class Counting(nn.Module):
    """State that changes in the forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen += 1
        return x


def squares(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.LBFGS(parameters)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"batch": 25}, "a batch of 25 does not divide into microbatches of 4; 24 or 28 would"),
    ({"batch": 0}, "batch is 0"),
    ({"batch": 400}, "the dataset has 96 samples, a batch 400"),
    ({"layers": []}, "layers is empty"),
    ({"layers": [*LAYERS, 3]}, "layer 6 is a int"),
    ({"layers": [*LAYERS, lambda: 3]}, "layer 6 is made by"),
    ({"layers": [LAYERS[0], Counting, LAYERS[-1]]}, "buffer seen of layer 1 changes in the forward pass"),
    ({"layers": [LAYERS[0], lambda: nn.BatchNorm1d(WIDTH), LAYERS[-1]]}, "BatchNorm1d of layer 1 keeps running"),
    ({"layers": [LAYERS[0], LAYERS[0]]}, "layer 1 cannot run on what comes before it"),
    ({"optimizer": squares}, "LBFGS"),
    ({"loss": lambda output, target: output}, "loss must give one"),
    ({"dataset": torch.randn(96, 3).tolist()}, "must be a pair"),
    ({"profile": profile(9)}, "no plan for 2 ranks, 6 microbatches and faults=0: layer 1 needs"),
    ({"profile": profile(1, [1, 2, 3])}, "the profile is of 3 layers, this model has 6"),
    ({"profile": profile(1, [7, *PARAMETERS[1:]])}, "layer 0 has 216 parameters, the profile was measured on one with 7"),
    ({"faults": 5}, "no plan for 2 ranks, 6 microbatches and faults=5"),
    ({"tied": [("0.weight",)]}, "tied=['0.weight']"),
]


@pytest.mark.parametrize(("options", "expected"), REFUSED, ids=lambda value: value[:30] if isinstance(value, str) else "")
def test_what_cannot_work_is_refused_by_name_on_every_rank(options: dict[str, Any], expected: str) -> None:
    def work(rank: int) -> str:
        with pytest.raises((TypeError, ValueError)) as error:
            train(rank, 1, **options)
        return str(error.value)

    assert all(expected in text for text in world(2, work, seconds=20))


def test_ranks_with_other_settings_are_refused() -> None:
    with pytest.raises(RankError, match="seed is 0 on rank 0 and 1 on rank 1"):
        world(2, lambda rank: train(rank, 1, seed=rank))


def test_of_ranks_with_other_settings_the_newcomers_refuse() -> None:
    """Those that have trained leave the generation instead."""
    trained, other = (_agree.Status(str(seed), {"seed": seed}, layers) for seed, layers in ((0, {0: 3}), (1, {})))
    for rank, error in ((0, ValueError), (1, _agree.NewcomersDifferError), (2, _agree.NewcomersDifferError)):
        with pytest.raises(ValueError, match="seed is 0 on rank 1 and 1 on rank 0") as raised:
            _agree.check_settings([other, trained, trained], rank)
        assert type(raised.value) is error


def test_a_measured_model_is_planned_trains_and_is_saved_whole(tmp_path: Path) -> None:
    """In bfloat16, as far as layers let it."""
    results = world(3, lambda rank: train(rank, faults=1, batch=48, autocast=torch.bfloat16, save=tmp_path / "model.pt"))
    assert results[0]["losses"][-1] < results[0]["losses"][0]
    saved = torch.load(tmp_path / "model.pt")
    expected = weights(results)
    assert list(saved) == list(nn.Sequential(*[layer() for layer in LAYERS]).state_dict())
    assert all(torch.equal(value, expected[name]) for name, value in saved.items())
