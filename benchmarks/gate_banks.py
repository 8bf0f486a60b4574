"""The gates that are compared: where they come from, what they cost, and in which order they are taken."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from gate_data import Place
from torch import Tensor
from torch.nn import functional as F

from edgesolve.host.gates import Bank, gate_bank
from edgesolve.host.rows import Rows
from edgesolve.kernels.losses import SquaredMoments
from edgesolve.kernels.moments import Moments
from edgesolve.kernels.newton import newton
from edgesolve.kernels.penalties import GroupL2, lam_max
from edgesolve.kernels.ridge import ridge_absolute

POOL = 256
"""Seeded candidates: four for each gate of the largest head that ships."""


@dataclass(frozen=True, slots=True)
class Gates:
    """A way to get gates. `make(place, z, seed)` gives the bank.

    area, rank, bits : a gate's inputs per channel, how many filters the bank is a mixture of (0: as many as
    gates), and bits of a stored weight. seeded : regenerated on the device, which stores per gate its
    offset, its scale and, if it was chosen, its index.
    """

    name: str
    make: Callable[[Place, Tensor, int], Bank]
    area: int = 9
    rank: int = 0
    bits: int = 32
    seeded: bool = False

    def n_bytes(self, m: int, d: int, chosen: bool) -> int:
        """Bytes of m gates on d channels."""
        if self.seeded:
            return 4 * m * (3 if chosen else 2)
        scales = 0 if self.bits == 32 else 4 * m
        return self._weights(m, d) * self.bits // 8 + 4 * m + scales

    def n_params(self, m: int, d: int) -> int:
        """Numbers that a bundle of today stores: it holds seeded gates as weights, as all others."""
        return self._weights(m, d) + m

    def macs(self, m: int, d: int) -> int:
        """Multiply-adds per position; the additions of seeded signs count as such."""
        return self._weights(m, d)

    def _weights(self, m: int, d: int) -> int:
        if self.rank and self.rank < m:
            return self.rank * (d * self.area + m)
        return m * d * self.area


def _seeded(kind: str):
    return lambda place, z, seed: gate_bank(place.network, place.cut.node, z, kind, POOL, seed)


def _teacher(place: Place, z: Tensor, seed: int = 0) -> Bank:
    return gate_bank(place.network, place.cut.node, z, "teacher", 0, 0)


def _mixed(rank: int):
    """The removed block's pre-activations projected on their `rank` principal directions."""

    def make(place: Place, z: Tensor, seed: int) -> Bank:
        bank = _teacher(place, z)
        mean, cov = _moments(_filtered(bank, z))
        top = torch.linalg.eigh(cov)[1][:, -rank:]
        P = (top @ top.T).float()
        weight = torch.einsum("ij,jdab->idab", P, bank.weight)
        return Bank(weight, P @ (bank.bias - mean) + mean, f"rank {rank}")

    return make


def _int8(place: Place, z: Tensor, seed: int) -> Bank:
    """The removed block's filters, each rounded to 255 levels."""
    bank = _teacher(place, z)
    step = bank.weight.abs().amax((1, 2, 3), keepdim=True) / 127
    return Bank((bank.weight / step).round() * step, bank.bias, "int8")


def _fitted(place: Place, z: Tensor, seed: int) -> Bank:
    """1×1 gates whose pre-activations are nearest to the removed block's 3×3 ones."""
    bank = _teacher(place, z)
    flat, target = (t.transpose(0, 1).flatten(1) for t in (z, _filtered(bank, z)))
    mean, cov = _moments(z)
    both = ((target - target.mean(1, keepdim=True)) @ flat.T / flat.shape[1]).double()
    ridge = 1e-4 * cov.diagonal().mean() * torch.eye(len(cov), dtype=torch.float64)
    weight = torch.linalg.solve(cov + ridge, both.T).T.float()
    return Bank(weight[:, :, None, None], target.mean(1) - weight @ mean, "fitted 1×1")


