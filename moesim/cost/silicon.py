"""Products of GPUs that are not here, from timed tables: how much longer each shape takes than the fitted law says.

What is interpolated is that factor, which varies little, not the time, which varies by orders of magnitude. Beyond the
table the factor of its edge holds. See docs/model.md#silicon-tables.

Legend: A the grid's values along one axis (m, n or k); ... any axes of the question.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moesim.catalog.silicon import ProductTable

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, eq=False)
class Silicon:
    """Measured seconds over the law's, on a grid of shapes (m, n, k); axes rise."""

    axes: tuple[Floats, Floats, Floats]
    factor_MNK: Floats
    source: str

    def factor_by_rows(self, m: ArrayLike, n: float, k: float) -> Floats:
        """The factor of products (m, k) x (k, n), any shape of m: linear in the logarithms of all three."""
        (low_n, share_n), (low_k, share_k) = _place(self.axes[1], n), _place(self.axes[2], k)
        corners = self.factor_MNK[:, low_n : low_n + 2, low_k : low_k + 2]
        curve_M = np.einsum("mnk,n,k->m", corners, _pair(share_n), _pair(share_k))
        return _read(self.axes[0], curve_M, m)

    def factor_by_reduced(self, m: float, n: float, k: ArrayLike) -> Floats:
        """The same, any shape of k."""
        (low_m, share_m), (low_n, share_n) = _place(self.axes[0], m), _place(self.axes[1], n)
        corners = self.factor_MNK[low_m : low_m + 2, low_n : low_n + 2]
        curve_K = np.einsum("mnk,m,n->k", corners, _pair(share_m), _pair(share_n))
        return _read(self.axes[2], curve_K, k)


def silicon_of(table: ProductTable, law_s: Floats) -> Silicon:
    """The grid of a table, given the law's seconds of each of its rows; shapes that were not timed take their
    neighbours' factor along m, or none where no m of a pair (n, k) was.
    """
    even = (table.m_N % 64 == 0) & (table.n_N >= 128) & (table.k_N >= 128)
    table, law_s = table.pick(even), law_s[even]
    axes = tuple(np.unique(column) for column in (table.m_N, table.n_N, table.k_N))
    factor = np.full([len(axis) for axis in axes], np.nan)
    at = tuple(np.searchsorted(axis, c) for axis, c in zip(axes, (table.m_N, table.n_N, table.k_N), strict=True))
    factor[at] = table.seconds_N / law_s
    rows = np.log(axes[0])
    for pair in np.ndindex(factor.shape[1:]):
        column = factor[(slice(None), *pair)]
        known = np.isfinite(column)
        factor[(slice(None), *pair)] = np.interp(rows, rows[known], column[known]) if known.any() else 1.0
    return Silicon(axes=(axes[0], axes[1], axes[2]), factor_MNK=factor, source=table.source)


def _place(axis: Floats, size: float) -> tuple[int, float]:
    """The grid's point below a size, and how far on its way to the next; sizes beyond the grid are at its edge."""
    place = float(np.interp(np.log(max(size, 1.0)), np.log(axis), np.arange(len(axis))))
    low = min(int(place), len(axis) - 2)
    return low, place - low


def _pair(share: float) -> Floats:
    return np.array([1.0 - share, share])


def _read(axis: Floats, curve: Floats, size: ArrayLike) -> Floats:
    sizes = np.maximum(np.asarray(size, dtype=np.float64), 1.0)
    return np.asarray(np.interp(np.log(sizes), np.log(axis), curve), dtype=np.float64)
