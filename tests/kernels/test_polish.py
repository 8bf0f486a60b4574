"""One-vs-all and its polished second layer, against scalar solves and a closed form."""

import numpy as np
import pytest

from edgesolve.kernels.designs import Explicit, Masked
from edgesolve.kernels.losses import SquaredRows
from edgesolve.kernels.newton import newton
from edgesolve.kernels.penalties import GroupL2, lam_max
from edgesolve.kernels.polish import folded, hidden_units, one_vs_all_polish


@pytest.fixture
def tiny(rng):
    """(design, t): 40 rows, 5 inputs, 4 gates, 3 outputs."""
    X = rng.standard_normal((40, 5))
    D = X @ rng.standard_normal((5, 4)) >= 0
    return Masked(X, D), rng.standard_normal((40, 3)) + np.maximum(X[:, :3], 0.0)


def test_the_first_layer_is_one_solve_for_each_output(tiny, accepts_only):
    design, t = tiny
    top = max(lam_max(SquaredRows.of(design, t[:, [k]], 0.1), _gates(design)) for k in range(3))
    alone = [
        newton(SquaredRows.of(design, t[:, [k]], 0.1), _gates(design, 0.1 * top), tol=1e-12)
        for k in range(3)
    ]
    reference = np.hstack([s.weights for s in alone])
    found = one_vs_all_polish(design, t, ratio=0.1, polish_ratio=0.1, ridge=0.1, tol=1e-12)

    def check(U):
        np.testing.assert_allclose(U, reference, atol=1e-5)

    accepts_only(check, found.first.weights)


def test_the_second_layer_is_ridge_on_the_hidden_units_where_lam_is_next_to_nothing(
    tiny, accepts_only
):
    design, t = tiny
    found = one_vs_all_polish(design, t, ratio=0.05, polish_ratio=1e-9, polish_ridge=0.3, tol=1e-10)
    H = np.stack(  # by loops, from the definition
        [
            (design.D[:, i, None] * design.X) @ found.first.weights[5 * i : 5 * i + 5, k]
            for i in range(4)
            for k in range(3)
        ],
        axis=1,
    )
    H0, t0 = H - H.mean(axis=0), t - t.mean(axis=0)
    W = np.linalg.solve(H0.T @ H0 / 40 + 0.3 * np.eye(12), H0.T @ t0 / 40)
    reference = H @ W + t.mean(axis=0) - H.mean(axis=0) @ W

    def check(answer):
        np.testing.assert_allclose(answer, reference, atol=1e-5)

    accepts_only(check, design.forward(found.weights) + found.intercept)


def test_two_layers_fold_into_one_head(rng):
    """Blocks of unequal size too."""
    design = Explicit(rng.standard_normal((20, 6)), np.array([0, 1, 4, 6]))
    U, W = rng.standard_normal((6, 2)), rng.standard_normal((6, 2))
    one = design.forward(folded(design.starts, U, W))
    np.testing.assert_allclose(one, hidden_units(design, U) @ W, atol=1e-12)


def test_the_joint_optimum_is_never_worse_on_the_joint_objective(tiny):
    design, t = tiny
    loss = SquaredRows.of(design, t, 0.1)
    penalty = _gates(design, 0.05)
    polished = one_vs_all_polish(design, t, ratio=0.05, polish_ratio=0.01, ridge=0.1)
    joint = newton(loss, penalty, tol=1e-9)
    assert joint.objective <= loss.value(polished.weights) + penalty.value(polished.weights)


def test_nothing_is_polished_where_every_gate_is_off(tiny):
    design, t = tiny
    found = one_vs_all_polish(design, t, ratio=1.0, polish_ratio=0.1)
    assert not found.weights.any()
    np.testing.assert_allclose(found.intercept, t.mean(axis=0))


def _gates(design, lam=1.0):
    return GroupL2(lam, design.starts)
