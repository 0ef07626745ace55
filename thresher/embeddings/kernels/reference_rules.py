"""The row optimizers of ``rules.py`` in torch, one operation a rounding."""

from collections.abc import Sequence

import torch
from torch import Tensor

from thresher.embeddings.kernels.rules import UpdateRule

PARTIAL_SUMS = 16


def column_sums(values: Tensor) -> Tensor:
    """[n] sums of [n, D] over the columns, in 16 partial sums as the contract has it."""
    padded = torch.nn.functional.pad(values, (0, -values.shape[1] % PARTIAL_SUMS))
    sums = torch.zeros_like(padded[:, :PARTIAL_SUMS])
    for start in range(0, padded.shape[1], PARTIAL_SUMS):
        sums = sums + padded[:, start : start + PARTIAL_SUMS]
    while sums.shape[1] > 1:
        low, high = sums.chunk(2, dim=1)
        sums = low + high
    return sums[:, 0]


def l2_gradient(rule: UpdateRule, x: Tensor, g: Tensor) -> Tensor:
    """``g`` with the L2 decay of ``x`` added."""
    return g + _number(rule.weight_decay, x) * x if rule.weight_decay and rule.decay == "l2" else g


def apply_rule(
    rule: UpdateRule,
    x: Tensor,
    g: Tensor,
    scalar: Tensor,
    vectors: Sequence[Tensor],
    width: int,
    sums: Tensor | None = None,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """New (x, scalar, vectors) of rows.

    Args:
        x, g: [n, D] fp32; vectors: as many of that shape as the optimizer keeps.
        scalar: [n]; returned as it is by optimizers without one.
        width: columns of the whole table.
        sums: [n] sums of g * g over the whole rows, L2 decay included; computed from g where None.
    """
    g = l2_gradient(rule, x, g)
    if rule.weight_decay and rule.decay == "decoupled":
        x = x * _number(1.0 - rule.lr * rule.weight_decay, x)
    match rule.name:
        case "sgd":
            return x - _number(rule.lr, x) * g, scalar, []
        case "adagrad":
            x, kept = _adagrad(rule, x, g, vectors[0])
            return x, scalar, kept
        case "rowwise_adagrad":
            scalar = scalar + _mean_square(g, width, sums)
            rate = _number(rule.lr, x) / (_root(scalar) + _number(rule.eps, x))
            return x - rate.unsqueeze(1) * g, scalar, []
        case "adam":
            second = _moved(vectors[1], g * g, rule.beta2)
            x, first = _adam(rule, x, g, vectors[0], second)
            return x, scalar, [first, second]
        case "rowwise_adam":
            scalar = _moved(scalar, _mean_square(g, width, sums), rule.beta2)
            x, first = _adam(rule, x, g, vectors[0], scalar.unsqueeze(1))
            return x, scalar, [first]
        case "ftrl":
            x, kept = _ftrl(rule, x, g, vectors[0], vectors[1])
            return x, scalar, kept


def _number(value: float, like: Tensor) -> Tensor:
    """A constant rounded to fp32 once. A tensor, because torch divides by a Python number on CUDA by its inverse."""
    return torch.tensor(value, dtype=torch.float32, device=like.device)


def _root(x: Tensor) -> Tensor:
    """Square root rounded once. Torch's own in fp32 goes through MKL, and is off by a bit for one number in 150."""
    return x.double().sqrt().float()


def _mean_square(g: Tensor, width: int, sums: Tensor | None) -> Tensor:
    return (column_sums(g * g) if sums is None else sums) / _number(width, g)


def _moved(old: Tensor, new: Tensor, beta: float) -> Tensor:
    return _number(beta, old) * old + _number(1.0 - beta, old) * new


def _adagrad(rule: UpdateRule, x: Tensor, g: Tensor, v: Tensor) -> tuple[Tensor, list[Tensor]]:
    v = v + g * g
    return x - (_number(rule.lr, x) * g) / (_root(v) + _number(rule.eps, x)), [v]


def _adam(rule: UpdateRule, x: Tensor, g: Tensor, m: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    m = _moved(m, g, rule.beta1)
    step = _number(rule.lr, x) * (m * _number(rule.correction1, x))
    return x - step / (_root(second * _number(rule.correction2, x)) + _number(rule.eps, x)), m


def _ftrl(rule: UpdateRule, x: Tensor, g: Tensor, z: Tensor, n: Tensor) -> tuple[Tensor, list[Tensor]]:
    lr, l1 = _number(rule.lr, x), _number(rule.l1, x)
    before = _root(n)
    n = n + g * g
    after = _root(n)
    z = (z + g) - ((after - before) / lr) * x
    solved = (z.sign() * l1 - z) / ((_number(rule.ftrl_beta, x) + after) / lr + _number(rule.l2, x))
    return torch.where(z.abs() <= l1, torch.zeros_like(x), solved), [z, n]
