"""Train a network so that its layers can be cut: weights as products of orthogonal factors, ranks by VBMF.

Over-parameterise (every weight becomes U diag(s) V'), train with `penalty` beside whatever loss, `truncate`.
(He, Jiang, Wu 2024, arXiv 2408.16289; the form of the penalty is ours, the abstract gives none: compression.md,
section 7.)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from edgesolve.host.vbmf import evbmf

LAYERS = (nn.Conv1d, nn.Conv2d, nn.Linear)


class Product(nn.Module):
    """weight (T, …) = U diag(s) V', U (T, k), s (k,), V (D, k), k = min(T, D); starts as the weight's own SVD."""

    def __init__(self, shape: torch.Size):
        super().__init__()
        self.shape = shape

    def forward(self, U: Tensor, s: Tensor, V: Tensor) -> Tensor:
        return ((U * s) @ V.T).reshape(self.shape)

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        U, s, Vt = torch.linalg.svd(weight.detach().double().flatten(1), full_matrices=False)
        return tuple(a.to(weight.dtype).contiguous() for a in (U, s, Vt.T))


def over_parameterise(model: nn.Module) -> list[str]:
    """Give every convolution and linear layer of `model`, in place, factors to train; the names of those layers.

    Layers whose weight has one row or column, and grouped convolutions, have no rank to remove and stay.
    """
    found = []
    for name, layer in list(model.named_modules()):
        if isinstance(layer, LAYERS) and getattr(layer, "groups", 1) == 1:
            if parametrize.is_parametrized(layer):
                raise ValueError(f"{name}: its weight is parametrized already; remove that first.")
            weight = layer.weight
            if min(len(weight), weight[0].numel()) > 1:
                parametrize.register_parametrization(layer, "weight", Product(weight.shape))
                found.append(name)
    if not found:
        raise ValueError(
            "the model has no convolution or linear layer with a rank to remove; groups = 1 and two channels "
            "on each side are the least."
        )
    return found


def factors(model: nn.Module) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """(U, s, V) of every over-parameterised layer by name, open to gradients."""
    found = {}
    for name, layer in model.named_modules():
        if isinstance(layer, LAYERS) and parametrize.is_parametrized(layer, "weight"):
            own = layer.parametrizations.weight
            if isinstance(own[0], Product):
                found[name] = own.original0, own.original1, own.original2
    if not found:
        raise ValueError("no layer has factors; call over_parameterise first.")
    return found


def penalty(model: nn.Module) -> Tensor:
    """Σ over layers of ||U'U - I||² + ||V'V - I||²: 0 where all factors are orthonormal. Differentiable."""
    return sum(
        ((A.T @ A - torch.eye(A.shape[1], dtype=A.dtype, device=A.device)) ** 2).sum()
        for U, _, V in factors(model).values()
        for A in (U, V)
    )


def orthonormalise(model: nn.Module) -> None:
    """The hard form: each U and V, in place, becomes the nearest matrix with orthonormal columns (its polar factor)."""
    with torch.no_grad():
        for U, _, V in factors(model).values():
            for A in (U, V):
                P, _, Qt = torch.linalg.svd(A, full_matrices=False)
                A.copy_(P @ Qt)


def vbmf_ranks(model: nn.Module, least: int = 1) -> dict[str, int]:
    """The rank of every over-parameterised layer that stands out of the noise, at least `least`."""
    found = {}
    for name, (U, s, V) in factors(model).items():
        weight = ((U * s) @ V.T).detach().double().numpy()
        found[name] = min(max(evbmf(weight).rank, least), len(s))
    return found


def truncate(model: nn.Module, ranks: Mapping[str, int], by: str = "svd") -> dict[str, int]:
    """Cut each layer to rank `ranks[name]`, in place, and make it a plain layer again.

    by : "svd" to the nearest weight of that rank, whatever its factors; "terms" to the strongest s_j u_j v_j' as they
        were trained, by |s| ||u|| ||v||, which are that SVD where the factors are orthonormal.
    Returns how many numbers the two factors of each layer would hold.
    """
    if by not in ("svd", "terms"):
        raise ValueError(f"by must be svd or terms, got {by!r}.")
    own = factors(model)
    if set(ranks) != set(own):
        raise ValueError(
            f"ranks must name the layers {', '.join(sorted(own))}, got {', '.join(sorted(ranks))}."
        )
    sizes = {}
    for name, (U, s, V) in own.items():
        r = ranks[name]
        if not 1 <= r <= len(s):
            raise ValueError(f"{name}: rank must lie in 1..{len(s)}, got {r}.")
        with torch.no_grad():
            if by == "svd":
                P, g, Qt = torch.linalg.svd(((U * s) @ V.T).double(), full_matrices=False)
                for factor, cut in zip((U, s, V), (P, g, Qt.T), strict=True):
                    factor.copy_(cut)
            strength = s.abs() * U.norm(dim=0) * V.norm(dim=0)
            s[torch.argsort(strength, descending=True, stable=True)[r:]] = 0.0
        _made_plain(model.get_submodule(name))
        sizes[name] = r * (len(U) + len(V))
    return sizes


def _made_plain(layer: nn.Module) -> None:
    # Not parametrize.remove_parametrizations: it takes the weight from every deep copy of the layer too.
    weight = layer.weight.detach().clone()
    del layer.parametrizations
    layer.__class__ = type(layer).__bases__[0]
    layer.weight = nn.Parameter(weight)


def train(
    model: nn.Module,
    batches: Callable[[int], object],
    loss: Callable[[nn.Module, object], Tensor],
    *,
    epochs: int,
    lam: float,
    shrink: float = 0.0,
    lr: float = 1e-3,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[tuple[float, float]]:
    """(mean loss, penalty at the end) of each epoch of Adam on loss + lam penalty + shrink Σ|s|, in place.

    batches(epoch) : iterates over an epoch's batches, in an order of its own seed; loss(model, batch) : with labels or
    against a teacher's answers.
    """
    if lam < 0.0 or shrink < 0.0:
        raise ValueError(f"lam and shrink must be 0 or more, got {lam} and {shrink}.")
    values, trace = list(model.parameters()), []
    optimiser = torch.optim.Adam(values, lr=lr)
    model.train()
    for epoch in range(epochs):
        total = []
        for batch in batches(epoch):
            own = loss(model, batch)
            whole = own + lam * penalty(model)
            if shrink:
                whole = whole + shrink * sum(s.abs().sum() for _, s, _ in factors(model).values())
            optimiser.zero_grad()
            whole.backward()
            optimiser.step()
            total.append(float(own.detach()))
        trace.append((float(np.mean(total)), float(penalty(model).detach())))
        progress(epoch + 1, epochs)
    model.eval()
    return trace
