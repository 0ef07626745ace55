"""Vectors and gradients sent in fewer bytes: close to fp32, and fewer bytes indeed."""

from typing import Any

import pytest
import torch

from tests.multi.harness import run_ranks
from tests.multi.tiers_twin import BATCH, SEED, Net, samples
from thresher.embeddings.optimizers import TableOptimizer
from thresher.sharding import wire as wire_module
from thresher.sharding.model import shard
from thresher.sharding.plan import WireConfig
from thresher.sharding.planner import make_plan

Found = tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], int]
WIRES = [
    (WireConfig(forward="bf16", backward="bf16"), 1 / 128),
    (WireConfig(forward="fp16", backward="fp16"), 1 / 1024),
    (WireConfig(forward="int8", backward="bf16"), 1 / 64),
]


def outputs(rank: int, world: int, kind: str, wires: list[WireConfig]) -> list[Found]:
    """For each precision: outputs before and after a step by key, and the bytes this rank encoded."""
    return [_outputs(rank, world, kind, wire) for wire in wires]


def _outputs(rank: int, world: int, kind: str, wire: WireConfig) -> Found:
    optimizer = TableOptimizer(name="sgd", lr=0.1)
    plan = make_plan(
        Net(), world=world, local_world=world, device="cpu", optimizer=optimizer, default=kind, memory_bytes=1 << 30
    )
    model = shard(Net(), plan, device=torch.device("cpu"), optimizer=optimizer, seed=SEED, wire=wire)
    size = BATCH // world
    kjt = samples(1)[0].part(slice(rank * size, (rank + 1) * size))
    sent: list[int] = []
    with pytest.MonkeyPatch.context() as patched:
        for codec in (wire_module.Cast, wire_module.GroupedInt8):
            patched.setattr(codec, "encode", _counting(codec.encode, sent))
        first = model.wrapped(kjt)
        torch.stack([value.square().sum() for value in first.values()]).sum().backward()
        model.step_tables()
    second = model.wrapped(kjt)
    return _kept(first), _kept(second), sum(sent)


def _counting(encode: Any, sent: list[int]) -> Any:
    def counted(*args: Any) -> torch.Tensor:
        found: torch.Tensor = encode(*args)
        sent.append(found.nbytes)
        return found

    return counted


def _kept(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: value.detach().clone() for key, value in found.items()}


@pytest.mark.parametrize("kind", ["table_wise", "row_wise", "column_wise"])
def test_outputs_and_updates_are_close_to_fp32_and_fewer_bytes_are_sent(kind: str) -> None:
    ranks = run_ranks(2, outputs, kind, [WireConfig(), *(wire for wire, _ in WIRES)], timeout_s=120)
    for (plain, after, _), *others in ranks:
        for (found, trained, sent), (wire, tolerance) in zip(others, WIRES, strict=True):
            for key, value in plain.items():
                limit = 2 * tolerance * float(value.abs().max()) if value.numel() else 0.0
                torch.testing.assert_close(found[key], value, rtol=0, atol=limit, msg=f"{wire} {key}")
                torch.testing.assert_close(trained[key], after[key], rtol=0, atol=2 * limit, msg=f"{wire} {key}")
            assert sent > 0
        assert others[2][2] < others[0][2] == others[1][2]
