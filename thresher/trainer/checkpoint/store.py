"""Checkpoints of one run: saved in a transaction, verified before they are loaded."""

import logging
import time
import uuid
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save
from torch.distributed.checkpoint.stateful import Stateful

from thresher.errors import CheckpointError
from thresher.sharding.tier_targets import Destination
from thresher.trainer.checkpoint import folders
from thresher.trainer.checkpoint.faults import translated
from thresher.trainer.checkpoint.hashing import HashingWriter
from thresher.trainer.checkpoint.layout import flattened, local_bytes, misfits
from thresher.trainer.checkpoint.lazy import Described, Prepared
from thresher.trainer.checkpoint.manifest import MANIFEST, FileRecord, Manifest
from thresher.trainer.checkpoint.planners import LoadPlanner, SavePlanner
from thresher.trainer.checkpoint.ranks import Ranks
from thresher.trainer.checkpoint.verify import newest_intact, outline, verify_together

log = logging.getLogger(__name__)

PARTS = "parts"
"""Under this name the facts that parts of the state give stand among the facts of a checkpoint."""

State = Mapping[str, Any]
"""Parts by name: ``Stateful`` objects (a module, an optimizer) or nested dicts of tensors and plain values.

A part that is left out when loading is not read: ``{"model": model}`` loads weights without their optimizers. The names
``model`` (the weights) and ``table_optimizer`` (the tables' row state) let errors about tables say more.
"""


@dataclass(frozen=True)
class SavedCheckpoint:
    """One checkpoint in place. ``bytes`` counts the files of all ranks, ``seconds`` the whole save on this rank."""

    path: Path
    step: int
    save_id: str
    seconds: float
    bytes: int


@dataclass(frozen=True)
class BadCheckpoint:
    """A checkpoint that was passed over, and what is wrong with it, file by file."""

    path: Path
    problems: tuple[str, ...]


@dataclass(frozen=True)
class RestoredCheckpoint:
    """A checkpoint that was loaded.

    Attributes:
        facts: what was saved beside the tensors.
        world: number of ranks that wrote it.
        skipped: newer checkpoints that are corrupt, newest first.
        seconds: verification and loading, on this rank.
    """

    path: Path
    step: int
    save_id: str
    facts: dict[str, Any]
    world: int
    skipped: tuple[BadCheckpoint, ...]
    seconds: float
    bytes: int


