"""Which gates, and which few directions of the activation they gate: from a sample, without labels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from edgesolve.host.network import Cut, Network, aten, layer_parameters
from edgesolve.host.rows import Rows, grid_pool
from edgesolve.kernels.gates import seeded_gates

OFFSETS = {1: (0.0,), 2: (-0.5, 0.5), 3: (-1.0, 0.0, 1.0)}
"""Where a filter's ramps stand, in standard deviations of its pre-activation; measured in rows.py."""
KINDS = ("auto", "teacher", "seeded", "seeded3")
_RIDGE = 1e-2
OVERSAMPLED = 4
"""Seeded gates per gate that is kept: the others are drawn only to choose from."""
LADDER = ((64, 8), (48, 8), (32, 8), (32, 4), (16, 4), (8, 4), (8, 2))
"""Head sizes (filters, directions per gate) that are tried, largest first."""


@dataclass(frozen=True, slots=True)
class Bank:
    """Candidate gates on the raw activation: weight (M, d, k, k), bias (M,), and where they come from."""

    weight: Tensor
    bias: Tensor
    source: str


def design_rows(
    network: Network,
    cut: str,
    z: Tensor,
    logits: Tensor,
    *,
    kind: str = "auto",
    n_gates: int,
    rank: int,
    ramps: int = 2,
    seed: int = 0,
) -> tuple[Rows, str]:
    """The row vector for a sample of activations z (n, d, h, w) and the network's logits (n, c).

    kind: "teacher" takes the filters of the convolution that reads the cut, "seeded" and "seeded3" a bank of
    ±1 vectors of 1×1 and 3×3 support, "auto" the teacher's where there are some and else "seeded". Of a bank
    of more than n_gates the greedy choice is kept. Returns the module and the bank's source.
    """
    z = z if z.ndim == 4 else z[:, :, None, None]
    bank = gate_bank(network, cut, z, kind, OVERSAMPLED * n_gates, seed)
    make = RowMaker.of(z, logits, bank, n_gates, rank)
    order = range(len(make.gates))
    if len(order) > n_gates:
        order = sorted(greedy_order(make.rows(order, 1), z, logits, n_gates))
    return make.rows(order, ramps), bank.source


@dataclass(frozen=True, slots=True, eq=False)
class RowMaker:
    """A normalised bank, and what all rows behind some of its gates have in common."""

    gates: _Gates
    project: Tensor
    mean: Tensor
    scale: Tensor
    pool: Tensor

    @classmethod
    def of(cls, z: Tensor, logits: Tensor, bank: Bank, n_gates: int, rank: int) -> RowMaker:
        """From a sample z (n, d, h, w); the directions are those that the first `n_gates` gates use."""
        mean, scale = _standardisation(z)
        gates = _normalised(bank, z)
        rank = min(rank, z.shape[1])
        project = _projection(gates[:n_gates], z, logits, mean, scale, rank)
        pool = grid_pool(*z.shape[2:], _cells(z.shape[1:]))
        return cls(gates, project, mean, scale, pool)

    def rows(self, pick, ramps: int) -> Rows:
        """The row vector behind the gates `pick`, in that order."""
        gates = self.gates[list(pick)]
        m, s = self.mean, self.scale
        return Rows(
            gates.weight,
            gates.bias,
            self.project,
            self.project @ m,
            m,
            s,
            self.pool,
            OFFSETS[ramps],
        )


def _cells(shape: tuple[int, ...]) -> int:
    """Side of the grid on which the plain features are pooled; z of `shape` (d, h, w)."""
    return 2 if 4 * shape[0] <= 512 and min(shape[1:]) >= 4 else 1


def affordable(
    network: Network, cut: Cut, classes: int, kind: str, ramps: int = 2
) -> tuple[int, int] | None:
    """The largest (n_gates, rank) whose head costs at most 0.7 of the parameters and 0.9 of the multiply-adds
    behind the cut, or None: then replacing it wins nothing."""
    shape = cut.shape if len(cut.shape) == 3 else (*cut.shape, 1, 1)
    d, p = shape[0], shape[1] * shape[2]
    teacher = teacher_filters(network, cut.node) if kind in ("auto", "teacher") else None
    side = _seeded_side(kind, shape) if teacher is None else teacher.weight.shape[2]
    area = side * side
    for m, r in LADDER:
        m, r = m if teacher is None else min(m, len(teacher.weight)), min(r, d)
        length = ramps * m * (r + 1) + _cells(shape) ** 2 * d
        params = m * (d * area + 1) + r * (d + 1) + 2 * d + (length + 1) * classes
        macs = p * (m * d * area + r * d + ramps * m * (r + 1) + d) + length * classes
        if params <= 0.7 * cut.params_after and macs <= 0.9 * cut.macs_after:
            return m, r
    return None


