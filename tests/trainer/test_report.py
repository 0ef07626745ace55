"""The report: it stands alone, says what the files say, and can be made at any time."""

import doctest
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from plotly.offline import get_plotlyjs

from tests.trainer import fake_run
from thresher.errors import ConfigError, DataError
from thresher.sharding.plan import Plan
from thresher.trainer.callbacks import progress
from thresher.trainer.report import build_report, charts, pictures, tables, units
from thresher.trainer.report.run import Run


class Page(HTMLParser):
    """Tags, attributes and text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "i", "rect", "path"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("i", "rect", "path"):
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("script", "style"):
            self.words.append(data.strip())

    @property
    def text(self) -> str:
        return " ".join(word for word in self.words if word)


def page_of(folder: Path) -> Page:
    return Page(build_report(folder).read_text(encoding="utf-8").replace(get_plotlyjs(), ""))


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "done"
    fake_run.write_run(folder)
    return folder


def test_the_page_opens_offline(done: Path) -> None:
    text = build_report(done).read_text(encoding="utf-8")
    assert text.count(get_plotlyjs()) == 1, "Plotly stands in the page, once"
    own = text.replace(get_plotlyjs(), "")
    assert not re.search(r"""(src|href|url)\s*[=(]\s*["']?(https?:)?//""", own)
    assert "@import" not in own
    page = Page(own)
    assert not page.open, "all tags are closed"
    policy = [a["content"] for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert len(policy) == 1
    assert "default-src 'none'" in str(policy[0])
    assert "connect-src" not in str(policy[0])
    assert {a["href"] for tag, a in page.tags if tag == "a"} <= {f"#{a['id']}" for _, a in page.tags if "id" in a}


def test_the_page_says_what_the_files_say(done: Path) -> None:
    text = page_of(done).text
    assert "completejourney-deepfm done" in text
    assert "2 ranks on cpu" in text
    assert "resumed once" in text
    assert "AUC, test 0.7652 129 k held-out rows" in text
    assert "AUC, valid 0.7759 best of 10, at step 1,600" in text
    assert "product row-wise fused 0, 1 2 68,511 32 8.6 MiB" in text
    assert "history sequence, newest 50 product hash 68,511 32 35,500 52 % 1.8 %" in text
    assert "train 1,211,420 0.2001" in text
    assert "torchrec 1.8.0" in text
    assert "window_rows: 524288" in text


def test_every_chart_has_its_place(done: Path) -> None:
    text = build_report(done).read_text(encoding="utf-8").replace(get_plotlyjs(), "")
    places = [a["data-chart"] for _, a in Page(text).tags if "data-chart" in a]
    figures = json.loads(re.search(r"const FIGURES = (\{.*\});", text)[1])  # type: ignore[index]
    assert sorted(places) == sorted(figures)
    assert places == ["loss", "auc", "entropy", "calibration", "speed", "wait", "rate", "norm", "bytes", "tiers"]
    tiers = {trace["name"]: trace for trace in figures["tiers"]["data"]}
    assert list(tiers) == ["none", "int8", "fp16", "fp32"]
    assert {sum(rows) for rows in zip(*(trace["y"] for trace in tiers.values()), strict=True)} == {120_000.0}
    assert [trace["name"] for trace in figures["bytes"]["data"]] == ["in use", "budget"]
    assert figures["bytes"]["data"][1]["y"][0] == 0.4
    loss = {trace["name"]: trace for trace in figures["loss"]["data"]}
    assert loss["valid logloss"]["x"] == list(range(200, 2001, 200))
    assert [shape["x0"] for shape in figures["loss"]["layout"]["shapes"]] == [1000]


@pytest.mark.parametrize(("status", "told"), [("failed", "loss is nan at step 1,980"), ("", "last heard of")])
def test_runs_that_did_not_end_well_say_so(tmp_path: Path, status: str, told: str) -> None:
    fake_run.write_run(tmp_path / "run", world=3, steps=400, status=status)
    text = page_of(tmp_path / "run").text
    assert f"completejourney-deepfm {status or 'in progress'}" in text
    assert told in text
    assert "AUC, test" not in text


def test_a_run_without_records_has_a_report(tmp_path: Path) -> None:
    fake_run.write_run(tmp_path / "run", steps=0, status="")
    text = page_of(tmp_path / "run").text
    assert "in progress" in text
    assert "No record yet." in text
    (tmp_path / "run" / "metrics.jsonl").unlink()
    assert "No record yet." in page_of(tmp_path / "run").text


def test_names_from_outside_are_text(tmp_path: Path) -> None:
    fake_run.write_run(tmp_path / "run", steps=40)
    config = tmp_path / "run" / "config.yaml"
    config.write_text(config.read_text() + "# </pre><script>alert(1)</script>\n")
    facts = tmp_path / "run" / "facts.json"
    facts.write_text(facts.read_text().replace('"device": "cpu"', '"device": "<img src=//x>"'))
    page = page_of(tmp_path / "run")
    assert "alert(1)" in page.text
    assert "img" not in {tag for tag, _ in page.tags}
    assert [tag for tag, _ in page.tags].count("script") == 2


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("plan.json", DataError, "plan.json: no such file. Give the folder of a run that has started"),
        ("facts.json", DataError, "facts.json: no such file"),
        ("config.yaml", ConfigError, "config.yaml: no such file"),
    ],
)
def test_a_missing_file_is_named(tmp_path: Path, name: str, kind: type[Exception], message: str) -> None:
    fake_run.write_run(tmp_path / "run", steps=40)
    (tmp_path / "run" / name).unlink()
    with pytest.raises(kind, match=re.escape(message)):
        build_report(tmp_path / "run")


