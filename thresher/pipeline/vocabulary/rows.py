"""Which rows of a vocabulary a rank holds, and whether ids are rows at all."""

import torch
from torch import Tensor

from thresher.errors import BadIds, ConfigError
from thresher.pipeline.layout import Layout
from thresher.pipeline.microbatch import Microbatch


def row_range(rows: int, parts: int, part: int) -> tuple[int, int]:
    """First row of ``part`` and one past its last; parts are as equal as possible, the longer ones first.

    Raises:
        ConfigError: more parts than rows.
    """
    if parts > rows:
        raise ConfigError(
            f"a vocabulary of {rows} rows cannot be cut into {parts} parts",
            where="pipeline.stages",
            fix="use fewer stages, or do not split the embedding and the output layer",
        )
    short, longer = divmod(rows, parts)
    return part * short + min(part, longer), (part + 1) * short + min(part + 1, longer)


def require_rows(microbatch: Microbatch, number: int, vocabulary: int) -> None:
    """Refuses ids that are no rows: any input, and targets that count (of weight 0 they may be anything).

    Args:
        number: which microbatch of the step it is, for the message.
        vocabulary: rows of the embedding and of the output layer.

    Raises:
        BadIds: names the first bad value with its microbatch, slice, row and token.
    """
    if not microbatch.are_vectors:
        everywhere = torch.ones_like(microbatch.inputs, dtype=torch.bool)
        _require(microbatch.inputs, everywhere, "input", number, microbatch.layout, vocabulary)
    _require(microbatch.targets, microbatch.weights != 0, "target", number, microbatch.layout, vocabulary)


def _require(values: Tensor, counted: Tensor, name: str, number: int, layout: Layout, vocabulary: int) -> None:
    bad = ((values < 0) | (values >= vocabulary)) & counted
    if not bad.any():
        return
    row, token = bad.nonzero()[0].tolist()
    index = next(i for i in range(layout.slices) if token < layout.bounds[i + 1])
    raise BadIds(
        f"{name} {int(values[row, token])} is outside 0..{vocabulary - 1}",
        where=f"microbatch {number}, slice {index}, row {row}, token {token}",
        fix="raise the vocabulary of the model, or give tokens that do not count weight 0",
    )
