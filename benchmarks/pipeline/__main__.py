"""The pipeline beside its rivals: ``python -m benchmarks.pipeline [PART ...] [--quick] [--json PATH]``.

    memory      bytes of a step beside torch's 1F1B and interleaved 1F1B
    speed       seconds of a step beside them, two independent processes and the plain model
    alone       one rank beside the plain model
    twin        bubbles of stages that sleep, beside the formula; what an exchange of attention saves
    prediction  simulated beside measured steps

Without a part, memory, speed and alone run. Readings of speed and prediction are kept in ``--samples`` as they come: a
run that was stopped goes on where it was, and a finished one only reports.
"""

from pathlib import Path
from typing import Any

from benchmarks import measure
from benchmarks.pipeline import alone, memory, prediction, speed, twin

PARTS = ("memory", "speed", "alone", "twin", "prediction")


def main() -> None:
    """Measures and reports."""
    parser = measure.parser("pipeline: SlimPipe beside torch.distributed.pipelining")
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--samples", type=Path, default=Path(".cache/pipeline/samples.jsonl"), metavar="PATH")
    parser.add_argument("--minutes", type=float, default=25, help="no new round of speed or prediction begins after it")
    given = parser.parse_args()
    if unknown := set(given.parts) - set(PARTS):
        parser.error(f"no part {', '.join(sorted(unknown))}: choose from {', '.join(PARTS)}")
    chosen = measure.options(given)
    results: dict[str, Any] = {}
    for part in given.parts or PARTS[:3]:
        if part in ("speed", "prediction"):
            run = speed.main if part == "speed" else prediction.main
            results[part] = run(chosen, given.samples, given.minutes * 60)
        else:
            results[part] = {"memory": memory, "alone": alone, "twin": twin}[part].main(chosen)
    rows = [[part, name, value] for part, one in results.items() for name, value in one.items() if is_figure(value)]
    measure.report("Pipeline", ["part", "figure", "value"], rows, results, chosen)


def is_figure(value: object) -> bool:
    """Whether a result is one number."""
    return isinstance(value, float)


if __name__ == "__main__":
    main()
