"""Correlations of two series. SciPy has them too, but importing its statistics takes longer than a whole command."""

import numpy as np
from numpy.typing import NDArray


def pearson(x: NDArray[np.floating], y: NDArray[np.floating]) -> float | None:
    """Returns the linear correlation of two series; None for fewer than two numbers, or where all are alike."""
    if x.size < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return None
    return float(np.corrcoef(x, y)[0, 1])


def spearman(x: NDArray[np.floating], y: NDArray[np.floating]) -> float | None:
    """Returns the correlation of the ranks, those of ties being their mean; None as `pearson`."""
    return pearson(ranks(x), ranks(y))


def ranks(values: NDArray[np.floating]) -> NDArray[np.floating]:
    """Returns ranks from 1, those of ties being their mean."""
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(count) - (count - 1) / 2)[place]
