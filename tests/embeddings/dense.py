"""The row optimizers once more, in double precision over whole tables, from their papers' formulas."""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from thresher.embeddings.optimizers import TableOptimizer

Matrix = NDArray[np.float64]


@dataclass
class Dense:
    """A table and its optimizer, row by row; ``step`` takes the rows that a lookup touched."""

    x: Matrix
    settings: TableOptimizer
    t: int = 0
    state: dict[int, list[Matrix]] = field(default_factory=dict)

    def step(self, gradients: dict[int, Matrix], lr: float) -> None:
        """One update: [D] gradients by row."""
        self.t += 1
        for row, g in gradients.items():
            kept = self.state.setdefault(row, [np.zeros(len(g)), np.zeros(len(g))])
            self.x[row] = self._row(self.x[row], g, kept, lr)

    def _row(self, x: Matrix, g: Matrix, kept: list[Matrix], lr: float) -> Matrix:
        s = self.settings
        if s.decay == "l2":
            g = g + s.weight_decay * x
        else:
            x = x - lr * s.weight_decay * x
        first, second = s.betas
        match s.name:
            case "sgd":
                return x - lr * g
            case "adagrad":
                kept[0] = kept[0] + g**2
                return x - lr * g / (np.sqrt(kept[0]) + s.eps)
            case "rowwise_adagrad":
                kept[0] = kept[0] + np.mean(g**2)
                return x - lr * g / (np.sqrt(kept[0]) + s.eps)
            case "adam" | "rowwise_adam":
                square = g**2 if s.name == "adam" else np.mean(g**2)
                kept[0] = first * kept[0] + (1 - first) * g
                kept[1] = second * kept[1] + (1 - second) * square
                m, v = kept[0] / (1 - first**self.t), kept[1] / (1 - second**self.t)
                return x - lr * m / (np.sqrt(v) + s.eps)
            case "ftrl":
                sigma = (np.sqrt(kept[1] + g**2) - np.sqrt(kept[1])) / lr
                kept[0], kept[1] = kept[0] + g - sigma * x, kept[1] + g**2
                curvature = (s.ftrl_beta + np.sqrt(kept[1])) / lr + s.l2
                shrunk = np.sign(kept[0]) * s.l1 - kept[0]
                return np.where(np.abs(kept[0]) <= s.l1, 0.0, shrunk / curvature)
