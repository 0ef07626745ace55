"""The row optimizers of ``kernels/rules.py`` in kernels, one operation a rounding, and their constants."""

from collections.abc import Sequence

import torch
import triton.language as tl
from torch import Tensor

from thresher.embeddings.kernels.gpu.kernel import jit
from thresher.embeddings.kernels.rules import UpdateRule

OPTIMIZERS = ("sgd", "rowwise_adagrad", "adagrad", "adam", "rowwise_adam", "ftrl")
"""Kernels know optimizers by their number here."""
SGD = tl.constexpr(0)
ROWWISE_ADAGRAD = tl.constexpr(1)
ADAGRAD = tl.constexpr(2)
ADAM = tl.constexpr(3)
ROWWISE_ADAM = tl.constexpr(4)
FTRL = tl.constexpr(5)

NAME = tl.constexpr(0)
LR = tl.constexpr(1)
EPS = tl.constexpr(2)
BETA1 = tl.constexpr(3)
REST1 = tl.constexpr(4)
BETA2 = tl.constexpr(5)
REST2 = tl.constexpr(6)
CORRECTION1 = tl.constexpr(7)
CORRECTION2 = tl.constexpr(8)
FTRL_BETA = tl.constexpr(9)
L1 = tl.constexpr(10)
L2 = tl.constexpr(11)
L2_DECAY = tl.constexpr(12)  # 0 for none
SHRINK = tl.constexpr(13)  # 1 for none
GAIN = tl.constexpr(14)
ABOVE = tl.constexpr(15)  # six, by number of the tier
CONSTANTS = tl.constexpr(21)

_LANES = tl.constexpr(16)


def constants_of(rules: Sequence[UpdateRule], device: torch.device) -> Tensor:
    """[tables, CONSTANTS] fp32, each rounded once."""
    rows = []
    for rule in rules:
        l2 = rule.weight_decay if rule.decay == "l2" else 0.0
        shrink = 1.0 - rule.lr * rule.weight_decay if rule.decay == "decoupled" else 1.0
        adam = [rule.beta1, 1.0 - rule.beta1, rule.beta2, 1.0 - rule.beta2, rule.correction1, rule.correction2]
        ftrl = [rule.ftrl_beta, rule.l1, rule.l2]
        head = [float(OPTIMIZERS.index(rule.name)), rule.lr, rule.eps]
        rows.append([*head, *adam, *ftrl, l2, shrink, rule.priority_gain, *rule.promote_above])
    return torch.tensor(rows, dtype=torch.float64).to(torch.float32).to(device)


@jit
def constant(rules: tl.tensor, table: tl.tensor, name: tl.constexpr) -> tl.tensor:
    """[R] one constant of each row's table."""
    return tl.load(rules + table * CONSTANTS + name)


@jit
def column_sums(values: tl.tensor, rows: tl.constexpr, block: tl.constexpr) -> tl.tensor:
    """[R] sums of [R, D] over the columns, in 16 partial sums as the contract has it.

    A group of 16 columns is picked by summing it with zeros in place of all others, which no order of summing changes.
    """
    groups: tl.constexpr = block // _LANES
    grouped = tl.reshape(values, [rows, groups, _LANES])
    number = tl.arange(0, groups)[None, :, None]
    sums = tl.zeros([rows, _LANES], tl.float32)
    for group in range(groups):
        sums += tl.sum(tl.where(number == group, grouped, 0.0), axis=1)
    sums = tl.sum(tl.reshape(sums, [rows, 2, 8]), axis=1)
    sums = tl.sum(tl.reshape(sums, [rows, 2, 4]), axis=1)
    sums = tl.sum(tl.reshape(sums, [rows, 2, 2]), axis=1)
    return tl.sum(sums, axis=1)


@jit
def l2_gradient(rules: tl.tensor, table: tl.tensor, x: tl.tensor, g: tl.tensor) -> tl.tensor:
    """``g`` with the L2 decay of ``x`` added."""
    decay = constant(rules, table, L2_DECAY)[:, None]
    return tl.where(decay != 0.0, g + decay * x, g)


@jit
def step_of(
    rules: tl.tensor,
    table: tl.tensor,
    x: tl.tensor,
    g: tl.tensor,
    scalar: tl.tensor,
    first: tl.tensor,
    second: tl.tensor,
    mean_square: tl.tensor,
    name: tl.constexpr,
) -> tuple[tl.tensor, ...]:
    """New (x, scalar, first, second) of rows [R, D], with scalars [R]; g with L2 decay, mean_square [R] of it."""
    shrink = constant(rules, table, SHRINK)[:, None]
    x = tl.where(shrink != 1.0, x * shrink, x)
    lr = constant(rules, table, LR)[:, None]
    eps = constant(rules, table, EPS)[:, None]
    if name == SGD:
        x = x - lr * g
    elif name == ROWWISE_ADAGRAD:
        scalar = scalar + mean_square
        rate = tl.math.div_rn(lr, tl.sqrt_rn(scalar)[:, None] + eps)
        x = x - rate * g
    elif name == ADAGRAD:
        first = first + g * g
        x = x - tl.math.div_rn(lr * g, tl.sqrt_rn(first) + eps)
    elif name == FTRL:
        l1 = constant(rules, table, L1)[:, None]
        before = tl.sqrt_rn(second)
        second = second + g * g
        after = tl.sqrt_rn(second)
        first = (first + g) - tl.math.div_rn(after - before, lr) * x
        sign = tl.where(first > 0.0, l1, tl.where(first < 0.0, -l1, 0.0))
        bend = tl.math.div_rn(constant(rules, table, FTRL_BETA)[:, None] + after, lr)
        solved = tl.math.div_rn(sign - first, bend + constant(rules, table, L2)[:, None])
        x = tl.where(tl.abs(first) <= l1, 0.0, solved)
    else:
        rest = constant(rules, table, REST2)
        if name == ADAM:
            second = constant(rules, table, BETA2)[:, None] * second + rest[:, None] * (g * g)
            spread = second * constant(rules, table, CORRECTION2)[:, None]
        else:
            scalar = constant(rules, table, BETA2) * scalar + rest * mean_square
            spread = (scalar * constant(rules, table, CORRECTION2))[:, None]
        first = constant(rules, table, BETA1)[:, None] * first + constant(rules, table, REST1)[:, None] * g
        step = lr * (first * constant(rules, table, CORRECTION1)[:, None])
        x = x - tl.math.div_rn(step, tl.sqrt_rn(spread) + eps)
    return x, scalar, first, second
