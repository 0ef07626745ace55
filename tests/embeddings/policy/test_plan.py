"""From tiers as a user writes them to a plan; every way in which they may be wrong."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.embeddings.policy.small import info, planned
from thresher.embeddings.optimizers import TableOptimizer
from thresher.embeddings.policy.budget import budget_bytes, readable
from thresher.embeddings.policy.config import TierConfig
from thresher.embeddings.policy.importance import sample_importance
from thresher.embeddings.policy.plan import TierPlan, parse_levels, require_room, tier_plan
from thresher.embeddings.rows.tiers import Tier
from thresher.errors import ConfigError
from thresher.settings import parse

ROWWISE = TableOptimizer()
ADAM = TableOptimizer(name="adam")
BIG = info("big", 10_000, 64)
SMALL = info("small", 100, 64)
LINEAR = info("linear", 1_000_000, 1)


def config(**given: Any) -> TierConfig:
    return parse(TierConfig, {"budget": "40%", **given}, "tiers")


@pytest.mark.parametrize(
    ("text", "allowed"),
    [("40%", 400), ("12.5 %", 125), ("2GB", 2 * 10**9), ("512 mb", 512 * 10**6), ("1.5KiB", 1536), ("77b", 77)],
)
def test_a_budget_is_a_share_or_bytes(text: str, allowed: int) -> None:
    assert budget_bytes(text, 1000) == allowed


@pytest.mark.parametrize(
    ("text", "advice"),
    [
        ("0.4", "Write 40% for a share"),
        ("2000000", "Write 40% for a share"),
        ("much", "Write a share of the fp32 size such as 40%"),
        ("-3GB", "Write a share"),
        ("0%", "Leave it empty"),
    ],
)
def test_other_budgets_are_refused(text: str, advice: str) -> None:
    with pytest.raises(ConfigError, match=r"tiers\.budget.*" + advice):
        budget_bytes(text, 1000)


def test_bytes_are_readable() -> None:
    assert [readable(size) for size in (0, 999, 1500, 2_500_000, 3 * 10**12)] == [
        "0 B",
        "999 B",
        "1.5 kB",
        "2.5 MB",
        "3.0 TB",
    ]


def test_small_odd_and_narrow_tables_stay_flat_and_say_why() -> None:
    narrow = info("narrow", 1_000_000, 4)
    plan = tier_plan([BIG, SMALL, LINEAR, narrow], config(budget="95%"), ROWWISE)
    assert plan.by_path["bags.big"].levels == (Tier.INT8, Tier.FP16, Tier.FP32)
    assert [table.path for table in plan.tiered] == ["bags.big"]
    assert [plan.by_path[f"bags.{name}"].why_flat for name in ("small", "linear", "narrow")] == [
        "no larger than 1.0 MB",
        "its width 1 is odd",
        "a row of width 4 would not become smaller",
    ]
    assert all(table.levels == (Tier.FP32,) for table in plan.tables if not table.tiered)


def test_bytes_of_a_plan_are_those_of_the_storage() -> None:
    plan = tier_plan([BIG, SMALL], config(), ROWWISE)
    assert plan.fp32_bytes == (10_000 + 100) * (64 * 4 + 4)
    assert plan.budget_bytes == int(0.4 * plan.fp32_bytes)
    big = plan.by_path["bags.big"]
    assert [big.row_bytes(tier) for tier in big.levels] == [64, 128, 256]
    assert big.least_bytes() == 10_000 * 80
    assert big.least_bytes([32, 32]) == 10_000 * 96
    # Adam's two vectors follow the row's precision, but not below bf16.
    adam = tier_plan([BIG], config(budget="50%"), ADAM).by_path["bags.big"]
    assert adam.row_bytes(Tier.INT8) == 64 + 2 * 128
    assert adam.fp32_bytes == 10_000 * 64 * 12


def test_tables_with_tiers_share_what_flat_ones_leave() -> None:
    plan = tier_plan([BIG, SMALL], config(), ROWWISE)
    flat = plan.planned_bytes("bags.small", 100, 64)
    assert flat == 100 * 260
    whole = plan.planned_bytes("bags.big", 10_000, 64)
    assert whole + flat == pytest.approx(plan.budget_bytes, abs=10)
    assert plan.planned_bytes("bags.big", 5_000, 64) == pytest.approx(whole / 2, abs=10)
    # Never less than the headers and the lowest tier: here column shards of width 4.
    assert plan.planned_bytes("bags.big", 10_000, 4) == 10_000 * (16 + 4)


def test_what_is_asked_for_a_table_goes_before_the_rest() -> None:
    asked = config(budget="100%", tables={"small": {"levels": ["int4", "fp16"]}, "big": {"levels": ["fp32"]}})
    plan = tier_plan([BIG, SMALL], asked, ROWWISE)
    assert plan.by_path["bags.small"].levels == (Tier.INT4, Tier.FP16)
    assert plan.by_path["bags.big"].why_flat == "fp32 only"


@pytest.mark.parametrize(
    ("levels", "entry"),
    [
        (("fp32", "fp16", "int8", "int4", "dropped"), Tier.INT8),
        (("int4", "fp32"), Tier.FP32),
        (("fp16", "fp32"), Tier.FP16),
        (("dropped", "int4"), Tier.INT4),
        (("int8",), Tier.INT8),
    ],
)
def test_rows_enter_at_int8_or_the_next_above(levels: tuple[str, ...], entry: Tier) -> None:
    assert tier_plan([BIG], config(budget="60%", levels=levels), ROWWISE).tables[0].entry is entry


def test_replicated_tables_are_not_counted() -> None:
    plan = tier_plan([BIG, SMALL], config(), ROWWISE, replicated={"bags.small"})
    assert [table.path for table in plan.tables] == ["bags.big"]
    assert plan.fp32_bytes == 10_000 * 260


def test_a_model_without_placed_tables_has_an_empty_plan() -> None:
    assert tier_plan([BIG], config(), ROWWISE, replicated={"bags.big"}).tables == ()


def test_fp32_tables_have_tiers_where_files_hold_them() -> None:
    storage = {"folder": "slabs", "tiers": ["fp32"]}
    plan = tier_plan([BIG], config(budget="110%", levels=["fp32"], storage=storage), ROWWISE)
    assert plan.tables[0].tiered
    assert plan.tables[0].entry is Tier.FP32


@pytest.mark.parametrize("budget", ["100.1%", "400 %"])
def test_a_share_above_the_whole_is_refused(budget: str) -> None:
    with pytest.raises(ConfigError) as told:
        tier_plan([BIG], config(budget=budget), ROWWISE)
    assert told.value.message == (
        f"ConfigError: tiers.budget: '{budget}' is more than the 2.6 MB that the tables take without tiers. "
        "Give at most 100%, or bytes such as 2GB for a limit that tables may stay below"
    )
    assert tier_plan([BIG], config(budget="100%"), ROWWISE).budget_bytes == 2_600_000
    assert tier_plan([BIG], config(budget="1GB"), ROWWISE).budget_bytes == 10**9


def test_cuts_that_need_more_than_the_whole_are_not_answered_by_a_share() -> None:
    plan = tier_plan([BIG], config(budget="100%"), ROWWISE)
    with pytest.raises(
        ConfigError, match=r"less than 3\.2 MB, 123\.1%.* Cut fewer tables by columns, add lower levels"
    ):
        require_room(plan, plan.by_path["bags.big"].least_bytes([4] * 16))


def test_a_plan_is_plain_data() -> None:
    plan = tier_plan([BIG, SMALL], config(), ROWWISE)
    assert TierPlan.model_validate_json(plan.model_dump_json()) == plan


def test_an_impossible_budget_is_told_with_the_least_share() -> None:
    with pytest.raises(ConfigError) as told:
        tier_plan([BIG, SMALL], config(budget="30%"), ROWWISE)
    least = 10_000 * 80 + 100 * 260
    share = -(-least * 1000 // (10_100 * 260)) / 10
    for part in (
        "tiers.budget: ",
        f"30% of the tables' {readable(10_100 * 260)}",
        f"less than {readable(least)}, {share:g}%",
        "'big' 800.0 kB (all int8), 'small' 26.0 kB (no larger than 1.0 MB)",
        f"Give {share:g}% or more, lower tiers.flat_below_bytes, add lower levels",
    ):
        assert part in told.value.message
    # The share that the message tells suffices; the next lower one it could have told does not.
    tier_plan([BIG, SMALL], config(budget=f"{share:g}%"), ROWWISE)
    with pytest.raises(ConfigError):
        tier_plan([BIG, SMALL], config(budget=f"{share - 0.1:g}%"), ROWWISE)


def test_lower_levels_make_a_budget_possible() -> None:
    for levels, share in ((("int4", "fp32"), 19), (("dropped", "fp32"), 7)):
        assert tier_plan([BIG], config(budget=f"{share}%", levels=levels), ROWWISE).tables[0].tiered
        with pytest.raises(ConfigError, match="cannot take less"):
            tier_plan([BIG], config(budget=f"{share - 1}%", levels=levels), ROWWISE)


def test_column_shards_have_headers_of_their_own() -> None:
    plan = tier_plan([BIG], config(budget="31%"), ROWWISE)
    require_room(plan, plan.tables[0].least_bytes())
    with pytest.raises(
        ConfigError, match=r"less than 960.0 kB, 37% \(160.0 kB of it because tables are cut by columns\)"
    ):
        require_room(plan, plan.tables[0].least_bytes([32, 32]))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"tables": {"bigg": {}}}, r"tiers\.tables\.bigg.*no table 'bigg'.*Did you mean 'big'"),
        ({"protect": ["smal"]}, r"tiers\.protect.*no table 'smal'.*Did you mean 'small'"),
        (
            {"protect": ["big"], "tables": {"big": {"levels": ["int8"]}}},
            r"tiers\.tables\.big.*protected and has levels int8.*Remove one",
        ),
        (
            {"tables": {"linear": {"levels": ["int8", "fp32"]}}},
            r"tiers\.tables\.linear\.levels.*cannot have tiers: its width 1 is odd.*\[fp32\]",
        ),
        ({"levels": ["dropped"]}, r"tiers\.levels.*no level holds weights.*Add fp32"),
        ({"tables": {"big": {"levels": ["dropped"]}}}, r"tiers\.tables\.big\.levels.*no level holds weights"),
    ],
)
def test_faults_are_told_with_their_place(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tier_plan([BIG, SMALL, LINEAR], config(budget="90%", **given), ROWWISE)


def test_unknown_levels_are_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"here: 'int9' is no tier. Did you mean 'int8'"):
        parse_levels(["int9"], "here")


def test_protected_tables_may_say_that_they_are_fp32() -> None:
    asked = config(budget="100%", protect=["big"], tables={"big": {"levels": ["fp32"]}})
    assert planned(asked, BIG).tables[0].why_flat == "protected"


def test_storage_needs_known_tiers(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="int7"):
        config(storage={"folder": str(tmp_path), "tiers": ["int7"]})


def test_positive_samples_weigh_more() -> None:
    labels = torch.tensor([[0.0, 0.0], [0.0, 1.0], [2.0, 0.0]])
    assert sample_importance(labels, 4.0).tolist() == [1.0, 4.0, 4.0]
    assert sample_importance(labels[:, 0], 0.5).tolist() == [1.0, 1.0, 0.5]
    assert sample_importance(labels, 4.0, torch.tensor([2.0, 0.0, 1.0])).tolist() == [1.0, 0.0, 4.0]
    assert sample_importance(torch.empty(2, 0), 4.0).tolist() == [1.0, 1.0]
