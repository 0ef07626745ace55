"""Everything a run can be told, in one frozen tree: a YAML file plus dotted overrides."""

from pathlib import Path
from typing import Annotated, Any, Generic, Literal, TypeVar

from pydantic import Field, model_validator

from thresher.embeddings.dynamic.config import DynamicTable
from thresher.embeddings.fields.config import FieldConfig
from thresher.embeddings.optimizers import Momentum, TableOptimizer
from thresher.embeddings.policy.config import TierConfig
from thresher.settings import Settings, apply_override, parse, read_yaml
from thresher.sharding.plan import ShardingConfig
from thresher.trainer.model import ModelConfig, SequenceConfig
from thresher.trainer.pipelined.config import PipelineConfig

Positive = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]


class DataConfig(Settings):
    """Where the rows come from.

    Attributes:
        path: folder made by ``thresher data prepare``.
        recipe: recipe that makes ``path`` when it does not exist; empty for none.
        options: options of that recipe.
        shuffle: whether training rows come in random order.
        window_rows: rows shuffled together in memory; a split no larger than this is shuffled as a whole.
        prefetch: batches prepared ahead of the step.
        max_bad_share: share of bad rows above which the run fails; 0 fails on the first.
        train, valid, test: split names; an empty ``valid`` or ``test`` means there is none.
    """

    path: Path
    recipe: str = ""
    options: dict[str, Any] = Field(default_factory=dict)
    shuffle: bool = True
    window_rows: Positive = 1 << 19
    prefetch: Positive = 4
    max_bad_share: Share = 0.0
    train: str = "train"
    valid: str = "valid"
    test: str = "test"


class Schedule(Settings):
    """Learning rate over time, as a factor: linear warm-up from 0, then ``kind`` down to ``floor``.

    Attributes:
        warmup_steps: steps of linear warm-up.
        decay_steps: steps until ``floor`` is reached; 0 for the whole run.
    """

    kind: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: int = Field(default=0, ge=0)
    decay_steps: int = Field(default=0, ge=0)
    floor: Share = 0.0


class DenseOptimizer(Settings):
    """The optimizer of everything that is not a table. ``weight_decay`` is decoupled for ``adamw``, L2 otherwise."""

    name: Literal["adam", "adamw", "sgd", "adagrad"] = "adam"
    lr: float = Field(default=1e-3, gt=0)
    betas: tuple[Momentum, Momentum] = (0.9, 0.999)
    eps: float = Field(default=1e-8, gt=0)
    momentum: float = Field(default=0.0, ge=0, lt=1)
    weight_decay: float = Field(default=0.0, ge=0)


class OptimConfig(Settings):
    """Optimizers of the dense part and of the tables, and the schedule both follow."""

    dense: DenseOptimizer = DenseOptimizer()
    tables: TableOptimizer = TableOptimizer()
    schedule: Schedule = Schedule()


class TrainConfig(Settings):
    """How long and in which portions.

    Attributes:
        batch_size: samples per optimizer step over all processes.
        epochs: passes over the training split; may be a fraction.
        max_steps: upper bound on optimizer steps; 0 for none.
        accumulate: micro-batches per step. Dense gradients add up; tables are updated at every micro-batch.
        precision: autocast of the dense part; tables stay fp32.
        clip_norm: upper bound on the norm of the dense gradient; 0 for none.
        log_every: steps between log lines and records of ``metrics.jsonl``.
    """

    batch_size: Positive = 4096
    epochs: float = Field(default=1.0, gt=0)
    max_steps: int = Field(default=0, ge=0)
    accumulate: Positive = 1
    precision: Literal["fp32", "bf16"] = "fp32"
    clip_norm: float = Field(default=0.0, ge=0)
    log_every: Positive = 50


class EarlyStop(Settings):
    """Stop when ``metric`` on the validation split has not improved for ``patience`` evaluations; 0 never stops.

    An empty ``metric`` is the first one measured: AUC, MRR, MSE or loss, by kind of model.
    """

    metric: str = ""
    patience: int = Field(default=0, ge=0)
    min_delta: float = Field(default=0.0, ge=0)


class EvalConfig(Settings):
    """When and what to measure on held-out rows.

    Attributes:
        every_steps: steps between evaluations on the validation split; 0 for once an epoch.
        batch_size: samples per evaluation batch over all processes; 0 for the training batch size.
        at: cut-offs k of HR@k and NDCG@k.
        max_rows: rows of the validation split used during training; 0 for all. The final test uses all.
    """

    every_steps: int = Field(default=0, ge=0)
    batch_size: int = Field(default=0, ge=0)
    at: tuple[Positive, ...] = (10, 50)
    max_rows: int = Field(default=0, ge=0)
    early_stop: EarlyStop = EarlyStop()


