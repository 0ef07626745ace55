"""A TorchRec program trains with our tables after the changes that ``docs/migrate_from_torchrec.md`` shows."""

import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from tests.multi import torchrec_program
from tests.multi.harness import run_ranks
from thresher.sharding.held import ShardedTables

DOCUMENT = Path(__file__).parents[2] / "docs" / "migrate_from_torchrec.md"
TIERS = ', model=model, tiers=TierConfig(budget="40%")'


def migrated(with_tiers: bool) -> str:
    """The program's text with the document's changes."""
    (block,) = re.findall(r"```diff\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)
    lines = Path(torchrec_program.__file__).read_text(encoding="utf-8").splitlines()
    place = 0
    for change in block.splitlines():
        kind, text = change[0], change[1:]
        if kind == "+":
            lines.insert(place, text)
            place += 1
            continue
        place = lines.index(text, place)
        if kind == "-":
            del lines[place]
        else:
            place += 1
    text = "\n".join(lines)
    assert text.count(TIERS) == 1
    return text if with_tiers else text.replace(TIERS, "")


def run(rank: int, world: int, text: str) -> tuple[list[float], float]:
    """Losses, and the share of their fp32 bytes that tables with tiers take (0 without)."""
    program = ModuleType("program")
    exec(compile(text, "program", "exec"), program.__dict__)
    made: Any = program
    losses, model = made.train(rank, world)
    if TIERS not in text:
        return losses, 0.0
    controller = ShardedTables(model).controller
    assert controller is not None
    ledger = controller.ledger()
    return losses, sum(t.live_bytes for t in ledger.tables) / sum(t.fp32_bytes for t in ledger.tables)


def losses_of(text: str) -> list[tuple[list[float], float]]:
    return run_ranks(2, run, text, timeout_s=120)


def test_without_tiers_the_losses_are_those_of_torchrec() -> None:
    before = losses_of(Path(torchrec_program.__file__).read_text(encoding="utf-8"))
    after = losses_of(migrated(with_tiers=False))
    for (wanted, _), (found, _) in zip(before, after, strict=True):
        assert found == pytest.approx(wanted, abs=2e-6)


def test_with_tiers_it_trains_within_the_budget() -> None:
    flat, tiered = losses_of(migrated(with_tiers=False)), losses_of(migrated(with_tiers=True))
    for (_, share), (wanted, _) in zip(tiered, flat, strict=True):
        assert 0.0 < share <= 0.4
        assert len(wanted) == torchrec_program.STEPS
    spread = torch.tensor([found for found, _ in tiered]) - torch.tensor([wanted for wanted, _ in flat])
    assert 0.0 < float(spread.abs().max()) < 0.2
