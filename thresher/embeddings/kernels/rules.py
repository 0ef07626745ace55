"""Row optimizers as arithmetic: x [.., D] weights, g gradient, all fp32, rounded after each operation as written.

    decay       l2: g = g + wd * x       decoupled: x = x * (1 - lr * wd)       (only where wd > 0; before the rest)
    sgd         x = x - lr * g
    adagrad     v = v + g * g;                     x = x - (lr * g) / (sqrt(v) + eps)       Duchi et al., 2011
    rowwise_adagrad   s = s + sum(g * g) / D;      x = x - (lr / (sqrt(s) + eps)) * g       FBGEMM, TorchRec
    adam        m = b1 * m + (1 - b1) * g;  v = b2 * v + (1 - b2) * (g * g)
                x = x - (lr * (m * c1)) / (sqrt(v * c2) + eps)       c = 1 / (1 - b^t)      Kingma & Ba, 2014; lazy
    rowwise_adam      m as above;  s = b2 * s + (1 - b2) * (sum(g * g) / D)
                x = x - ((lr * (m * c1)) / (sqrt(s * c2) + eps))
    ftrl        r = sqrt(n);  n = n + g * g;  q = sqrt(n);  z = (z + g) - ((q - r) / lr) * x
                x = |z| <= l1 ? 0 : (sign(z) * l1 - z) / ((beta + q) / lr + l2)             McMahan et al., 2013

v, m, n, z are vectors of the row's state (adagrad: v; adam: m, v; rowwise_adam: m; ftrl: z, n), s its scalar; D is the
width of the whole table; t counts the updates of the table. Only rows that occur are updated ("lazy"): Adam's moments
of other rows stand still. Constants are rounded to fp32 once: 1 - b1, 1 - b2, 1 - lr * wd and c after being computed in
double precision.
"""

from dataclasses import dataclass
from typing import Literal

RowOptimizerName = Literal["sgd", "rowwise_adagrad", "adagrad", "adam", "rowwise_adam", "ftrl"]
VECTORS: dict[RowOptimizerName, int] = {
    "sgd": 0,
    "rowwise_adagrad": 0,
    "adagrad": 1,
    "adam": 2,
    "rowwise_adam": 1,
    "ftrl": 2,
}
HAS_SCALAR: frozenset[RowOptimizerName] = frozenset({"rowwise_adagrad", "rowwise_adam"})
NEVER = (float("inf"),) * 6


@dataclass(frozen=True)
class UpdateRule:
    """Everything that an update of one table's rows depends on besides rows and gradients.

    Attributes:
        lr, eps, beta1, beta2, ftrl_beta, l1, l2: as above; backends round them to fp32.
        correction1, correction2: Adam's c1, c2.
        weight_decay, decay: strength and kind.
        priority_gain: factor of the increments of priorities (gain x decay rate); 0 leaves them alone.
        promote_above: by number of the tier, the priority (times gain) above which a row moves there.
    """

    name: RowOptimizerName
    lr: float
    eps: float = 1e-8
    beta1: float = 0.9
    beta2: float = 0.999
    correction1: float = 1.0
    correction2: float = 1.0
    ftrl_beta: float = 1.0
    l1: float = 0.0
    l2: float = 0.0
    weight_decay: float = 0.0
    decay: Literal["l2", "decoupled"] = "l2"
    priority_gain: float = 0.0
    promote_above: tuple[float, ...] = NEVER
