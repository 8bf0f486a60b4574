"""The allocator against enumeration and a plain dynamic program."""

import itertools

import numpy as np
import pytest
from scipy.optimize import linprog

from edgesolve.host.allocate import Curve, allocate, pareto


def random_curves(rng, layers=5, candidates=4, whole=True):
    """Neither monotone nor convex, unsorted, with ties where `whole`."""

    def numbers():
        return rng.integers(0, 12, candidates).astype(float) if whole else rng.random(candidates)

    return [Curve(f"layer{i}", numbers(), numbers()) for i in range(layers)]


def enumerated(curves, budget):
    """(loss, choice) of the best of all choices."""
    every = itertools.product(*(range(len(c.cost)) for c in curves))
    feasible = [j for j in every if total(curves, j)[0] <= budget + 1e-9]
    return min((total(curves, j)[1], j) for j in feasible)


def total(curves, choice):
    return tuple(
        sum(getattr(c, what)[j] for c, j in zip(curves, choice, strict=True))
        for what in ("cost", "loss")
    )


def dynamic_program(curves, budget):
    """The least loss, for whole costs."""
    best = np.zeros(int(budget) + 1)
    for curve in curves:
        following = np.full_like(best, np.inf)
        for cost, loss in zip(curve.cost.astype(int), curve.loss, strict=True):
            shifted = best[: max(len(best) - cost, 0)] + loss
            np.minimum(following[cost:], shifted, out=following[cost:])
        best = following
    return best[-1]


def span(curves):
    return sum(c.cost.min() for c in curves), sum(c.cost.max() for c in curves)


def accepts(curves, budget, choice, loss, optimum):
    """What every test here asks of an answer."""
    cost, true_loss = total(curves, choice)
    return cost <= budget + 1e-9 and np.isclose(true_loss, loss) and np.isclose(loss, optimum)


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("seed", range(8))
def test_equals_enumeration(seed, whole):
    rng = np.random.default_rng(seed)
    curves = random_curves(rng, whole=whole)
    low, high = span(curves)
    for share in (0.0, 0.15, 0.4, 0.8, 1.0):
        budget = low + share * (high - low)
        found = allocate(curves, budget)
        best, _ = enumerated(curves, budget)
        assert accepts(curves, budget, found.choice, found.loss, best)
        assert found.exact
        assert np.isclose(found.cost, total(curves, found.choice)[0])
        assert found.bound <= best + 1e-12 and found.gap >= found.loss - best >= -1e-12


def test_rejects_wrong_answers():
    curves = random_curves(np.random.default_rng(3))
    low, high = span(curves)
    budget = low + 0.3 * (high - low)
    best, choice = enumerated(curves, budget)
    assert accepts(curves, budget, choice, best, best)
    cheapest = [int(c.cost.argmin()) for c in curves]
    finest = [int(c.loss.argmin()) for c in curves]
    for wrong in (cheapest, finest, list(choice)[::-1]):
        assert not accepts(curves, budget, wrong, total(curves, wrong)[1], best)
    assert not accepts(curves, budget, choice, 0.0, best)
    assert not accepts(curves, budget, choice, 0.9 * best, best)


def layer_like(rng, layers):
    """Falling, nearly convex curves over whole costs, as a network's ranks give them."""
    curves = []
    for i in range(layers):
        rank = np.arange(1, 31)
        loss = rng.lognormal() * np.exp(-rank * rng.uniform(0.02, 0.2)) * rng.uniform(1, 1.1, 30)
        curves.append(Curve(f"layer{i}", rank * float(rng.integers(5, 40)), loss))
    return curves


@pytest.mark.parametrize("share", [0.05, 0.3, 0.7])
def test_equals_dynamic_program(share):
    curves = layer_like(np.random.default_rng(0), 40)
    low, high = span(curves)
    budget = np.floor(low + share * (high - low))
    found = allocate(curves, budget)
    assert found.exact
    assert accepts(curves, budget, found.choice, found.loss, dynamic_program(curves, budget))


def test_bound_is_the_linear_relaxation():
    """Lagrangian duality's best bound is the optimum over mixtures of candidates, here by a simplex solver."""
    curves = random_curves(np.random.default_rng(5), whole=False)
    low, high = span(curves)
    budget = low + 0.35 * (high - low)
    one_each = np.kron(np.eye(len(curves)), np.ones(4))
    relaxed = linprog(
        np.concatenate([c.loss for c in curves]),
        A_ub=np.concatenate([c.cost for c in curves])[None],
        b_ub=[budget],
        A_eq=one_each,
        b_eq=np.ones(len(curves)),
    )
    assert np.isclose(allocate(curves, budget).bound, relaxed.fun)