def test_the_old_page_stays_until_the_new_one_is_whole(done: Path) -> None:
    before = build_report(done)
    inode = before.stat().st_ino
    assert build_report(done).stat().st_ino != inode
    assert [path.name for path in done.iterdir() if "partial" in path.name] == []


def test_what_was_evaluated_twice_counts_once(done: Path) -> None:
    run = Run.read(done)
    again = run.evals("valid")[-1] | {"metrics": {"auc": 0.5}}
    twice = Run(run.folder, run.config, run.config_text, run.plan, run.facts, [*run.records, again])
    assert len(twice.evals("valid")) == 10
    assert twice.evals("valid")[-1]["metrics"] == {"auc": 0.5}


def test_metrics_of_losses_are_best_when_small(done: Path) -> None:
    run = Run.read(done)
    config = run.config | {"eval": {"early_stop": {"metric": "logloss"}}}
    run = Run(run.folder, config, run.config_text, run.plan, run.facts, run.records)
    assert run.best is not None
    assert run.best["metrics"]["logloss"] == min(r["metrics"]["logloss"] for r in run.evals("valid"))


def test_ranking_metrics_are_drawn_and_headlined(tmp_path: Path) -> None:
    fake_run.write_run(tmp_path / "run", steps=400)
    path = tmp_path / "run" / "metrics.jsonl"
    ranking = '"metrics": {"mrr": 0.11, "hr@10": 0.21, "ndcg@10": 0.15}'
    path.write_text(re.sub(r'"metrics": \{[^}]*\}', ranking, path.read_text()))
    run = Run.read(tmp_path / "run")
    assert [tile.label for tile in tables.tiles(run)][:3] == ["MRR, test", "MRR, valid", "HR@10, test"]
    chart = next(chart for chart in charts.charts(run) if chart.key == "ranking")
    assert [trace["name"] for trace in chart.data] == ["hr@10", "mrr", "ndcg@10"]
    assert ["HR@10", "0.2100", "0.2100", "0.2100"] in tables.metrics_table(run).rows


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_pictures_cover_each_table_once(tmp_path: Path, world: int) -> None:
    fake_run.write_run(tmp_path / "run", world=world, steps=20)
    run = Run.read(tmp_path / "run")
    for picture in pictures.pictures(run):
        area = sum(r.width * r.height for r in picture.rectangles)
        assert area == pytest.approx(pictures.WIDTH * pictures.HEIGHT)
    assert pictures.copied(run) == ["household", "commodity", "brand"]
    assert len(pictures.pictures(run)) == 5
    bars = pictures.bars(run)
    assert max(sum(part.width for part in bar.segments) for bar in bars) == pytest.approx(100)
    assert len(bars) == world


def test_large_plans_stay_readable(done: Path) -> None:
    run = Run.read(done)
    wide = Run(run.folder, run.config, run.config_text, fake_run.plan(600), run.facts, run.records)
    assert len(pictures.bars(wide)) == pictures.MAX_BARS
    assert "product" not in [picture.name for picture in pictures.pictures(wide)], "600 slices cannot be told apart"
    assert tables.plan_table(wide).rows[0][3] == "0 … 599 (600)"
    empty = Plan(world=1, local_world=1, tables=())
    bare = Run(run.folder, run.config, run.config_text, empty, run.facts, run.records)
    assert pictures.balance(empty) == "0 B on one rank"
    assert pictures.bars(bare)[0].segments == []


@pytest.mark.parametrize(
    ("pipeline", "told"),
    [
        ({}, "replicated on every rank"),
        ({"stages": 2}, "cut over pipelines of 2 ranks"),
        ({"slices": 2, "dense": "sharded"}, "sharded over ranks"),
    ],
)
def test_where_dense_parameters_are_is_told(done: Path, pipeline: dict[str, object], told: str) -> None:
    run = Run.read(done)
    (tile,) = [t for t in tables.tiles(replace(run, config=run.config | {"pipeline": pipeline})) if "Dense" in t.label]
    assert tile.note == told


def test_rates_of_tables_are_drawn_where_there_are_tables(done: Path) -> None:
    run = Run.read(done)
    for each, lines in ((run, 2), (replace(run, plan=Plan(world=2, local_world=2, tables=())), 1)):
        (rates,) = [chart for chart in charts.charts(each) if chart.key == "rate"]
        assert len(rates.data) == lines


def test_running_means_keep_lines_and_short_curves_as_they_are() -> None:
    line = [0.5 * x for x in range(100)]
    assert charts._smoothed(line) == pytest.approx(line), "no lag"
    assert charts._smoothed([1.0, 5.0, 2.0]) == [1.0, 5.0, 2.0]
    noise = charts._smoothed([float(x % 2) for x in range(400)])
    assert all(0.4 < value < 0.6 for value in noise[20:-20])


def test_long_curves_are_thinned() -> None:
    records = [{"step": step} for step in range(50_001)]
    assert 1900 <= len(charts._thinned(records)) <= charts.MAX_POINTS


@pytest.mark.parametrize("module", [units, progress])
def test_examples_in_docstrings_hold(module: object) -> None:
    outcome = doctest.testmod(module)  # type: ignore[arg-type]
    assert outcome.attempted
    assert not outcome.failed
