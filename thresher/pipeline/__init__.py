"""WHEN slices of a sequence flow through pipeline stages: SlimPipe (arXiv 2504.14519).

schedule/    which rank does what in which order: data, built by pure functions, validated, dumped
simulate/    how long that takes and how much memory: timelines, pictures, the best settings under a budget
attention/   attention of one slice over the slices before it
vocabulary/  input embedding and output layer cut by rows over the ranks of a pipeline
runtime/     executes a schedule on torch.distributed
parallel/    pipeline x data parallel: mesh, dense state, clipping
"""
