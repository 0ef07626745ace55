"""Schedules as text: the same after a round trip, and refused when damaged."""

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.pipeline.schedule.shapes import SPLITS, arguments
from thresher.errors import ScheduleError
from thresher.pipeline.schedule.build import build_schedule
from thresher.pipeline.schedule.dump import from_csv, from_json, to_csv, to_json
from thresher.pipeline.schedule.exchange import ExchangeRule

FORMS = {"JSON": (to_json, from_json), "CSV": (to_csv, from_csv)}


@settings(max_examples=15)
@given(arguments(stages=4), SPLITS)
def test_round_trip(given, splits):
    schedule = build_schedule(*given, **splits)
    for dump, load in FORMS.values():
        assert load(dump(schedule)) == schedule


def test_exchanges_survive():
    schedule = build_schedule(4, 1, 1, 8, exchange=ExchangeRule(forced=True))
    assert any(op.partner for op in schedule.ranks[0])
    for dump, load in FORMS.values():
        assert load(dump(schedule)) == schedule


def test_csv_as_written():
    assert to_csv(build_schedule(1, 1, 1, 1)) == (
        "version,stages,chunks,microbatches,slices,slack,policy,split_embedding,split_head,split_backward,counts\n"
        "1,1,1,1,1,2,slimpipe,False,False,False,3\n"
        "rank,kind,microbatch,chunk,slice,payload,peer,share,partner\n"
        "0,F,0,0,0,,-1,0,\n"
        "0,L,0,0,0,,-1,0,\n"
        "0,B,0,0,0,,-1,0,\n"
    )


def test_json_as_written():
    assert json.loads(to_json(build_schedule(1, 1, 1, 1))) == {
        "version": 1,
        "shape": {
            "stages": 1,
            "chunks": 1,
            "microbatches": 1,
            "slices": 1,
            "slack": 2,
            "policy": "slimpipe",
            "split_embedding": False,
            "split_head": False,
            "split_backward": False,
        },
        "columns": ["kind", "microbatch", "chunk", "slice", "payload", "peer", "share", "partner"],
        "counts": [3],
        "ranks": [[[kind, 0, 0, 0, None, -1, 0, None] for kind in "FLB"]],
    }


@pytest.mark.parametrize(
    ("form", "old", "new", "message"),
    [
        ("JSON", '"version":1', '"version":2', "version: Input should be 1"),
        ("JSON", '"F"', '"FORWARD"', "ranks.0.0.0: Input should be 'F', 'B'"),
        ("JSON", '"ranks":[', '"ranks":[[],', "(0, 3) operations by rank instead of (3,) for 1 stages"),
        ("JSON", '"counts":[3]', '"counts":[4]', "(3,) operations by rank instead of (4,) for 1 stages"),
        ("JSON", '"slack":2', '"slack":5', "slack 5"),
        ("JSON", '"slack"', '"slick"', "shape.slack: Field required"),
        (
            "JSON",
            '"peer","share"',
            '"share","peer"',
            "columns are kind, microbatch, chunk, slice, payload, share, peer",
        ),
        ("JSON", '{"version"', '"version"', "not JSON: Extra data"),
        ("CSV", "\n1,1", "\n2,1", "version: Input should be 1"),
        ("CSV", "\n1,1", "\none,1", "version: Input should be 1"),
        ("CSV", "0,L,0,0,0,,-1,0,\n", "", "(2,) operations by rank instead of (3,)"),
        ("CSV", "0,L,0", "0,L,-1", "ranks.0.1.1: Input should be greater than or equal to 0"),
        ("CSV", "0,L,0", "7,L,0", "line 5 is no operation of one of 1 ranks: 7,L,0,0,0,,-1,0,"),
        ("CSV", "0,L,0", "0,L", "line 5 is no operation of one of 1 ranks: 0,L,0,0,,-1,0,"),
        ("CSV", "-1,0,\n0,L", "-1,0,5 5\n0,L", "ranks.0.0.7"),
        ("CSV", "version,", "", "the first two lines do not give version, shape and counts"),
        ("CSV", "0,L,0", '0,"' + "L" * 200_000 + '",0', "not CSV: field larger than field limit"),
    ],
)
def test_damaged(form, old, new, message):
    dump, load = FORMS[form]
    text = dump(build_schedule(1, 1, 1, 1))
    assert old in text
    with pytest.raises(ScheduleError, match=re.escape(message)):
        load(text.replace(old, new, 1))


@settings(max_examples=60)
@given(st.sampled_from(sorted(FORMS)), st.data())
def test_cut_short(form, data):
    dump, load = FORMS[form]
    schedule = build_schedule(2, 1, 1, 2)
    text = dump(schedule).rstrip()
    shorter = text[: data.draw(st.integers(0, len(text) - 1))]
    try:
        loaded = load(shorter)
    except ScheduleError:
        return
    # only the separators of empty fields at the very end can be missing unnoticed, and then nothing is lost
    assert loaded == schedule
