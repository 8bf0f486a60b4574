"""A block to be refitted: its layers, what flows through them, and a point of the descent (host/bcd_refit.py)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.grad import conv2d_input

from edgesolve.host.chain import Chain
from edgesolve.host.refit_block import Block, Flow
from edgesolve.host.sites import Site


@dataclass(frozen=True, slots=True)
class RefitOptions:
    """Penalties of the objective, relative to ½ of the loss.

    tau : relative to the mean square of the block's input; None: every weight is what its factors make.
    alpha : proximal weight of the U_i. ridge : of the W_i, relative to tr(S) / D of what the layer sees.
    factor_sweeps : of a layer's factors in one update. cg : tolerance and most iterations of the V_i.
    dtype : "float32" or "float64", of the activations. rows : output positions of a block's widest layer from which
    on it takes no more frames.
    """

    sweeps: int = 3
    gamma: float = 0.2
    rho: float = 0.05
    tau: float | None = None
    alpha: float = 1e-3
    ridge: float = 1e-2
    factor_sweeps: int = 1
    cg: tuple[float, int] = (1e-3, 25)
    dtype: str = "float32"
    rows: int = 1 << 18

    def __post_init__(self):
        for name in ("gamma", "rho", "alpha", "ridge"):
            if not 0.0 < getattr(self, name) < np.inf:
                raise ValueError(f"{name} must be a positive number, got {getattr(self, name)}.")
        if self.tau is not None and not 0.0 < self.tau < np.inf:
            raise ValueError(f"tau must be None or a positive number, got {self.tau}.")
        if self.dtype not in ("float32", "float64"):
            raise ValueError(f"dtype must be float32 or float64, got {self.dtype!r}.")


@dataclass(frozen=True, slots=True, eq=False)
class Point:
    """One point of the descent: V[i] goes into layer i (V[0] is given), U[i] leaves it, a tuple of batches each;
    W[i] (T, D), bias[i] (T,), chains[i]."""

    V: tuple[tuple[Tensor, ...], ...]
    U: tuple[tuple[Tensor, ...], ...]
    W: tuple[np.ndarray, ...]
    bias: tuple[np.ndarray, ...]
    chains: tuple[Chain, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Problem:
    """`weights` (T,) is d of the objective; its mean is 1. `tau`: absolute, or 0 where W_i is G_i."""

    block: Block
    flow: Flow
    options: RefitOptions
    weights: np.ndarray
    tau: float = 0.0

    @classmethod
    def of(
        cls, block: Block, flow: Flow, options: RefitOptions, weights: np.ndarray | None = None
    ) -> Problem:
        """With equal weights unless given: (T,), positive."""
        d = np.ones(len(block.sites[-1].bias)) if weights is None else np.asarray(weights, float)
        if d.shape != block.sites[-1].bias.shape or not d.min() > 0.0:
            raise ValueError(
                f"{block.name}: weights must be {block.sites[-1].bias.shape} positive numbers, got {d.shape}."
            )
        energy = sum(square(x) for x in flow.x) / sum(x.numel() for x in flow.x)
        return cls(block, flow, options, d / d.mean(), (options.tau or 0.0) * energy)

    @property
    def n_layers(self) -> int:
        return len(self.block.sites)

    def rows(self, i: int) -> int:
        """Output positions of layer i on all frames."""
        h, w = self.block.sites[i].at.after
        return h * w * sum(len(x) for x in self.flow.x)

    def scale(self, i: int) -> Tensor | float:
        """d (1, T, 1, 1) at the last layer, 1 elsewhere."""
        last = i == self.n_layers - 1
        return self.tensor(self.weights)[None, :, None, None] if last else 1.0

    def tensor(self, a: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(a)).to(getattr(torch, self.options.dtype))

    def skip(self, i: int, k: int) -> Tensor | float:
        own = self.flow.skip if i == self.n_layers - 1 else None
        return 0.0 if own is None else own[k]


def affine(problem: Problem, i: int, W: np.ndarray, bias: np.ndarray, v: Tensor) -> Tensor:
    """W * v + b of layer i."""
    own, shift = kernel(problem, i, W), problem.tensor(bias)
    return conv(problem.block.sites[i], own, v) + shift[None, :, None, None]


def kernel(problem: Problem, i: int, W: np.ndarray) -> Tensor:
    """W (T, D) as layer i's convolution takes it."""
    return problem.tensor(W.reshape(problem.block.sites[i].weight.shape))


def conv(site: Site, weight: Tensor, x: Tensor) -> Tensor:
    """The layer at `site` with another weight and no bias."""
    return F.conv2d(x, weight, None, site.stride, site.padding, site.dilation)


def adjoint(site: Site, weight: Tensor, y: Tensor, shape) -> Tensor:
    """The transpose of `conv`: <conv(x), y> = <x, adjoint(y)> for x of `shape`."""
    return conv2d_input(shape, weight, y, site.stride, site.padding, site.dilation)


def matrix(chain: Chain) -> np.ndarray:
    """The weight (T, D) that the factors make."""
    full = chain.full()
    return full.reshape(len(full), -1)


def square(a: Tensor, d: Tensor | float = 1.0) -> float:
    """Σ d a², summed in float64."""
    return float((d * a * a).sum(dtype=torch.float64))


def put(values: tuple, i: int, value) -> tuple:
    """`values` with another i-th."""
    return (*values[:i], value, *values[i + 1 :])
