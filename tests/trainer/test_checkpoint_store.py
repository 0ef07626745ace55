"""Saving, verifying, falling back, retention: in one process, without torch.distributed."""

import json
import logging
import os
import re
from pathlib import Path

import pytest
import torch

from thresher.errors import CheckpointError
from thresher.trainer.checkpoint import CheckpointStore, verify
from thresher.trainer.checkpoint.folders import candidates
from thresher.trainer.checkpoint.manifest import MANIFEST, read_manifest


def state(value: float = 0.0) -> dict[str, dict[str, object]]:
    return {
        "model": {
            "weight": torch.full((64, 8), float(value)),
            "bias": torch.full((8,), float(value)),
            "count": int(value),
        }
    }


def saved(folder: Path, *steps: int, keep: int = 10) -> CheckpointStore:
    store = CheckpointStore(folder, keep)
    for step in steps:
        store.save(step, state(step), {"cursor": step * 100})
    return store


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(data)


def test_what_is_saved_is_restored_with_facts_and_cost(tmp_path):
    store = CheckpointStore(tmp_path / "new" / "checkpoints", keep=2)
    record = store.save(7, state(7.5), {"cursor": 700, "best": {"auc": 0.1 + 0.2}, "none": None})
    assert record.path == tmp_path / "new" / "checkpoints" / "step-00000007"
    assert record.bytes == sum(f.stat().st_size for f in record.path.iterdir() if f.name != MANIFEST)
    assert record.seconds > 0
    target = state()
    restored = store.restore(target)
    assert restored is not None
    assert restored.facts == {"cursor": 700, "best": {"auc": 0.1 + 0.2}, "none": None}
    assert (restored.step, restored.save_id, restored.world, restored.skipped) == (7, record.save_id, 1, ())
    assert torch.equal(target["model"]["weight"], torch.full((64, 8), 7.5))
    assert target["model"]["count"] == 7


def test_an_undefined_metric_among_the_facts_does_not_cost_the_checkpoint(tmp_path):
    CheckpointStore(tmp_path, 1).save(1, state(), {"auc": float("nan")})
    restored = CheckpointStore(tmp_path, 1).restore(state())
    assert restored is not None
    assert restored.facts["auc"] != restored.facts["auc"]
    assert verify(restored.path) == []


def test_facts_that_are_not_json_leave_nothing_behind(tmp_path):
    store = saved(tmp_path, 1)
    with pytest.raises(TypeError, match="not JSON serializable"):
        store.save(2, state(2), {"path": object()})
    assert names(tmp_path) == ["step-00000001"]


def test_an_empty_or_absent_folder_holds_no_checkpoint(tmp_path):
    assert CheckpointStore(tmp_path, 1).restore(state()) is None
    assert CheckpointStore(tmp_path / "absent", 1).restore(state()) is None
    assert CheckpointStore(tmp_path / "absent", 1).latest() is None


def test_keeping_none_is_refused(tmp_path):
    with pytest.raises(ValueError, match="at least 1"):
        CheckpointStore(tmp_path, 0)


def test_only_the_newest_are_kept(tmp_path):
    saved(tmp_path, 1, 2, 3, 10, 9_999_999_999, keep=2)
    assert names(tmp_path) == ["step-00000010", "step-9999999999"]


def test_foreign_names_are_neither_read_nor_deleted(tmp_path):
    for name in ("best", "step-1", "step-000000001", "step-00000001x"):
        (tmp_path / name).mkdir()
    (tmp_path / "step-00000005").write_text("a file")
    assert CheckpointStore(tmp_path, 1).restore(state()) is None
    store = saved(tmp_path, 7, 8, keep=1)
    assert store.latest() == tmp_path / "step-00000008"
    assert {"best", "step-1", "step-000000001", "step-00000001x", "step-00000005"} < set(names(tmp_path))


