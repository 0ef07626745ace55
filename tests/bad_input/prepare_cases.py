"""Preparations that cannot be done."""

from collections.abc import Callable
from pathlib import Path

from tests.bad_input.case import Case
from thresher.errors import BadBatch, ConfigError, DataError, SchemaError, ThresherError
from thresher.launch.data_views import list_recipes, prepare_from

CRITEO = "\t".join(["1", *map(str, range(13)), *[f"{i:08x}" for i in range(26)]])


def _prepare(
    id: str, recipe: str, options: list[str], error: type[ThresherError], *told: str, source: str | bytes | None = None
) -> Case:
    def act(folder: Path) -> object:
        if isinstance(source, bytes):
            (folder / "source.txt").write_bytes(source)
        elif source is not None:
            (folder / "source.txt").write_text(source)
        return prepare_from(recipe, options, folder / "out", 0.001, overwrite=False)

    return Case(id, act, error, told)


def _into(id: str, fill: Callable[[Path], object], error: type[ThresherError], *told: str) -> Case:
    def act(folder: Path) -> object:
        fill(folder / "out")
        return prepare_from("synthetic", ["rows=200"], folder / "out", 0.001, overwrite=False)

    return Case(id, act, error, told)


def _foreign_files(out: Path) -> None:
    out.mkdir()
    (out / "letters.txt").write_text("dear")


FILE = ["source=source.txt"]
CASES = (
    _prepare("unknown recipe", "critheo", [], ConfigError, "no recipe 'critheo'", "Did you mean 'criteo'?"),
    _prepare("unknown option", "synthetic", ["row=3"], ConfigError, "recipe 'synthetic': row: unknown key", "'rows'"),
    _prepare("option of the wrong type", "synthetic", ["rows=x"], ConfigError, "rows: expects a whole number, got 'x'"),
    _prepare("option without a value", "synthetic", ["rows"], ConfigError, "'rows' is no override", "key.path=value"),
    _prepare("shares that leave no rows", "synthetic", ["valid=0.6", "test=0.6"], ConfigError, "valid"),
    _prepare("no source", "criteo", [], ConfigError, "source"),
    _prepare("missing source", "criteo", ["source=nowhere.txt"], DataError, "nowhere.txt"),
    _prepare("empty source", "criteo", FILE, DataError, "source.txt: is empty", "Give a file with rows", source=""),
    _prepare("blank source", "criteo", FILE, DataError, "source.txt", source="\n\n\n"),
    _prepare("source of another format", "criteo", FILE, ThresherError, "source.txt", source="dear reader\n" * 5),
    _prepare("binary source", "criteo", FILE, ThresherError, "source.txt", source=bytes(range(1, 256)) * 20),
    _prepare("source without labels", "criteo", FILE, SchemaError, "no column 'label'", source=CRITEO[2:] + "\n"),
    _prepare(
        "malformed lines above the share",
        "criteo",
        FILE,
        BadBatch,
        "source.txt, row 2",
        "raise max_bad_share",
        source="\n".join([CRITEO, "1\tonly\tthree", *[CRITEO] * 30]),
    ),
    _prepare("truncated archive", "criteo", FILE, DataError, "source.txt", source=b"\x1f\x8b\x08\x00broken"),
    _prepare("libsvm that is none", "libsvm", FILE, ThresherError, "source.txt", source="hello world\n" * 3),
    _into("folder with other files", _foreign_files, ConfigError, "out: exists and is no data set", "new folder"),
    _into(
        "file where the data set should be",
        lambda out: out.write_text(""),
        ConfigError,
        "out: exists and is no data set",
    ),
    _into(
        "folder with another data set",
        lambda out: prepare_from("synthetic", ["rows=100"], out, 0.001, overwrite=False),
        ConfigError,
        "holds another data set: option rows=100, not 200",
    ),
    Case(
        "no folder to prepare in",
        lambda _: prepare_from("synthetic", [], Path(), 0.001, overwrite=False),
        ConfigError,
        ("--out: no folder is given",),
    ),
    Case(
        "options of an unknown recipe",
        lambda _: list_recipes("synth"),
        ConfigError,
        ("no recipe 'synth'", "'synthetic'"),
    ),
)
