"""Counts the bytes that autograd keeps for backward, of any model."""

from collections import Counter, deque
from collections.abc import Iterable
from types import TracebackType
from typing import Self

from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from thresher.pipeline.runtime.ledger import Ledger

SAVED = "saved"


class SavedBytes:
    """Bytes saved for backward by what runs inside ``with meter:``, each storage once, live and at the peak.

    A storage counts from the first tensor that is saved of it until the last graph that saved one is gone, whole, since
    a saved view keeps all of it. Copies of weights that autocast makes do count: they are kept too.

    It does not see what no graph saves: accumulators of keys and values, receive buffers, gradients under way, values
    that a caller holds. Whoever holds those says so with :meth:`also`, and :attr:`ledger` shows every kind apart.

    Of nested hooks torch calls the innermost alone. Hooks inside this meter (:class:`Offloader`) are given it and hand
    on what they leave in place; regions under ``checkpoint`` save nothing but their inputs, which are seen.

    Args:
        excluded: tensors whose storages are not counted: parameters, buffers, pools that are counted otherwise.

    Attributes:
        ledger: live and peak bytes; what was saved is under :data:`SAVED`.
    """

    def __init__(self, excluded: Iterable[Tensor] = ()) -> None:
        self.ledger = Ledger()
        self._excluded = frozenset(tensor.untyped_storage().data_ptr() for tensor in excluded)
        self._held: Counter[int] = Counter()
        self._bytes: dict[int, int] = {}
        self._freed: deque[int] = deque()
        self._entered: list[saved_tensors_hooks] = []

    @property
    def live_bytes(self) -> int:
        """Saved bytes held now."""
        self._settle()
        return self.ledger.live[SAVED]

    @property
    def peak_bytes(self) -> int:
        """The most saved bytes that were held at one time."""
        return self.ledger.peaks[SAVED]

    def also(self, kind: str, size: int) -> None:
        """``size`` bytes more (or less, when negative) of a kind that autograd does not know of."""
        self._settle()
        self.ledger.add(kind, size)

    def pack(self, tensor: Tensor) -> object:
        """What to keep in place of ``tensor``; for hooks that are nested inside this meter."""
        storage = tensor.untyped_storage()
        address = storage.data_ptr()
        if address in self._excluded or not storage.nbytes():
            return tensor.detach()
        self._settle()
        if not self._held[address]:
            self._bytes[address] = storage.nbytes()
            self.ledger.add(SAVED, storage.nbytes())
        self._held[address] += 1
        return _Saved(tensor.detach(), address, self._freed)

    def unpack(self, kept: object) -> Tensor:
        """The tensor for which :meth:`pack` returned ``kept``."""
        tensor = kept.tensor if isinstance(kept, _Saved) else kept
        assert isinstance(tensor, Tensor)
        return tensor

    def __enter__(self) -> Self:
        hooks = saved_tensors_hooks(self.pack, self.unpack)
        hooks.__enter__()
        self._entered.append(hooks)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._entered.pop().__exit__(kind, error, trace)

    def _settle(self) -> None:
        """Takes off what graphs have let go of. Finalisers only note it down: they may run in the middle of a count."""
        while self._freed:
            address = self._freed.popleft()
            self._held[address] -= 1
            if not self._held[address]:
                del self._held[address]
                self.ledger.add(SAVED, -self._bytes.pop(address))


class _Saved:
    """A saved tensor, and its end."""

    __slots__ = ("_address", "_freed", "tensor")

    def __init__(self, tensor: Tensor, address: int, freed: deque[int]) -> None:
        self.tensor, self._address, self._freed = tensor, address, freed

    def __del__(self) -> None:
        self._freed.append(self._address)
