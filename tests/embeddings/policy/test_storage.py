"""Slabs in files: same rows as in memory, bounded memory, nothing left on the disk."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.embeddings.policy.small import ALL_LEVELS, BACKEND, info, planned, table, train, values, zipf_ids
from thresher.embeddings.policy import storage
from thresher.embeddings.policy.config import TierConfig, TierStorage
from thresher.embeddings.policy.controller import TierController
from thresher.embeddings.policy.storage import SlabFiles, mapped_bytes
from thresher.embeddings.rows.tiered import TieredTable
from thresher.embeddings.rows.tiers import Tier
from thresher.errors import PlanError

CONFIG = TierConfig(budget="35%", flat_below_bytes=0, levels=ALL_LEVELS, decay=0.05, spread=2.0, rebalance_every=8)


def files_in(folder: Path, **given: Any) -> SlabFiles:
    return SlabFiles(TierStorage(folder=folder, **given))


def stored_in(files: SlabFiles, rows: int, dim: int) -> TieredTable:
    """A table whose int4, int8 and fp16 slabs are in files."""
    plan = planned(CONFIG, info("t", rows, dim)).tables[0]
    paths = files.paths(plan.path, plan.levels, rows, dim, plan.vectors)
    shard = table(plan, files=paths)
    files.adopt(shard, list(paths.values()))
    return shard


def test_rows_in_files_are_those_in_memory(tmp_path: Path) -> None:
    files = files_in(tmp_path, ram_gb=1e-6)
    plan = planned(CONFIG, info("t", 2000, 16))
    tables = [table(plan.tables[0]), stored_in(files, 2000, 16)]
    controllers = [
        TierController([shard], plan, CONFIG, BACKEND, files=kept)
        for shard, kept in zip(tables, (None, files), strict=True)
    ]
    for step in range(20):
        ids = zipf_ids(step, 400, 2000)
        for shard, controller in zip(tables, controllers, strict=True):
            train([shard], [ids], [torch.sin(torch.arange(400 * 16).view(400, 16) + step)])
            controller.after_step()
    assert len(tables[0].tier_of().unique()) == 6
    assert torch.equal(tables[0].tier_of(), tables[1].tier_of())
    assert torch.equal(values(tables[0]), values(tables[1]))
    assert controllers[0].ledger() == controllers[1].ledger()


def test_nothing_stays_in_the_folder(tmp_path: Path) -> None:
    shard = stored_in(files_in(tmp_path), 1000, 16)
    assert list(tmp_path.iterdir()) == []
    BACKEND.write(shard, torch.arange(5), torch.ones(5, 16), torch.full((5,), int(Tier.FP16)))
    assert bool((BACKEND.read(shard, torch.arange(5)) == 1).all())


def test_files_are_named_by_shard_tier_and_process(tmp_path: Path) -> None:
    files = files_in(tmp_path, tiers=("int8", "fp32", "dropped"))
    levels = (Tier.DROPPED, Tier.INT8, Tier.FP16, Tier.FP32)
    names = [
        path.name
        for row0, col0 in ((0, 0), (5, 0), (0, 8))
        for path in files.paths("bags/x.t", levels, 5, 8, 0, row0, col0).values()
    ]
    assert len(set(names)) == 6
    assert names[0].startswith("bags_x.t.0.0.int8.")
    assert set(files.paths("t", levels, 5, 8, 0)) == {Tier.INT8, Tier.FP32}
    assert files.paths("t", (Tier.FP16,), 5, 8, 0) == {}


def test_without_a_folder_there_are_no_files() -> None:
    files = SlabFiles(TierStorage())
    assert not files.enabled
    assert files.paths("t", (Tier.INT8,), 10**12, 64, 0) == {}
    files.after_step()


def test_memory_of_files_is_bounded(tmp_path: Path) -> None:
    rows, dim = 100_000, 128
    files = files_in(tmp_path, tiers=("fp16",), ram_gb=0.01)
    shard = stored_in(files, rows, dim)
    before = mapped_bytes()
    for first in range(0, rows, 25_000):
        chosen = torch.arange(first, first + 25_000)
        BACKEND.write(shard, chosen, torch.full((25_000, dim), first / 1000), torch.full((25_000,), int(Tier.FP16)))
    assert mapped_bytes() - before > 0.9 * rows * dim * 2
    files.after_step()
    assert mapped_bytes() - before < 0.1 * rows * dim * 2
    assert BACKEND.read(shard, torch.tensor([99_999, 0]))[:, 0].tolist() == [75.0, 0.0]
    # Under the bound nothing is dropped.
    held = mapped_bytes()
    files.after_step()
    assert mapped_bytes() == pytest.approx(held, abs=1e6)


def test_a_disk_that_is_too_small_is_refused_before_training(tmp_path: Path) -> None:
    files = files_in(tmp_path)
    with pytest.raises(PlanError, match=r"tiers\.storage\.folder.*table 't' may need 1.28e\+03 GB.*larger disk"):
        files.paths("t", (Tier.INT8, Tier.FP16, Tier.FP32), 10**10, 64, 0)


def test_tables_share_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage.shutil, "disk_usage", lambda folder: storage.shutil._ntuple_diskusage(0, 0, 3 * 10**9))
    files = files_in(tmp_path)
    files.paths("one", (Tier.INT8,), 30_000_000, 64, 0)
    with pytest.raises(PlanError, match=r"table 'two' may need 1.92 GB, 1.08 GB are free"):
        files.paths("two", (Tier.INT8,), 30_000_000, 64, 0)


def test_a_disk_that_fills_up_stops_training_before_the_system_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = files_in(tmp_path)
    stored_in(files, 1000, 16)
    monkeypatch.setattr(storage.shutil, "disk_usage", lambda folder: storage.shutil._ntuple_diskusage(0, 0, 10**8))
    with pytest.raises(PlanError, match=r"tiers\.storage\.folder.*only 100 MB are free on the disk.*Free disk space"):
        files.after_step()
