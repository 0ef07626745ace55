"""The optimizer of the dense part."""

from collections.abc import Mapping

import torch
from torch import nn
from torchrec.optim.keyed import KeyedOptimizerWrapper

from thresher.trainer.config import DenseOptimizer


def dense_optimizer(parameters: Mapping[str, nn.Parameter], settings: DenseOptimizer) -> KeyedOptimizerWrapper:
    """The optimizer of ``parameters``, its state keyed by their names so that it can be saved and loaded."""
    return KeyedOptimizerWrapper(dict(parameters), lambda params: optimizer_of(params, settings))


def optimizer_of(params: list[nn.Parameter], settings: DenseOptimizer) -> torch.optim.Optimizer:
    """The optimizer of ``params``."""
    lr, decay = settings.lr, settings.weight_decay
    match settings.name:
        case "adam":
            return torch.optim.Adam(params, lr=lr, betas=settings.betas, eps=settings.eps, weight_decay=decay)
        case "adamw":
            return torch.optim.AdamW(params, lr=lr, betas=settings.betas, eps=settings.eps, weight_decay=decay)
        case "sgd":
            return torch.optim.SGD(params, lr=lr, momentum=settings.momentum, weight_decay=decay)
        case "adagrad":
            return torch.optim.Adagrad(params, lr=lr, eps=settings.eps, weight_decay=decay)
