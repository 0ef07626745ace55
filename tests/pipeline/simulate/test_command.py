"""``python -m thresher.pipeline``: numbers, files, comparisons, and errors as one message."""

import json
import subprocess
import sys

import pytest

from thresher.pipeline.__main__ import run
from thresher.pipeline.schedule.build import build_schedule
from thresher.pipeline.schedule.dump import from_csv
from thresher.pipeline.schedule.ops import Shape
from thresher.pipeline.simulate.link import Link
from thresher.pipeline.simulate.report import Study

BASIC = ["--stages", "4", "--chunks", "2", "--slices", "8", "--microbatches", "4"]


def test_all_files_are_written(tmp_path, capsys):
    files = {kind: tmp_path / f"out.{kind}" for kind in ("html", "json", "trace", "csv")}
    options = [part for kind, file in files.items() for part in (f"--{kind}", str(file))]
    assert run([*BASIC, *options]) == 0
    written = json.loads(files["json"].read_text())
    assert written["bubble"] == 3 / 64
    assert written["bubbles"] == [3 / 64] * 4
    assert written["peak_slices"] == [22, 20, 18, 16]
    assert written["peak_share"] == pytest.approx([22 / 64, 20 / 64, 18 / 64, 16 / 64])
    assert written["shape"]["policy"] == "slimpipe"
    assert [len(ops) for ops in written["ops"]] == [sum(counts.values()) for counts in written["counts"]]
    assert written["counts"][0]["F"] == written["counts"][0]["B"] == 64
    assert [op for op in written["ops"][0] if op[0] == "F"][:3] == ["F(0,0,0)", "F(0,0,1)", "F(0,0,2)"]
    assert "S(0,0,0) act -> 1" in written["ops"][0]
    assert from_csv(files["csv"].read_text()) == build_schedule(4, 2, 4, 8)
    assert json.loads(files["trace"].read_text())["traceEvents"]
    assert files["html"].read_text().startswith("<!doctype html>")
    assert "bubble 4.69% of ideal time: 201 instead of 192" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("policy", "bubble", "peaks", "share"),
    [
        ("slimpipe", 3 / 64, [22, 20, 18, 16], 22 / 64),
        ("seq1f1b", 3 / 32, [11, 10, 9, 8], 11 / 32),
        ("terapipe", 3 / 32, [32] * 4, 1),
        ("interleaved", 3 / 8, [8, 8, 7, 5], 1),
        ("1f1b", 3 / 4, [4, 3, 2, 1], 1),
        ("gpipe", 3 / 4, [4] * 4, 1),
    ],
)
def test_every_policy_does_the_same_work(policy, bubble, peaks, share, tmp_path, capsys):
    file = tmp_path / "out.json"
    assert run([*BASIC, "--policy", policy, "--json", str(file)]) == 0
    written = json.loads(file.read_text())
    assert (written["bubble"], written["peak_slices"], written["ideal_s"]) == (bubble, peaks, 192)
    assert max(written["peak_share"]) == share
    noted = f"{policy} does the same work as 4 stages" in capsys.readouterr().out
    assert noted == (policy != "slimpipe")


def test_policies_are_compared_on_the_same_work(capsys):
    assert run([*BASIC, "--attention-ratio", "3", "--compare"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in ("gpipe", "1f1b", "interleaved", "terapipe", "seq1f1b", "slimpipe, exchange"))
    study = Study(Shape(4, 2, 4, 8), attention=3.0)
    rows = {name: (timeline, share) for name, timeline, share in study.compare(Link())}
    works = [sum(timeline.busy) for timeline, _ in rows.values()]
    assert works == pytest.approx([works[0]] * len(works))
    assert rows["gpipe"][1] == pytest.approx(1.0)
    assert rows["slimpipe"][1] == pytest.approx(22 / 64)
    assert rows["slimpipe, exchange"][0].bubble < rows["slimpipe"][0].bubble / 2


def test_a_policy_that_cannot_do_the_work_says_why(capsys):
    study = Study(Shape(8, 1, 3, 4))
    reasons = {name: outcome for name, outcome, _ in study.compare(Link()) if isinstance(outcome, str)}
    assert reasons == {"slimpipe": "4 slices are too few for 8 stages"}
    assert run(["--stages", "2", "--slices", "2", "--microbatches", "3", "--chunks", "2", "--compare"]) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--slices", "2"], "2 slices are too few for 4 stages"),
        (["--policy", "slimpip"], "no policy 'slimpip'"),
        (["--attention-ratio", "-1"], "--attention-ratio: -1.0 is no cost"),
        (["--latency", "inf"], "--latency: inf is no cost"),
        (["--head", "nan"], "--head: nan is no cost"),
        (["--attention-ratio", "1e308"], "--attention-ratio: 1e+308 is no cost"),
        (["--slices", "1000000000"], "16,000,000,000 passes of slices through stages are too many"),
        (["--cluster", "h100-128", "--html", "out.html"], "--html would do nothing. Leave --html out"),
        (["--exchange", "-1"], "limit is -1"),
        (["--chunks", "0"], "0 chunks"),
        (["--cluster", "h100-512"], "no cluster 'h100-512'"),
        (["--html", "/nowhere/out.html"], "/nowhere/out.html: No such file or directory"),
    ],
)
def test_errors_are_one_message(options, message, capsys):
    assert run(options) == 2
    text = capsys.readouterr().err
    assert message in text
    assert "Traceback" not in text


def test_the_output_layer_makes_the_last_rank_slow_unless_it_is_cut(tmp_path):
    bubbles = []
    for cut in ([], ["--split-head"]):
        file = tmp_path / "out.json"
        assert run([*BASIC, "--head", "2", "--json", str(file), *cut]) == 0
        bubbles.append(json.loads(file.read_text())["bubble"])
    assert bubbles[1] < bubbles[0]


def test_the_command_starts_without_torch():
    code = "import sys, thresher.pipeline.__main__; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