class CheckpointStore:
    """The checkpoints of one run in ``folder``. All methods but :meth:`latest` are collective over ``group``.

    Args:
        folder: visible to all ranks under the same path; made by the first save.
        keep: number of checkpoints kept, the newest ones.
        group: the ranks that save and load together; None for all.
    """

    def __init__(self, folder: Path, keep: int, group: ProcessGroup | None = None) -> None:
        if keep < 1:
            raise ValueError(f"keep is {keep}; at least 1 checkpoint is kept")
        self.folder = folder
        self._keep = keep
        self._group = group

    def save(self, step: int, state: State, facts: Mapping[str, Any]) -> SavedCheckpoint:
        """Writes ``state`` and ``facts`` (JSON) as the checkpoint of ``step``.

        Until it is complete and on disk it does not exist for :meth:`restore`; former ones are deleted after that only.

        Raises:
            CheckpointError: on every rank, whichever failed: disk full, no permission, folder not shared. Nothing is
                left of the attempt, former checkpoints are untouched, and training may go on.
        """
        start = time.perf_counter()
        ranks = Ranks(self._group)
        plain = ranks.each(lambda: _plain(state), self.folder)
        needed = sum(ranks.gather(local_bytes(plain, ranks.rank)))
        partial = ranks.first(lambda: folders.begin(self.folder, step), self.folder)
        with self._undone_on_failure(partial, ranks, needed):
            records = _write(partial, plain, ranks)
            described = _described(state, ranks)
            all_facts = {**facts, PARTS: described} if described else facts
            manifest = ranks.first(lambda: _seal(partial, step, ranks.world, all_facts, records), partial, needed)
            final = ranks.first(lambda: folders.commit(partial), partial, needed)
        ranks.first(lambda: self._retain(final), self.folder)
        return SavedCheckpoint(final, step, manifest.save_id, time.perf_counter() - start, manifest.size_bytes)

    def latest(self) -> Path | None:
        """The newest intact checkpoint; None where there is none. Reads it entirely, in this process.

        Raises:
            CheckpointError: the folder cannot be listed.
        """
        try:
            return newest_intact(self.folder)
        except OSError as error:
            raise translated(error, self.folder) from None

    def restore(self, state: State) -> RestoredCheckpoint | None:
        """Loads the newest intact checkpoint into ``state``, in place; None where the folder holds no checkpoint.

        Corrupt ones are passed over with a warning that names the files.

        Raises:
            CheckpointError: there are checkpoints and none is intact, or the newest intact one is of another model.
        """
        start = time.perf_counter()
        ranks = Ranks(self._group)
        skipped: list[BadCheckpoint] = []
        for path in ranks.first(lambda: folders.candidates(self.folder), self.folder):
            manifest, problems = verify_together(path, ranks)
            if manifest is not None and not problems:
                return _load(path, manifest, state, ranks, tuple(skipped), start)
            skipped.append(BadCheckpoint(path, tuple(problems)))
            if ranks.rank == 0:
                log.warning("checkpoint %s is corrupt, trying the one before it: %s", path, "; ".join(problems))
        if skipped:
            raise _all_bad(skipped)
        return None

    def load(self, path: Path, state: State) -> RestoredCheckpoint:
        """Loads the checkpoint ``path`` and no other.

        Raises:
            CheckpointError: it is corrupt (names the files, and the newest intact one beside it) or of another model.
        """
        start = time.perf_counter()
        ranks = Ranks(self._group)
        manifest, problems = verify_together(path, ranks)
        if manifest is None or problems:
            good = ranks.first(lambda: newest_intact(path.parent), path.parent)
            fix = f"load {good}, the newest intact one" if good else "restore it from a copy"
            raise CheckpointError(f"is corrupt: {'; '.join(problems)}", where=str(path), fix=fix)
        return _load(path, manifest, state, ranks, (), start)

    def _retain(self, newest: Path) -> None:
        """Deletes what is older than the newest ``keep`` complete checkpoints up to ``newest``, which always stays."""
        step = folders.step_of(newest)
        kept = 1
        for path in folders.candidates(self.folder):
            if (folders.step_of(path) or 0) >= (step or 0):
                continue
            if kept >= self._keep:
                self._delete(path)
            elif not outline(path)[1]:
                kept += 1

    def _delete(self, path: Path) -> None:
        try:
            folders.remove(path)
        except OSError as error:
            log.warning("old checkpoint %s cannot be deleted: %s", path, error)

    @contextmanager
    def _undone_on_failure(self, partial: Path, ranks: Ranks, needed_bytes: int) -> Iterator[None]:
        try:
            yield
        except (Exception, CheckpointException) as error:
            if ranks.rank == 0:
                folders.discard(partial)
            if isinstance(error, CheckpointException):
                raise translated(error, partial, needed_bytes) from error
            raise


def _plain(state: State) -> dict[str, Any]:
    return {name: part.state_dict() if isinstance(part, Stateful) else part for name, part in state.items()}


def _described(state: State, ranks: Ranks) -> dict[str, dict[str, Any]]:
    """Facts of the parts of ``state`` that have any, of all ranks together."""
    mine = {name: part.facts() for name, part in state.items() if isinstance(part, Described)}
    found: dict[str, dict[str, Any]] = {}
    for theirs in ranks.gather(mine):
        for name, part in theirs.items():
            found[name] = found.get(name, {}) | part
    return {name: part for name, part in found.items() if part}


def _write(partial: Path, plain: dict[str, Any], ranks: Ranks) -> dict[str, FileRecord]:
    """All ranks' shards; the digests of all files, on every rank."""
    writer = HashingWriter(partial)
    with _one_process_is_fine():
        dcp_save(
            plain,
            storage_writer=writer,
            planner=SavePlanner(),
            process_group=ranks.group,
        )
    return {name: record for records in ranks.gather(writer.records) for name, record in records.items()}


