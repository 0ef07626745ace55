"""A run directory like that of a real run, made by the callbacks from invented records."""

import itertools
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
import yaml

from thresher.data.schema import (
    DenseFeature,
    Group,
    Label,
    Schema,
    SequenceFeature,
    SideColumn,
    SparseFeature,
    Table,
    Time,
)
from thresher.sharding.plan import Plan, Shard, TablePlan
from thresher.trainer.callbacks.base import EndRecord, EvalRecord, RunFacts, SaveRecord, StepRecord, TableRecord
from thresher.trainer.callbacks.records import Records
from thresher.trainer.config import DataConfig, RunConfig
from thresher.trainer.model import Model, ModelConfig

TABLES = {
    "household": (2_471, "data_parallel"),
    "product": (68_511, "row_wise"),
    "commodity": (312, "data_parallel"),
    "manufacturer": (6_480, "column_wise"),
    "brand": (4, "data_parallel"),
    "store": (600, "table_wise"),
    "coupon": (1_136, "table_wise"),
    "basket_context": (40_000, "grid_shard"),
}
DIM = 32


class FakeConfig(ModelConfig):
    """A model nobody builds."""

    name: Literal["deepfm"] = "deepfm"
    dim: int = DIM

    def build(self, schema: Schema, device: torch.device) -> Model:
        raise NotImplementedError


def schema() -> Schema:
    history = SequenceFeature(
        name="history", table="product", max_length=50, side=(SideColumn(name="commodity_seen", table="commodity"),)
    )
    sparse = tuple(SparseFeature(name=name, table=name, many=name == "coupon") for name in TABLES)
    dense = tuple(DenseFeature(name=name, transform="log1p") for name in ("price", "days_since_last", "basket_size"))
    tables = tuple(
        Table(name=name, rows=rows, ids="hash" if rows > 1000 else "vocabulary") for name, (rows, _) in TABLES.items()
    )
    ends = (Label(name="bought"), Time(name="time"), Group(name="user"))
    return Schema(name="completejourney", tables=tables, features=(*sparse, history, *dense, *ends))


def plan(world: int) -> Plan:
    return Plan(
        world=world,
        local_world=world,
        tables=tuple(_table(name, rows, how, n, world) for n, (name, (rows, how)) in enumerate(TABLES.items())),
    )


