"""State that comes into being only when it is used first, and must exist before a checkpoint can be read into it."""

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torchrec.optim.keyed import KeyedOptimizer


@runtime_checkable
class Prepared(Protocol):
    """Something that must know what a checkpoint holds before it can be read into."""

    def prepare(self, saved: Mapping[str, Any], facts: Mapping[str, Any]) -> dict[str, Any]:
        """What the checkpoint is read into: state of the same structure as ``state_dict``.

        Args:
            saved: DCP's metadata of what the checkpoint holds for it, by its own nesting joined by dots.
            facts: what it described itself with when it was saved (:class:`Described`).
        """


@runtime_checkable
class Described(Protocol):
    """Something with facts beside its tensors: they go into the manifest and are known before loading."""

    def facts(self) -> dict[str, Any]:
        """JSON; entries that several ranks give are the same."""


class LazyOptimizer:
    """A keyed optimizer that creates the state of a parameter at its first gradient, as torch's optimizers do."""

    def __init__(self, optimizer: KeyedOptimizer) -> None:
        self._optimizer = optimizer

    def state_dict(self) -> dict[str, Any]:
        """State tensors by parameter name; they share memory with the optimizer's."""
        return self._optimizer.state_dict()  # type: ignore[no-any-return]

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Takes over state of the same structure."""
        self._optimizer.load_state_dict(state_dict)

    def prepare(self, saved: Mapping[str, Any], facts: Mapping[str, Any]) -> dict[str, Any]:
        """Gives state to exactly the parameters that have some in the checkpoint; neither weights nor rates change.

        A parameter that has not had a gradient yet has no state, and must have none after loading: its first step
        counts as the first.
        """
        having = {key.removeprefix("state.").rpartition(".")[0] for key in saved}
        params: Mapping[str, Any] = self._optimizer.params
        for key, param in params.items():
            param.grad = None
            if key not in having:
                self._optimizer.state.pop(param, None)
        fresh = [param for key, param in params.items() if key in having and param not in self._optimizer.state]
        for param in fresh:
            param.grad = torch.zeros_like(param)
        if fresh:
            _step_in_place(self._optimizer)
        for param in params.values():
            param.grad = None
        return self.state_dict()


def _step_in_place(optimizer: KeyedOptimizer) -> None:
    """A step at a learning rate of 0, which is what makes torch's optimizers create their state."""
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    optimizer.step()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