class CheckpointConfig(Settings):
    """When to save. ``every_steps`` 0 saves at the end only; ``keep`` newest are kept."""

    every_steps: int = Field(default=0, ge=0)
    keep: Positive = 3


class LaunchConfig(Settings):
    """Processes of a local run; under torchrun or Ray these are told by the launcher.

    Attributes:
        processes: ranks to start.
        threads: compute threads per rank.
        device: ``auto`` takes CUDA where there is one.
        timeout_s: how long a collective may wait before the run is stopped.
    """

    processes: Positive = 1
    threads: Positive = 1
    device: Literal["auto", "cpu", "cuda"] = "auto"
    timeout_s: float = Field(default=600.0, gt=0)


M = TypeVar("M", bound=ModelConfig)


class RunConfig(Settings, Generic[M]):
    """One run. ``run_dir`` empty means ``runs/<name>``.

    Attributes:
        tiers: precision of table rows by their priority, under a byte budget.
        fields: scores of fields, and whether useless ones are dropped while training.
        dynamic: for tables with raw ids, by table name, how rows are given and taken back.
        pipeline: stages and slices of a model of sequences; see ``docs/pipeline.md``.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    run_dir: str = ""
    seed: int = Field(default=0, ge=0)
    data: DataConfig
    model: M
    sharding: ShardingConfig = ShardingConfig()
    tiers: TierConfig = TierConfig()
    fields: FieldConfig = FieldConfig()
    dynamic: dict[str, DynamicTable] = Field(default_factory=dict)
    pipeline: PipelineConfig = PipelineConfig()
    train: TrainConfig = TrainConfig()
    optim: OptimConfig = OptimConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    launch: LaunchConfig = LaunchConfig()
    tensorboard: bool = True

    @model_validator(mode="after")
    def _is_cut(self) -> "RunConfig[M]":
        if not self.pipeline.is_on:
            return self
        if not isinstance(self.model, SequenceConfig):
            raise ValueError(
                f"model '{self.model.name}' cannot be cut into stages and slices; "
                "set model.name to transformer, or leave pipeline out"
            )
        if self.launch.processes % self.pipeline.stages:
            raise ValueError(
                f"launch.processes {self.launch.processes} do not form pipelines of pipeline.stages "
                f"{self.pipeline.stages}; set launch.processes to a multiple of {self.pipeline.stages}"
            )
        if self.train.accumulate > 1:
            raise ValueError(
                f"train.accumulate {self.train.accumulate} is for runs without a pipeline; "
                "set pipeline.microbatches instead, and train.accumulate to 1"
            )
        return self

    @model_validator(mode="after")
    def _batches_divide(self) -> "RunConfig[M]":
        parts = self.batch_parts(self.launch.processes)
        if self.train.batch_size % parts:
            raise ValueError(
                f"train.batch_size {self.train.batch_size} is not divisible by "
                f"{self.batch_factors} = {parts}; set train.batch_size to a multiple of {parts}"
            )
        return self

    @model_validator(mode="after")
    def _stops_by_something(self) -> "RunConfig[M]":
        if self.eval.early_stop.patience and not self.data.valid:
            raise ValueError(
                f"eval.early_stop.patience {self.eval.early_stop.patience} needs a validation split, but data.valid is "
                "empty; set data.valid to the name of a split, or eval.early_stop.patience to 0"
            )
        return self

    @model_validator(mode="after")
    def _drops_are_judged(self) -> "RunConfig[M]":
        if self.fields.drops and not self.data.valid:
            raise ValueError(
                "fields.rounds drops fields only as long as the validation split allows it, but data.valid is empty; "
                "set data.valid to the name of a split, or fields.rounds to 0"
            )
        return self

    def batch_parts(self, world: int) -> int:
        """Into how many equal parts the samples of a step are divided on ``world`` processes."""
        return self.pipeline.parts(world) if self.pipeline.is_on else world * self.train.accumulate

    @property
    def batch_factors(self) -> str:
        """What that number is, for messages."""
        if self.pipeline.is_on:
            return "launch.processes / pipeline.stages x pipeline.microbatches"
        return "launch.processes x train.accumulate"

    @property
    def folder(self) -> Path:
        """The run directory."""
        return Path(self.run_dir or f"runs/{self.name}")


C = TypeVar("C", bound=Settings)


def load_config(kind: type[C], path: Path, overrides: tuple[str, ...] = ()) -> C:
    """Reads a YAML file and applies overrides such as ``train.batch_size=1024`` (values are YAML).

    Raises:
        ConfigError: the file or an override is not usable; names the key and the nearest valid one.
    """
    values = read_yaml(path)
    overridden = [apply_override(values, override) for override in overrides]
    return parse(kind, values, str(path), overridden)
