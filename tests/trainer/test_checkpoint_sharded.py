"""Sharded tables through a checkpoint: same plan, other plans, other numbers of ranks; failures on one rank."""

import re
import resource
import signal
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torchrec import (
    EmbeddingBagCollection,
    EmbeddingBagConfig,
    EmbeddingCollection,
    EmbeddingConfig,
    KeyedJaggedTensor,
)

from tests.multi.harness import run_ranks
from thresher.embeddings.optimizers import TableOptimizer
from thresher.errors import CheckpointError
from thresher.sharding.model import ShardedModel, shard
from thresher.sharding.planner import make_plan
from thresher.trainer.checkpoint import CheckpointStore, LazyOptimizer, TableState, model_state
from thresher.trainer.config import DenseOptimizer
from thresher.trainer.optim import dense_optimizer

ROWS, DIM, BATCH = 40, 16, 6
Found = dict[str, Tensor]


class Net(nn.Module):
    """Two pooled tables, one of sequences, and a dense part with a buffer that differs between ranks."""

    def __init__(self, width: int) -> None:
        super().__init__()
        meta = torch.device("meta")
        bags = [
            EmbeddingBagConfig(name=name, num_embeddings=ROWS, embedding_dim=width, feature_names=[f"f_{name}"])
            for name in ("a", "b")
        ]
        seq = [EmbeddingConfig(name="s", num_embeddings=ROWS, embedding_dim=width, feature_names=["f_s"])]
        self.ebc = EmbeddingBagCollection(tables=bags, device=meta)
        self.ec = EmbeddingCollection(tables=seq, device=meta)
        self.norm = nn.BatchNorm1d(2 * width)
        self.over = nn.Linear(3 * width, 1)

    def forward(self, kjt: KeyedJaggedTensor) -> Tensor:
        history = self.ec(kjt)["f_s"].to_padded_dense(2).sum(1)
        return self.over(torch.cat([self.norm(self.ebc(kjt).values()), history], 1))


class Run:
    """A model and its optimizers on this rank."""

    def __init__(
        self, world: int, kind: str, optimizer: str, seed: int, local_world: int = 0, width: int = DIM
    ) -> None:
        torch.manual_seed(seed)
        name, _, columns = optimizer.partition(" ")
        model, rows = Net(width), TableOptimizer(name=name, lr=0.1, column_state=columns or "exact")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            plan = make_plan(
                model,
                world=world,
                local_world=local_world or world,
                device="cpu",
                optimizer=rows,
                default=kind,
                tables={"s": kind if kind in ("table_wise", "row_wise", "column_wise") else "table_wise"},
            )
            self.sharded: ShardedModel = shard(model, plan, device=torch.device("cpu"), optimizer=rows, seed=seed)
        self.dense = dense_optimizer(self.sharded.dense_parameters(), DenseOptimizer(lr=0.01))

    def state(self) -> dict[str, Any]:
        return {
            "model": model_state(self.sharded),
            "table_optimizer": TableState(self.sharded),
            "dense_optimizer": LazyOptimizer(self.dense),
        }

    def train(self, steps: range, rank: int) -> None:
        for step in steps:
            generator = torch.Generator().manual_seed(step * 100 + rank)
            self.dense.zero_grad()
            self.sharded.wrapped(batch(generator)).square().mean().backward()
            self.sharded.step_tables()
            self.dense.step()

    def rectangles(self) -> list[tuple[str, tuple[int, ...], Tensor]]:
        """All tensors of this rank: key, offset of the rectangle, values."""
        parts = []
        pending = [(name, part.state_dict()) for name, part in self.state().items()]
        while pending:
            key, value = pending.pop()
            if isinstance(value, dict):
                pending += [(f"{key}.{name}", inner) for name, inner in value.items()]
            elif isinstance(value, ShardedTensor):
                parts += [(key, tuple(s.metadata.shard_offsets), s.tensor.clone()) for s in value.local_shards()]
            else:
                parts.append((key, (0,) * value.dim(), value.clone()))
        return parts


def batch(generator: torch.Generator) -> KeyedJaggedTensor:
    lengths = torch.randint(0, 3, (3 * BATCH,), generator=generator)
    values = torch.randint(0, ROWS, (int(lengths.sum()),), generator=generator)
    return KeyedJaggedTensor(keys=["f_a", "f_b", "f_s"], values=values, lengths=lengths)


def whole(ranks: list[list[tuple[str, tuple[int, ...], Tensor]]]) -> Found:
    """Rectangles of all ranks put together; of what is replicated, rank 0's."""
    sizes: dict[str, list[int]] = {}
    for key, offset, value in (part for parts in ranks for part in parts):
        ends = [o + n for o, n in zip(offset, value.shape, strict=True)]
        sizes[key] = [max(pair) for pair in zip(sizes.get(key, ends), ends, strict=True)]
    found = {key: torch.full(size, torch.nan) for key, size in sizes.items()}
    for key, offset, value in (part for parts in reversed(ranks) for part in parts):
        found[key][tuple(slice(o, o + n) for o, n in zip(offset, value.shape, strict=True))] = value
    return found