def _table(name: str, rows: int, how: str, number: int, world: int) -> TablePlan:
    ranks = range(world)
    if how == "data_parallel":
        cuts = [(rank, 0, rows, 0, DIM) for rank in ranks]
    elif how == "row_wise":
        step = math.ceil(rows / world)
        cuts = [(rank, rank * step, max(0, min(step, rows - rank * step)), 0, DIM) for rank in ranks]
    elif how == "column_wise":
        cuts = [(rank % world, 0, rows, rank * DIM // 2, DIM // 2) for rank in (0, 1)]
    elif how == "grid_shard":
        half = rows // 2
        corners = itertools.product((0, 1), (0, 1))
        cuts = [((2 * i + j) % world, i * half, half, j * DIM // 2, DIM // 2) for i, j in corners]
    else:
        cuts = [(number % world, 0, rows, 0, DIM)]
    shards = [Shard(rank=r, row0=r0, rows=n, col0=c0, cols=c, bytes=4 * n * (c + 1)) for r, r0, n, c0, c in cuts]
    kernel: Literal["dense", "fused"] = "dense" if how == "data_parallel" else "fused"
    return TablePlan(
        module="ebc", table=name, rows=rows, dim=DIM, sharding_type=how, kernel=kernel, shards=tuple(shards)
    )


def facts(folder: Path, world: int = 2) -> RunFacts:
    rows = {"train": 1_211_420, "valid": 128_800, "test": 129_087}
    keys = [*TABLES, "history", "history.commodity_seen"]
    return RunFacts(
        config=RunConfig[FakeConfig](
            name="completejourney-deepfm",
            data=DataConfig(path=Path("data/completejourney"), recipe="completejourney"),
            model=FakeConfig(),
        ),
        schema=schema(),
        data_facts={
            "rows": rows,
            "distinct_ids": {key: int(TABLES.get(key, (50_000,))[0] * 0.71) for key in keys[:-1]} | {keys[-1]: 302},
            "missing_share": {"coupon": 0.914, "manufacturer": 0.00042, "price": 0.021, "history": 0.0183},
            "label_mean": {"bought": {"train": 0.2001, "valid": 0.1998, "test": 0.2003}},
            "sources": ["transactions.parquet"],
        },
        plan=plan(world),
        versions={"thresher": "0.1.0", "torch": "2.13.0", "torchrec": "1.8.0", "fbgemm-gpu": "1.8.0"},
        folder=folder,
        rank=0,
        world=world,
        device="cpu",
        dense_parameters=184_321,
        total_steps=2_000,
        resumed_step=0,
    )


def step_record(step: int, rng: random.Random) -> StepRecord:
    progress = 1 - math.exp(-step / 600)
    return StepRecord(
        step=step,
        epoch=step * 4096 / 1_211_420,
        samples=step * 4096,
        loss=0.62 - 0.22 * progress + rng.gauss(0, 0.006),
        auc=0.55 + 0.26 * progress + rng.gauss(0, 0.008) if step > 20 else math.nan,
        samples_per_s=61_000 + rng.gauss(0, 2500) - (20_000 if step < 30 else 0),
        data_wait=abs(rng.gauss(0.03, 0.01)),
        lr_dense=1e-3 * min(1, step / 200),
        lr_tables=2e-2 * min(1, step / 200),
        grad_norm=math.exp(rng.gauss(-1.5 - progress, 0.3)),
        seconds=20 * 4096 / 61_000,
    )


def table_record(step: int) -> TableRecord:
    seen = round(120_000 * (1 - math.exp(-step / 400)))
    fp32, fp16 = seen // 20, seen // 7
    return TableRecord(
        step=step,
        live_bytes=4_000_000 + 60 * seen,
        held_bytes=4_100_000 + 62 * seen,
        budget_bytes=12_000_000,
        fp32_bytes=30_000_000,
        rows={"none": 120_000 - seen, "dropped": 0, "int4": 0, "int8": seen - fp32 - fp16, "fp16": fp16, "fp32": fp32},
        shares={"ebc.product": 0.31, "ebc.basket_context": 0.36},
        promoted=step * 31,
        demoted=step * 29,
        refused=0,
    )


def eval_record(step: int, split: str) -> EvalRecord:
    auc = 0.54 + 0.249 * (1 - math.exp(-step / 500)) - max(0, step - 1500) * 3e-5 - (0.0042 if split == "test" else 0)
    logloss = 0.60 - 0.19 * (1 - math.exp(-step / 500)) + (0.0031 if split == "test" else 0)
    metrics = {
        "auc": auc,
        "gauc": auc - 0.031,
        "logloss": logloss,
        "ne": logloss / 0.5004,
        "calibration": 1 + 0.1 * math.exp(-step / 300),
    }
    return EvalRecord(step, split, 129_087 if split == "test" else 128_800, 3.21, metrics)


def write_run(folder: Path, world: int = 2, steps: int = 2_000, status: str = "done") -> None:
    """A run of ``steps`` steps that was resumed once in the middle; ``status`` empty leaves it unfinished."""
    rng, told, half = random.Random(7), facts(folder, world), steps // 2
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(told.config.model_dump(mode="json"), sort_keys=False))
    told.plan.save(folder / "plan.json")
    ticks = itertools.count(1_795_350_000.0, 1.3)
    records = Records(folder, clock=lambda: next(ticks))
    records.on_start(told)
    for step in range(20, steps + 1, 20):
        if step == half + 20:
            records.on_start(replace(told, resumed_step=half))
        records.on_tables(table_record(step))
        records.on_step(step_record(step, rng))
        if step % 200 == 0:
            records.on_eval(eval_record(step, "valid"))
            records.on_save(SaveRecord(step, folder / f"checkpoints/step-{step:08d}", 0.2, 12_345_678))
    if status == "done":
        records.on_eval(eval_record(steps, "test"))
    if status:
        best = {"auc": 0.78, "step": 1_600.0}
        message = "loss is nan at step 1,980" if status == "failed" else ""
        records.on_end(EndRecord(status, steps, 141.0, best, message))
