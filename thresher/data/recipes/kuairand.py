"""KuaiRand (Gao et al., CIKM 2022): logs of short videos with many kinds of feedback.

Read: the published ``log_*.csv`` of KuaiRand-Pure, -1K and -27K (commas), with ``user_features_*.csv`` and
``video_features_basic_*.csv`` beside them joined where present, and processed copies of the log parted by tabs.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import ClassVar, Literal

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from thresher.data.recipes.base import Chunk, divide
from thresher.data.recipes.from_files import HeldOut, IdTables, Names, rows_of
from thresher.data.recipes.joins import SideTable, bad_of
from thresher.data.recipes.screen import integers, need, need_integers
from thresher.data.schema import DenseFeature, Group, Label, Schema, SparseFeature, Time
from thresher.data.sources import Layout, Part, choose_files, first_line, header, read_delimited, require

_KNOWN_FILES = ("log_standard_*.csv*", "log_*.csv*", "*.tsv")
_USER_FILES, _VIDEO_FILES = "user_features_*.csv*", "video_features_basic_*.csv*"
_CSV = Layout(delimiter=",")
_NEEDED = ("user_id", "video_id", "time_ms")
_RANGES = tuple(f"{kind}_user_num_range" for kind in ("follow", "fans", "friend"))
_USER = (
    "user_active_degree",
    *("is_lowactive_period", "is_live_streamer", "is_video_author"),
    *_RANGES,
    "register_days_range",
    *(f"onehot_feat{i}" for i in range(18)),
)
_VIDEO = ("author_id", "video_type", "upload_type", "music_id", "music_type")


class KuaiRand(IdTables, HeldOut):
    """Ids of user, video, tab, hour of the day and weekday, the video's duration, and side features where present.

    What is known only after the impression (play and stay times, other feedback) is never a feature.

    Attributes:
        labels: columns of 0 or 1, each a label: ``is_click``, ``long_view``, ``is_like``, ``is_comment`` ...
        split: ``time``: the newest rows are held out; ``random``: by a hash of the row number.
        pattern: which files of a folder are logs.
    """

    recipe: ClassVar[str] = "kuairand"
    summary: ClassVar[str] = "KuaiRand video logs: several labels, side features"

    labels: Names = Field(default=("is_click", "long_view"), min_length=1)
    split: Literal["time", "random"] = "time"
    pattern: str = ""

    def data_schema(self) -> Schema:
        ids = ["user_id", "video_id", *(["tab"] if "tab" in self._columns else []), "hour_of_day", "weekday"]
        ids += [name for side in self._sides for name in side.columns]
        dense = [DenseFeature(name="duration_ms", transform="log1p")] if "duration_ms" in self._columns else []
        return Schema(
            name="kuairand",
            tables=tuple(self.table(name) for name in ids),
            features=(
                *(Label(name=name) for name in self.labels),
                *dense,
                *(SparseFeature(name=name, table=name) for name in ids),
                Time(name="time"),
                Group(name="group"),
            ),
        )

    def inputs(self) -> tuple[Path, ...]:
        return (
            *self._logs,
            *self._side_files("user_features_*.csv*"),
            *self._side_files("video_features_basic_*.csv*"),
        )

    def chunks(self) -> Iterator[Chunk]:
        by_time = self.split == "time"
        cuts = self.cuts(integers(part.table, "time") for _, part in self._parts()) if by_time else (0.0, 0.0)
        for number, part in self._parts():
            which = self.by_time(integers(part.table, "time"), cuts) if by_time else self.at_random(number, part.rows)
            yield from divide(rows_of(part, "train", self._joined(part.table)), which)

    @cached_property
    def _logs(self) -> tuple[Path, ...]:
        return choose_files(self.source, (self.pattern,) if self.pattern else _KNOWN_FILES, "KuaiRand log")

    @cached_property
    def _columns(self) -> tuple[str, ...]:
        """The columns of the first log."""
        return header(self._logs[0], _layout(self._logs[0]), (*_NEEDED, *self.labels))

    def _side_files(self, pattern: str) -> tuple[Path, ...]:
        folders = dict.fromkeys(path.parent for path in self._logs)
        return tuple(path for folder in folders for path in sorted(folder.glob(pattern)))

    @cached_property
    def _sides(self) -> tuple[SideTable, ...]:
        users = SideTable.read(self._side_files(_USER_FILES), _CSV, "user_id", _USER)
        videos = SideTable.read(self._side_files(_VIDEO_FILES), _CSV, "video_id", _VIDEO)
        return tuple(side for side in (users, videos) if side)

    def _parts(self) -> Iterator[tuple[int, Part]]:
        bad = bad_of(self._sides)
        for number, path in enumerate(self._logs):
            layout = _layout(path)
            require(path, header(path, layout, _NEEDED), [name for name in self._columns if name in self._used])
            for part in read_delimited(path, layout):
                part = replace(part, bad=(*bad, *part.bad))
                bad = ()
                yield number, _moments(need_integers(need(part, "user_id", "video_id"), "time_ms"))

    @property
    def _used(self) -> set[str]:
        return {feature.name for feature in self.data_schema().features}

    def _joined(self, table: pa.Table) -> pa.Table:
        table = table.append_column("group", table.column("user_id"))
        for side in self._sides:
            table = side.join(table)
        return table


def _layout(path: Path) -> Layout:
    return Layout(delimiter="\t" if "\t" in first_line(path) else ",")


def _moments(part: Part) -> Part:
    """Adds ``time`` (seconds), and ``hour_of_day`` and ``weekday`` (0 is Monday) in UTC, from ``time_ms``."""
    seconds = pc.divide(part.table.column("time_ms"), 1000)
    moment = seconds.cast(pa.timestamp("s"))
    table = part.table.append_column("time", seconds)
    table = table.append_column("hour_of_day", pc.hour(moment)).append_column("weekday", pc.day_of_week(moment))
    return replace(part, table=table)
