"""Callbacks: what stands on disk after a kill and a resume, what a terminal shows, what sinks are told."""

import io
import json
import math
import os
import resource
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.trainer import fake_run
from tests.trainer.fake_run import table_record
from thresher.errors import ConfigError, DataError
from thresher.trainer.callbacks import standard_callbacks
from thresher.trainer.callbacks.base import EndRecord, EvalRecord, RunFacts, SaveRecord, StepRecord
from thresher.trainer.callbacks.progress import Progress
from thresher.trainer.callbacks.records import Records
from thresher.trainer.callbacks.report import Report
from thresher.trainer.callbacks.sinks import Forward
from thresher.trainer.callbacks.tensorboard import TensorBoard
from thresher.trainer.report.files import read_facts, read_records, write_atomically
from thresher.trainer.world import World


def step_record(step: int, loss: float = 0.5) -> StepRecord:
    return StepRecord(step, 0.25, step * 100, loss, math.nan, 12_345.6, 0.03, 1e-3, 2e-2, math.nan, 1.5)


def steps_on_disk(folder: Path) -> list[tuple[str, int]]:
    return [(record["kind"], record["step"]) for record in read_records(folder)]


@pytest.fixture
def facts(tmp_path: Path) -> RunFacts:
    return fake_run.facts(tmp_path)


def test_every_record_is_a_line_of_json_at_once(facts: RunFacts) -> None:
    records = Records(facts.folder, clock=lambda: 1000.0)
    records.on_start(facts)
    records.on_step(step_record(10))
    records.on_eval(EvalRecord(10, "valid", 7, 0.5, {"auc": 0.75, "gauc": math.nan}))
    records.on_save(SaveRecord(10, Path("checkpoints/step-00000010"), 0.1, 99))
    # Before the end: what is written so far must be there for a reader, and after a kill.
    lines = (facts.folder / "metrics.jsonl").read_text().splitlines()
    start, train, evaluation, save = (json.loads(line, parse_constant=pytest.fail) for line in lines)
    assert start == {"kind": "start", "time": 1000.0, "step": 0, "world": 2, "device": "cpu"}
    assert (train["kind"], train["loss"], train["auc"]) == ("train", 0.5, None)
    assert evaluation["metrics"] == {"auc": 0.75, "gauc": None}
    assert (save["path"], save["bytes"]) == ("checkpoints/step-00000010", 99)
    records.on_end(EndRecord("done", 10, 3.0, {"auc": 0.75}))
    assert read_records(facts.folder)[-1]["status"] == "done"
    assert math.isnan(read_records(facts.folder)[1]["auc"])


def test_a_resumed_run_does_not_double_the_curve(facts: RunFacts) -> None:
    killed = Records(facts.folder)
    killed.on_start(facts)
    for step in (10, 20, 30):
        killed.on_step(step_record(step, loss=9.0))
    resumed = Records(facts.folder)
    resumed.on_start(replace(facts, resumed_step=20))
    resumed.on_step(step_record(30, loss=0.1))
    assert steps_on_disk(facts.folder) == [("start", 0), ("train", 10), ("train", 20), ("start", 20), ("train", 30)]
    assert [r["loss"] for r in read_records(facts.folder) if r["kind"] == "train"] == [9.0, 9.0, 0.1]


@pytest.mark.parametrize("torn", ["", '{"kind": "tra', '{"kind": "train", "step": 30}', "\x00\x00\x00"])
def test_a_torn_last_line_is_left_out(facts: RunFacts, torn: str) -> None:
    killed = Records(facts.folder)
    killed.on_start(facts)
    killed.on_step(step_record(20))
    with (facts.folder / "metrics.jsonl").open("a") as file:
        file.write(torn)
    assert steps_on_disk(facts.folder)[:2] == [("start", 0), ("train", 20)]
    resumed = Records(facts.folder)
    resumed.on_start(replace(facts, resumed_step=20))
    resumed.on_step(step_record(30))
    assert steps_on_disk(facts.folder) == [("start", 0), ("train", 20), ("start", 20), ("train", 30)]


def test_a_fresh_run_forgets_what_a_killed_one_left(facts: RunFacts) -> None:
    killed = Records(facts.folder)
    killed.on_start(facts)
    killed.on_step(step_record(10))
    Records(facts.folder).on_start(facts)
    assert steps_on_disk(facts.folder) == [("start", 0)]


