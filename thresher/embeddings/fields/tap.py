"""Hooks that put scores and pruning between a model and its collections of tables, sharded or not.

They stand on the data-parallel side: ids before they are sent, vectors after they have come back. There a rank has the
whole vectors of its own samples, whatever the sharding type.

    batch --> [drop ids] --> exchange --> rows --> exchange --> [constants] --> [score] --> model
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

from torch import Tensor, nn
from torchrec import JaggedTensor, KeyedJaggedTensor, KeyedTensor
from torchrec.distributed.types import LazyAwaitable

from thresher.embeddings.fields.order import OutputOrder
from thresher.embeddings.fields.pruning import FieldPruner, with_values
from thresher.errors import PlanError

Jagged = dict[str, JaggedTensor]


class Listener(Protocol):
    """Hears of outputs that get a gradient."""

    @property
    def listening(self) -> bool:
        """Whether it wants to."""
        ...

    def watch_pooled(self, order: OutputOrder, values: Tensor) -> None:
        """Takes a pooled output [B, D]."""
        ...

    def watch_sequence(self, field: int, values: Sequence[Tensor], lengths: Tensor) -> None:
        """Takes the outputs [n, width] of all keys of a field; ``lengths`` [B]."""
        ...


class FieldTap:
    """The hooks of one collection.

    Args:
        module: path of the collection in the model.
        listener: None where nothing is scored.
    """

    def __init__(self, module: str, pruner: FieldPruner, listener: Listener | None) -> None:
        self._module, self._pruner, self._listener = module, pruner, listener
        self._fields = {number: f for number, f in enumerate(pruner.fields) if f.module == module}
        self._order: OutputOrder | None = None
        self._lengths: dict[str, Tensor] = {}

    def before(self, module: nn.Module, given: tuple[Any, ...]) -> tuple[KeyedJaggedTensor]:
        """Forward pre-hook: takes the ids of dropped fields out."""
        (ids,) = given
        _require_uniform(ids)
        samples = ids.lengths().view(len(ids.keys()), -1)
        self._lengths = {key: samples[number] for number, key in enumerate(ids.keys())}
        return (self._pruner.emptied(self._module, ids),)

    def after(self, module: nn.Module, given: tuple[Any, ...], output: Any) -> Any:
        """Forward hook: the output, or what will be it once it is awaited, with constants, and watched."""
        finish = partial(self._finished, self._lengths)
        if isinstance(output, LazyAwaitable):
            output.callbacks.append(finish)
            return output
        return finish(output)

    def _finished(self, lengths: dict[str, Tensor], output: Any) -> Any:
        if isinstance(output, KeyedTensor):
            return self._finished_pooled(output)
        return self._finished_sequences(lengths, output)

    def _finished_pooled(self, output: KeyedTensor) -> KeyedTensor:
        values, order = output.values(), self._order_of(output)
        constant = self._pruner.pooled(order, values)
        listener = self._listening(constant)
        if listener is not None:
            listener.watch_pooled(order, constant)
        return output if constant is values else with_values(output, constant)

    def _listening(self, values: Tensor) -> Listener | None:
        heard = self._listener is not None and self._listener.listening and values.requires_grad
        return self._listener if heard else None

    def _order_of(self, output: KeyedTensor) -> OutputOrder:
        keys = output.keys()
        if self._order is None or list(self._order.keys) != keys:
            self._order = OutputOrder.of(self._pruner.fields, self._module, keys, output.values().device)
        return self._order

    def _finished_sequences(self, lengths: dict[str, Tensor], output: Jagged) -> Jagged:
        found = dict(output)
        for number, field in self._fields.items():
            of_samples, values = lengths[field.feature], [output[key].values() for key in field.keys]
            listener = self._listening(values[0])
            if number in self._pruner.dropped:
                found |= self._pruner.sequences(number, output, of_samples)
            elif listener is not None:
                listener.watch_sequence(number, values, of_samples)
        return found


def _require_uniform(ids: KeyedJaggedTensor) -> None:
    if ids.variable_stride_per_key():
        raise PlanError(
            "fields can be neither scored nor dropped where features have different numbers of samples",
            where="fields",
            fix="give every feature as many bags as there are samples, or switch field scores off",
        )


def attach(collections: Mapping[str, nn.Module], pruner: FieldPruner, listener: Listener | None) -> Callable[[], None]:
    """Puts the hooks onto the collections of a model, by path.

    Returns:
        Takes them off again.
    """
    handles = []
    for path, collection in collections.items():
        tap = FieldTap(path, pruner, listener)
        handles += [collection.register_forward_pre_hook(tap.before), collection.register_forward_hook(tap.after)]

    def detach() -> None:
        for handle in handles:
            handle.remove()

    return detach
