"""From the ragged columns of a batch to padded sequences.

    history  [a b c]   target d          inputs   a b c 0      targets  b c d 0      weights  w w w 0
    tokens   [a b c d] no target         the same

Sequences stand on the left: causality alone keeps the padding behind them away from real tokens.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from thresher.data.batch import Batch
from thresher.data.schema import Schema
from thresher.errors import ConfigError, SchemaError, nearest
from thresher.pipeline.layout import Layout
from thresher.pipeline.microbatch import Microbatch
from thresher.trainer.model import Sequencer
from thresher.zoo.blocks.history import History, choose_columns, choose_sequence, first_item, read_history, targets
from thresher.zoo.blocks.inputs import one_id_features


@dataclass(frozen=True)
class TokenColumns:
    """Where the tokens stand.

    Attributes:
        target: what follows the last token; empty where the last token of a sequence is what follows.
        times: key of a float side column; empty for none.
        rows: of the table.
        first_item: smallest row that may be predicted.
        max_length: bound on tokens of ``sequence``.
    """

    sequence: str
    target: str
    times: str
    table: str
    rows: int
    first_item: int
    max_length: int


def choose_tokens(schema: Schema, sequence: str, target: str, times: str) -> TokenColumns:
    """Columns by name, or the only candidates where a name is empty.

    Raises:
        ConfigError: a name is unknown, or empty with several candidates; the tables differ; the table has raw ids.
        SchemaError: no sequence, or too few tokens or items.
    """
    history = choose_sequence(schema, sequence)
    table = schema.table(history.table)
    if table.ids == "raw":
        raise ConfigError(
            f"table '{table.name}' of sequence '{history.name}' has raw ids, but the transformer's rows are fixed",
            where="model.sequence",
            fix="prepare the data with ids=hash or ids=vocabulary, or use sasrec",
        )
    if target or one_id_features(schema, history.table):
        target = choose_columns(schema, history.name, target).target
    elif history.max_length < 2:
        raise SchemaError(
            f"sequence '{history.name}' holds 1 token at most, and nothing follows it",
            where=f"schema '{schema.name}'",
            fix="prepare longer sequences",
        )
    timed = _times(schema, history.name, times)
    return TokenColumns(history.name, target, timed, table.name, table.rows, first_item(table), history.max_length)


def _times(schema: Schema, sequence: str, times: str) -> str:
    known = [key for key in schema.float_side_keys if key.startswith(f"{sequence}.")]
    key = f"{sequence}.{times.removeprefix(f'{sequence}.')}" if times else ""
    if key and key not in known:
        raise ConfigError(
            f"no float side column '{times}' of '{sequence}'", where="model.times", fix=nearest(key, known)
        )
    return key


class TokenSequencer(Sequencer):
    """Reads sequences, and what follows each token.

    Args:
        limit: newest tokens that are inputs; 0 for all.
        last_only: only the last token of a sequence is trained to predict.
    """

    def __init__(self, columns: TokenColumns, limit: int, last_only: bool) -> None:
        self.columns, self.last_only = columns, last_only
        self.first_item, self.has_target = columns.first_item, bool(columns.target)
        whole = columns.max_length - (0 if columns.target else 1)
        self.length = min(limit or whole, whole)

    def sequences(self, batch: Batch, *, per_token: bool = False) -> Microbatch:
        """See :class:`Sequencer`."""
        width = self.length + 1
        history = read_history(batch.sparse[self.columns.sequence], self.length if self.columns.target else width)
        ids, filled = padded(history.ids, history, width), _filled(history, width)
        if self.columns.target:
            rows, present = targets(batch.sparse[self.columns.target])
            ends = history.lengths.unsqueeze(1)
            ids, filled = ids.scatter(1, ends, rows.unsqueeze(1)), filled.scatter(1, ends, present.unsqueeze(1))
        following = ids[:, 1:]
        counted = filled[:, 1:] & filled[:, :-1] & (following >= self.columns.first_item)
        if self.last_only:
            counted &= _is_last(filled)
        weights = counted * batch.weight.unsqueeze(1)
        if not per_token:
            weights = weights / counted.sum(1, keepdim=True).clamp(min=1)
        layout = Layout((0, self.length), batch.size)
        return Microbatch(layout, ids[:, :-1], following, weights, self._times(batch, history))

    def last(self, batch: Batch) -> Tensor:
        """See :class:`Sequencer`."""
        limit = self.length if self.columns.target else self.length + 1
        lengths = batch.sparse[self.columns.sequence].lengths().to(torch.int64).clamp(max=limit)
        newest: Tensor = lengths - (1 if self.columns.target else 2)
        return newest

    def target(self, batch: Batch) -> Tensor:
        """See :class:`Sequencer`."""
        rows, _ = targets(batch.sparse[self.columns.target])
        return rows

    def _times(self, batch: Batch, history: History) -> Tensor | None:
        if not self.columns.times:
            return None
        column = batch.side[self.columns.times]
        seconds = read_history(column, self.length if self.columns.target else self.length + 1).ids
        return padded(seconds.round().to(torch.int64), history, self.length + 1)[:, :-1]


def padded(values: Tensor, history: History, width: int) -> Tensor:
    """[B, width] from one value per token [N]; zeros behind each sequence."""
    slots = history.owner * width + history.place
    flat = values.new_zeros(history.lengths.numel() * width).index_copy(0, slots, values)
    return flat.view(-1, width)


def _filled(history: History, width: int) -> Tensor:
    return torch.arange(width, device=history.ids.device) < history.lengths.unsqueeze(1)


def _is_last(filled: Tensor) -> Tensor:
    """[B, S] from [B, S + 1]: the place before the last token."""
    places = torch.arange(filled.shape[1] - 1, device=filled.device)
    return places == (filled.sum(1, keepdim=True) - 2)
