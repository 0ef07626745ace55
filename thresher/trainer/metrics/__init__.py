"""How good predictions are: streaming over batches, exact over ranks, weighted by sample weight.

Every metric is collected per rank with ``update`` and computed by all ranks together with ``compute``; the result is
the one that a single process would get from all samples at once, however they were split over ranks and batches. Sums
are float64: whole-number weights add up exactly, others to rounding. A sample of weight 0 is ignored entirely. A metric
that is undefined on the samples seen (AUC of one class, anything of no samples) is NaN.
"""

from thresher.trainer.metrics.binary import BinaryMetrics
from thresher.trainer.metrics.ranking import RankingMetrics
from thresher.trainer.metrics.regression import RegressionMetrics
from thresher.trainer.metrics.retrieval import item_chunks, target_ranks
from thresher.trainer.metrics.tokens import TokenMetrics

__all__ = ["BinaryMetrics", "RankingMetrics", "RegressionMetrics", "TokenMetrics", "item_chunks", "target_ranks"]