def test_incomplete_ones_do_not_count_among_the_kept(tmp_path):
    saved(tmp_path, 1, 2, 3)
    (tmp_path / "step-00000003" / MANIFEST).unlink()
    (tmp_path / "step-00000002" / ".metadata").unlink()
    saved(tmp_path, 4, keep=2)
    assert names(tmp_path) == ["step-00000001", "step-00000002", "step-00000003", "step-00000004"]
    saved(tmp_path, 5, keep=2)
    assert names(tmp_path) == ["step-00000004", "step-00000005"]


def test_corrupt_ones_of_later_steps_do_not_push_out_the_one_just_saved(tmp_path):
    saved(tmp_path, 100, 200, 300)
    for step in (200, 300):
        flip(tmp_path / f"step-00000{step}" / "__0_0.distcp")
    store = saved(tmp_path, 150, keep=1)
    assert store.latest() == tmp_path / "step-00000150"
    store.save(300, state(300), {})
    assert store.latest() == tmp_path / "step-00000300"
    assert names(tmp_path) == ["step-00000300"]


def test_a_step_can_be_saved_again(tmp_path):
    store = saved(tmp_path, 4, 5)
    first = read_manifest(tmp_path / "step-00000005")
    store.save(5, state(55), {"again": True})
    restored = store.restore(target := state())
    assert restored is not None
    assert restored.facts == {"again": True}
    assert restored.save_id != first.save_id
    assert target["model"]["count"] == 55
    assert names(tmp_path) == ["step-00000004", "step-00000005"]


def test_what_interrupted_saves_left_is_tidied_and_never_loaded(tmp_path):
    saved(tmp_path, 3)
    (tmp_path / "step-00000003").rename(tmp_path / "step-00000003.old")
    for name in ("step-00000004.partial", "step-00000002.trash", "step-00000003.trash"):
        (tmp_path / name / "deep").mkdir(parents=True)
    store = CheckpointStore(tmp_path, 2)
    restored = store.restore(state())
    assert restored is not None
    assert restored.path.name == "step-00000003.old"
    store.save(4, state(4), {})
    assert names(tmp_path) == ["step-00000003", "step-00000004"]


def test_a_superseded_former_checkpoint_is_tidied(tmp_path):
    saved(tmp_path, 3)
    (tmp_path / "step-00000003").rename(tmp_path / "step-00000003.old")
    saved(tmp_path / "other", 3)
    (tmp_path / "other" / "step-00000003").rename(tmp_path / "step-00000003")
    assert [path.name for path in candidates(tmp_path)] == ["step-00000003", "step-00000003.old"]
    (tmp_path / "other").rmdir()
    saved(tmp_path, 4)
    assert names(tmp_path) == ["step-00000003", "step-00000004"]


def test_a_corrupt_checkpoint_is_named_and_passed_over(tmp_path, caplog):
    store = saved(tmp_path, 1, 2, 3)
    flip(tmp_path / "step-00000003" / "__0_0.distcp")
    (tmp_path / "step-00000002" / ".metadata").unlink()
    target = state()
    with caplog.at_level(logging.WARNING):
        restored = store.restore(target)
    assert restored is not None
    assert restored.step == 1
    assert target["model"]["count"] == 1
    assert [(bad.path.name, bad.problems) for bad in restored.skipped] == [
        ("step-00000003", ("__0_0.distcp has changed content",)),
        ("step-00000002", (".metadata is missing",)),
    ]
    assert "step-00000003 is corrupt, trying the one before it: __0_0.distcp has changed content" in caplog.text
    assert store.latest() == tmp_path / "step-00000001"


def test_with_none_intact_the_run_does_not_silently_start_anew(tmp_path):
    store = saved(tmp_path, 1, 2)
    for step in (1, 2):
        flip(tmp_path / f"step-0000000{step}" / "__0_0.distcp")
    with pytest.raises(CheckpointError) as caught:
        store.restore(state())
    assert caught.value.message == (
        f"CheckpointError: {tmp_path}: no intact checkpoint; step-00000002: __0_0.distcp has changed content "
        "(and 1 older ones). Restore one from a copy, or set another run_dir to start anew"
    )


