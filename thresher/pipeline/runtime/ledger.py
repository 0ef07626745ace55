"""Bytes that a step holds besides saved activations, by what they are for."""

from collections import Counter


class Ledger:
    """Live and peak bytes by kind.

    Attributes:
        live: bytes held now.
        peaks: the most that each kind ever held.
        peak: the most that all kinds held together.
    """

    def __init__(self) -> None:
        self.live: Counter[str] = Counter()
        self.peaks: Counter[str] = Counter()
        self.peak = 0

    def add(self, kind: str, size: int) -> None:
        """``size`` bytes more (or less, when negative) of ``kind``."""
        self.set(kind, self.live[kind] + size)

    def set(self, kind: str, size: int) -> None:
        """``kind`` holds ``size`` bytes now."""
        self.live[kind] = size
        self.peaks[kind] = max(self.peaks[kind], size)
        self.peak = max(self.peak, self.live.total())