def test_gap_is_at_most_one_step():
    """Of one layer, on its convex hull: what the relaxation splits."""
    curves = layer_like(np.random.default_rng(1), 20)
    low, high = span(curves)
    found = allocate(curves, low + 0.4 * (high - low))
    assert 0.0 <= found.gap <= max(np.ptp(c.loss) for c in curves)


def test_the_hull_is_not_enough():
    """Planted: the best answer is a candidate above the hull, which no price can name."""
    curves = [Curve("a", np.array([0.0, 5.0, 10.0]), np.array([10.0, 6.0, 0.0]))]
    found = allocate(curves, 7.0)
    assert found.choice.tolist() == [1] and found.exact
    assert np.isclose(found.bound, 3.0)


def test_everything_fits():
    curves = random_curves(np.random.default_rng(2))
    found = allocate(curves, np.inf)
    assert found.loss == sum(c.loss.min() for c in curves)
    assert found.gap == 0.0


def test_order_of_candidates_does_not_matter():
    curves = layer_like(np.random.default_rng(4), 6)
    rng = np.random.default_rng(0)
    orders = [rng.permutation(len(c.cost)) for c in curves]
    mixed = [Curve(c.name, c.cost[o], c.loss[o]) for c, o in zip(curves, orders, strict=True)]
    budget = np.mean(span(curves))
    a, b = allocate(curves, budget), allocate(mixed, budget)
    assert [o[j] for o, j in zip(orders, b.choice, strict=True)] == a.choice.tolist()


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_truncated_search_stays_feasible_and_certified(share, monkeypatch):
    """Subset sums: loss is budget left over, every state is as good as any other."""
    rng = np.random.default_rng(0)
    curves = [Curve(f"{i}", c, 1 - c) for i, c in enumerate(rng.random((10, 12)))]
    low, high = span(curves)
    budget = low + share * (high - low)
    monkeypatch.setattr("edgesolve.host.allocate.MAX_STATES", 64)
    found = allocate(curves, budget)
    assert not found.exact and found.cost <= budget * (1 + 1e-9)
    # The loss is 10 - cost, so that no answer is below 10 - budget: the gap is what is left of the budget.
    assert np.isclose(found.gap, budget - found.cost) and found.gap < 0.05


def test_whole_costs_meet_the_budget_exactly():
    curves = [Curve(f"{i}", np.array([1.0, 3.0]), np.array([1.0, 0.0])) for i in range(7)]
    assert allocate(curves, 7.0).cost == 7.0
    assert allocate(curves, 8.999).cost == 7.0
    assert allocate(curves, 9.0).cost == 9.0


def test_sums_of_fractions_meet_the_budget():
    """0.1 + 0.2 isn't 0.3: rounding must not make a reachable budget unreachable."""
    curves = [Curve(f"{i}", np.array([c]), np.zeros(1)) for i, c in enumerate((0.1, 0.2))]
    assert allocate(curves, 0.3).choice.tolist() == [0, 0]


def test_unreachable_budget_names_the_closest():
    curves = [
        Curve("a", np.array([3.0, 4.0]), np.zeros(2)),
        Curve("b", np.array([5.0]), np.ones(1)),
    ]
    for budget in (7.5, -np.inf, np.nan):
        with pytest.raises(ValueError, match="all 2 layers cost 8 together"):
            allocate(curves, budget)
    with pytest.raises(ValueError, match="at least one curve"):
        allocate([], 1.0)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_unfit_curves_are_refused(bad):
    with pytest.raises(ValueError, match="conv1: candidate 1"):
        Curve("conv1", np.array([1.0, 2.0]), np.array([1.0, bad]))
    with pytest.raises(ValueError, match="conv1: candidate 0"):
        Curve("conv1", np.array([bad, 2.0]), np.array([1.0, 1.0]))
    with pytest.raises(ValueError, match="conv1: cost and loss"):
        Curve("conv1", np.array([1.0, 2.0]), np.array([1.0]))
    with pytest.raises(ValueError, match="conv1: cost and loss"):
        Curve("conv1", np.zeros(0), np.zeros(0))


@pytest.mark.parametrize("seed", range(5))
def test_pareto_is_what_nothing_dominates(seed):
    rng = np.random.default_rng(seed)
    cost, loss = rng.integers(0, 8, (2, 30))
    kept = pareto(cost, loss)
    as_good = (cost[:, None] <= cost) & (loss[:, None] <= loss)
    better = as_good & ((cost[:, None] < cost) | (loss[:, None] < loss))
    front = np.flatnonzero(~better.any(0))
    assert {(cost[j], loss[j]) for j in kept} == {(cost[j], loss[j]) for j in front}
    assert len(kept) == len({(cost[j], loss[j]) for j in front})
    assert (np.diff(cost[kept]) > 0).all() and (np.diff(loss[kept]) < 0).all()
