"""Keys and values of the slices of one chunk, and the gradients that later slices left for them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from thresher.pipeline.attention.regions import Regions, Rows

Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Part:
    """Keys and values of earlier tokens: views of the pool.

    Attributes:
        key, value: [B, G, rows, E].
        tokens: tokens of the microbatch these are, in order of rows.
        row: the first of their rows.
    """

    key: Tensor
    value: Tensor
    tokens: tuple[range, ...]
    row: int


class _Pool:
    """Keys and values [B, G, capacity, E], and the rows of live slices by (layer, microbatch, slice)."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.pair = (keys, values)
        self.live: dict[tuple[int, int, int], tuple[int, int]] = {}

    def occupy(self, layer: int, microbatch: int, index: int, rows: Rows) -> None:
        place = (layer, microbatch, index)
        for (other, number, slot), (first, last) in self.live.items():
            assert (other, number, slot) == place or last <= rows.first or rows.last <= first, (
                f"layer {layer} would write slice {index} of microbatch {microbatch} "
                f"over slice {slot} of microbatch {number} of layer {other}"
            )
        self.live[place] = (rows.first, rows.last)


PoolKey = tuple[int, int, torch.Size, torch.dtype, torch.device]


@dataclass
class _Layer:
    """One layer's pool, slices written by microbatch, accumulators by microbatch."""

    pool: _Pool
    written: dict[int, int] = field(default_factory=dict)
    gradients: dict[int, Pair] = field(default_factory=dict)