def test_a_checkpoint_asked_for_by_name_is_not_replaced_by_another(tmp_path):
    store = saved(tmp_path, 1, 2)
    assert store.load(tmp_path / "step-00000001", target := state()).step == 1
    assert target["model"]["count"] == 1
    flip(tmp_path / "step-00000002" / "__0_0.distcp")
    with pytest.raises(CheckpointError) as caught:
        store.load(tmp_path / "step-00000002", state())
    good = tmp_path / "step-00000001"
    assert caught.value.message == (
        f"CheckpointError: {tmp_path / 'step-00000002'}: is corrupt: __0_0.distcp has changed content. "
        f"Load {good}, the newest intact one"
    )
    with pytest.raises(CheckpointError, match=r"MANIFEST.json cannot be read: No such file.*Restore it from a copy"):
        store.load(tmp_path / "elsewhere" / "step-00000002", state())


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda p: (p / "__0_0.distcp").write_bytes(b"x"), r"__0_0.distcp has 1 bytes, not \d+"),
        (lambda p: (p / "extra").write_bytes(b"x"), "extra does not belong to the checkpoint"),
        (lambda p: (p / "folder").mkdir(), "folder does not belong to the checkpoint"),
        (lambda p: (p / MANIFEST).unlink(), "MANIFEST.json cannot be read: No such file or directory"),
        (lambda p: (p / MANIFEST).write_text("{}"), "MANIFEST.json is not a manifest"),
        (lambda p: (p / MANIFEST).write_text("[1]"), "MANIFEST.json is not a manifest"),
        (lambda p: (p / MANIFEST).write_text("[" * 100_000), "MANIFEST.json is not a manifest"),
        (lambda p: (p / MANIFEST).write_bytes(b"\xff"), "MANIFEST.json is not a manifest"),
        (
            lambda p: (p / MANIFEST).write_text((p / MANIFEST).read_text() + "\n"),
            r"MANIFEST.json differs from what was written \(checksum [0-9a-f]{32}\)",
        ),
        (
            lambda p: (p / MANIFEST).write_text((p / MANIFEST).read_text().replace('"cursor": 500', '"cursor": 400')),
            "MANIFEST.json differs from what was written .*",
        ),
        (
            lambda p: ((p / "__0_0.distcp").rename(p.parent / "x"), (p / "__0_0.distcp").symlink_to(p.parent / "x")),
            "__0_0.distcp is not a regular file",
        ),
    ],
)
def test_every_kind_of_damage_is_told(tmp_path, damage, problem):
    saved(tmp_path, 5)
    path = tmp_path / "step-00000005"
    assert verify(path) == []
    damage(path)
    assert len(problems := verify(path)) == 1
    assert re.fullmatch(problem, problems[0])


def test_a_renamed_folder_is_told(tmp_path):
    saved(tmp_path, 5)
    renamed = (tmp_path / "step-00000005").rename(tmp_path / "step-00000006")
    assert verify(renamed) == ["MANIFEST.json is of step 5, the folder is named step-00000006"]
    assert verify(tmp_path / "nothing") == ["MANIFEST.json cannot be read: No such file or directory"]


def test_the_manifest_is_json_that_others_can_read(tmp_path):
    saved(tmp_path, 5)
    content = json.loads((tmp_path / "step-00000005" / MANIFEST).read_text())
    assert content["step"] == 5
    assert content["facts"] == {"cursor": 500}
    assert set(content["files"]) == {".metadata", "__0_0.distcp"}


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (
            {"weight": torch.zeros(64, 9), "bias": torch.zeros(8), "count": 0},
            "'model.weight' is torch.float32 [64, 8], the model wants torch.float32 [64, 9]. "
            "Load it into a model of the same tables and layers",
        ),
        (
            {"weight": torch.zeros(64, 8, dtype=torch.float64), "bias": torch.zeros(8), "count": 0},
            "'model.weight' is torch.float32 [64, 8], the model wants torch.float64 [64, 8]. "
            "Load it into a model of the same tables and layers",
        ),
        (
            {"weight": torch.zeros(64, 8), "bias": torch.zeros(8), "count": 0, "gate": torch.zeros(1)},
            "has no 'model.gate', which this run needs. Load it into the model it was saved from",
        ),
        (
            {"weight": torch.zeros(64, 8), "count": 0},
            "holds 'model.bias', which this run does not have. Load it into the model it was saved from",
        ),
        (
            {"weight": torch.zeros(64, 8), "bias": torch.zeros(8), "count": torch.zeros(1)},
            "'model.count' is no tensor. Load it into the model it was saved from",
        ),
        (
            {"weight": torch.zeros(1), "bias": torch.zeros(1), "count": 0},
            "'model.weight' is torch.float32 [64, 8], the model wants torch.float32 [1] (and 1 more). "
            "Load it into a model of the same tables and layers",
        ),
    ],
)
def test_a_checkpoint_of_another_model_is_refused_before_anything_is_overwritten(tmp_path, wanted, message):
    store = saved(tmp_path, 1)
    with pytest.raises(CheckpointError) as caught:
        store.restore({"model": wanted})
    assert caught.value.message == f"CheckpointError: {tmp_path / 'step-00000001'}: {message}"
    assert all(not torch.any(value) for value in wanted.values() if isinstance(value, torch.Tensor))


