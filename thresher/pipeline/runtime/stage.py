"""What one rank holds of a model: its stages, and its rows of the embedding and the output layer."""

from itertools import accumulate, pairwise

import torch
from torch import Tensor, nn

from thresher.errors import ScheduleError
from thresher.pipeline.context import SliceContext, TrunkBuilder, TrunkLayer
from thresher.pipeline.runtime.recompute import Recompute, recomputed
from thresher.pipeline.schedule.ops import Shape
from thresher.pipeline.simulate.costs import even_layers
from thresher.pipeline.vocabulary.embedding import SplitEmbedding
from thresher.pipeline.vocabulary.head import Head
from thresher.pipeline.vocabulary.rows import row_range


class StageModule(nn.Module):
    """Consecutive layers of a trunk. Parameters keep the names they have in the whole model.

    Args:
        front: what the first stage does before its layers; None elsewhere.
        layers: in order; their ``index`` names them.
        tail: what the last stage does after its layers; None elsewhere.
    """

    def __init__(self, front: TrunkLayer | None, layers: list[TrunkLayer], tail: TrunkLayer | None) -> None:
        super().__init__()
        self.front = front
        self.layers = nn.ModuleDict({str(layer.index): layer for layer in layers})
        self.tail = tail

    def forward(self, values: Tensor, context: SliceContext, recompute: Recompute = "none") -> Tensor:
        """[B, T, D] from [B, T, D]."""
        if self.front is not None:
            values = self.front(values, context)
        for layer in self.layers.values():
            values = recomputed(layer, values, context, recompute)
        if self.tail is not None:
            values = self.tail(values, context)
        return values


class RankParts(nn.Module):
    """Everything a rank trains.

    Attributes:
        stages: by chunk.
        embedding: its rows of the input embedding; None where it has none.
        head: its rows of the output layer; None where it has none.
        width: of hidden states, D.
        layers: of the whole model, L.
        vocabulary: rows of the whole embedding and of the whole output layer, V.
    """

    def __init__(
        self,
        stages: list[StageModule],
        embedding: SplitEmbedding | None,
        head: Head | None,
        width: int,
        layers: int,
        vocabulary: int,
    ) -> None:
        super().__init__()
        self.stages = nn.ModuleList(stages)
        self.embedding, self.head = embedding, head
        self.width, self.layers, self.vocabulary = width, layers, vocabulary

    def stage(self, chunk: int) -> StageModule:
        """The stage that is ``chunk`` of this rank."""
        stage = self.stages[chunk]
        assert isinstance(stage, StageModule)
        return stage

    @property
    def dtype(self) -> torch.dtype:
        """Of hidden states between stages: that of the parameters."""
        return next(self.parameters()).dtype


def layer_ranges(layers: int, stages: int) -> list[range]:
    """Layers of each stage, as evenly as possible, longer stages first.

    Raises:
        ScheduleError: there are fewer layers than stages.
    """
    if layers < stages:
        raise ScheduleError(
            f"{layers} layers cannot fill {stages} stages",
            where="pipeline.stages x pipeline.chunks",
            fix=f"use at most {layers} stages in all, or a deeper model",
        )
    edges = [0, *accumulate(even_layers(layers, stages))]
    return [range(first, last) for first, last in pairwise(edges)]


def build_parts(builder: TrunkBuilder, shape: Shape, rank: int, device: torch.device) -> RankParts:
    """What ``rank`` of the pipeline holds, as it is initialised.

    Raises:
        ScheduleError: the model has too few layers, or its output layer is tied to an embedding on another rank.
    """
    ranges = layer_ranges(builder.layers, shape.stages * shape.chunks)
    require_tied_together(builder, shape)
    stages = [_stage(builder, ranges, shape, shape.stage(rank, chunk)).to(device) for chunk in range(shape.chunks)]
    embedding = _embedding(builder, shape, rank, device)
    head = _head(builder, shape, rank, device, embedding)
    return RankParts(stages, embedding, head, builder.width, builder.layers, builder.vocabulary)


def _stage(builder: TrunkBuilder, ranges: list[range], shape: Shape, stage: int) -> StageModule:
    front = builder.front() if stage == 0 else None
    tail = builder.tail() if stage == shape.last_stage else None
    return StageModule(front, [builder.layer(index) for index in ranges[stage]], tail)


def _embedding(builder: TrunkBuilder, shape: Shape, rank: int, device: torch.device) -> SplitEmbedding | None:
    if rank and not shape.split_embedding:
        return None
    parts = shape.stages if shape.split_embedding else 1
    first, last = row_range(builder.vocabulary, parts, rank)
    weight = nn.Parameter(builder.table("embedding", first, last, device))
    return SplitEmbedding(weight, builder.vocabulary, parts, rank)


def _head(
    builder: TrunkBuilder, shape: Shape, rank: int, device: torch.device, embedding: SplitEmbedding | None
) -> Head | None:
    if not shape.split_head and rank != shape.stages - 1:
        return None
    parts, part = (shape.stages, rank) if shape.split_head else (1, 0)
    first, last = row_range(builder.vocabulary, parts, part)
    if builder.tied:
        assert embedding is not None
        return builder.head(embedding.weight, first)
    return builder.head(nn.Parameter(builder.table("head", first, last, device)), first)


def require_tied_together(builder: TrunkBuilder, shape: Shape) -> None:
    """Refuses an output layer that is tied to an embedding on another rank.

    Raises:
        ScheduleError: see above.
    """
    apart = shape.split_embedding != shape.split_head or not shape.split_head
    if builder.tied and shape.stages > 1 and apart:
        raise ScheduleError(
            "the output layer is tied to the embedding, but they are on different ranks",
            where="pipeline.split_embedding, pipeline.split_head",
            fix="set both, or untie them",
        )