def _standardisation(z: Tensor) -> tuple[Tensor, Tensor]:
    mean, scale = z.mean((0, 2, 3)), z.std((0, 2, 3))
    return mean, torch.clamp(scale, min=1e-3 * float(scale.max()) + 1e-12)


def gate_bank(network: Network, cut: str, z: Tensor, kind: str, n_seeded: int, seed: int) -> Bank:
    """Candidate gates of a `kind` of `design_rows`; z (n, d, h, w). n_seeded: size of a bank from a seed.

    ValueError: another kind. ModelError: "teacher", and no convolution reads the cut.
    """
    if kind not in KINDS:
        raise ValueError(f"gates must be auto, teacher, seeded or seeded3, got {kind!r}.")
    teacher = teacher_filters(network, cut) if kind in ("auto", "teacher") else None
    if teacher is not None:
        return teacher
    if kind == "teacher":
        from edgesolve.host.errors import ModelError

        raise ModelError(
            f"no plain 1×1 or 3×3 convolution reads the cut {cut}; use --gates seeded."
        )
    mean, scale = _standardisation(z)
    d, side = z.shape[1], _seeded_side(kind, z.shape[1:])
    inputs = d * side * side
    signs = torch.from_numpy(seeded_gates(inputs, n_seeded, seed))
    weight = signs.view(-1, d, side, side) / scale[:, None, None]
    spread = torch.from_numpy(np.random.default_rng(seed).normal(size=n_seeded)).float()
    bias = 0.3 * inputs**0.5 * spread - weight.sum((2, 3)) @ mean
    return Bank(weight, bias, kind if side > 1 else "seeded")


def _seeded_side(kind: str, shape: tuple[int, ...]) -> int:
    """Of z of `shape` (d, h, w); where there is one position, a 3×3 gate sees no more than a 1×1 one."""
    return 3 if kind == "seeded3" and max(shape[1:]) > 1 else 1