@pytest.mark.parametrize(
    ("number", "what", "fix"),
    [
        (28, "No space left on device", "Free space there, or save to a larger file system"),
        (122, "Disk quota exceeded", "Free space there, or save to a larger file system"),
        (13, "Permission denied", "Make the folder writable for this user"),
        (5, "Input/output error", "Check the file system"),
    ],
)
@pytest.mark.parametrize("call", ["fsync", "rename", "mkdir"])
def test_a_failing_disk_is_told_and_leaves_the_former_checkpoint(tmp_path, monkeypatch, call, number, what, fix):
    store = saved(tmp_path, 1)

    def fail(*arguments: object, **options: object) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(Path if call != "fsync" else os, call, fail)
        with pytest.raises(CheckpointError) as caught:
            store.save(2, state(2), {})
    assert what in caught.value.what
    assert caught.value.where.startswith(str(tmp_path))
    assert caught.value.fix == fix[0].lower() + fix[1:]
    if call != "mkdir":
        assert re.search(r"the checkpoint needs 2,080 bytes", caught.value.what)
    assert names(tmp_path) == ["step-00000001"]
    assert store.save(2, state(2), {}).step == 2


def test_an_old_checkpoint_that_cannot_be_deleted_does_not_fail_the_save(tmp_path, monkeypatch, caplog):
    store = saved(tmp_path, 1, keep=1)
    real = Path.rename

    def stubborn(path: Path, target: Path) -> Path:
        if target.suffix == ".trash":
            raise PermissionError(13, "Permission denied")
        return real(path, target)

    monkeypatch.setattr(Path, "rename", stubborn)
    with caplog.at_level(logging.WARNING):
        store.save(2, state(2), {})
    assert names(tmp_path) == ["step-00000001", "step-00000002"]
    assert "step-00000001 cannot be deleted" in caplog.text


def test_a_folder_that_cannot_be_made_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"file.*Check the file system"):
        CheckpointStore(tmp_path / "file" / "checkpoints", 1).save(1, state(), {})


def test_a_folder_that_cannot_be_listed_is_told(tmp_path, monkeypatch):
    def fail(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "iterdir", fail)
    with pytest.raises(CheckpointError, match="Permission denied"):
        CheckpointStore(tmp_path, 1).latest()
    with pytest.raises(CheckpointError, match="Permission denied"):
        CheckpointStore(tmp_path, 1).restore(state())


def test_files_that_did_not_arrive_in_one_folder_are_told(tmp_path, monkeypatch):
    from thresher.trainer.checkpoint import hashing
    from thresher.trainer.checkpoint.manifest import FileRecord

    elsewhere = {"__1_0.distcp": FileRecord(size_bytes=10, xxh3_128="0" * 32)}
    monkeypatch.setattr(hashing.HashingWriter, "records", property(lambda writer: elsewhere))
    with pytest.raises(CheckpointError, match=r"rank 0 sees 0 of the 10 bytes of __1_0.distcp.*all machines share"):
        CheckpointStore(tmp_path, 1).save(1, state(), {})
    assert names(tmp_path) == []
