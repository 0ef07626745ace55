"""All that a TorchRec program needs to train with our tables: sharders for its own planner and model, and tiers.

sharders = make_sharders(TableOptimizer(lr=0.1), model=model, tiers=TierConfig(budget="40%"))
plan = EmbeddingShardingPlanner(...).collective_plan(model, sharders, group)
model = DistributedModelParallel(model, plan=plan, sharders=sharders)
keep_tiers(model)
"""

from torch import nn

from thresher.embeddings.optimizers import TableOptimizer
from thresher.embeddings.policy.config import TierConfig
from thresher.sharding.held import ShardedTables
from thresher.sharding.sharders import sharders as make_sharders

__all__ = ["TableOptimizer", "TierConfig", "keep_tiers", "make_sharders"]


def keep_tiers(model: nn.Module) -> ShardedTables:
    """Lets the rows of a sharded model move between tiers as it trains. Collective; without tiers nothing happens.

    Args:
        model: the ``DistributedModelParallel``; every forward with gradients counts as a step.

    Returns:
        This rank's tables; ``observe`` weighs samples, ``controller.ledger()`` tells rows and bytes.

    Raises:
        PlanError: its collections were not sharded by one list of our sharders.
    """
    tables = ShardedTables(model)
    tables.follow(model)
    return tables