def teacher_filters(network: Network, cut: str) -> Bank | None:
    """The filters of the convolutions that read the cut, normalisation folded, or None."""
    by_name = {n.name: n for n in network.nodes}
    readers = list(by_name[cut].users)
    readers += [u for r in readers if r.target is aten.pad.default for u in r.users]
    found = []
    for node in readers:
        if node.target is not aten.conv2d.default:
            continue
        weight, bias = layer_parameters(network, node)
        groups = node.args[6] if len(node.args) > 6 else 1
        dilation = set(node.args[5]) if len(node.args) > 5 else {1}
        if groups != 1 or dilation != {1} or tuple(weight.shape[2:]) not in ((1, 1), (3, 3)):
            continue
        bias = torch.zeros(len(weight)) if bias is None else bias
        for norm in network.norms:
            if norm.layer == node.name and not norm.virtual:
                s = norm.scale()
                weight = weight * s[:, None, None, None]
                bias = norm.beta + (bias - norm.mean) * s
        found.append((weight, bias))
    if not found:
        return None
    k = max(w.shape[2] for w, _ in found)
    padded = [F.pad(w, [(k - w.shape[2]) // 2] * 4) for w, _ in found]
    return Bank(torch.cat(padded), torch.cat([b for _, b in found]), "teacher")


@dataclass(frozen=True, slots=True)
class _Gates:
    weight: Tensor
    bias: Tensor

    def __len__(self) -> int:
        return len(self.weight)

    def __getitem__(self, index) -> _Gates:
        return _Gates(self.weight[index], self.bias[index])

    def __call__(self, z: Tensor) -> Tensor:
        k = self.weight.shape[2]
        s = F.conv2d(z, self.weight, self.bias, padding=k // 2)
        return (s + 0.5).clamp(0.0, 1.0).flatten(2)


def _normalised(bank: Bank, z: Tensor) -> _Gates:
    """The filters in units of their own standard deviation."""
    k = bank.weight.shape[2]
    parts = [F.conv2d(b, bank.weight, bank.bias, padding=k // 2) for b in z[:256].split(64)]
    sd = torch.cat(parts).std((0, 2, 3))
    sd = torch.clamp(sd, min=1e-3 * float(sd.max()) + 1e-12)
    return _Gates(bank.weight / sd[:, None, None, None], bank.bias / sd)


def _gated(gates: _Gates, z: Tensor, values: Tensor) -> Tensor:
    """(n, m, r): (1/p) sum_p D v for values (n, r, p)."""
    out = [
        torch.matmul(gates(zb), vb.transpose(1, 2)) / vb.shape[2]
        for zb, vb in zip(z.split(64), values.split(64), strict=True)
    ]
    return torch.cat(out)


def _projection(gates, z, logits, mean, scale, rank) -> Tensor:
    """project (rank, d): the directions of z that the gated solution uses.

    Solve with every direction (principal ones where d is large), then keep the leading left singular vectors of
    the weights unfolded along the directions, in the metric of z's covariance (one Tucker step on U).
    """
    flat = z.transpose(0, 1).flatten(1)[:, :: max(1, z[0, 0].numel() * len(z) // 100_000)]
    flat = (flat - mean[:, None]) / scale[:, None]
    cov = (flat @ flat.T / flat.shape[1]).double()
    energy, vectors = torch.linalg.eigh(cov)
    wide = min(z.shape[1], 64)
    basis = vectors[:, -wide:].float()  # (d, wide), orthonormal
    standard = (z.flatten(2) - mean[:, None]) / scale[:, None]
    A = _gated(gates, z, torch.einsum("dr,ndp->nrp", basis, standard))
    U = _sample_ridge(A.flatten(1), logits).view(A.shape[1], wide, -1)
    root = energy[-wide:].clamp(min=1e-10 * float(energy[-1])).sqrt()
    weighted = root[:, None] * U.double().permute(1, 0, 2).flatten(1)
    left = torch.linalg.svd(weighted, full_matrices=False)[0][:, :rank]
    left = left * torch.sign(left.gather(0, left.abs().argmax(0, keepdim=True)))
    directions = basis.double() @ (left / root[:, None])
    directions = directions / torch.sqrt(((cov @ directions) * directions).sum(0))  # unit variance
    return (directions.float() / scale[:, None]).T.contiguous()


def _sample_ridge(A: Tensor, Y: Tensor) -> Tensor:
    """Ridge weights (D, c) by the n x n kernel: a sample has fewer rows than features."""
    A, Y = A.double(), Y.double()
    A, Y = A - A.mean(0), Y - Y.mean(0)
    K = A @ A.T
    K.diagonal().add_(_RIDGE * len(A) * float((A * A).mean()))
    return (A.T @ torch.linalg.solve(K, Y)).float()


def greedy_order(rows: Rows, z: Tensor, logits: Tensor, n_gates: int) -> list[int]:
    """`n_gates` gates of the bank in the order of choice, eight at a time by the normalised adjoint
    ‖A_i'R‖ / ‖A_i‖; rows: one ramp per gate. The first k are what a choice of k would be, k divisible by 8."""
    with torch.no_grad():
        A = torch.cat([rows(b) for b in z.split(64)])
    m, r1 = rows.gate_weight.shape[0], rows.value_weight.shape[0]
    A = A - A.mean(0)
    gated, plain = A[:, : m * r1].unflatten(1, (m, r1)), A[:, m * r1 :]
    Y = logits - logits.mean(0)
    norms = gated.flatten(2).pow(2).sum((0, 2)).sqrt().clamp(min=1e-12)
    chosen: list[int] = []
    while len(chosen) < n_gates:
        X = torch.cat([plain, gated[:, chosen].flatten(1)], 1)
        R = Y - X @ _sample_ridge(X, Y)
        score = torch.einsum("nmr,nc->mrc", gated, R).pow(2).sum((1, 2)).sqrt() / norms
        score[chosen] = -1.0
        chosen += score.topk(min(8, n_gates - len(chosen))).indices.tolist()
    return chosen
