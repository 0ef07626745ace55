"""Negatives for observed purchases: products of the time, drawn by how often they had been bought by then."""

from collections.abc import Iterator
from itertools import pairwise

import numpy as np

from thresher.data.hashing import uniform
from thresher.data.recipes.purchases import Floats, Ints, Log

_ROUNDS = 20


class Negatives:
    """Draws products a basket does not contain, from those bought before the basket's week began.

    A product's chance is proportional to (purchases before the week) ** alpha. With alpha 1 negatives are distributed
    as past purchases are, so popularity alone says little; with a smaller alpha being popular tells a positive. A
    product that nobody had bought before the week is no candidate, neither as a negative nor as a positive: else being
    new would tell a positive.

    Args:
        log: all purchases.
        alpha: exponent of popularity.
        seed: another seed, other negatives. The draw for a position does not depend on which others are drawn.
    """

    def __init__(self, log: Log, alpha: float, seed: int) -> None:
        self._log, self._alpha, self._seed = log, alpha, seed
        self._products = len(log.names["product"])
        self._bought = np.sort(self._key(log.basket, log.product))
        weeks = np.arange(log.week[0], log.week[-1] + 1)
        self._start = dict(zip(weeks.tolist(), np.searchsorted(log.week, weeks).tolist(), strict=True))
        self._first = np.full(self._products, len(log.week), np.int64)
        np.minimum.at(self._first, log.product, np.arange(len(log.product)))

    def _key(self, basket: Ints, product: Ints) -> Ints:
        return basket * self._products + product

    def known(self, positions: Ints) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
        """[n] positions in the log: whether the product had been bought before that week began."""
        starts = np.array([self._start[week] for week in self._log.week[positions].tolist()], np.int64)
        return self._first[self._log.product[positions]] < starts

    def draw(self, positions: Ints, number: int) -> Ints:
        """``number`` negatives for each of [n] positions, ascending in time.

        Returns:
            [n, number] products; -1 where chance found none outside the basket in many tries.
        """
        drawn = np.full((len(positions), number), -1, np.int64)
        for block, shares in self._weeks(positions):
            counter = positions[block, None] * number + np.arange(number)
            basket = np.broadcast_to(self._log.basket[positions[block], None], counter.shape)
            drawn[block] = self._outside(basket, counter, shares)
        return drawn

    def _weeks(self, positions: Ints) -> Iterator[tuple[slice, Floats]]:
        """Blocks of positions of one week, with the cumulated weights of all products at its beginning."""
        week = self._log.week[positions]
        edges = [0, *(np.flatnonzero(np.diff(week)) + 1).tolist(), len(positions)]
        for begin, end in pairwise(edges):
            if begin == end:
                continue
            before = self._start[int(week[begin])]
            counts = np.bincount(self._log.product[:before], minlength=self._products).astype(np.float64)
            yield slice(begin, end), np.cumsum(np.where(counts > 0, counts**self._alpha, 0.0))

    def _outside(self, basket: Ints, counter: Ints, shares: Floats) -> Ints:
        drawn = np.full(counter.shape, -1, np.int64)
        last = int(np.searchsorted(shares, shares[-1]))
        for attempt in range(_ROUNDS):
            open_ = np.flatnonzero(drawn.ravel() < 0)
            if not len(open_):
                break
            chance = uniform(counter.ravel()[open_] * _ROUNDS + attempt, self._seed) * shares[-1]
            product = np.minimum(np.searchsorted(shares, chance, side="right"), last)
            key = self._key(basket.ravel()[open_], product)
            place = np.minimum(np.searchsorted(self._bought, key), len(self._bought) - 1)
            drawn.ravel()[open_] = np.where(self._bought[place] == key, -1, product)
        return drawn
