"""Checkpoints: torch DCP inside a transaction. See ``docs/checkpoints.md``."""

from thresher.trainer.checkpoint.directories import Directories
from thresher.trainer.checkpoint.lazy import LazyOptimizer, Prepared
from thresher.trainer.checkpoint.sharded import TableState, model_state
from thresher.trainer.checkpoint.store import BadCheckpoint, CheckpointStore, RestoredCheckpoint, SavedCheckpoint, State
from thresher.trainer.checkpoint.verify import verify

__all__ = [
    "BadCheckpoint",
    "CheckpointStore",
    "Directories",
    "LazyOptimizer",
    "Prepared",
    "RestoredCheckpoint",
    "SavedCheckpoint",
    "State",
    "TableState",
    "model_state",
    "verify",
]
