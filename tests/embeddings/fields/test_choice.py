"""Which fields a round drops, and how rounds begin and end."""

import math

import pytest
import torch

from thresher.embeddings.fields.choice import Chooser
from thresher.embeddings.fields.config import FieldConfig
from thresher.embeddings.fields.field import find_fields
from thresher.embeddings.fields.rounds import Phase, Rounds
from thresher.embeddings.tables import TableInfo
from thresher.errors import ConfigError
from thresher.settings import parse

TABLES = [
    TableInfo("m", "big", 1000, 8, True, ("a",)),
    TableInfo("m", "shared", 100, 8, True, ("b", "c")),
    TableInfo("m", "small", 10, 8, True, ("d",)),
]
BYTES = {"m.big": 800, "m.shared": 160, "m.small": 40}
SCORES = torch.tensor([0.4, 0.1, 0.2, 0.05], dtype=torch.float64)


def chooser(**settings: object) -> Chooser:
    return Chooser.of(FieldConfig(score_every=10, rounds=9, **settings), find_fields(TABLES), BYTES)


def test_fields_go_by_score():
    assert chooser(fields_per_round=2).next_round(SCORES, ()) == (3, 1)
    assert chooser(fields_per_round=2).next_round(SCORES, {3}) == (1, 2)


def test_with_a_budget_they_go_by_score_per_byte_until_it_is_kept():
    rules = chooser(fields_per_round=9, budget="25%")
    assert rules.next_round(SCORES, ()) == (0,)  # 0.4 / 800 is the least
    assert rules.bytes_in_use({0}) == 200
    assert not rules.within_budget(())
    assert rules.within_budget({0})
    assert rules.next_round(SCORES, {0}) == ()


def test_a_shared_table_is_freed_by_its_last_reader():
    rules = chooser()
    assert rules.field_bytes() == [800, 80, 80, 40]
    assert rules.field_bytes({1}) == [800, 160, 160, 40]
    assert rules.bytes_in_use({1}) == 1000
    assert rules.bytes_in_use({1, 2}) == 840


def test_a_table_of_a_protected_field_is_never_freed_so_its_other_readers_stay_where_bytes_count():
    scores = torch.tensor([0.4, 0.001, 0.2, 0.05], dtype=torch.float64)
    rules = chooser(fields_per_round=9, budget="10%", protect=("c",))
    assert rules.field_bytes() == [800, 0, 160, 40]
    assert rules.next_round(scores, ()) == (0, 3)
    assert chooser(fields_per_round=1, protect=("c",)).next_round(scores, ()) == (1,)


def test_a_round_by_bytes_frees_at_least_so_many():
    rules = chooser(bytes_per_round="10%")
    assert rules.next_round(SCORES, ()) == (3, 1, 2)


def test_protected_fields_and_those_without_a_score_stay():
    assert chooser(fields_per_round=9, protect=("d",)).next_round(SCORES, ()) == (1, 2, 0)
    unknown = torch.tensor([math.nan, 0.1, math.nan, 0.05], dtype=torch.float64)
    assert chooser(fields_per_round=9).next_round(unknown, ()) == (3, 1)


def test_one_field_always_stays():
    assert chooser(fields_per_round=9).next_round(SCORES, ()) == (3, 1, 2)


def test_a_field_of_several_tables_counts_their_bytes_together():
    both = [*TABLES, TableInfo("m", "other", 10, 4, True, ("d",))]
    fields = find_fields(both)
    assert fields[3].keys == ("d@small", "d@other")
    rules = Chooser.of(FieldConfig(), fields, BYTES | {"m.other": 60})
    assert rules.field_bytes()[3] == 100


def test_features_of_several_collections_are_told_apart():
    names = [field.name for field in find_fields([*TABLES, TableInfo("n", "x", 5, 4, True, ("a",))])]
    assert names == ["m:a", "b", "c", "d", "n:a"]


def test_settings_that_say_nothing_are_refused():
    with pytest.raises(ConfigError, match="fields are dropped by their scores, but score_every is 0"):
        parse(FieldConfig, {"rounds": 1}, "run.yaml")
    with pytest.raises(ConfigError, match=r"fields.budget: '70' is no budget"):
        chooser(budget="70")
    with pytest.raises(ConfigError, match=r"fields.protect: the model has no field 'e'"):
        chooser(protect=("e",))


def test_rounds_are_tried_judged_and_counted():
    rounds = Rounds(FieldConfig(score_every=10, start_after=5, rounds=2, finetune_steps=4), 4)
    assert [step for step in range(40) if rounds.scores_due(step)] == [15, 25, 35]
    rounds.reference = 0.7
    rounds.dropped((2,), 15)
    assert [step for step in range(15, 22) if rounds.check_due(step, last=99)] == [19, 20, 21]
    assert rounds.check_due(17, last=17)
    assert rounds.held(0.6991, lower_is_better=False)
    assert not rounds.held(0.6989, lower_is_better=False)
    assert not rounds.held(0.7011, lower_is_better=True)
    assert not rounds.held(math.nan, lower_is_better=False)
    rounds.judged(held=True)
    assert (rounds.phase, rounds.done, rounds.pending) == (Phase.SCORING, 1, ())
    rounds.dropped((0,), 25)
    rounds.judged(held=False)
    assert (rounds.phase, rounds.done) == (Phase.OVER, 1)


def test_rounds_go_on_from_a_checkpoint():
    config = FieldConfig(score_every=10, rounds=2)
    rounds, other = Rounds(config, 4), Rounds(config, 4)
    rounds.reference = 0.7
    rounds.dropped((2, 0), 20)
    other.load_state_dict(rounds.state_dict())
    assert (other.phase, other.pending, other.reference) == (Phase.TUNING, (0, 2), 0.7)
    assert [other.check_due(step, 99) for step in (29, 30)] == [False, True]
