"""Moves what slices save for backward to host memory while they wait for it.

    forward of a slice         each large saved tensor starts to leave as soon as it is saved, on a stream of its own
    backward of the one before it in the list    all of it starts to come back
    backward of the slice      waits for what is not there yet

The slices whose backward comes first after their forward stay: what they save would only go to and fro.
"""

import math
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

from thresher.errors import ConfigError
from thresher.pipeline.attention.store import KVStore
from thresher.pipeline.runtime.meter import SavedBytes
from thresher.pipeline.schedule.ops import Kind, Op

HOST = "offloaded"
RETURNED = "brought back"
RESIDENT_SLICES = 2
THRESHOLD_BYTES = 1 << 20

SliceKey = tuple[int, int, int]
"""(microbatch, chunk, slice)."""


class Parcel(ABC):
    """The bytes of one storage, away from the device."""

    @abstractmethod
    def fetch(self) -> None:
        """Starts to bring them back; nothing where that has been started already."""

    @abstractmethod
    def take(self) -> Tensor:
        """[bytes] uint8 on the device; whatever the current stream does next sees them."""


class Mover(ABC):
    """How bytes leave a device.

    Attributes:
        device: the one they leave.
    """

    device: torch.device

    @abstractmethod
    def send(self, content: Tensor) -> Parcel:
        """Starts to copy ``content``, [bytes] uint8 on the device."""


