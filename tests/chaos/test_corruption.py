"""A thousand damaged checkpoints: each is found, its file named, and the one before it loaded."""

import random
import shutil
from collections import Counter
from pathlib import Path

import pytest

from tests.chaos import small
from tests.chaos.corruption import KINDS, damage, kinds
from tests.multi.harness import run_ranks
from thresher.trainer.checkpoint import CheckpointStore, verify


@pytest.fixture(scope="module")
def pristine(tmp_path_factory) -> Path:
    """Three checkpoints of two ranks."""
    folder = tmp_path_factory.mktemp("pristine")
    run_ranks(2, small.save_steps, str(folder), [1, 2, 3], 5, timeout_s=60)
    return folder


def restored(folder: Path) -> tuple[int, list[str]]:
    """The step that a real restore ends with, its values checked, and what it says was wrong."""
    target = small.state(0)
    record = CheckpointStore(folder, 5).restore(target)
    assert record is not None
    assert small.matches(target, record.step)
    return record.step, [problem for bad in record.skipped for problem in bad.problems]


def test_without_damage_the_newest_is_loaded(pristine):
    assert restored(pristine) == (3, [])


def test_a_thousand_corruptions_and_none_is_silent(pristine, tmp_path):
    rng = random.Random(20261122)
    tried: Counter[str] = Counter()
    for number, kind in enumerate(kinds(rng, 1000)):
        folder = tmp_path / str(number)
        shutil.copytree(pristine, folder)
        done = damage(rng, folder, kind)
        step, problems = restored(folder)
        assert step < 3, done
        assert any(name in problem for name in done.files for problem in problems), (done, problems)
        tried[kind] += 1
        shutil.rmtree(folder)
    assert sum(tried.values()) == 1000
    assert tried.keys() == KINDS.keys()


@pytest.mark.parametrize("kind", KINDS)
def test_verify_alone_names_the_file(pristine, tmp_path, kind):
    shutil.copytree(pristine, tmp_path / "copy")
    done = damage(random.Random(7), tmp_path / "copy", kind)
    problems = verify(done.checkpoint)
    assert any(name in problem for name in done.files for problem in problems)
