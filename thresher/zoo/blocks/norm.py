"""Batch normalisation that weightless samples do not touch."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class BatchNorm(nn.BatchNorm1d):
    """``nn.BatchNorm1d`` over the rows that count.

    Statistics are those of the local batch: with several ranks each normalises by its own. Fewer than two counted rows
    have no variance; they are normalised by the running statistics, which then stay as they are.
    """

    def forward(self, values: Tensor, counted: Tensor | None = None) -> Tensor:
        """[N, D] from [N, D]; ``counted`` [N] bool, None for all rows."""
        if not self.training:
            return super().forward(values)
        sample = values if counted is None or bool(counted.all()) else values[counted]
        if sample.shape[0] < 2:
            return F.batch_norm(values, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        if sample is values:
            return super().forward(values)
        return self._normalise(values, sample)

    def _normalise(self, values: Tensor, sample: Tensor) -> Tensor:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        sample = sample.to(torch.promote_types(sample.dtype, torch.float32))
        variance, mean = torch.var_mean(sample, dim=0, correction=0)
        with torch.no_grad():
            unbiased = variance * (sample.shape[0] / (sample.shape[0] - 1))
            self.num_batches_tracked.add_(1)
            momentum = 0.1 if self.momentum is None else self.momentum
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
            self.running_var.lerp_(unbiased.to(self.running_var.dtype), momentum)
        scale = torch.rsqrt(variance + self.eps)
        normal = ((values - mean) * scale).to(values.dtype)
        return normal if self.weight is None else normal * self.weight + self.bias