class PinnedMover(Mover):
    """Pinned host memory, over one stream each way, so that computing never waits for a copy it does not need."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._leaving = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._coming = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def send(self, content: Tensor) -> Parcel:
        """Starts to copy ``content`` once the current stream has written it."""
        host = torch.empty(content.shape, dtype=content.dtype, pin_memory=True)
        self._leaving.wait_stream(torch.cuda.current_stream(content.device))
        with torch.cuda.stream(self._leaving):
            host.copy_(content, non_blocking=True)
            content.record_stream(self._leaving)
            return _PinnedParcel(host, content.device, self._leaving.record_event(), self._coming)


class _PinnedParcel(Parcel):
    def __init__(self, host: Tensor, device: torch.device, sent: torch.cuda.Event, coming: torch.cuda.Stream) -> None:
        self._host, self._device, self._sent, self._coming = host, device, sent, coming
        self._content: Tensor | None = None
        self._arrived: torch.cuda.Event | None = None

    def fetch(self) -> None:
        if self._content is not None:
            return
        with torch.cuda.stream(self._coming):
            self._coming.wait_event(self._sent)
            self._content = self._host.to(self._device, non_blocking=True)
            self._arrived = self._coming.record_event()

    def take(self) -> Tensor:
        self.fetch()
        assert self._content is not None
        assert self._arrived is not None
        current = torch.cuda.current_stream(self._device)
        current.wait_event(self._arrived)
        self._content.record_stream(current)
        return self._content


@dataclass(frozen=True)
class _Away:
    """A saved tensor whose storage is away: how it lay in it."""

    freight: "_Freight"
    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]
    offset: int | torch.SymInt

    def back(self) -> Tensor:
        content = self.freight.take()
        empty = torch.empty(0, dtype=self.dtype, device=content.device)
        return empty.set_(content.untyped_storage(), self.offset, self.size, self.stride)


class _Freight:
    """A parcel shared by all tensors saved of one storage, counted while any of them is kept."""

    def __init__(self, parcel: Parcel, size: int, meter: SavedBytes | None) -> None:
        self._parcel, self._size, self._meter = parcel, size, meter
        self._is_back = False
        self._count(HOST, size)

    def fetch(self) -> None:
        if not self._is_back:
            self._is_back = True
            self._count(RETURNED, self._size)
            self._parcel.fetch()

    def take(self) -> Tensor:
        self.fetch()
        return self._parcel.take()

    def _count(self, kind: str, change: int) -> None:
        if self._meter is not None:
            self._meter.also(kind, change)

    def __del__(self) -> None:
        self._count(HOST, -self._size)
        if self._is_back:
            self._count(RETURNED, -self._size)


class Offloader:
    """Keeps saved tensors of some slices in host memory.

    Leaves that want gradients stay (parameters, the input of a stage): their graph holds them in any case.

    Args:
        mover: how bytes leave the device: see :func:`pinned_mover`.
        operations: list of this rank.
        share: of each microbatch's slices on this rank that are offloaded, 0 .. 1: see :func:`offloaded_slices`.
        excluded: tensors whose storages stay: parameters. Pools of keys and values stay in any case.
        meter: told of what stays as if it had been asked first, and of what is away; None: nobody is.
        threshold_bytes: smaller storages stay.
    """

    def __init__(
        self,
        mover: Mover,
        operations: Sequence[Op],
        share: float,
        *,
        excluded: Iterable[Tensor] = (),
        meter: SavedBytes | None = None,
        threshold_bytes: int = THRESHOLD_BYTES,
    ) -> None:
        self._mover, self._meter, self._threshold = mover, meter, threshold_bytes
        self._excluded = frozenset(tensor.untyped_storage().data_ptr() for tensor in excluded)
        self._chosen = offloaded_slices(operations, share)
        backward = [_key(op) for op in operations if op.kind in (Kind.BACKWARD, Kind.INPUT_BACKWARD)]
        self._next = dict(pairwise(backward))
        self._away: dict[SliceKey, list[weakref.ref[_Freight]]] = {}

    def forward(self, op: Op, store: KVStore) -> AbstractContextManager[None]:
        """What FORWARD ``op`` saves inside this context goes to the host, if its slice is one that is offloaded.

        Args:
            store: of its chunk: its pools are shared with other slices.
        """
        return self._leaving(_key(op), store) if _key(op) in self._chosen else nullcontext()

    def before_backward(self, op: Op) -> None:
        """Starts to bring back what ``op`` needs, and what the backward after it will need."""
        self._fetch(_key(op))
        if _key(op) in self._next:
            self._fetch(self._next[_key(op)])

    @contextmanager
    def _leaving(self, key: SliceKey, store: KVStore) -> Iterator[None]:
        sent: dict[tuple[int, int], tuple[StorageWeakRef, _Freight]] = {}
        away = self._away[key] = []

        def pack(tensor: Tensor) -> object:
            if not self._moves(tensor) or store.holds(tensor):
                return tensor.detach() if self._meter is None else self._meter.pack(tensor)
            storage = tensor.untyped_storage()
            # A weak reference keeps the address from being given to another storage, so none is taken for another.
            reference = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
            place = (reference.cdata, tensor._version)
            if place not in sent:
                parcel = self._mover.send(torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage))
                sent[place] = (reference, _Freight(parcel, storage.nbytes(), self._meter))
                away.append(weakref.ref(sent[place][1]))
            return _Away(sent[place][1], tensor.dtype, tensor.size(), tensor.stride(), tensor.storage_offset())

        try:
            with saved_tensors_hooks(pack, self._unpack):
                yield
        finally:
            sent.clear()

    def _fetch(self, key: SliceKey) -> None:
        for reference in reversed(self._away.pop(key, [])):
            freight = reference()
            if freight is not None:
                freight.fetch()

    def _moves(self, tensor: Tensor) -> bool:
        if tensor.device != self._mover.device or (tensor.is_leaf and tensor.requires_grad):
            return False
        storage = tensor.untyped_storage()
        return storage.nbytes() >= max(self._threshold, 1) and storage.data_ptr() not in self._excluded

    def _unpack(self, kept: object) -> Tensor:
        if isinstance(kept, _Away):
            return kept.back()
        if self._meter is not None:
            return self._meter.unpack(kept)
        assert isinstance(kept, Tensor)
        return kept


def offloaded_slices(operations: Sequence[Op], share: float) -> frozenset[SliceKey]:
    """Which slices of a rank leave: of each microbatch the first in forward order, for they wait longest.

    ``share`` of them, but none of the last two, whose backward comes first.
    """
    forward: dict[int, list[SliceKey]] = {}
    for op in operations:
        if op.kind is Kind.FORWARD:
            forward.setdefault(op.microbatch, []).append(_key(op))
    return frozenset(key for keys in forward.values() for key in keys[: _count(len(keys), share)])


def _count(slices: int, share: float) -> int:
    rounding = 1e-9
    return max(0, min(math.floor(slices * share + rounding), slices - RESIDENT_SLICES))


def _key(op: Op) -> SliceKey:
    return op.microbatch, op.chunk, op.slice


def pinned_mover(device: torch.device, share: float) -> PinnedMover | None:
    """The mover for ``device``; None for a share of 0.

    Raises:
        ConfigError: the share is not in 0 .. 1, or the device has no memory apart from the host's.
    """
    if not 0 <= share <= 1:
        raise ConfigError(
            f"{share} of the slices cannot be offloaded", where="pipeline.offload", fix="give a share in 0 .. 1"
        )
    if not share:
        return None
    if device.type != "cuda":
        raise ConfigError(
            f"what slices save on device '{device}' is in host memory already",
            where="pipeline.offload",
            fix="set it to 0, or train on a CUDA device",
        )
    return PinnedMover(device)