def test_a_broken_line_is_named(facts: RunFacts) -> None:
    (facts.folder / "metrics.jsonl").write_text('{"kind": "train", "step": 1}\nhello\n{"kind": "train", "step": 2}\n')
    with pytest.raises(DataError, match=r"DataError: .*metrics.jsonl:2: is no record. Remove that line"):
        read_records(facts.folder)


def test_a_full_disk_is_named_and_leaves_no_half_line(facts: RunFacts) -> None:
    records = Records(facts.folder)
    records.on_start(facts)
    path = facts.folder / "metrics.jsonl"
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 10, hard))
    try:
        with pytest.raises(DataError, match=r"metrics.jsonl: cannot be written: File too large. Make room there"):
            records.on_step(step_record(10))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == before


def test_facts_survive_the_disk(facts: RunFacts) -> None:
    Records(facts.folder).on_start(facts)
    read = read_facts(facts.folder)
    assert read.columns == facts.schema
    assert (read.model, read.world, read.recipe) == ("deepfm", 2, "completejourney")
    assert read.data["rows"]["test"] == 129_087


def test_missing_and_broken_facts_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"facts.json: no such file. Give the folder of a run that has started"):
        read_facts(tmp_path)
    (tmp_path / "facts.json").write_text("{")
    with pytest.raises(DataError, match=r"facts.json: cannot be read: Expecting .* Resume the run, which writes it"):
        read_facts(tmp_path)
    (tmp_path / "facts.json").write_text('{"name": "x"}')
    with pytest.raises(ConfigError, match=r"facts.json: model: required key is absent"):
        read_facts(tmp_path)


def printed(facts: RunFacts, **console: object) -> str:
    out = io.StringIO()
    clock = iter([0.0, 60.0])
    progress = Progress(Console(file=out, width=200, **console), clock=lambda: next(clock))
    progress.on_start(facts)
    progress.on_step(step_record(500))
    progress.on_eval(EvalRecord(500, "valid", 1000, 2.04, {"auc": 0.75, "hr@10": math.nan}))
    progress.on_save(SaveRecord(500, Path("runs/[x]/step-500"), 0.2, 3 << 20))
    progress.on_end(EndRecord("done", 2000, 3723.0, {}))
    return out.getvalue()


def test_without_a_terminal_every_record_is_a_plain_line(facts: RunFacts) -> None:
    *plan, headline, first, second, third, last = printed(facts).splitlines()
    assert plan[0].startswith("sharding plan: 2 ranks")
    assert [headline, first, second, third, last] == [
        "deepfm on completejourney: 2,000 steps on 2 ranks (cpu), tables 15.6 MiB with optimizer state, "
        "184,321 dense parameters",
        "step 500/2,000  loss 0.5000  12,346 samples/s  data wait 3%  eta 0:03:00",
        "step 500  valid: auc 0.7500  hr@10 -  (1,000 rows, 2.0 s)",
        "step 500  saved runs/[x]/step-500 (3.0 MiB, 0.2 s)",
        f"done at step 2,000 after 1:02:03; report: {facts.folder / 'report.html'}",
    ]


def test_tables_with_tiers_show_their_share_and_their_rows(facts: RunFacts) -> None:
    out = io.StringIO()
    progress = Progress(Console(file=out, width=200), clock=lambda: 0.0)
    progress.on_start(facts)
    rows = {"none": 900, "dropped": 0, "int4": 0, "int8": 80, "fp16": 15, "fp32": 5}
    progress.on_tables(replace(table_record(500), live_bytes=31, fp32_bytes=100, rows=rows))
    progress.on_step(step_record(500))
    progress.on_tables(replace(table_record(510), live_bytes=30, fp32_bytes=100, rows=dict.fromkeys(rows, 0)))
    progress.on_step(step_record(510))
    assert "data wait 3%  tables 31% (fp32 5% fp16 15% int8 80%)  eta" in out.getvalue()
    assert "tables 30% (untouched)" in out.getvalue()


def test_no_colour_means_plain_lines_on_a_terminal_too(facts: RunFacts) -> None:
    shown = printed(facts, force_terminal=True, no_color=True)
    assert "step 500/2,000  loss 0.5000" in shown
    assert "━" not in shown


def test_a_terminal_gets_a_bar_with_the_figures(facts: RunFacts) -> None:
    shown = printed(facts, force_terminal=True, color_system="truecolor")
    assert "━" in shown
    assert "loss 0.5000  12,346/s  wait 3%  eta 0:03:00" in shown
    assert "valid: auc 0.7500" in shown


