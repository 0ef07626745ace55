"""SlimPipe beside torch.distributed.pipelining: ``python -m benchmarks.pipeline PART ... [--quick] [--json PATH]``."""
