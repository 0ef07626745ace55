"""Which history is attended by which target, column by column."""

from dataclasses import dataclass

from pydantic import Field

from thresher.data.schema import Schema, SequenceFeature
from thresher.errors import ConfigError, SchemaError, nearest
from thresher.settings import Settings
from thresher.zoo.blocks.inputs import one_id_features


class AttentionConfig(Settings):
    """One attended sequence.

    Attributes:
        sequence: name of a sequence feature.
        target: a sparse feature of one id on the sequence's table; empty where there is just one.
        side: side column of the sequence to the sparse feature it is compared with, both on one table
            (``{category: item_category}``); a side column that is not named is pooled instead.
    """

    sequence: str
    target: str = ""
    side: dict[str, str] = Field(default_factory=dict)


@dataclass(frozen=True)
class Pair:
    """Keys of a history's columns and of the target's columns they are compared with, in the same order."""

    history: tuple[str, ...]
    target: tuple[str, ...]


def choose_pairs(schema: Schema, attention: tuple[AttentionConfig, ...], keys: tuple[str, ...]) -> tuple[Pair, ...]:
    """The attended pairs, checked against the schema and the model's inputs ``keys``.

    Raises:
        SchemaError: no sequence has a target.
        ConfigError: a name is unknown or not among the inputs, tables differ, or a target is not unique.
    """
    if not attention:
        pairs = _automatic(schema, keys)
        if not pairs:
            raise SchemaError(
                "no sequence among the inputs shares its table with exactly one sparse feature of one id",
                where=f"schema '{schema.name}'",
                fix="let the target use the sequence's table, or name both in model.attention",
            )
        return pairs
    pairs = tuple(_explicit(schema, choice, f"model.attention[{i}]") for i, choice in enumerate(attention))
    names = [choice.sequence for choice in attention]
    for i, name in enumerate(names):
        if name in names[:i]:
            raise ConfigError(f"sequence '{name}' is attended twice", where=f"model.attention[{i}]", fix="name it once")
    for i, pair in enumerate(pairs):
        for key in (*pair.history, *pair.target):
            if key not in keys:
                raise ConfigError(
                    f"'{key}' is not among model.features", where=f"model.attention[{i}]", fix=f"add '{key}' there"
                )
    return pairs


def _automatic(schema: Schema, keys: tuple[str, ...]) -> tuple[Pair, ...]:
    pairs = []
    for sequence in schema.sequences:
        targets = [feature.name for feature in one_id_features(schema, sequence.table) if feature.name in keys]
        if sequence.name not in keys or len(targets) != 1:
            continue
        history, target = [sequence.name], targets
        for side in sequence.side:
            partners = [f.name for f in one_id_features(schema, side.table) if f.name in keys] if side.table else []
            if sequence.key(side) in keys and len(partners) == 1:
                history.append(sequence.key(side))
                target += partners
        pairs.append(Pair(tuple(history), tuple(target)))
    return tuple(pairs)


def _explicit(schema: Schema, choice: AttentionConfig, where: str) -> Pair:
    sequences = {sequence.name: sequence for sequence in schema.sequences}
    if choice.sequence not in sequences:
        raise ConfigError(
            f"no sequence '{choice.sequence}'", where=f"{where}.sequence", fix=nearest(choice.sequence, sequences)
        )
    sequence = sequences[choice.sequence]
    history, target = [sequence.name], [_target(schema, sequence, choice.target, where)]
    sides = {side.name: side for side in sequence.side if side.table}
    for name, feature in choice.side.items():
        if name not in sides:
            raise ConfigError(
                f"sequence '{sequence.name}' has no id side column '{name}'",
                where=f"{where}.side",
                fix=nearest(name, sides),
            )
        history.append(sequence.key(sides[name]))
        target.append(_partner(schema, feature, sides[name].table, f"{where}.side.{name}"))
    return Pair(tuple(history), tuple(target))


def _target(schema: Schema, sequence: SequenceFeature, name: str, where: str) -> str:
    if name:
        return _partner(schema, name, sequence.table, f"{where}.target")
    targets = [feature.name for feature in one_id_features(schema, sequence.table)]
    if len(targets) == 1:
        return targets[0]
    raise ConfigError(
        f"{len(targets)} sparse features of one id use table '{sequence.table}' of sequence '{sequence.name}'",
        where=f"{where}.target",
        fix=f"name one of them: {', '.join(targets)}" if targets else "declare one in the schema",
    )


def _partner(schema: Schema, name: str, table: str, where: str) -> str:
    singles = {feature.name: feature for feature in schema.sparse if not feature.many}
    if name not in singles:
        raise ConfigError(f"no sparse feature of one id '{name}'", where=where, fix=nearest(name, singles))
    if singles[name].table != table:
        allowed = [feature.name for feature in one_id_features(schema, table)]
        raise ConfigError(
            f"'{name}' uses table '{singles[name].table}', the sequence '{table}'; they must share one table",
            where=where,
            fix=nearest(name, allowed),
        )
    return name