def test_a_resumed_run_says_so_and_estimates_from_its_own_steps(facts: RunFacts) -> None:
    shown = printed(replace(facts, resumed_step=400))
    assert "dense parameters, resumed at step 400" in shown
    assert "eta 0:15:00" in shown  # 100 steps took a minute, 1,500 remain


def test_tensorboard_is_told_finite_scalars_and_hides_what_is_done_again(facts: RunFacts, tmp_path: Path) -> None:
    first = Forward(TensorBoard(tmp_path / "tb"))
    first.on_start(facts)
    first.on_step(step_record(10, loss=9.0))
    first.on_step(step_record(20, loss=9.0))
    first.on_tables(table_record(10))
    first.on_end(EndRecord("failed", 20, 1.0, {}))
    second = Forward(TensorBoard(tmp_path / "tb"))
    second.on_start(replace(facts, resumed_step=10))
    second.on_step(step_record(20, loss=0.5))
    second.on_eval(EvalRecord(20, "valid", 7, 0.5, {"auc": 0.75, "hr@10": 0.25, "gauc": math.nan}))
    second.on_end(EndRecord("done", 20, 1.0, {}))
    events = EventAccumulator(str(tmp_path / "tb")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(10, 9.0), (20, 0.5)]
    assert [(e.step, e.value) for e in events.Scalars("eval/valid/hr_at_10")] == [(20, 0.25)]
    assert [e.value for e in events.Scalars("tables/rows/none")] == [
        120_000 - round(120_000 * (1 - math.exp(-10 / 400)))
    ]
    assert events.Scalars("tables/share_of/ebc.product")[0].value == pytest.approx(0.31)
    assert {"eval/valid/gauc", "train/auc"}.isdisjoint(events.Tags()["scalars"])


class Fickle:
    """A sink that takes one record and then fails at everything."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def start(self, facts: RunFacts) -> None:
        self.calls.append("start")

    def scalars(self, step: int, values: dict[str, float]) -> None:
        self.calls.append(f"scalars {step}")
        if step > 10:
            raise OSError("No space left on device")

    def end(self, record: EndRecord) -> None:
        self.calls.append("end")


def test_a_sink_that_fails_is_left_alone_and_the_run_goes_on(facts: RunFacts, caplog) -> None:
    sink = Fickle()
    callback = Forward(sink)
    callback.on_start(facts)
    for step in (10, 20, 30):
        callback.on_step(step_record(step))
    callback.on_eval(EvalRecord(30, "valid", 7, 0.5, {"auc": 0.75}))
    callback.on_end(EndRecord("done", 30, 1.0, {}))
    assert sink.calls == ["start", "scalars 10", "scalars 20"]
    assert caplog.text.count("Fickle gets no more of this run: OSError: No space left on device") == 1


def test_a_file_that_does_not_fit_leaves_the_old_one_and_no_part(tmp_path, monkeypatch) -> None:
    path = tmp_path / "report.html"
    write_atomically(path, "old")

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, "new")
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.html"]
    assert path.read_text() == "old"


def test_a_bug_in_the_report_does_not_stop_the_run(tmp_path, monkeypatch, caplog) -> None:
    def broken(folder: Path) -> Path:
        raise KeyError("seconds")

    monkeypatch.setattr("thresher.trainer.callbacks.report.build_report", broken)
    Report(tmp_path).on_end(EndRecord("done", 1, 0.1, {}))
    assert "a bug of Thresher" in caplog.text
    assert "KeyError: 'seconds'" in caplog.text


def test_a_report_that_cannot_be_written_does_not_stop_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Report(tmp_path / "nowhere").on_eval(EvalRecord(1, "valid", 1, 0.1, {}))
    assert "the report was not written" in caplog.text


def test_only_the_first_rank_speaks(facts: RunFacts, tmp_path: Path) -> None:
    def world(rank: int) -> World:
        return World(rank, 2, rank, 2, torch.device("cpu"))

    kinds = [type(callback).__name__ for callback in standard_callbacks(facts.config, tmp_path, world(0))]
    assert kinds == ["Progress", "Records", "Forward", "Report"]
    quiet = facts.config.model_copy(update={"tensorboard": False})
    assert len(standard_callbacks(quiet, tmp_path, world(0))) == 3
    assert standard_callbacks(facts.config, tmp_path, world(1)) == ()
