"""Messages of errors."""

import pickle

import pytest

from thresher import errors
from thresher.errors import BadBatch, DataError, ThresherError, nearest


def test_message_has_place_fault_and_cure() -> None:
    error = DataError("no column 'a'", where="x.parquet", fix="prepare again")
    assert error.message == str(error) == "DataError: x.parquet: no column 'a'. Prepare again"
    assert DataError("no column 'a'").message == "DataError: no column 'a'"


def test_errors_survive_a_pipe_between_processes() -> None:
    error = pickle.loads(pickle.dumps(BadBatch("id 7", where="row 3", fix="mend it")))
    assert type(error) is BadBatch
    assert (error.what, error.where, error.fix) == ("id 7", "row 3", "mend it")


@pytest.mark.parametrize(
    ("given", "allowed", "clause"),
    [
        ("recal", ["recall", "auc"], "did you mean 'recall'? Allowed: auc, recall"),
        ("AUC", ["recall", "auc"], "did you mean 'auc'? Allowed: auc, recall"),
        ("row", ["table_wise", "row_wise"], "did you mean 'row_wise'? Allowed: row_wise, table_wise"),
        ("zzz", ["b", "a"], "Allowed: a, b"),
        ("", ["b", "a"], "Allowed: a, b"),
        ("x", [], "Allowed: nothing"),
    ],
)
def test_nearest_names_a_close_spelling_and_all_choices(given: str, allowed: list[str], clause: str) -> None:
    assert nearest(given, allowed) == clause


def test_every_error_of_a_user_is_one_family() -> None:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)]
    assert len(kinds) > 5
    assert all(issubclass(kind, ThresherError) for kind in kinds)
