"""Random damage to a folder of checkpoints: what disks, copies and people do to files."""

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from thresher.trainer.checkpoint.manifest import MANIFEST

PAGE_BYTES = 4096


@dataclass(frozen=True)
class Damage:
    """What was done to one checkpoint; at least one of ``files`` must be named when it is found."""

    kind: str
    checkpoint: Path
    files: tuple[str, ...]


def damage(rng: random.Random, folder: Path, kind: str) -> Damage:
    """Does ``kind`` to the newest checkpoint of ``folder``, which holds two or more of the same model."""
    older, newest = sorted(folder.glob("step-*"))[-2:]
    return Damage(kind, newest, KINDS[kind](rng, newest, older))


def _pick(rng: random.Random, path: Path) -> Path:
    return rng.choice(sorted(file for file in path.iterdir() if file.is_file()))


def _shard(rng: random.Random, path: Path) -> Path:
    return rng.choice([file for file in sorted(path.iterdir()) if file.name != MANIFEST])


def _bit_flip(rng: random.Random, newest: Path, older: Path) -> tuple[str, ...]:
    file = _pick(rng, newest)
    data = bytearray(file.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    file.write_bytes(data)
    return (file.name,)


def _zeroed_page(rng: random.Random, newest: Path, older: Path) -> tuple[str, ...]:
    file = _pick(rng, newest)
    before = file.read_bytes()
    pages = range(0, len(before), PAGE_BYTES)
    start = rng.choice([page for page in pages if any(before[page : page + PAGE_BYTES])])
    end = min(start + PAGE_BYTES, len(before))
    file.write_bytes(before[:start] + bytes(end - start) + before[end:])
    return (file.name,)


def _truncated(rng: random.Random, newest: Path, older: Path) -> tuple[str, ...]:
    file = _pick(rng, newest)
    file.write_bytes(file.read_bytes()[: rng.randrange(file.stat().st_size)])
    return (file.name,)


def _grown(rng: random.Random, newest: Path, older: Path) -> tuple[str, ...]:
    file = _pick(rng, newest)
    with file.open("ab") as stream:
        stream.write(rng.randbytes(rng.randint(1, 100)))
    return (file.name,)


def _missing(rng: random.Random, newest: Path, older: Path) -> tuple[str, ...]:
    file = _pick(rng, newest)
    file.unlink()
    return (file.name,)


def _extra(rng: random.Random, newest: Path, older: Path) -> tuple[str, ...]:
    name = rng.choice(["__9_0.distcp", ".metadata.tmp", "notes.txt", "MANIFEST.json.bak", "__0_1.distcp"])
    (newest / name).write_bytes(rng.randbytes(rng.randrange(100)))
    return (name,)


def _duplicated(rng: random.Random, newest: Path, older: Path) -> tuple[str, ...]:
    file = _pick(rng, newest)
    name = f"{file.name}.copy"
    shutil.copyfile(file, newest / name)
    return (name,)


def _swapped_within(rng: random.Random, newest: Path, older: Path) -> tuple[str, ...]:
    first, second = rng.sample(sorted(newest.iterdir()), 2)
    _exchange(first, second)
    return (first.name, second.name)


def _swapped_between(rng: random.Random, newest: Path, older: Path) -> tuple[str, ...]:
    file = _pick(rng, newest)
    _exchange(file, older / file.name)
    return (file.name,)


def _from_older(rng: random.Random, newest: Path, older: Path) -> tuple[str, ...]:
    """All files but the manifest, or the manifest alone, are those of the step before."""
    names = [file.name for file in newest.iterdir() if file.name != MANIFEST]
    chosen = rng.choice([names, [MANIFEST]])
    for name in chosen:
        shutil.copyfile(older / name, newest / name)
    return tuple(chosen)


def _other_step(rng: random.Random, newest: Path, older: Path) -> tuple[str, ...]:
    """The whole folder is that of the step before, under the newer name."""
    shutil.rmtree(newest)
    shutil.copytree(older, newest)
    return (MANIFEST,)


def _edited(rng: random.Random, newest: Path, older: Path) -> tuple[str, ...]:
    """The manifest is still JSON and of the same structure."""
    content = json.loads((newest / MANIFEST).read_text())
    record = rng.choice(list(content["files"].values()))
    edits: list[Callable[[], object]] = [
        lambda: content.update(step=content["step"] + 1),
        lambda: content.update(world=content["world"] + 1),
        lambda: content.update(save_id="0" * 36),
        lambda: content["facts"].update(cursor=rng.randrange(10**6, 10**7)),
        lambda: content["facts"].update(new=1),
        lambda: record.update(size_bytes=record["size_bytes"] + 1),
        lambda: record.update(xxh3_128=f"{rng.getrandbits(128):032x}"),
        lambda: content["files"].pop(rng.choice(list(content["files"]))),
        lambda: content["files"].update({"__7_0.distcp": record}),
        lambda: content.update(checksum=f"{rng.getrandbits(128):032x}"),
        lambda: content.update(more=1),
        lambda: content.pop(rng.choice(list(content))),
    ]
    rng.choice(edits)()
    (newest / MANIFEST).write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")
    return (MANIFEST,)


def _respelled(rng: random.Random, newest: Path, older: Path) -> tuple[str, ...]:
    """The manifest means the same JSON in other bytes."""
    text = (newest / MANIFEST).read_text()
    spellings = [
        json.dumps(json.loads(text)),
        text + " ",
        text.replace('"step"', '"\\u0073tep"'),
        text.replace("{\n", '{\n "step": 0,\n', 1),
        text.replace("\n", "\r\n"),
    ]
    (newest / MANIFEST).write_bytes(rng.choice(spellings).encode())
    return (MANIFEST,)


def _exchange(first: Path, second: Path) -> None:
    data = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(data)


KINDS: dict[str, Callable[[random.Random, Path, Path], tuple[str, ...]]] = {
    "bit flip": _bit_flip,
    "zeroed page": _zeroed_page,
    "truncated": _truncated,
    "grown": _grown,
    "missing": _missing,
    "extra": _extra,
    "duplicated": _duplicated,
    "swapped within a step": _swapped_within,
    "swapped between steps": _swapped_between,
    "files of another step": _from_older,
    "folder of another step": _other_step,
    "edited manifest": _edited,
    "respelled manifest": _respelled,
}
COMMON = ("bit flip", "zeroed page", "truncated", "swapped within a step", "swapped between steps")
"""Kinds that are tried more often."""


def kinds(rng: random.Random, count: int) -> list[str]:
    """``count`` kinds, each at least once where ``count`` allows, the common ones more often."""
    every = list(KINDS)
    drawn = rng.choices([*every, *COMMON, *COMMON], k=max(0, count - len(every)))
    return (every + drawn)[:count]