def save_then_train(rank: int, world: int, folder: str, kind: str, optimizer: str, local: int) -> tuple[Any, Any]:
    run = Run(world, kind, optimizer, seed=0, local_world=local)
    run.train(range(3), rank)
    CheckpointStore(Path(folder), 2).save(3, run.state(), {"cursor": 3 * BATCH * world})
    before = run.rectangles()
    run.train(range(3, 6), rank)
    return before, run.rectangles()


def load_then_train(rank: int, world: int, folder: str, kind: str, optimizer: str, local: int) -> tuple[Any, Any]:
    run = Run(world, kind, optimizer, seed=1, local_world=local)
    record = CheckpointStore(Path(folder), 2).restore(run.state())
    assert record is not None
    assert record.step == 3
    before = run.rectangles()
    run.train(range(3, 6), rank)
    return before, run.rectangles()


def both(case: Any, world: int, folder: Path, kind: str, optimizer: str, local: int = 0) -> tuple[Found, Found]:
    results = run_ranks(world, case, str(folder), kind, optimizer, local, timeout_s=120, local_world=local or None)
    return whole([before for before, _ in results]), whole([after for _, after in results])


def assert_same(left: Found, right: Found) -> None:
    assert left.keys() == right.keys()
    for key, value in left.items():
        assert not value.isnan().any(), key
        assert torch.equal(value, right[key]), key


@pytest.mark.parametrize(
    ("kind", "optimizer"),
    [
        ("table_wise", "rowwise_adagrad"),
        ("row_wise", "adam"),
        ("column_wise", "rowwise_adagrad"),
        ("column_wise", "rowwise_adagrad separate"),
        ("data_parallel", "rowwise_adagrad"),
    ],
)
def test_a_resumed_run_is_bit_exact(tmp_path, kind, optimizer):
    saved, trained = both(save_then_train, 2, tmp_path, kind, optimizer)
    restored, resumed = both(load_then_train, 2, tmp_path, kind, optimizer)
    assert_same(saved, restored)
    assert_same(trained, resumed)
    assert any(key.startswith("table_optimizer.") and value.any() for key, value in saved.items())
    assert {"model.ebc.embedding_bags.a.weight", "model.ec.embeddings.s.weight", "model.norm.running_mean"} < set(saved)


@pytest.mark.parametrize(
    ("kind", "world", "other", "other_world", "optimizer"),
    [
        ("table_wise", 2, "row_wise", 2, "rowwise_adagrad"),
        ("row_wise", 2, "table_wise", 1, "rowwise_adagrad"),
        ("table_wise", 1, "row_wise", 3, "rowwise_adagrad"),
        ("column_wise", 2, "row_wise", 2, "adagrad"),
        ("row_wise", 2, "column_wise", 2, "sgd"),
        ("column_wise", 2, "row_wise", 2, "rowwise_adagrad"),
        ("row_wise", 3, "column_wise", 2, "rowwise_adam"),
        ("column_wise", 2, "data_parallel", 1, "rowwise_adagrad"),
        ("row_wise", 2, "table_wise", 2, "rowwise_adagrad separate"),
        ("data_parallel", 2, "row_wise", 2, "rowwise_adagrad"),
        ("row_wise", 2, "data_parallel", 1, "rowwise_adagrad"),
        ("table_wise", 1, "data_parallel", 2, "adagrad"),
        ("data_parallel", 1, "column_wise", 2, "adagrad"),
    ],
)
def test_a_checkpoint_loads_into_another_plan_and_number_of_ranks(tmp_path, kind, world, other, other_world, optimizer):
    saved, _ = both(save_then_train, world, tmp_path, kind, optimizer)
    restored, _ = both(load_then_train, other_world, tmp_path, other, optimizer)
    assert_same(saved, restored)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["rowwise_adagrad", "adagrad"])
@pytest.mark.parametrize("kind", ["table_row_wise", "grid_shard", "table_column_wise"])
def test_two_machines_of_two(tmp_path, kind, optimizer):
    """Bit-exact on the same plan; and into table-wise on two ranks."""
    saved, trained = both(save_then_train, 4, tmp_path, kind, optimizer, 2)
    restored, resumed = both(load_then_train, 4, tmp_path, kind, optimizer, 2)
    assert_same(saved, restored)
    assert_same(trained, resumed)
    other, _ = both(load_then_train, 2, tmp_path, "table_wise", optimizer)
    assert_same(saved, other)


def test_row_state_kept_apart_by_columns_is_refused_elsewhere(tmp_path):
    both(save_then_train, 2, tmp_path, "column_wise", "rowwise_adagrad separate")
    with pytest.raises(CheckpointError) as caught:
        both(load_then_train, 2, tmp_path, "row_wise", "rowwise_adagrad separate")
    assert re.fullmatch(
        r"CheckpointError: .*step-00000003: 'table_optimizer.state.ebc.embedding_bags.[ab].weight.[ab].momentum1' is "
        r"optimizer state of one number per row and split of the columns: saved for columns 0..7, 8..15, this plan has "
        r"0..15 \(and \d more\). Keep the table's column split, or train with column_state exact, whose state is of "
        r"whole rows",
        caught.value.message,
    )


