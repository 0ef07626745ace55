"""Scores of fields as a by-product of training: a hook on what collections give, another on its gradient.

SHARK's F-Permutation (arXiv 2308.09395) asks what the loss would do if a field's vectors were permuted among the
samples. To first order, and with the permuted vector replaced by its mean over the data,

    score_f = mean over samples n of | sum_d g_nfd (mean_fd - e_nfd) |,     g_nfd = d loss_n / d e_nfd

with e_nf the collection's output. The backward of training computes g anyway: there is no other pass. The absolute
value is taken of each sample, after the sum over the columns; without it samples cancel.

The mean is a moving one over what training saw until now, renewed after steps 1, 2, 4, 8, 16, 32, 48, ..., so that all
ranks use the same one and need no exchange in between. Where losses of samples depend on each other (batch norm), g is
the gradient of the batch's loss.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from thresher.embeddings.fields.field import Field, first_columns
from thresher.embeddings.fields.order import OutputOrder
from thresher.embeddings.fields.scores import BINS, FieldScores, merged, move_products, scores_of

RENEW_STEPS = 16
MEAN_DECAY = 0.9
"""Share of what the mean knew that it keeps when it is renewed."""


@dataclass(frozen=True)
class Samples:
    """The samples of the step in progress.

    Attributes:
        weight: [B] fp32, of each in the loss.
        scale: [B] fp32, what makes a gradient of the step's loss that of a sample's; 0 for samples of weight 0.
    """

    weight: Tensor
    scale: Tensor


class FieldScorer:
    """Collects scores while a model trains.

    Each rank sums up its own samples; ranks meet when the scores are read or saved. So the scores depend neither on how
    tables are sharded nor (but for rounding) on the number of ranks.

    Args:
        group: of all ranks; None for torch's default group, or for this process alone where there is none.
        mean: the constant to compare with in place of a moving mean, [columns of all fields] fp32.
    """

    def __init__(
        self,
        fields: Sequence[Field],
        device: torch.device,
        group: ProcessGroup | None = None,
        mean: Tensor | None = None,
    ) -> None:
        self.fields, self._device, self._group = tuple(fields), device, group
        self._firsts = first_columns(fields)
        self._columns = self._firsts[-1]
        self._widths = torch.tensor([field.width for field in fields], device=device)
        self._fixed, self._mean = mean is not None, mean
        self._mean_sums, self._mean_weights = self._zeros(self._columns), self._zeros(len(fields))
        self._window_sums, self._window_weights = self._zeros(self._columns), self._zeros(len(fields))
        self._bins, self._bin_weights = self._zeros(BINS, len(fields)), self._zeros(BINS)
        self._steps, self._scored, self._stride = 0, 0, 1
        self._samples: Samples | None = None

    def begin(self, weight: Tensor, parts: int = 1) -> None:
        """Call before the forward of each training step. Collective where the mean is due for renewal.

        Args:
            weight: [B] fp32, weights of this rank's samples; the loss is sum(weight x loss of a sample) / B / parts.
            parts: micro-batches of a step.
        """
        if not self._fixed and self._due():
            self.renew()
        self._steps += 1
        self._samples = Samples(weight, (weight > 0).to(weight.dtype) * (weight.numel() * parts))
        if self._mean is not None:
            if self._scored == self._stride * BINS:
                self._halve()
            self._scored += 1
            self._bin_weights[self._bin] += weight.sum()

    def pause(self) -> None:
        """Looks at no output until :meth:`begin` is called again: steps cost nothing."""
        self._samples = None

    @property
    def listening(self) -> bool:
        """Whether a step is in progress that counts."""
        return self._samples is not None

    def watch_pooled(self, order: OutputOrder, values: Tensor) -> None:
        """Takes note of a pooled output [B, D] and, when it comes, of its gradient."""
        # The hook must not hold `values` itself: a tensor that its own hook keeps alive is never freed.
        held, samples = values.detach(), self._now(values.shape[0])
        self._window_sums[order.columns] += torch.mv(held.T, samples.weight)
        self._window_weights[order.fields] += samples.weight.sum()
        if self._mean is not None:
            hook = partial(self._pooled, order, held, self._mean[order.columns], samples)
            values.register_hook(hook)  # type: ignore[no-untyped-call]

    def watch_sequence(self, field: int, values: Sequence[Tensor], lengths: Tensor) -> None:
        """Takes note of the vectors of a field's ids and, when they come, of their gradients.

        Args:
            field: its number.
            values: [n, width] for each of its keys.
            lengths: [B], ids of each sample; a sample's positions are summed up.
        """
        held, samples = torch.cat([part.detach() for part in values], dim=1), self._now(lengths.numel())
        owner = torch.repeat_interleave(lengths, output_size=held.shape[0])
        weight = samples.weight[owner]
        columns = slice(self._firsts[field], self._firsts[field + 1])
        self._window_sums[columns] += torch.mv(held.T, weight)
        self._window_weights[field] += weight.sum()
        if self._mean is not None:
            hook = partial(self._sequence, field, self._mean[columns] - held, owner, samples)
            torch.autograd.graph.register_multi_grad_hook(tuple(values), hook)

    def mean(self) -> Tensor:
        """[columns of all fields] fp32: the mean that moves are measured to; zeros before the second step."""
        return torch.zeros(self._columns, device=self._device) if self._mean is None else self._mean

    def renew(self) -> None:
        """Lets the mean take in what all ranks saw since it was last renewed. Collective."""
        seen = self._added_up(torch.cat([self._window_sums, self._window_weights]))
        self._mean_sums.mul_(MEAN_DECAY).add_(seen[: self._columns])
        self._mean_weights.mul_(MEAN_DECAY).add_(seen[self._columns :])
        self._window_sums.zero_()
        self._window_weights.zero_()
        self._mean = self._divided()

    def read(self) -> FieldScores:
        """The scores of the steps since the last :meth:`reset`. Collective."""
        total = self._added_up(torch.cat([self._bins, self._bin_weights[:, None]], dim=1))
        return scores_of(self.fields, total[:, :-1], total[:, -1])

    def reset(self) -> None:
        """Forgets the scores, not the mean."""
        self._bins.zero_()
        self._bin_weights.zero_()
        self._scored, self._stride = 0, 1

    def state_dict(self) -> dict[str, Tensor]:
        """What all ranks know together. Collective."""
        totals = {name: self._added_up(part) for name, part in self._own().items()}
        self._take(totals)
        known = 0 if self._mean is None else 1
        totals |= {"mean_sums": self._mean_sums.clone(), "mean_weights": self._mean_weights.clone()}
        return totals | {"counters": torch.tensor([self._steps, self._scored, self._stride, known])}

    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Goes on from what :meth:`state_dict` gave, on any number of ranks."""
        self._mean_sums.copy_(state_dict["mean_sums"])
        self._mean_weights.copy_(state_dict["mean_weights"])
        self._take(state_dict)
        self._steps, self._scored, self._stride, known = state_dict["counters"].tolist()
        self._mean = self._divided() if known else None

    @property
    def _bin(self) -> int:
        """Where the step in progress is counted."""
        return (self._scored - 1) // self._stride

    def _due(self) -> bool:
        steps = self._steps
        return steps > 0 and (steps % RENEW_STEPS == 0 or (steps < RENEW_STEPS and steps & (steps - 1) == 0))

    def _divided(self) -> Tensor:
        # A decaying sum over a decaying count: no correction for the first steps is needed.
        weights = torch.repeat_interleave(self._mean_weights, self._widths)
        return torch.where(weights > 0, self._mean_sums / weights, 0.0).float()

    def _halve(self) -> None:
        """Makes room for as many steps again: two bins become one."""
        for part in (self._bins, self._bin_weights):
            pairs = part[0::2] + part[1::2]
            part.zero_()
            part[: BINS // 2] = pairs
        self._stride *= 2

    def _pooled(self, order: OutputOrder, values: Tensor, mean: Tensor, samples: Samples, grad: Tensor) -> None:
        products, of = move_products(values, grad.float(), mean, order), order.fields
        if order.shared:
            products, of = merged(products, of)
        self._bins[self._bin, of] += torch.mv(products.abs_().T, samples.scale)

    def _sequence(
        self, field: int, moves: Tensor, owner: Tensor, samples: Samples, grads: Sequence[Tensor | None]
    ) -> None:
        given = [part for part in grads if part is not None]
        assert len(given) == len(grads), "a key of a field got no gradient"
        places = moves.mul_(torch.cat(given, dim=1).float()).sum(1)
        products = places.new_zeros(samples.weight.numel()).index_add_(0, owner, places)
        self._bins[self._bin, field] += torch.dot(products.abs_(), samples.scale)

    def _now(self, samples: int) -> Samples:
        """The samples of the step in progress, which the output is of."""
        assert self._samples is not None, "begin() comes before the forward"
        assert self._samples.weight.numel() == samples, "an output of other samples than those of begin()"
        return self._samples

    def _take(self, totals: Mapping[str, Tensor]) -> None:
        """Gives the sums of all ranks to the first one; the others start anew."""
        first = not dist.is_initialized() or dist.get_rank(self._group) == 0
        for name, part in self._own().items():
            part.copy_(totals[name] if first else torch.zeros_like(part))

    def _own(self) -> dict[str, Tensor]:
        """What each rank knows alone."""
        return {
            "window_sums": self._window_sums,
            "window_weights": self._window_weights,
            "bins": self._bins,
            "bin_weights": self._bin_weights,
        }

    def _added_up(self, part: Tensor) -> Tensor:
        """The sum over all ranks, a copy."""
        total = part.clone()
        if dist.is_initialized():
            dist.all_reduce(total, group=self._group)
        return total

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(*shape, dtype=torch.float64, device=self._device)
