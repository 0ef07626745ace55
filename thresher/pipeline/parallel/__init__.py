"""Pipelines side by side: the mesh, dense optimizer state, gradient clipping."""
