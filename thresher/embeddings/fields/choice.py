"""Which fields a round drops."""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from thresher.embeddings.fields.config import FieldConfig
from thresher.embeddings.fields.field import Field
from thresher.embeddings.policy.budget import budget_bytes
from thresher.errors import ConfigError, nearest


@dataclass(frozen=True)
class Chooser:
    """The rules of a run.

    Attributes:
        table_bytes: of each table by path, optimizer state included.
        budget: bytes that tables may take; 0 for no budget.
        round_bytes: bytes that a round frees at least; 0 where rounds count fields.
    """

    config: FieldConfig
    fields: tuple[Field, ...]
    table_bytes: Mapping[str, int]
    budget: int
    round_bytes: int

    @staticmethod
    def of(config: FieldConfig, fields: Sequence[Field], table_bytes: Mapping[str, int]) -> "Chooser":
        """The rules that ``config`` makes for a model.

        Raises:
            ConfigError: a protected field is none of the model, or a number of bytes is not usable.
        """
        names = [field.name for field in fields]
        for name in config.protect:
            if name not in names:
                raise ConfigError(f"the model has no field '{name}'", where="fields.protect", fix=nearest(name, names))
        total = sum(table_bytes.values())
        return Chooser(
            config,
            tuple(fields),
            table_bytes,
            _bytes(config.budget, total, "fields.budget"),
            _bytes(config.bytes_per_round, total, "fields.bytes_per_round"),
        )

    def bytes_in_use(self, dropped: Collection[int]) -> int:
        """Bytes of the tables that a field reads which is not dropped."""
        read = {table for number, field in enumerate(self.fields) if number not in dropped for table in field.tables}
        return sum(self.table_bytes[table] for table in read)

    def field_bytes(self, dropped: Collection[int] = ()) -> list[float]:
        """Each field's part of its tables' bytes: as much as any other's that is not dropped and reads the table.

        A table that a protected field reads is never freed: it counts for protected fields alone.
        """
        held = {table for field in self.fields if self._stays(field) for table in field.tables}
        counted = [
            [table for table in field.tables if self._stays(field) or table not in held] for field in self.fields
        ]
        readers = Counter(table for number, tables in enumerate(counted) if number not in dropped for table in tables)
        return [sum(self.table_bytes[table] / max(readers[table], 1) for table in tables) for tables in counted]

    def within_budget(self, dropped: Collection[int]) -> bool:
        """Whether there is a budget, and it is kept."""
        return self.budget > 0 and self.bytes_in_use(dropped) <= self.budget

    def next_round(self, score: Tensor, dropped: Collection[int]) -> tuple[int, ...]:
        """The fields that go next, least important first; none where none may.

        One field always stays.

        Args:
            score: [F] float64; fields whose score is no number stay.
        """
        gone = set(dropped)
        chosen: list[int] = []
        while not self._full(chosen, dropped) and not self.within_budget(gone):
            found = self._least(score, gone)
            if found is None or len(gone) + 1 == len(self.fields):
                break
            chosen.append(found)
            gone.add(found)
        return tuple(chosen)

    def _full(self, chosen: Sequence[int], dropped: Collection[int]) -> bool:
        if not self.round_bytes:
            return len(chosen) == self.config.fields_per_round
        freed = self.bytes_in_use(dropped) - self.bytes_in_use({*dropped, *chosen})
        return freed >= self.round_bytes

    def _stays(self, field: Field) -> bool:
        return field.name in self.config.protect

    def _least(self, score: Tensor, gone: Collection[int]) -> int | None:
        """The field that costs the least score, or score per byte; with a budget none that frees no byte."""
        sizes = self.field_bytes(gone)
        values = score.tolist()
        allowed = [
            number
            for number, field in enumerate(self.fields)
            if number not in gone and not self._stays(field) and bool(torch.isfinite(score[number]))
            if sizes[number] > 0 or not self.budget
        ]
        worth = {number: values[number] / (sizes[number] if self.budget else 1.0) for number in allowed}
        return min(worth, key=lambda number: (worth[number], number), default=None)


def _bytes(text: str, total: int, where: str) -> int:
    if not text:
        return 0
    try:
        return budget_bytes(text, total)
    except ConfigError as error:
        raise ConfigError(error.what, where=where, fix=error.fix) from None
