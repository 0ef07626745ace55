"""The same run on every device there is: CUDA with NCCL must take the steps that the CPU takes with gloo."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from thresher.data.prepare import prepare
from thresher.data.recipes.synthetic import Synthetic
from thresher.launch.cli import run

GPUS = torch.cuda.device_count()
CONFIG = """
name: devices
data: {{path: {data}}}
model: {{name: {model}}}
train: {{batch_size: 256, max_steps: 12, log_every: 1}}
optim: {{dense: {{name: sgd, lr: 0.01}}, tables: {{name: sgd, lr: 0.1}}}}
tensorboard: false
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("devices") / "data"
    prepare(Synthetic(rows=6000, sparse=4, table_rows=5000), folder)
    return folder


def losses(folder: Path, data: Path, model: str, device: str, processes: int) -> list[float]:
    config = folder / f"{device}.yaml"
    config.write_text(CONFIG.format(data=data, model=model))
    root = folder / device
    settings = [f"run_dir={root}", f"launch.device={device}", f"launch.processes={processes}"]
    assert run(["train", str(config), *settings]) == 0
    records: list[dict[str, Any]] = [json.loads(line) for line in (root / "metrics.jsonl").read_text().splitlines()]
    return [record["loss"] for record in records if record["kind"] == "train"]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("model", ["deepfm", "din"])
@pytest.mark.parametrize("processes", [1, 2])
def test_cuda_takes_the_steps_of_the_cpu(tmp_path: Path, data: Path, model: str, processes: int) -> None:
    if processes > GPUS:
        pytest.skip(f"needs {processes} CUDA devices, this machine has {GPUS}")
    cpu = losses(tmp_path, data, model, "cpu", processes)
    cuda = losses(tmp_path, data, model, "cuda", processes)
    assert len(cpu) == len(cuda) == 12
    assert max(abs(a - b) for a, b in zip(cpu, cuda, strict=True)) < 1e-3
