"""The largest difference between sharded and plain single-process training, over all sharding types and ranks.

``python -m benchmarks.sharding [--quick] [--json PATH]``

The cases are those of ``tests/multi/test_equality.py``: 20 steps in fp32 on 1, 2 (one machine; two of one) and 4 ranks,
pooled and sequence tables, sums and means, weights, duplicates, empty bags. All row optimizers; row-wise ones take
their means over whole rows, also where columns are cut.
"""

from typing import Any

import torch

from benchmarks import measure
from tests.multi.harness import run_ranks
from tests.multi.sharded_twin import SEED, STEPS, Case, Outcome, assemble, train_all
from tests.multi.test_equality import RANKS, cases, further_cases
from tests.multi.twin import Plain, samples


def gaps(ranks: list[Outcome], plain: Plain) -> dict[str, float]:
    """Largest difference of losses and of weights."""
    losses = torch.tensor(ranks[0].losses) - torch.tensor(plain.losses)
    weights = [assemble(ranks, path, *weight.shape) - weight.detach() for path, weight in plain.tables.items()]
    dense = [
        outcome.dense[f"top.{name}"] - parameter.detach()
        for outcome in ranks
        for name, parameter in plain.top.named_parameters()
    ]
    return {
        "loss": float(losses.abs().max()),
        "weights": max(float(difference.abs().max()) for difference in (*weights, *dense)),
    }


def main() -> None:
    """Measures and reports."""
    chosen = measure.options(measure.parser("sharding: differences from plain training").parse_args())
    torch.set_num_threads(1)
    todo = {(world, local): cases(world, local) for world, local in (RANKS[:2] if chosen.quick else RANKS)}
    if not chosen.quick:
        todo[2, 2] = [*todo[2, 2], *further_cases()]
    plain: dict[str, Plain] = {}
    found: dict[str, Any] = {}
    for (world, local), some in todo.items():
        ranks = run_ranks(world, train_all, local, some, timeout_s=400, local_world=local)
        for number, case in enumerate(some):
            plain.setdefault(case.optimizer, _plain(case))
            name = f"{world}x{local} {case.kind} {case.optimizer}"
            found[name] = gaps([rank[number] for rank in ranks], plain[case.optimizer])
    results = {
        "cases": len(found),
        "max_loss": max(one["loss"] for one in found.values()),
        "max_weights": max(one["weights"] for one in found.values()),
        "by_case": found,
    }
    rows: list[list[object]] = [[name, f"{one['loss']:.1e}", f"{one['weights']:.1e}"] for name, one in found.items()]
    measure.report(
        "Sharded against plain, 20 steps", ["ranks, type, optimizer", "loss", "weights"], rows, results, chosen
    )


def _plain(case: Case) -> Plain:
    return Plain(case.table_optimizer, SEED, 1).train(samples(STEPS))


if __name__ == "__main__":
    main()
