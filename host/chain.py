"""A factored layer: a chain of convolutions, whatever decomposition it came from."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from scipy.linalg import qr

AXES = ("", "h", "w", "hw")


@dataclass(frozen=True, slots=True, eq=False)
class Factor:
    """One convolution of a chain, without bias.

    weight (o, i / groups, kh, kw) float64. `axes`: the spatial axes that it works along, "", "h", "w" or "hw":
    there it takes the layer's stride, padding and dilation, elsewhere its kernel is 1.
    `pivots`: for a 1×1 factor with an identity block, the channels where it is the identity: input channels if
    it narrows (o <= i), output channels if it widens. The block is not stored.
    """

    weight: np.ndarray
    axes: str = ""
    groups: int = 1
    pivots: tuple[int, ...] = ()

    def __post_init__(self):
        o, _, kh, kw = self.weight.shape
        if self.axes not in AXES:
            raise ValueError(f"axes must be one of {AXES}, got {self.axes!r}.")
        if (kh > 1 and "h" not in self.axes) or (kw > 1 and "w" not in self.axes):
            raise ValueError(f"a {kh}x{kw} factor must work along its axes, got {self.axes!r}.")
        if o % self.groups:
            raise ValueError(f"{o} output channels don't split into {self.groups} groups.")
        if self.pivots:
            if self.axes or self.groups > 1 or len(self.pivots) != min(o, self.weight.shape[1]):
                raise ValueError("pivots belong to a 1x1 factor without stride or groups.")
            block = self.weight[:, :, 0, 0]
            block = block[:, self.pivots] if self.narrows else block[self.pivots, :]
            if not np.array_equal(block, np.eye(len(self.pivots))):
                raise ValueError("the weight at the pivots must be the identity.")

    @property
    def narrows(self) -> bool:
        return self.weight.shape[0] <= self.weight.shape[1]

    @property
    def c_in(self) -> int:
        return self.weight.shape[1] * self.groups

    @property
    def c_out(self) -> int:
        return self.weight.shape[0]

    @property
    def n_params(self) -> int:
        """Numbers to store: an identity block is structure."""
        return self.weight.size - len(self.pivots) ** 2


class Positions(NamedTuple):
    """Spatial extent of a layer's input and output, (h, w) each."""

    before: tuple[int, int]
    after: tuple[int, int]


@dataclass(frozen=True, slots=True, eq=False)
class Chain:
    """Stands for a layer weight (T, c / groups, kh, kw). `format`, `ranks`: where it came from, for reports.

    Each spatial axis is worked along by exactly one factor, and channels fit: checked here.
    """

    format: str
    ranks: tuple[int, ...]
    factors: tuple[Factor, ...]

    def __post_init__(self):
        for a, b in zip(self.factors, self.factors[1:], strict=False):
            if a.c_out != b.c_in:
                raise ValueError(f"a factor makes {a.c_out} channels, the next one takes {b.c_in}.")
        if sorted("".join(f.axes for f in self.factors)) != ["h", "w"]:
            raise ValueError("each spatial axis must be worked along by exactly one factor.")

    def full(self) -> np.ndarray:
        """The weight (T, c, kh, kw) of the one ungrouped convolution that the chain equals."""
        c = self.factors[0].c_in
        whole = np.eye(c).reshape(c, c, 1, 1)
        for factor in self.factors:
            w = _ungrouped(factor)
            whole = np.einsum("oihw,icHW->ochHwW", w, whole, optimize=True)
            o, _, h, H, w_, W = whole.shape
            whole = whole.reshape(o, c, h * H, w_ * W)
        return whole

    @property
    def n_params(self) -> int:
        """Numbers to store, the bias not counted."""
        return sum(f.n_params for f in self.factors)

    def macs(self, at: Positions) -> int:
        """Multiply-adds of one frame, identity blocks not counted."""
        (h, w), total = at.before, 0
        for f in self.factors:
            h, w = (at.after[0] if "h" in f.axes else h), (at.after[1] if "w" in f.axes else w)
            total += h * w * f.n_params
        return total


def dense(weight: np.ndarray) -> Chain:
    """The layer itself, as a chain of one; weight (T, c, kh, kw)."""
    return Chain("dense", (), (Factor(np.asarray(weight, np.float64), "hw"),))


def grouped(chains: list[Chain]) -> Chain:
    """One chain for a grouped convolution from one per group, all of the same format and ranks."""
    if len(chains) == 1:
        return chains[0]
    columns = zip(*(c.factors for c in chains), strict=True)
    factors = tuple(
        Factor(
            np.concatenate([f.weight for f in column]),
            column[0].axes,
            len(chains) * column[0].groups,
        )
        for column in columns
    )
    return Chain(chains[0].format, chains[0].ranks, factors)


def pivoted(chain: Chain) -> Chain:
    """The same layer with an identity block in each outer 1×1 factor, which is then not stored.

    The columns of a thin factor span the same space as [I; E] after a permutation; its neighbour takes up the
    change of basis. Pivots by QR with column pivoting, which keeps |E| near 1. At most r² numbers less per
    interface between two ungrouped factors.
    """
    factors = list(chain.factors)
    if len(factors) < 2 or any(f.groups > 1 for f in factors):
        return chain
    if len(factors) > 2 or factors[-1].axes:
        factors[:2] = _pivot_first(factors[0], factors[1])
    if not factors[-1].axes:
        factors[-2:] = _pivot_last(factors[-2], factors[-1])
    return replace(chain, factors=tuple(factors))


def _pivot_first(first: Factor, second: Factor) -> tuple[Factor, Factor]:
    if first.axes or not first.narrows or first.pivots:
        return first, second
    A = first.weight[:, :, 0, 0]
    pivots = _pivots(A)
    B = A[:, pivots]
    narrow = np.linalg.solve(B, A)
    narrow[:, pivots] = np.eye(len(pivots))
    second = replace(second, weight=np.einsum("oihw,ij->ojhw", second.weight, B))
    return replace(first, weight=narrow[:, :, None, None], pivots=pivots), second


def _pivot_last(before: Factor, last: Factor) -> tuple[Factor, Factor]:
    if last.axes or last.c_out < last.c_in or last.pivots or before.pivots:
        return before, last
    A = last.weight[:, :, 0, 0]
    pivots = _pivots(A.T)
    B = A[pivots, :]
    wide = np.linalg.solve(B.T, A.T).T
    wide[pivots, :] = np.eye(len(pivots))
    before = replace(before, weight=np.einsum("ij,jkhw->ikhw", B, before.weight))
    return before, replace(last, weight=wide[:, :, None, None], pivots=pivots)


def _pivots(A: np.ndarray) -> tuple[int, ...]:
    """Columns of A (r, n), r <= n, that QR with pivoting takes first, ascending."""
    _, _, order = qr(A, mode="economic", pivoting=True)
    return tuple(sorted(int(j) for j in order[: A.shape[0]]))


def _ungrouped(factor: Factor) -> np.ndarray:
    """weight (o, c_in, kh, kw), zeros between groups."""
    if factor.groups == 1:
        return factor.weight
    o, i, kh, kw = factor.weight.shape
    whole = np.zeros((o, factor.c_in, kh, kw))
    step = o // factor.groups
    for g in range(factor.groups):
        whole[g * step : (g + 1) * step, g * i : (g + 1) * i] = factor.weight[
            g * step : (g + 1) * step
        ]
    return whole
