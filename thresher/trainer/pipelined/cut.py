"""From the samples of a step to the microbatches and slices of a pipeline."""

from dataclasses import replace

from torch import Tensor

from thresher.pipeline.layout import Layout
from thresher.pipeline.microbatch import Microbatch


def cut(samples: Microbatch, microbatches: int, bounds: tuple[int, ...]) -> list[Microbatch]:
    """Equal numbers of rows, in order.

    Args:
        samples: whose number of rows is a multiple of ``microbatches``.
        bounds: of the slices.
    """
    rows, rest = divmod(samples.layout.batch, microbatches)
    assert not rest, f"{samples.layout.batch} samples are no multiple of {microbatches} microbatches"
    layout = Layout(bounds, rows)
    return [_rows(samples, layout, slice(first, first + rows)) for first in range(0, rows * microbatches, rows)]


def _rows(samples: Microbatch, layout: Layout, rows: slice) -> Microbatch:
    def of(values: Tensor) -> Tensor:
        return values[rows]

    times = None if samples.times is None else of(samples.times)
    inputs, targets, weights = of(samples.inputs), of(samples.targets), of(samples.weights)
    return replace(samples, layout=layout, inputs=inputs, targets=targets, weights=weights, times=times)
