"""The columns that sequence models read: the history and the item that follows it."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torchrec import JaggedTensor

from thresher.data.schema import Schema, SequenceFeature, Table
from thresher.errors import ConfigError, SchemaError, nearest
from thresher.zoo.blocks.inputs import one_id_features
from thresher.zoo.blocks.ragged import Grid, newest, owners, places, segment_sum


@dataclass(frozen=True)
class Columns:
    """Names of the history and the target, their table, and the schema's bound on a history's length."""

    sequence: str
    target: str
    table: str
    max_length: int

    @property
    def keys(self) -> tuple[str, str, str]:
        """Keys of the lookup: history, target, negatives. A schema has no name with this suffix."""
        return self.sequence, self.target, f"{self.target}.negatives"


def first_item(table: Table) -> int:
    """The smallest row that stands for one item: after the missing row, and a vocabulary's unseen row."""
    return {"index": 0, "hash": 1, "vocabulary": 2}[table.ids]


def choose_columns(schema: Schema, sequence: str, target: str) -> Columns:
    """Columns by name, or the only candidates where a name is empty.

    Raises:
        ConfigError: a name is unknown, or empty with several candidates; the tables differ.
        SchemaError: there is no candidate, or fewer than two items.
    """
    history = choose_sequence(schema, sequence)
    item = _target(schema, history, target)
    table = schema.table(history.table)
    if table.rows - first_item(table) < 2:
        raise SchemaError(
            f"{table.rows} row(s) leave fewer than two items", where=f"table '{table.name}'", fix="give it more rows"
        )
    return Columns(history.name, item, table.name, history.max_length)


def choose_sequence(schema: Schema, name: str) -> SequenceFeature:
    """The sequence called ``name``, or the only one where it is empty.

    Raises:
        ConfigError: it is unknown, or empty with several candidates.
        SchemaError: there is none.
    """
    sequences = {sequence.name: sequence for sequence in schema.sequences}
    if not sequences:
        raise SchemaError("no sequence feature", where=f"schema '{schema.name}'", fix="declare the history of items")
    if not name and len(sequences) > 1:
        raise ConfigError(
            f"{len(sequences)} sequences", where="model.sequence", fix=f"name one: {', '.join(sequences)}"
        )
    if name and name not in sequences:
        raise ConfigError(f"no sequence '{name}'", where="model.sequence", fix=nearest(name, sequences))
    return sequences[name] if name else next(iter(sequences.values()))


def _target(schema: Schema, history: SequenceFeature, name: str) -> str:
    names = [feature.name for feature in one_id_features(schema, history.table)]
    if not names:
        raise SchemaError(
            f"no sparse feature of one id uses table '{history.table}' of sequence '{history.name}'",
            where=f"schema '{schema.name}'",
            fix="declare the next item on that table",
        )
    if not name and len(names) > 1:
        raise ConfigError(
            f"{len(names)} features use table '{history.table}'",
            where="model.target",
            fix=f"name one: {', '.join(names)}",
        )
    if name and name not in names:
        raise ConfigError(
            f"no sparse feature of one id '{name}' on table '{history.table}'",
            where="model.target",
            fix=nearest(name, names),
        )
    return name or names[0]


@dataclass(frozen=True)
class History:
    """Histories of B samples, N items in all, each cut to its newest.

    Attributes:
        ids: [N] int64. ``lengths`` [B] and ``offsets`` [B + 1] say whose they are.
        owner: [N] the sample of each item.
        place: [N] its place from the oldest.
    """

    ids: Tensor
    lengths: Tensor
    offsets: Tensor
    owner: Tensor
    place: Tensor

    @property
    def grid(self) -> Grid:
        """The padded form of rows that belong to the items."""
        longest = max(int(self.lengths.max()), 1)
        return Grid(self.owner * longest + self.place, self.lengths.numel(), longest)

    def shifted(self, values: Tensor, last: Tensor) -> Tensor:
        """[N, ...]: for each place the value of the next one, and after the newest its sample's ``last`` [B, ...]."""
        return values.roll(-1, 0).index_copy(0, self.ends, last[self.owner[self.ends]])

    @property
    def ends(self) -> Tensor:
        """[E] int64: the newest item of each of the E histories that are not empty."""
        return (self.offsets[1:] - 1)[self.lengths > 0]

    def shares(self, counted: Tensor) -> Tensor:
        """[N] float64: one over the number of counted places of a place's sample, 0 where it is not counted itself."""
        marks = counted.to(torch.float64)
        number = segment_sum(marks.unsqueeze(1), self.owner, self.lengths.numel()).squeeze(1)
        return marks / number[self.owner].clamp(min=1)


def no_history(device: torch.device) -> History:
    """One sample without items."""
    none = torch.zeros(0, dtype=torch.int64, device=device)
    return History(none, none.new_zeros(1), none.new_zeros(2), none, none)


def read_history(ids: JaggedTensor, limit: int) -> History:
    """The newest ``limit`` items of each history."""
    values, lengths = ids.values(), ids.lengths()
    if values.numel():
        values, lengths = newest(values, lengths, ids.offsets(), limit)
    lengths = lengths.to(torch.int64)
    offsets = torch.ops.fbgemm.asynchronous_complete_cumsum(lengths)
    owner = owners(lengths, values.numel())
    return History(values, lengths, offsets, owner, places(owner, offsets))


def targets(ids: JaggedTensor) -> tuple[Tensor, Tensor]:
    """[B] row of the target, 0 where it is absent, and [B] bool whether it is present."""
    offsets = ids.offsets()
    present = offsets[1:] > offsets[:-1]
    rows = torch.zeros_like(offsets[:-1], dtype=torch.int64)
    return rows.index_copy(0, present.nonzero().squeeze(1), ids.values()[offsets[:-1][present]]), present
