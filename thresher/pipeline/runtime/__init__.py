"""Executes a schedule on torch.distributed."""
