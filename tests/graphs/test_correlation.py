"""Correlations are SciPy's, ties included."""

import numpy as np
import pytest
from scipy import stats

from difffract_jax.graphs.correlation import pearson, ranks, spearman


@pytest.mark.parametrize("seed", range(3))
def test_correlations_are_scipy_s(seed):
    generator = np.random.default_rng(seed)
    x = generator.integers(0, 6, 40).astype(float)  # many ties
    y = x + generator.standard_normal(40)
    assert np.array_equal(ranks(x), stats.rankdata(x))
    # Both sum 40 products in float64, in another order.
    assert pearson(x, y) == pytest.approx(stats.pearsonr(x, y).statistic, abs=1e-14)
    assert spearman(x, y) == pytest.approx(stats.spearmanr(x, y).statistic, abs=1e-14)


def test_series_without_a_correlation_have_none():
    same = np.ones(4)
    assert pearson(same, np.arange(4.0)) is None and spearman(np.zeros(1), np.zeros(1)) is None