def _seal(partial: Path, step: int, world: int, facts: Mapping[str, Any], records: dict[str, FileRecord]) -> Manifest:
    """Writes the manifest, after a look at whether the files of all ranks arrived in the one folder."""
    present = {entry.name: entry.stat().st_size for entry in partial.iterdir()}
    for name, record in records.items():
        if present.get(name) != record.size_bytes:
            raise CheckpointError(
                f"rank 0 sees {present.get(name, 0):,} of the {record.size_bytes:,} bytes of {name}",
                where=str(partial),
                fix="save to a folder that all machines share",
            )
    manifest = Manifest(save_id=str(uuid.uuid4()), step=step, world=world, facts=dict(facts), files=records)
    folders.write_synced(partial / MANIFEST, manifest.encoded())
    return manifest


def _load(
    path: Path, manifest: Manifest, state: State, ranks: Ranks, skipped: tuple[BadCheckpoint, ...], start: float
) -> RestoredCheckpoint:
    reader = FileSystemReader(path)
    described = manifest.facts.get(PARTS, {})
    prepared = ranks.each(lambda: _prepared(state, reader.read_metadata().state_dict_metadata, described), path)
    destinations = {key: value for key, value in flattened(prepared).items() if isinstance(value, Destination)}
    plain = {name: _without_destinations(part) for name, part in prepared.items()}
    wanted = flattened(plain) | destinations
    everyone = {key for keys in ranks.gather(list(wanted)) for key in keys}
    ranks.each(lambda: _require_fit(misfits(wanted, everyone, state, reader.read_metadata(), path)), path)
    try:
        with _one_process_is_fine():
            dcp_load(plain, storage_reader=reader, planner=LoadPlanner(destinations), process_group=ranks.group)
    except CheckpointException as error:
        raise translated(error, path) from error
    ranks.each(lambda: _take_over(state, plain), path)
    seconds = time.perf_counter() - start
    if ranks.rank == 0:
        log.info("restored step %d from %s in %.2f s", manifest.step, path, seconds)
    return RestoredCheckpoint(
        path, manifest.step, manifest.save_id, manifest.facts, manifest.world, skipped, seconds, manifest.size_bytes
    )


def _prepared(state: State, saved: Mapping[str, Any], described: Mapping[str, Any]) -> dict[str, Any]:
    plain = _plain({name: part for name, part in state.items() if not isinstance(part, Prepared)})
    for name, part in state.items():
        if isinstance(part, Prepared):
            own = {key.removeprefix(f"{name}."): found for key, found in saved.items() if key.startswith(f"{name}.")}
            plain[name] = part.prepare(own, described.get(name, {}))
    return plain


def _without_destinations(part: Any) -> Any:
    """The same state without them, as DCP takes it; ``part`` itself where it has none."""
    if not isinstance(part, dict) or not any(isinstance(v, Destination) for v in flattened(part).values()):
        return part
    kept = {key: _without_destinations(value) for key, value in part.items() if not isinstance(value, Destination)}
    return {key: value for key, value in kept.items() if not (isinstance(value, dict) and not value)}


def _require_fit(found: list[CheckpointError]) -> None:
    if found:
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        raise CheckpointError(f"{found[0].what}{more}", where=found[0].where, fix=found[0].fix)


def _take_over(state: State, plain: dict[str, Any]) -> None:
    for name, part in state.items():
        if isinstance(part, Stateful):
            part.load_state_dict(plain[name])


def _all_bad(skipped: list[BadCheckpoint]) -> CheckpointError:
    newest, others = skipped[0], len(skipped) - 1
    more = f" (and {others} older ones)" if others else ""
    return CheckpointError(
        f"no intact checkpoint; {newest.path.name}: {'; '.join(newest.problems)}{more}",
        where=str(newest.path.parent),
        fix="restore one from a copy, or set another run_dir to start anew",
    )


@contextmanager
def _one_process_is_fine() -> Iterator[None]:
    """Without DCP's warning about an absent process group."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        yield
