"""Tables with tiers in one process: modules that stand where ``nn.EmbeddingBag`` or TorchRec's unsharded collection do.

Their backward updates the rows, so they have no parameters. Between a step's backward and the next lookup that trains,
rows change their tiers as the budget demands; nothing else is to be called.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchrec import EmbeddingBagConfig, KeyedJaggedTensor, KeyedTensor, PoolingType
from torchrec.modules.embedding_configs import DataType
from torchrec.modules.embedding_modules import get_embedding_names_by_table

from thresher.embeddings.group import StepContext, TableGroup
from thresher.embeddings.init import fill, init_scale
from thresher.embeddings.kernels.backend import Table, UpdateStats, pick_backend
from thresher.embeddings.kernels.bags import Pooling
from thresher.embeddings.optimizers import TableOptimizer
from thresher.embeddings.policy.config import TierConfig
from thresher.embeddings.policy.controller import TierController
from thresher.embeddings.policy.importance import sample_importance
from thresher.embeddings.policy.ledger import Ledger
from thresher.embeddings.policy.plan import TableTierPlan, tier_plan
from thresher.embeddings.policy.storage import SlabFiles
from thresher.embeddings.rows.flat import FlatTable
from thresher.embeddings.rows.tiered import TieredTable
from thresher.embeddings.snapshot import load_snapshot, take_snapshot
from thresher.embeddings.tables import TableInfo
from thresher.errors import BadIds, ConfigError

_POOLINGS = {PoolingType.SUM: Pooling.SUM, PoolingType.MEAN: Pooling.MEAN}


class LocalTables(nn.Module):
    """The tables of a module on this process, their groups, and what keeps them within the budget.

    Args:
        infos: whose paths, with ``seed``, determine initial values and rounding.
        groups: for each call that looks up: the numbers of the tables its features read, and its pooling.

    Attributes:
        tables: in the order of ``infos``.
        groups: in the order given.
        controller: None without tiers.
        context: importance of the samples of the next backward.

    Raises:
        ConfigError: the tiers are not possible for these tables.
    """

    def __init__(
        self,
        infos: Sequence[TableInfo],
        groups: Sequence[tuple[Sequence[int], Pooling]],
        optimizer: TableOptimizer,
        tiers: TierConfig,
        seed: int,
        device: torch.device,
    ) -> None:
        super().__init__()
        self._infos, self._optimizer, self._tiers, self._seed, self._device = infos, optimizer, tiers, seed, device
        self._files = SlabFiles(tiers.storage)
        plan = tier_plan(infos, tiers, optimizer) if tiers.enabled else None
        self.tables = [self._table(info, plan.by_path[info.path] if plan else None) for info in infos]
        backend, self.context = pick_backend(device), StepContext()
        self.groups = [self._group(features, pooling) for features, pooling in groups]
        self.controller = None
        if plan is not None:
            tiered = [table for table in self.tables if isinstance(table, TieredTable)]
            flat = sum(table.nbytes for table in self.tables if isinstance(table, FlatTable))
            self.controller = TierController(tiered, plan, tiers, backend, flat_bytes=flat, files=self._files)
        self._done = [group.stats for group in self.groups]
        self._saved_open = False

    def begin(self, ids: Tensor) -> None:
        """Begins a lookup of ``ids``: ends the step before it, if rows were updated since the last one.

        Raises:
            BadIds: ids and tables are on different devices.
        """
        if ids.device.type != self._device.type:
            raise BadIds(
                f"ids are on {ids.device}, their tables on {self._device}",
                fix="give the module the device when it is made: its tables do not move",
            )
        if not torch.is_grad_enabled() or self.controller is None:
            return
        fresh = self._fresh()
        if fresh or self._saved_open:
            self._close()
            self.controller.after_step(fresh)

    def set_labels(self, labels: Tensor | None) -> None:
        """Weighs samples in the priorities of rows by their labels [B] or [B, tasks], until the next call."""
        positive = self._tiers.positive_weight
        self.context.importance = None if labels is None else sample_importance(labels, positive)

    def set_lr(self, lr: float) -> None:
        """Sets the learning rate from the next backward on."""
        for group in self.groups:
            group.lr = lr

    def get_extra_state(self) -> dict[str, Any]:
        """Tables by path, the policy's state, and whether a step is still to be ended."""
        tables = {info.path: take_snapshot(table) for info, table in zip(self._infos, self.tables, strict=True)}
        policy = None if self.controller is None else self.controller.state_dict()
        return {"tables": tables, "policy": policy, "open": self._saved_open or bool(self._fresh())}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Takes up what :meth:`get_extra_state` gave.

        Raises:
            CheckpointError: it is of other tables.
        """
        for info, table in zip(self._infos, self.tables, strict=True):
            load_snapshot(table, state["tables"].get(info.path, {}))
        if self.controller is not None and state["policy"] is not None:
            self.controller.load_state_dict(state["policy"])
        self._close()
        self._saved_open = state["open"]

    def _fresh(self) -> list[UpdateStats]:
        """What updates did since a step was ended; each of them leaves a new object."""
        return [group.stats for group, old in zip(self.groups, self._done, strict=True) if group.stats is not old]

    def _close(self) -> None:
        self._done, self._saved_open = [group.stats for group in self.groups], False

    def _group(self, features: Sequence[int], pooling: Pooling) -> TableGroup:
        """Of the tables that ``features`` read, in their order."""
        numbers = list(dict.fromkeys(features))
        tables = [self.tables[number] for number in numbers]
        places = [numbers.index(number) for number in features]
        return TableGroup(tables, places, pooling, self._optimizer, pick_backend(self._device), self.context)

    def _table(self, info: TableInfo, plan: TableTierPlan | None) -> Table:
        scale = init_scale(info.rows, self._optimizer.init_scale)
        scalar, vectors = self._optimizer.has_scalar, self._optimizer.vectors
        if plan is None or not plan.tiered:
            flat = FlatTable(info.table, info.rows, info.dim, scalar=scalar, vectors=vectors, device=self._device)
            fill(flat.weights, self._seed, info.path, info.dim, scale)
            return flat
        files = self._files.paths(info.path, plan.levels, info.rows, info.dim, vectors)
        table = TieredTable(
            info.table,
            info.path,
            info.rows,
            info.dim,
            seed=self._seed,
            init_scale=scale,
            scalar=scalar,
            vectors=vectors,
            levels=plan.levels,
            entry=plan.entry,
            files=files,
            device=self._device,
        )
        self._files.adopt(table, list(files.values()))
        return table


class TieredEmbeddingBagCollection(nn.Module):
    """An ``EmbeddingBagCollection`` that is not sharded, trains its tables itself and keeps them within a budget.

        KeyedJaggedTensor  ->  KeyedTensor, [B, sum of widths], with TorchRec's keys

    Args:
        tables: fp32; initial weights are Thresher's (``init.py``).
        optimizer: of all tables.
        tiers: budget and levels; without a budget all rows are fp32.
        is_weighted: whether ids have weights, which vectors are multiplied by.
        path: of this module in the model: with ``seed`` it determines initial values and rounding.

    Attributes:
        rows: the tables, their learning rate, and the labels that weigh rows.

    Raises:
        ConfigError: a table asks for what is not done here, or the tiers are not possible.
    """

    def __init__(
        self,
        tables: Sequence[EmbeddingBagConfig],
        optimizer: TableOptimizer | None = None,
        tiers: TierConfig | None = None,
        *,
        is_weighted: bool = False,
        seed: int = 0,
        path: str = "",
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__()
        self._configs, self._is_weighted = list(tables), is_weighted
        infos = [_info(config, path) for config in tables]
        order = [(number, key) for number, config in enumerate(tables) for key in config.feature_names]
        kinds = list(dict.fromkeys(_POOLINGS[config.pooling] for config in tables))
        self._calls = [[(n, key) for n, key in order if _POOLINGS[tables[n].pooling] is kind] for kind in kinds]
        groups = [([n for n, _ in call], kind) for call, kind in zip(self._calls, kinds, strict=True)]
        self.rows = LocalTables(
            infos, groups, optimizer or TableOptimizer(), tiers or TierConfig(), seed, torch.device(device)
        )
        self._names = [name for names in get_embedding_names_by_table(self._configs) for name in names]
        self._widths = [tables[number].embedding_dim for number, _ in order]
        grouped = [place for call in self._calls for place in (order.index(feature) for feature in call)]
        self._places = [grouped.index(place) for place in range(len(order))]

    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor:
        """Pooled rows by key.

        Raises:
            BadIds: an id is no row of its table, or features have different numbers of bags.
        """
        if features.variable_stride_per_key():
            raise BadIds("features have different numbers of bags", fix="give every feature a bag for each sample")
        self.rows.begin(features.values())
        parts: list[Tensor] = []
        for group, call in zip(self.rows.groups, self._calls, strict=True):
            part = features.permute([features.keys().index(key) for _, key in call])
            weights = part.weights() if self._is_weighted else None
            pooled = group(part.values(), part.offsets().to(torch.int64), weights)
            parts += torch.split(pooled, [self._configs[number].embedding_dim for number, _ in call], dim=1)
        return KeyedTensor(self._names, self._widths, torch.cat([parts[place] for place in self._places], dim=1))

    def embedding_bag_configs(self) -> list[EmbeddingBagConfig]:
        """As given."""
        return self._configs

    def is_weighted(self) -> bool:
        """As given."""
        return self._is_weighted

    def ledger(self) -> Ledger | None:
        """Rows by tier and bytes; None without tiers."""
        return None if self.rows.controller is None else self.rows.controller.ledger()


class TieredEmbeddingBag(nn.Module):
    """One table with the call of ``nn.EmbeddingBag``; see :class:`TieredEmbeddingBagCollection`.

    Attributes:
        rows: the table, its learning rate, and the labels that weigh rows.

    Raises:
        ConfigError: the tiers are not possible for this table.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        optimizer: TableOptimizer | None = None,
        tiers: TierConfig | None = None,
        *,
        pooling: Pooling = Pooling.SUM,
        seed: int = 0,
        name: str = "table",
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__()
        info = TableInfo("", name, num_embeddings, embedding_dim, pooling is not Pooling.NONE, (name,))
        where = torch.device(device)
        self.rows = LocalTables(
            [info], [([0], pooling)], optimizer or TableOptimizer(), tiers or TierConfig(), seed, where
        )

    def forward(self, ids: Tensor, offsets: Tensor | None = None, weights: Tensor | None = None) -> Tensor:
        """[B, dim] vectors of bags; [n, dim] of ids where nothing is pooled.

        Args:
            ids: [n] whole numbers; or [B, n] without ``offsets``, a row a bag.
            offsets: [B] int64, where each bag starts, as in ``nn.EmbeddingBag``; without them every id is a bag.
            weights: fp32 of the shape of ``ids``.

        Raises:
            BadIds: an id is no row of the table, or offsets are not in order.
        """
        self.rows.begin(ids)
        if ids.dim() == 2 and offsets is None:
            offsets = torch.arange(ids.shape[0], device=ids.device) * ids.shape[1]
        elif offsets is None:
            offsets = torch.arange(ids.numel(), device=ids.device)
        ids, weights = ids.reshape(-1), None if weights is None else weights.reshape(-1)
        ends = torch.cat([offsets.to(torch.int64), torch.tensor([ids.numel()], device=ids.device)])
        return self.rows.groups[0](ids, ends, weights)


def _info(config: EmbeddingBagConfig, path: str) -> TableInfo:
    given = config.weight_init_max is not None or config.weight_init_min is not None
    if config.data_type is not DataType.FP32 or given:
        raise ConfigError(
            f"table '{config.name}' has its own " + ("initial values" if given else f"type {config.data_type.name}"),
            where=f"EmbeddingBagConfig '{config.name}'",
            fix="set optimizer.init_scale" if given else "leave it FP32, and give a budget for tiers",
        )
    rows, dim, features = config.num_embeddings, config.embedding_dim, tuple(config.feature_names)
    return TableInfo(path, config.name, rows, dim, True, features)
