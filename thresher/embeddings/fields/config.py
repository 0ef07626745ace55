"""What a user says about fields: how often to score them, and which may go."""

from pydantic import Field, model_validator

from thresher.settings import Settings


class FieldConfig(Settings):
    """F-Permutation (SHARK, arXiv 2308.09395): the loss says which fields matter; those that do not are dropped.

    A round drops the least important fields, trains ``finetune_steps`` more and measures the validation split. If the
    metric has lost more than ``tolerance`` against its value before the first round, the fields of this round are taken
    back and the rounds are over; else the tables that nobody reads any more give their memory back, and the next round
    begins at the next scoring. The paper names neither numbers nor a schedule: these are ours.

    Attributes:
        score_every: steps between scorings; 0 for none of all this.
        look_every: one step in so many counts for scores. Looking costs some percent of a step.
        start_after: steps without scores at the beginning, while the model knows little.
        rounds: at most so many; 0 scores and reports only.
        fields_per_round: fields dropped in a round.
        bytes_per_round: fields are dropped in a round until they free so much instead: a share of the tables' bytes
            (``5%``) or bytes (``200MB``).
        finetune_steps: between a drop and its validation; 0 for ``score_every``.
        metric: what must not get worse; empty for the first one measured (AUC, MRR or MSE, by kind of model).
        tolerance: how much worse it may get.
        budget: rounds end once tables take no more than this share of their bytes (``70%``) or these bytes (``2GB``);
            fields are then dropped by score per byte, and by score where it is empty.
        protect: fields that stay.
        dry_run: report what would be dropped, and drop nothing.
    """

    score_every: int = Field(default=0, ge=0)
    look_every: int = Field(default=4, ge=1)
    start_after: int = Field(default=0, ge=0)
    rounds: int = Field(default=0, ge=0)
    fields_per_round: int = Field(default=1, ge=1)
    bytes_per_round: str = ""
    finetune_steps: int = Field(default=0, ge=0)
    metric: str = ""
    tolerance: float = Field(default=0.001, ge=0)
    budget: str = ""
    protect: tuple[str, ...] = ()
    dry_run: bool = False

    @property
    def enabled(self) -> bool:
        """Whether fields are scored."""
        return self.score_every > 0

    @property
    def drops(self) -> bool:
        """Whether fields may be dropped."""
        return self.enabled and self.rounds > 0 and not self.dry_run

    @property
    def check_after(self) -> int:
        """Steps between a drop and its validation."""
        return self.finetune_steps or self.score_every

    def looks(self, step: int) -> bool:
        """Whether the step after ``step`` counts for scores."""
        return step >= self.start_after and (step - self.start_after) % self.look_every == 0

    @model_validator(mode="after")
    def _scored_if_dropped(self) -> "FieldConfig":
        if (self.rounds or self.dry_run) and not self.score_every:
            raise ValueError("fields are dropped by their scores, but score_every is 0; set it to a number of steps")
        return self