def _principal(place: Place, z: Tensor, seed: int) -> Bank:
    """1×1 gates along the principal directions of the standardised activation."""
    scale = z.std((0, 2, 3))
    scale = scale.clamp(min=1e-3 * float(scale.max()))
    mean, cov = _moments(z / scale[:, None, None])
    weight = torch.linalg.eigh(cov)[1].flip(1).T.float()
    return Bank((weight / scale)[:, :, None, None], -weight @ mean, "principal 1×1")


def _filtered(bank: Bank, z: Tensor) -> Tensor:
    side = bank.weight.shape[2]
    return torch.cat([F.conv2d(b, bank.weight, bank.bias, padding=side // 2) for b in z.split(128)])


def _moments(s: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (m,) and covariance (m, m) float64 over items and positions of s (n, m, h, w)."""
    flat = s.transpose(0, 1).flatten(1)
    mean = flat.mean(1)
    flat = flat - mean[:, None]
    return mean, (flat @ flat.T / flat.shape[1]).double()


SEEDED = (
    Gates("seeded 1×1", _seeded("seeded"), area=1, seeded=True),
    Gates("seeded 3×3", _seeded("seeded3"), seeded=True),
)
OWN = Gates("block's own", _teacher)
DATA_DRIVEN = (
    OWN,
    Gates("own, int8", _int8, bits=8),
    Gates("own, rank 24", _mixed(24), rank=24),
    Gates("own, rank 16", _mixed(16), rank=16),
    Gates("own, fitted 1×1", _fitted, area=1),
    Gates("principal 1×1", _principal, area=1),
)


def group_order(rows: Rows, z: Tensor, logits: Tensor, n_gates: int) -> list[int]:
    """`n_gates` gates in the order in which the group penalty switches them on as lam falls.

    rows : one ramp per gate. The plain features are not penalised: they are projected out of the moments
    beforehand. A gate's weight in the penalty is its deviation, so that units don't decide.
    """
    with torch.no_grad():
        A = torch.cat([rows(b) for b in z.split(64)]).numpy()
    moments = Moments.of(A, logits.numpy())
    whole = SquaredMoments.of(moments, ridge_absolute(moments, 1e-3))
    size, m = rows.value_weight.shape[0], rows.gate_weight.shape[0]
    loss = _without(whole, size * m)
    starts = np.arange(m + 1) * size
    weights = np.sqrt(np.add.reduceat(np.diag(whole.Q)[: size * m], starts[:-1]))
    weights = np.maximum(weights, 1e-6 * weights.max())
    lam = lam_max(loss, GroupL2(1.0, starts, weights))
    order, U = [], None
    for _ in range(60):
        lam *= 0.8
        penalty = GroupL2(lam, starts, weights)
        U = newton(loss, penalty, U, tol=1e-3).weights
        strength = weights * penalty.norms(U)
        new = [i for i in np.argsort(-strength) if strength[i] > 0 and i not in order]
        order += [int(i) for i in new]
        if len(order) >= n_gates:
            return order[:n_gates]
    return (order + [i for i in range(m) if i not in order])[:n_gates]


def _without(loss: SquaredMoments, D: int) -> SquaredMoments:
    """The loss in the first D weights, minimised over the others."""
    inner = loss.Q[D:, D:] + loss.ridge * np.eye(len(loss.Q) - D)
    take = np.linalg.solve(inner, np.c_[loss.Q[D:, :D], loss.q[D:]])
    Q = loss.Q[:D, :D] - loss.Q[:D, D:] @ take[:, :D]
    q = loss.q[:D] - loss.Q[:D, D:] @ take[:, D:]
    y2 = loss.y2 - float(np.vdot(loss.q[D:], take[:, D:]))
    return SquaredMoments(0.5 * (Q + Q.T), q, y2, loss.ridge, loss.mean_x[:D], loss.mean_t)