def test_weights_alone_load_into_any_plan(tmp_path):
    saved, _ = both(save_then_train, 2, tmp_path, "column_wise", "rowwise_adagrad")
    found = whole(run_ranks(2, load_weights, str(tmp_path), "row_wise", timeout_s=120))
    weights = {key: value for key, value in saved.items() if key.startswith("model.")}
    assert_same(weights, {key: value for key, value in found.items() if key.startswith("model.")})


def load_weights(rank: int, world: int, folder: str, kind: str) -> Any:
    run = Run(world, kind, "rowwise_adagrad", seed=1)
    assert CheckpointStore(Path(folder), 2).restore({"model": model_state(run.sharded)}) is not None
    return run.rectangles()


def test_another_table_optimizer_is_named(tmp_path):
    both(save_then_train, 2, tmp_path, "data_parallel", "sgd")
    with pytest.raises(
        CheckpointError,
        match=r"has no 'table_optimizer.state.ebc.embedding_bags.*momentum1', which this run needs.*Keep the tables, "
        r"their tiers and the table optimizer that it was saved with, or load the weights alone",
    ):
        both(load_then_train, 2, tmp_path, "table_wise", "rowwise_adagrad")


def test_a_table_of_another_width_is_named(tmp_path):
    both(save_then_train, 2, tmp_path, "table_wise", "sgd")
    with pytest.raises(
        CheckpointError, match=r"'model.\S+weight' is torch.float32 \[.*16\], the model wants torch.float32 \[.*32\]"
    ):
        run_ranks(2, load_wide, str(tmp_path), timeout_s=120)


def load_wide(rank: int, world: int, folder: str) -> None:
    CheckpointStore(Path(folder), 2).restore(Run(world, "table_wise", "sgd", 1, width=32).state())


def test_ranks_share_the_verification_and_agree(tmp_path):
    results = run_ranks(2, fall_back, str(tmp_path), timeout_s=120)
    assert results == [(1, ["__1_0.distcp has changed content"])] * 2


def fall_back(rank: int, world: int, folder: str) -> tuple[int, list[str]]:
    from random import Random

    run, store = Run(world, "row_wise", "sgd", 0), CheckpointStore(Path(folder), 3)
    store.save(1, run.state(), {})
    store.save(2, run.state(), {})
    if rank == 0:
        file = Path(folder, "step-00000002", "__1_0.distcp")
        before, after = file.read_bytes(), Random(0).randbytes(8)
        file.write_bytes(before[:100] + after + before[108:])
    dist.barrier()
    record = store.restore(run.state())
    assert record is not None
    return record.step, [problem for bad in record.skipped for problem in bad.problems]


@pytest.mark.parametrize("broken", [0, 1])
def test_a_failure_on_one_rank_is_told_on_all_and_training_goes_on(tmp_path, broken):
    """One rank may write 4 KiB a file only; afterwards it may write again."""
    messages = run_ranks(2, limited, str(tmp_path), broken, timeout_s=120)
    assert messages[0] == messages[1]
    assert re.fullmatch(
        rf"CheckpointError: .*step-00000002.partial: rank {broken}: File too large "
        r"\(the checkpoint needs [\d,]+ bytes\). Free space there, or save to a larger file system",
        messages[0],
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001", "step-00000003"]


def limited(rank: int, world: int, folder: str, broken: int) -> str:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    run, store = Run(world, "row_wise", "sgd", 0), CheckpointStore(Path(folder), 3)
    store.save(1, run.state(), {})
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    if rank == broken:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, unlimited[1]))
    try:
        store.save(2, run.state(), {})
    except CheckpointError as error:
        message = error.message
    resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    run.train(range(2), rank)
    store.save(3, run.state(), {})
    assert store.latest() == Path(folder, "step-00000003")
    return message


def test_a_bug_on_one_rank_stops_the_others_too(tmp_path):
    first, second = run_ranks(2, with_a_bug, str(tmp_path), timeout_s=60)
    assert first == f"CheckpointError: {tmp_path}: KeyError: 'lost'. See the log"
    assert second == "'lost'"
    assert list(tmp_path.iterdir()) == []


class Broken:
    """A part of the state whose ``state_dict`` fails."""

    def state_dict(self) -> dict[str, Any]:
        raise KeyError("lost")

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        raise AssertionError("nothing was saved")


def with_a_bug(rank: int, world: int, folder: str) -> str:
    state: dict[str, Any] = {"model": Broken() if rank == 1 else {"weight": torch.zeros(2)}}
    with pytest.raises((CheckpointError, KeyError)) as caught:
        CheckpointStore(Path(folder), 1).save(1, state, {})
    return str(caught.value)
