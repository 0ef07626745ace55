"""Held-out AUC of LR, DeepFM and DCN V2 beside FuxiCTR's and torch's SparseAdam: what stands beside the speed.

``python -m benchmarks.auc_ctr [--data NAME ...] [--quick] [--json PATH]``

The same rows, the same batches in the same order, the same epochs; the update rule of the tables differs
(:mod:`benchmarks.train_ctr` says how). Settings stand in :mod:`benchmarks.ctr.auc`.
"""

import torch

from benchmarks import measure
from benchmarks.ctr.auc import TASKS, auc_gaps, auc_rows, auc_table
from benchmarks.ctr.contestants import NAMES, one_rank


def main() -> None:
    """Measures and reports."""
    parser = measure.parser("auc_ctr: held-out AUC beside FuxiCTR")
    parser.add_argument("--data", nargs="+", choices=sorted(TASKS), default=sorted(TASKS), help="data sets")
    given = parser.parse_args()
    chosen = measure.options(given)
    torch.set_num_threads(1)
    with one_rank():
        found = auc_table(given.data, seeds=1 if chosen.quick else 3)
    results = {"auc": found, "auc_gap": auc_gaps(found)}
    columns = ["data, model", *(f"{name} {what}" for name in NAMES for what in ("AUC", "spread"))]
    measure.report("Held-out AUC, same epochs", columns, auc_rows(found), results, chosen)


if __name__ == "__main__":
    main()
