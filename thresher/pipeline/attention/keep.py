"""What attention saves of its inputs: no byte more than they have, and keys and values once for all slices."""

from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from thresher.pipeline.attention.sliced import SlicedContext


def keep(
    context: "SlicedContext", layer: int, query: Tensor, key: Tensor, value: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The same tensors [B, *, T, E] with contiguous rows, stored as backward will want them.

    Keys and values go to the store of ``context``, unless its microbatch has one slice only.
    """
    if context.layout.slices > 1:
        return _compact(query), *context.store.write(layer, context.number, context.index, key, value)
    inputs = (query, key, value)
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in inputs}
    if sum(storages.values()) == sum(x.nbytes for x in inputs):
        return with_rows(query), with_rows(key), with_rows(value)
    return _compact(query), _compact(key), _compact(value)


def with_rows(x: Tensor) -> Tensor:
    """``x`` with contiguous rows, as kernels want them."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _compact(x: Tensor) -> Tensor:
    """``x`` in a storage of its own size."""
    return with_rows(x) if x.untyped_storage().nbytes() == x.nbytes else x.clone()
