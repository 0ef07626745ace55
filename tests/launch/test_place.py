"""What a rank reads from the environment."""

from pathlib import Path

import pytest

from thresher.errors import LaunchError
from thresher.launch.group import check_batches, check_device
from thresher.launch.place import Place, read_place
from thresher.trainer.config import LaunchConfig, TrainConfig

GOOD = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}


def test_place_is_what_torchrun_says() -> None:
    assert read_place(GOOD) == Place(rank=3, world=4, local_rank=1, local_world=2)
    told = {"THRESHER_LOG_DIR": "/logs", "TORCHELASTIC_ERROR_FILE": "/error.json", "THRESHER_LAUNCHER": "17"}
    more = read_place(GOOD | told)
    assert (more.log_dir, more.error_file, more.launcher) == (Path("/logs"), Path("/error.json"), 17)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"RANK": "4"}, "RANK 4 is outside 0..3"),
        ({"LOCAL_RANK": "2"}, "LOCAL_RANK 2 is outside 0..1"),
        ({"WORLD_SIZE": "many"}, "WORLD_SIZE is 'many', not a number"),
    ],
)
def test_inconsistent_environment_is_refused(changes: dict[str, str], told: str) -> None:
    with pytest.raises(LaunchError, match=told):
        read_place(GOOD | changes)


def test_absent_environment_names_both_ways_to_start() -> None:
    with pytest.raises(LaunchError, match=r"RANK is not set.*thresher train CONFIG.*torchrun --nproc-per-node"):
        read_place({})


def test_batch_must_divide_among_the_ranks() -> None:
    check_batches(TrainConfig(batch_size=24, accumulate=2), world=4)
    with pytest.raises(LaunchError, match=r"batch_size 100 .* 3 processes x train.accumulate 2 = 6") as caught:
        check_batches(TrainConfig(batch_size=100, accumulate=2), world=3)
    assert "96 or 102" in caught.value.fix
    with pytest.raises(LaunchError) as caught:
        check_batches(TrainConfig(batch_size=2), world=3)
    assert "train.batch_size to 3," in caught.value.fix


def test_cuda_is_refused_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert check_device(LaunchConfig(device="auto"), 2) == "cpu"
    with pytest.raises(LaunchError, match=r"launch.device: 2 processes need a CUDA device each.*launch.device=cpu"):
        check_device(LaunchConfig(device="cuda"), 2)
