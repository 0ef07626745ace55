"""Scalars as TensorBoard event files."""

from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from thresher.trainer.callbacks.base import EndRecord, RunFacts


class TensorBoard:
    """A :class:`~thresher.trainer.callbacks.sinks.Sink` that writes event files.

    Args:
        folder: where the event files go; TensorBoard shows it as one run, also over several resumes.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writer: SummaryWriter | None = None

    def start(self, facts: RunFacts) -> None:
        # TensorBoard hides the events of a killed process after the step that is resumed.
        self._writer = SummaryWriter(str(self._folder), purge_step=facts.resumed_step + 1)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        assert self._writer is not None, "start comes first"
        for name, value in values.items():
            # '@' (hr@10) is not allowed in a TensorBoard tag.
            self._writer.add_scalar(name.replace("@", "_at_"), value, step)

    def end(self, record: EndRecord) -> None:
        assert self._writer is not None, "start comes first"
        self._writer.close()
