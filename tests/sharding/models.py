"""Models for planner tests: nothing but tables, on the meta device."""

import torch
from torch import nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, EmbeddingCollection, EmbeddingConfig

META = torch.device("meta")


def bags(**tables: tuple[int, int]) -> EmbeddingBagCollection:
    """A pooled collection of tables named with their (rows, dim)."""
    return EmbeddingBagCollection(
        [
            EmbeddingBagConfig(name=n, num_embeddings=r, embedding_dim=d, feature_names=[n])
            for n, (r, d) in tables.items()
        ],
        device=META,
    )


def sequences(**tables: tuple[int, int]) -> EmbeddingCollection:
    """A sequence collection of tables named with their (rows, dim)."""
    return EmbeddingCollection(
        [EmbeddingConfig(name=n, num_embeddings=r, embedding_dim=d, feature_names=[n]) for n, (r, d) in tables.items()],
        device=META,
    )


def model(**collections: nn.Module) -> nn.Module:
    """A module that holds the collections by name."""
    return nn.ModuleDict(collections)