class KVStore:
    """The pools of one chunk, one pair per layer, each allocated when its layer first writes.

    Slices of a microbatch are written in order and released in reverse order; writing the newest one again is allowed,
    so that a forward may be computed twice. Pools are given back as soon as nothing is live. With one slice per
    microbatch nothing is ever kept here.
    """

    def __init__(self, regions: Regions, pools: "WeakValueDictionary[PoolKey, _Pool] | None" = None) -> None:
        """
        Args:
            regions: where slices lie.
            pools: those of other chunks that it may share; see :func:`make_stores`.
        """
        self.regions = regions
        self._layers: dict[int, _Layer] = {}
        self._pools: WeakValueDictionary[PoolKey, _Pool] = WeakValueDictionary() if pools is None else pools

    @property
    def bytes(self) -> int:
        """Bytes of all pools in use; one that two chunks share counts in the stores of both."""
        return sum(pool.nbytes for pool in self._tensors())

    @property
    def accumulator_bytes(self) -> int:
        """Bytes of gradients of keys and values whose own slice has yet to run backward."""
        pairs = (pair for layer in self._layers.values() for pair in layer.gradients.values())
        return sum(gradient.nbytes for pair in pairs for gradient in pair)

    def holds(self, tensor: Tensor) -> bool:
        """Whether ``tensor`` lies in one of the pools."""
        storage = tensor.untyped_storage().data_ptr()
        return any(pool.untyped_storage().data_ptr() == storage for pool in self._tensors())

    def _tensors(self) -> Iterator[Tensor]:
        return (tensor for layer in self._layers.values() for tensor in layer.pool.pair)

    def write(self, layer: int, microbatch: int, index: int, key: Tensor, value: Tensor) -> Pair:
        """Copies key and value [B, G, T, E] of slice ``index`` into the pool, outside autograd; returns :meth:`own`."""
        state = self._layer(layer, key)
        count = state.written.get(microbatch, 0)
        assert index in (count, count - 1), f"slice {index} of microbatch {microbatch} written after {count} slices"
        state.written[microbatch] = index + 1
        bounds = self.regions.layouts[microbatch].bounds
        (rows,) = self.regions.rows(microbatch, range(bounds[index], bounds[index + 1]))
        state.pool.occupy(layer, microbatch, index, rows)
        own = self.own(layer, microbatch, index)
        for target, source in zip(own, (key, value), strict=True):
            assert target.dtype == source.dtype, f"layer {layer} keeps {target.dtype} and was given {source.dtype}"
            target.copy_(source)
        return own

    def _layer(self, layer: int, like: Tensor) -> _Layer:
        if layer not in self._layers:
            _, heads, _, width = like.shape
            shape = torch.Size((self.regions.batch, heads, self.regions.capacity, width))
            key = (self.regions.pool, len(self._layers), shape, like.dtype, like.device)
            pool = self._pools.get(key) or _Pool(like.new_empty(shape), like.new_empty(shape))
            self._pools[key] = pool
            self._layers[layer] = _Layer(pool)
        return self._layers[layer]

    def own(self, layer: int, microbatch: int, index: int) -> Pair:
        """Keys and values [B, G, T, E] of slice ``index``: views of the pool with version counters of their own.

        Later slices write beside them, which autograd must not take for a change of what it saved.
        """
        bounds = self.regions.layouts[microbatch].bounds
        (part,) = self.parts(layer, microbatch, range(bounds[index], bounds[index + 1]))
        return part.key.data, part.value.data

    def parts(self, layer: int, microbatch: int, tokens: range) -> list[Part]:
        """Keys and values of consecutive ``tokens`` in as few pieces as they lie in (see :meth:`Regions.rows`)."""
        if not tokens:
            return []
        keys, values = self._layers[layer].pool.pair
        rows = self.regions.rows(microbatch, tokens)
        batch = self.regions.layouts[microbatch].batch
        return [Part(_cut(keys, r)[:batch], _cut(values, r)[:batch], r.tokens, r.first) for r in rows]

    def gather(self, layer: int, microbatch: int, tokens: range) -> Pair:
        """Copies of keys and values of ``tokens``, [B, G, len(tokens), E] in order of tokens, contiguous."""
        runs = [
            (run.start, piece)
            for part in self.parts(layer, microbatch, tokens)
            for run, piece in zip(part.tokens, _split(part), strict=True)
        ]
        ordered = [piece for _, piece in sorted(runs, key=lambda run: run[0])]
        return torch.cat([p[0] for p in ordered], 2), torch.cat([p[1] for p in ordered], 2)

    def add(self, layer: int, microbatch: int, part: Part, gradients: Pair) -> None:
        """Adds gradients of the keys and values of ``part``, as a slice after them computed them.

        Sums are kept in fp32, in fp64 where keys are.
        """
        state, row = self._layers[layer], part.row - self.regions.blocks[microbatch]
        if self._adopts(state, microbatch, gradients):
            state.gradients[microbatch] = gradients
            return
        for total, gradient in zip(self._accumulators(state, microbatch), gradients, strict=True):
            total[:, :, row : row + gradient.shape[2]].add_(gradient)

    def add_tokens(self, layer: int, microbatch: int, tokens: range, gradients: Pair) -> None:
        """As :meth:`add` for ``tokens`` in order of tokens."""
        totals = self._accumulators(self._layers[layer], microbatch)
        for rows in self._gradient_rows(microbatch, tokens):
            row = rows.first
            for run in rows.tokens:
                source = slice(run.start - tokens.start, run.stop - tokens.start)
                for total, gradient in zip(totals, gradients, strict=True):
                    total[:, :, row : row + len(run)].add_(gradient[:, :, source])
                row += len(run)

    def take(self, layer: int, microbatch: int, index: int) -> Pair | None:
        """What later slices added to the keys and values of slice ``index``: [B, G, T, E]; None where nothing came.

        To be called once a slice, newest first, after the slice has added to those before it.
        """
        state = self._layers[layer]
        count = state.written.get(microbatch, 0)
        assert index == count - 1, f"backward of slice {index} of microbatch {microbatch} while {count} slices are live"
        bounds = self.regions.layouts[microbatch].bounds
        totals = state.gradients.get(microbatch)
        if index == 0:
            state.gradients.pop(microbatch, None)
        if totals is None or bounds[index] >= bounds[-2]:
            return None
        (rows,) = self._gradient_rows(microbatch, range(bounds[index], bounds[index + 1]))
        return _cut(totals[0], rows), _cut(totals[1], rows)

    def _adopts(self, state: _Layer, microbatch: int, gradients: Pair) -> bool:
        """Whether ``gradients`` may become the accumulators: those of the newest slice for all slices before it."""
        whole = gradients[0].shape[2] == self.regions.layouts[microbatch].bounds[-2]
        return whole and microbatch not in state.gradients and gradients[0].dtype == _sum_dtype(gradients[0])

    def _gradient_rows(self, microbatch: int, tokens: range) -> tuple[Rows, ...]:
        """Rows of the accumulators, which lie like the pool but hold slices 0 .. n - 2 of one microbatch only."""
        shift = self.regions.blocks[microbatch]
        return tuple(Rows(rows.first - shift, rows.tokens) for rows in self.regions.rows(microbatch, tokens))

    def _accumulators(self, state: _Layer, microbatch: int) -> Pair:
        if microbatch not in state.gradients:
            layout, pool = self.regions.layouts[microbatch], state.pool.pair[0]
            shape = (layout.batch, pool.shape[1], layout.bounds[-2], pool.shape[3])
            zeros = (torch.zeros(shape, dtype=_sum_dtype(pool), device=pool.device) for _ in range(2))
            state.gradients[microbatch] = (next(zeros), next(zeros))
        return state.gradients[microbatch]

    def release(self, microbatch: int, index: int) -> None:
        """Forgets slice ``index``, the newest of its microbatch, in all layers. After its backward."""
        for layer, state in self._layers.items():
            count = state.written.get(microbatch, 0)
            assert index == count - 1, (
                f"layer {layer} releases slice {index} of microbatch {microbatch} while {count} slices are live"
            )
            assert index > 0 or microbatch not in state.gradients, (
                f"layer {layer} releases microbatch {microbatch} before the backward of its slice 0"
            )
            state.written[microbatch] = index
            del state.pool.live[layer, microbatch, index]
        self._give_back()

    def forget(self, microbatch: int) -> None:
        """Forgets all slices of a microbatch: after its last forward where there is no backward."""
        for layer, state in self._layers.items():
            for index in range(state.written.pop(microbatch, 0)):
                del state.pool.live[layer, microbatch, index]
            state.gradients.pop(microbatch, None)
        self._give_back()

    def _give_back(self) -> None:
        if not any(self._live()):
            self._layers.clear()

    def _live(self) -> Iterator[tuple[int, int, int]]:
        for layer, state in self._layers.items():
            yield from ((layer, k, count) for k, count in state.written.items() if count)

    def require_empty(self) -> None:
        """Asserts that nothing is live: at the end of a step."""
        left = list(self._live())
        assert not left, f"live slices at the end of a step, as (layer, microbatch, slices): {left}"


def make_stores(regions: Sequence[Regions]) -> list[KVStore]:
    """The stores of a rank, by chunk, which share the pools that ``regions`` share."""
    pools: WeakValueDictionary[PoolKey, _Pool] = WeakValueDictionary()
    return [KVStore(region, pools) for region in regions]


def _cut(pool: Tensor, rows: Rows) -> Tensor:
    return pool[:, :, rows.first : rows.last]


def _split(part: Part) -> list[Pair]:
    sizes = [len(run) for run in part.tokens]
    return list(zip(torch.split(part.key, sizes, 2), torch.split(part.value, sizes, 2), strict=True))


def _sum_dtype(like: Tensor) -> torch.dtype:
    return torch.float64 if like.dtype == torch.float64 else torch.float32
