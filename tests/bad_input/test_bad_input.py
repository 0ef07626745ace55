"""The catalogue of bad input: one clear message each, that names the place and the cure, and no traceback."""

from collections import Counter
from pathlib import Path

import pytest

from tests.bad_input import config_cases, data_cases, pipeline_cases, prepare_cases, run_cases, table_cases
from tests.bad_input.case import Case
from thresher.launch.messages import USER_ERROR, tell

CASES: tuple[Case, ...] = (
    *config_cases.CASES,
    *data_cases.CASES,
    *pipeline_cases.CASES,
    *prepare_cases.CASES,
    *run_cases.CASES,
    *table_cases.CASES,
)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_message_names_place_and_cure(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(case.error) as caught:
        case.act(tmp_path)
    capsys.readouterr()
    assert tell(caught.value, debug=False) == USER_ERROR
    told = capsys.readouterr().err
    assert told.startswith(f"{type(caught.value).__name__}: ")
    assert [piece for piece in case.told if piece not in told] == [], told
    assert caught.value.fix or "; " in told, told
    assert "Traceback" not in told
    assert len(told) < 1500


def test_catalogue_is_large_and_has_no_twins() -> None:
    assert len(CASES) >= 90
    assert [id for id, count in Counter(case.id for case in CASES).items() if count > 1] == []
