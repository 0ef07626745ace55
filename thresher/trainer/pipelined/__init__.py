"""Runs whose model is cut into the stages of a pipeline: the same faces as for any model, the same one loop."""
