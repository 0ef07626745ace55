"""The picture: geometry, what it says, that it needs nothing from elsewhere; the trace: fields of its format."""

import json
import re
from html.parser import HTMLParser
from itertools import pairwise
from xml.etree import ElementTree

import pytest

from thresher.pipeline.schedule.ops import Kind, Op, Shape
from thresher.pipeline.simulate.link import Link
from thresher.pipeline.simulate.perfetto import trace
from thresher.pipeline.simulate.picture import LANE, colour, describe, html, nice_step, time_unit
from thresher.pipeline.simulate.report import Study

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def study():
    plain = Study(Shape(4, 2, 2, 8), attention=3.0)
    return Study(plain.shape, plain.attention, plain.rule(0, 0.0), head=1.0)


@pytest.fixture(scope="module")
def outcome(study):
    return study.run(Link(latency_s=0.05))


@pytest.fixture(scope="module")
def page(study, outcome):
    return html(*outcome, study.whole_bytes, "A <title>", in_seconds=False)


@pytest.fixture(scope="module")
def drawn(page):
    return ElementTree.fromstring(re.search(r"<svg.*</svg>", page, re.S).group())


def test_every_operation_is_a_box_in_its_row_and_boxes_do_not_overlap(drawn, outcome):
    rows = {}
    for box in drawn.iter(f"{SVG}rect"):
        if box.get("class") == "op":
            x, width = float(box.get("x")), float(box.get("width"))
            rows.setdefault(float(box.get("y")), []).append((x, x + width))
            assert float(box.get("height")) == LANE
    timeline = outcome[0]
    drawn_counts = [len(boxes) for _, boxes in sorted(rows.items())]
    assert drawn_counts == [sum(event.end > event.start for event in events) for events in timeline.events]
    right = float(drawn.get("width"))
    for boxes in rows.values():
        assert all(before[1] <= after[0] + 0.02 for before, after in pairwise(boxes))
        assert boxes[0][0] >= 0
        assert boxes[-1][1] <= right


def test_lengths_are_in_proportion_to_time(drawn, outcome):
    events = [event for event in outcome[0].events[0] if event.end > event.start]
    boxes = [box for box in drawn.iter(f"{SVG}rect") if box.get("class") == "op"][: len(events)]
    ratios = [float(box.get("width")) / (event.end - event.start) for box, event in zip(boxes, events, strict=True)]
    assert max(ratios) == pytest.approx(min(ratios), rel=0.02)


def test_tooltips_say_what_happened(page):
    assert "rank 0: forward (microbatch 0, chunk 0, slice 0)" in page
    assert re.search(r"waited [\d.]+", page)
    assert re.search(r"activation from rank 0, under way [\d.]+ to [\d.]+", page)
    assert re.search(r"gives attention over \d+ slices; peer: rank \d, (forward|backward) \(microbatch", page)
    assert "takes over attention over" in page


def test_the_page_tells_the_numbers(page, outcome, study):
    timeline, memory = outcome
    assert f"<b>{timeline.bubble:.1%}</b>" in page
    assert "22, 20, 18, 16" in page
    assert f"peak {memory.peak(0).total / study.whole_bytes:.3f}" in page
    assert "A &lt;title&gt;" in page
    assert "gives attention away" in page
    assert "prefers-color-scheme: dark" in page


def test_the_page_loads_nothing(page):
    class Links(HTMLParser):
        found = 0

        def handle_starttag(self, tag, attrs):
            self.found += tag in ("script", "link", "img", "iframe") or any(
                name in ("src", "href") for name, _ in attrs
            )

    links = Links()
    links.feed(page)
    assert links.found == 0
    assert "url(" not in page
    assert "@import" not in page


def test_microbatches_differ_by_hue_and_chunks_by_depth():
    def shade(kind, microbatch, chunk):
        return tuple(map(int, re.findall(r"\d+", colour(Op(kind, microbatch, chunk, 0), 2))))

    assert shade(Kind.FORWARD, 0, 0)[0] != shade(Kind.FORWARD, 1, 0)[0]
    assert shade(Kind.FORWARD, 0, 0)[2] > shade(Kind.FORWARD, 0, 1)[2] > shade(Kind.BACKWARD, 0, 0)[2]
    assert shade(Kind.BACKWARD, 0, 0)[2] > shade(Kind.BACKWARD, 0, 1)[2]


@pytest.mark.parametrize(("span", "ticks", "step"), [(100, 10, 10), (201, 10, 50), (0.03, 5, 0.01), (7, 10, 1)])
def test_ticks_are_round(span, ticks, step):
    assert nice_step(span, ticks) == pytest.approx(step)


def test_times_are_spelt_in_the_unit_that_fits():
    assert [time_unit(t).of(t) for t in (12.5, 0.25, 3e-5)] == ["12.5 s", "250 ms", "30 µs"]


def test_one_line_says_what_the_schedule_is():
    assert describe(Shape(1, 3, 1, 6, policy="slimpipe")) == "slimpipe: 1 stage, 3 chunks, 6 slices, 1 microbatch"


def test_the_trace_has_the_fields_of_its_format(outcome):
    timeline, memory = outcome
    entries = json.loads(json.dumps(trace(timeline, memory)))["traceEvents"]
    by_phase = {}
    for entry in entries:
        by_phase.setdefault(entry["ph"], []).append(entry)
    assert set(by_phase) == {"M", "X", "s", "f", "C"}
    for entry in entries:
        assert isinstance(entry["pid"], int)
        assert 0 <= entry["pid"] < 4
        assert isinstance(entry["tid"], int)
        if entry["ph"] != "M":
            assert entry["ts"] >= 0
    compute = [entry for entry in by_phase["X"] if entry["tid"] == 0]
    assert len(compute) == sum(map(len, timeline.events))
    assert max(entry["ts"] + entry["dur"] for entry in compute) == pytest.approx(timeline.makespan * 1e6)
    assert len(by_phase["s"]) == len(by_phase["f"]) == len(timeline.transfers)
    assert {entry["id"] for entry in by_phase["s"]} == {entry["id"] for entry in by_phase["f"]}
    assert all(value >= 0 for entry in by_phase["C"] for value in entry["args"].values())
