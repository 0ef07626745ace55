"""Which embedding tables a model holds. A model declares them with TorchRec's two collections."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn
from torchrec import EmbeddingBagCollection, EmbeddingCollection

from thresher.data.schema import Schema

FLOAT_BYTES = 4


@dataclass(frozen=True)
class TableInfo:
    """One table of a model.

    Attributes:
        module: path of its collection in the model.
        table: its name, unique within the collection.
        rows, dim: its shape.
        pooled: whether lookups give one vector a bag (EmbeddingBagCollection) or one an id (EmbeddingCollection).
        features: keys of the batch that look rows up in it.
    """

    module: str
    table: str
    rows: int
    dim: int
    pooled: bool
    features: tuple[str, ...]

    @property
    def path(self) -> str:
        """The table's name within the model, ``module.table``."""
        return f"{self.module}.{self.table}" if self.module else self.table

    @property
    def weight_bytes(self) -> int:
        """Bytes of its weights."""
        return self.rows * self.dim * FLOAT_BYTES


def module_name(schema: Schema, table: str) -> str:
    """The name under which collections, plans and checkpoints know a table: its own wherever torch allows it.

    Collections keep tables in a ``nn.ModuleDict``, which refuses the names of its attributes (``items``, ``type``);
    such a table gets underscores behind its name until it is unique.
    """
    taken = {other.name for other in schema.tables}
    name = table
    while hasattr(nn.ModuleDict(), name) or (name != table and name in taken):
        name += "_"
    return name


def find_tables(model: nn.Module) -> tuple[TableInfo, ...]:
    """The tables of an unsharded model, in the order of its modules; a collection with two names counts twice."""
    return tuple(info for info, _ in _walk(model))


def table_weights(model: nn.Module) -> Iterator[tuple[TableInfo, Tensor]]:
    """Each table of an unsharded model with its [rows, dim] weights."""
    for info, collection in _walk(model):
        yield info, collection[info.table].get_parameter("weight").data


def _walk(model: nn.Module) -> Iterator[tuple[TableInfo, nn.ModuleDict]]:
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, EmbeddingBagCollection):
            configs, weights, pooled = module.embedding_bag_configs(), module.embedding_bags, True
        elif isinstance(module, EmbeddingCollection):
            configs, weights, pooled = module.embedding_configs(), module.embeddings, False
        else:
            continue
        for config in configs:
            rows, dim, features = config.num_embeddings, config.embedding_dim, tuple(config.feature_names)
            yield TableInfo(path, config.name, rows, dim, pooled, features), weights
