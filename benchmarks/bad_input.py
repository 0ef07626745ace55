"""How many catalogued bad inputs give one clear message: ``python -m benchmarks.bad_input [--json PATH]``.

The catalogue is that of ``tests/bad_input``: each message must be a Thresher error that holds the words of the case.
"""

import os
import tempfile
from pathlib import Path

from benchmarks import measure
from tests.bad_input.case import Case
from tests.bad_input.test_bad_input import CASES
from thresher.errors import ThresherError


def clear(case: Case) -> bool:
    """Whether the case ends in the message it should."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory(prefix="thresher-bad-") as folder:
        os.chdir(folder)
        try:
            case.act(Path(folder))
        except ThresherError as error:
            return isinstance(error, case.error) and all(piece in error.message for piece in case.told)
        except Exception:
            return False
        finally:
            os.chdir(before)
    return False


def main() -> None:
    """Measures and reports."""
    chosen = measure.options(measure.parser("bad input: messages that name place and cure").parse_args())
    unclear = [case.id for case in CASES if not clear(case)]
    results = {"cases": len(CASES), "clear": len(CASES) - len(unclear), "unclear": len(unclear), "which": unclear}
    rows: list[list[object]] = [["catalogued", len(CASES)], ["not clear", len(unclear)]]
    measure.report("Bad input", ["", "cases"], rows, results, chosen)


if __name__ == "__main__":
    main()
