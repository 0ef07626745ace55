"""HOW a model is trained: the loop, the step, configuration, metrics, callbacks, checkpoints, the report."""
