"""FuxiCTR 2.3.10's LR, DeepFM and DCN V2.

Its wheel carries the layers and the base class with the training step, but these three models only in its repository.
Here they are put together from its layers as its repository does, and trained by its own ``train_step``.
"""

from typing import Any

import torch
from fuxictr.features import FeatureMap
from fuxictr.pytorch.layers import CrossNetV2, FactorizationMachine, FeatureEmbedding, LogisticRegression, MLP_Block
from fuxictr.pytorch.models import BaseModel
from torch import Tensor, nn

from thresher.data.schema import Schema

BASE = {"metrics": ["AUC"], "verbose": 0, "model_root": "", "gpu": -1}
CLIP_NORM = 10.0
"""What its ``fit`` clips at unless told otherwise."""


def feature_map(schema: Schema, dim: int) -> FeatureMap:
    """The schema in FuxiCTR's terms, with embeddings ``dim`` wide."""
    fields = FeatureMap(schema.name, "")
    fields.default_emb_dim = dim
    for feature in schema.sparse:
        rows = schema.table(feature.table).rows
        fields.features[feature.name] = {"type": "categorical", "source": "", "vocab_size": rows}
    for floating in schema.dense:
        fields.features[floating.name] = {"type": "numeric", "source": ""}
    fields.num_fields = len(fields.features)
    fields.labels = [schema.labels[0].name]
    fields.set_column_index()
    return fields


class FuxiLr(BaseModel):  # type: ignore[misc]
    """Logistic regression."""

    def __init__(self, fields: FeatureMap) -> None:
        super().__init__(fields, **BASE)
        self.lr_layer = LogisticRegression(fields, use_bias=True)

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"y_pred": self.output_activation(self.lr_layer(self.get_inputs(inputs)))}


class FuxiDeepFm(BaseModel):  # type: ignore[misc]
    """DeepFM."""

    def __init__(self, fields: FeatureMap, dim: int, hidden: tuple[int, ...], dropout: float) -> None:
        super().__init__(fields, **BASE)
        self.embedding_layer = FeatureEmbedding(fields, dim)
        self.fm = FactorizationMachine(fields)
        self.mlp = MLP_Block(fields.sum_emb_out_dim(), list(hidden), output_dim=1, dropout_rates=dropout)

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        values = self.get_inputs(inputs)
        vectors = self.embedding_layer(values)
        logits = self.fm(values, vectors)
        logits += self.mlp(vectors.flatten(start_dim=1))
        return {"y_pred": self.output_activation(logits)}


class FuxiDcnV2(BaseModel):  # type: ignore[misc]
    """DCN V2, parallel, three full-rank cross layers."""

    def __init__(self, fields: FeatureMap, dim: int, hidden: tuple[int, ...], dropout: float) -> None:
        super().__init__(fields, **BASE)
        self.embedding_layer = FeatureEmbedding(fields, dim)
        width = fields.sum_emb_out_dim()
        self.crossnet = CrossNetV2(width, 3)
        self.parallel_dnn = MLP_Block(width, list(hidden), dropout_rates=dropout)
        self.fc = nn.Linear(width + hidden[-1], 1)

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        vectors = self.embedding_layer(self.get_inputs(inputs), flatten_emb=True)
        both = torch.cat([self.crossnet(vectors), self.parallel_dnn(vectors)], dim=-1)
        return {"y_pred": self.output_activation(self.fc(both))}


def fuxictr_model(name: str, schema: Schema, dim: int, hidden: tuple[int, ...], dropout: float, lr: float) -> Any:
    """The peer of one of our models with its own Adam over all parameters, ready for ``train_step``."""
    fields = feature_map(schema, dim)
    makers: dict[str, Any] = {
        "lr": lambda: FuxiLr(fields),
        "deepfm": lambda: FuxiDeepFm(fields, dim, hidden, dropout),
        "dcnv2": lambda: FuxiDcnV2(fields, dim, hidden, dropout),
    }
    model = makers[name]()
    model.compile("adam", "binary_crossentropy", lr)
    model.reset_parameters()
    model._max_gradient_norm = CLIP_NORM
    return model.train()
