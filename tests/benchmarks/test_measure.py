"""What all benchmarks share."""

import json
import time

import pytest

from benchmarks import measure


def test_interleaved_runs_in_turn_and_leaves_out_the_warm_up():
    calls: list[str] = []
    times = measure.interleaved({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 3, warm_up=2)
    assert calls == ["a", "b"] * 5
    assert [len(timing.seconds) for timing in times.values()] == [3, 3]


def test_thread_cpu_does_not_count_sleep():
    times = measure.interleaved({"sleep": lambda: time.sleep(0.05)}, 1, warm_up=0)
    assert times["sleep"].median_s < 0.03


def test_median_spread_and_ratio():
    ours, theirs = measure.Timing((1.0, 2.0, 4.0)), measure.Timing((3.0, 4.0, 20.0))
    assert ours.median_s == 2.0
    assert ours.spread == 1.5
    assert measure.ratio(ours, theirs) == 3.0


def test_environment_names_what_a_figure_depends_on():
    facts = measure.environment(threads=3)
    assert facts["threads"] == 3
    assert facts["cores"] >= 1
    assert {"torch", "torchrec", "numpy"} <= set(facts["versions"])
    json.dumps(facts)


def test_report_prints_a_table_and_ends_with_one_line_of_json(capsys):
    chosen = measure.options(measure.parser("x").parse_args(["--quick"]))
    measure.report("speeds", ["who", "rows/s"], [["ours", 1234567.0]], {"ours": {"rows_per_s": 1234567.0}}, chosen)
    *table, last = capsys.readouterr().out.strip().splitlines()
    assert any("1,234,567" in line for line in table)
    assert json.loads(last)["results"]["ours"]["rows_per_s"] == 1234567.0
    assert json.loads(last)["options"] == {"quick": True}


def test_report_writes_a_file(tmp_path, capsys):
    path = tmp_path / "new" / "x.json"
    measure.report("t", ["a"], [[1]], {"a": 1}, measure.Options(quick=False, json=path))
    assert json.loads(path.read_text())["results"] == {"a": 1}
    assert "{" not in capsys.readouterr().out


@pytest.mark.parametrize(("value", "text"), [(0.12345, "0.123"), (98765.4, "98,765"), (1000, "1,000"), ("x", "x")])
def test_cells(value, text):
    assert measure._cell(value) == text
