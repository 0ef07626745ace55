"""The command line: exit codes, messages, help, and one small run from end to end."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from thresher import __version__
from thresher.launch.cli import run

CONFIG = {
    "name": "small",
    "run_dir": "run",
    "data": {"path": "data", "recipe": "synthetic", "options": {"rows": 640, "table_rows": 50}},
    "model": {"name": "lr"},
    "train": {"batch_size": 64, "log_every": 4},
    "launch": {"processes": 2},
    "tensorboard": False,
}


@pytest.fixture(autouse=True)
def in_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("small.yaml").write_text(yaml.safe_dump(CONFIG))


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["train", "smal.yaml"], "ConfigError: smal.yaml: no such file. Did you mean 'small.yaml'?"),
        (["train", "small.yaml", "seeed=1"], "ConfigError: override seeed: unknown key. Did you mean 'seed'?"),
        (["train", "small.yaml", "launch.processes=3"], "is not divisible by launch.processes"),
        (["plan", "small.yaml", "model.name=gpt"], "ConfigError: override model.name: 'gpt' is not known"),
        (["data", "show", "nowhere"], "DataError: nowhere: no such folder"),
        (["data", "recipes", "crite"], "ConfigError: command line: no recipe 'crite'. Did you mean 'criteo'?"),
        (["data", "prepare", "synthetic"], "ConfigError: --out: no folder is given. Add '--out FOLDER'"),
        (["eval", "nowhere"], "ConfigError: nowhere: is no run directory"),
        (["report", "nowhere"], "ConfigError: nowhere: is no run directory"),
    ],
)
def test_user_errors_are_one_message_and_code_two(
    arguments: list[str], told: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(arguments) == 2
    seen = capfd.readouterr().err
    assert told in seen
    assert "Traceback" not in seen


def test_debug_shows_the_traceback_as_well(capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["data", "show", "nowhere", "--debug"]) == 2
    seen = capfd.readouterr().err
    assert seen.startswith("Traceback")
    assert seen.rstrip().splitlines()[-1].startswith("DataError: nowhere: no such folder")


def test_unknown_commands_and_options_are_refused(capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["trian"]) == 2
    assert "train" in capfd.readouterr().err
    assert run(["eval", "x", "--checkpoint", "newest"]) == 2
    assert "--checkpoint" in capfd.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["--help"], ["train", "-h"], ["data", "--help"], ["data", "prepare", "-h"]])
def test_help_is_help(arguments: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    assert run(arguments) in (0, 2)
    assert "Usage: thresher" in capfd.readouterr().out


def test_version(capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["--version"]) == 0
    assert capfd.readouterr().out == f"thresher {__version__}\n"


def test_help_imports_no_torch() -> None:
    program = (
        "import sys; from thresher.launch.cli import run; run(['train', '--help']); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=60).returncode == 0


def test_recipes_are_listed_with_their_options(capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["data", "recipes"]) == 0
    assert "synthetic" in capfd.readouterr().out
    assert run(["data", "recipes", "synthetic"]) == 0
    assert "table_rows" in capfd.readouterr().out


def test_prepare_show_plan(capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["data", "prepare", "synthetic", "--out", "data", "rows=640", "-o", "table_rows=50"]) == 0
    assert "train" in capfd.readouterr().out
    assert run(["data", "show", "data", "--rows", "1"]) == 0
    shown = capfd.readouterr().out
    assert "option table_rows: 50" in shown
    assert "sparse_0=" in shown
    assert run(["plan", "small.yaml", "sharding.default=row_wise"]) == 0
    planned = capfd.readouterr().out
    assert "row_wise" in planned
    assert "rank 1 " in planned
    assert "8 steps of 64 samples over 512 rows" in planned.replace("\n", " ")


def test_training_leaves_a_run_behind(capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["train", "small.yaml"]) == 0
    run_dir = Path("run")
    assert [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert {"config.yaml", "plan.json", "report.html", "logs"} <= {path.name for path in run_dir.iterdir()}
    assert "rank 1 of 2" in (run_dir / "logs" / "rank-1.log").read_text()
    assert "warning" not in capfd.readouterr().err
    (run_dir / "report.html").unlink()
    assert run(["report", "run"]) == 0
    assert (run_dir / "report.html").stat().st_size > 1000


@pytest.mark.slow
def test_a_run_is_refused_to_another_seed_continued_and_measured(capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["train", "small.yaml"]) == 0
    capfd.readouterr()
    assert run(["train", "small.yaml", "seed=1"]) == 2
    told = capfd.readouterr().err
    assert "seed was 0, is 1" in told
    assert told.count("ConfigError") == 1
    assert run(["train", "small.yaml", "train.epochs=2"]) == 0
    assert "resumed at step 8" in capfd.readouterr().out
    assert run(["eval", "run", "--split", "valid"]) == 0
    assert "auc" in capfd.readouterr().out


@pytest.mark.slow
def test_worker_runs_under_plain_torchrun() -> None:
    assert run(["data", "prepare", "synthetic", "--out", "data", "rows=640", "table_rows=50"]) == 0
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    worker = ["-m", "thresher.launch.worker", "small.yaml"]
    done = subprocess.run([*torchrun, "4", *worker], capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    assert "4 ranks" in done.stdout
    wrong = subprocess.run([*torchrun, "3", *worker, "seed=1"], capture_output=True, text=True, timeout=180)
    assert wrong.returncode == 1
    assert "LaunchError: world size 3: train.batch_size 64 is not divisible by 3 processes" in wrong.stderr
