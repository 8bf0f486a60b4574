"""Which candidate each layer gets under one budget: the multiple-choice knapsack, solved exactly.

The Lagrangian relaxation gives a price per unit of cost and a lower bound; what the price shows to be in no better
answer is dropped; the few choices left are enumerated layer by layer, keeping what no other partial answer dominates.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

MAX_STATES = 1 << 13
"""Partial answers kept per layer; beyond it the answer is still feasible, but `exact` is False. Layers' curves need
up to about 2,000; losses that are a linear function of cost, without end."""
ROUNDING = 1e-12
"""Relative: a sum of costs exceeds a budget by more than this, or not at all."""


@dataclass(frozen=True, slots=True, eq=False)
class Curve:
    """One layer's candidates: cost (J,) and loss (J,), finite, in any order, of any shape; J >= 1."""

    name: str
    cost: np.ndarray
    loss: np.ndarray

    def __post_init__(self):
        if (
            np.ndim(self.cost) != 1
            or np.shape(self.cost) != np.shape(self.loss)
            or not len(self.cost)
        ):
            raise ValueError(
                f"{self.name}: cost and loss must be vectors of one length, at least 1, got shapes "
                f"{np.shape(self.cost)} and {np.shape(self.loss)}."
            )
        bad = np.flatnonzero(~np.isfinite(self.cost) | ~np.isfinite(self.loss))
        if len(bad):
            j = bad[0]
            raise ValueError(
                f"{self.name}: candidate {j} has cost {self.cost[j]} and loss {self.loss[j]}; both must be "
                "finite. Leave it out."
            )


@dataclass(frozen=True, slots=True, eq=False)
class Allocation:
    """choice (L,) int: per curve, the index of its candidate; cost and loss are the totals.

    `bound`: no feasible choice has a lower loss, by Lagrangian duality, which doesn't depend on the search.
    `exact`: the search was exhaustive, so no feasible choice has a lower loss than this one, even if gap > 0.
    """

    choice: np.ndarray
    cost: float
    loss: float
    bound: float
    exact: bool

    @property
    def gap(self) -> float:
        """loss - bound >= 0: at least as large as the distance to the optimum."""
        return self.loss - self.bound


def pareto(cost: np.ndarray, loss: np.ndarray) -> np.ndarray:
    """Indices of the candidates that no other matches or betters in both, by rising cost; of equals the first."""
    order = np.lexsort((loss, cost))
    best = np.minimum.accumulate(np.asarray(loss)[order])
    return order[np.r_[True, best[1:] < best[:-1]]]


def allocate(curves: list[Curve], budget: float) -> Allocation:
    """The choice of least total loss whose total cost is at most `budget` (to 1e-12 of the costs' magnitude).

    Optimal where `exact`; certified within `gap` in any case. Deterministic. A budget that no choice meets is a
    ValueError with the smallest total. (Multiple-choice knapsack: Sinha & Zoltners 1979; reduction by reduced
    costs and states by dominance as in Pisinger 1995.)
    """
    if not curves:
        raise ValueError("allocate needs at least one curve, got none.")
    kept = [pareto(c.cost, c.loss) for c in curves]
    costs = [np.asarray(c.cost, np.float64)[k] for c, k in zip(curves, kept, strict=True)]
    losses = [np.asarray(c.loss, np.float64)[k] for c, k in zip(curves, kept, strict=True)]
    limit = _limit(costs, budget)
    price = _price(costs, losses, limit)
    priced = [f + price * c for c, f in zip(costs, losses, strict=True)]
    bound = sum(float(p.min()) for p in priced) - price * limit
    start = _filled(costs, losses, limit, price)
    choice, exact = _search(costs, losses, priced, limit, price, start)
    loss = _total(losses, choice)
    return Allocation(
        np.array([k[j] for k, j in zip(kept, choice, strict=True)]),
        _total(costs, choice),
        loss,
        min(bound, loss),
        exact,
    )


def _limit(costs: list[np.ndarray], budget: float) -> float:
    """The budget plus rounding, and no more than all layers at their dearest."""
    least = sum(float(c[0]) for c in costs)
    most = sum(float(c[-1]) for c in costs)
    slack = ROUNDING * sum(float(np.abs(c).max()) for c in costs)
    if not budget + slack >= least:
        raise ValueError(
            f"the budget is {budget:g}, but the cheapest candidates of all {len(costs)} layers cost {least:g} "
            "together: raise the budget to that, or offer cheaper candidates."
        )
    return min(float(budget), most) + slack


def _hull(cost: np.ndarray, loss: np.ndarray) -> list[int]:
    """The lower convex hull of a Pareto front: indices of rising cost, each step of less gain per unit."""
    hull = [0]
    for j in range(1, len(cost)):
        while len(hull) > 1:
            a, b = hull[-2:]
            before = (loss[a] - loss[b]) * (cost[j] - cost[b])
            after = (loss[b] - loss[j]) * (cost[b] - cost[a])
            if before > after:
                break
            hull.pop()
        hull.append(j)
    return hull


def _price(costs, losses, limit: float) -> float:
    """The Lagrangian multiplier of highest dual: the gain per unit of the first hull step that doesn't fit."""
    gain, step = [], []
    for c, f in zip(costs, losses, strict=True):
        h = _hull(c, f)
        step.append(np.diff(c[h]))
        gain.append(-np.diff(f[h]) / step[-1])
    gain, step = np.concatenate(gain), np.concatenate(step)
    order = np.argsort(-gain, kind="stable")
    spent = sum(float(c[0]) for c in costs) + np.cumsum(step[order])
    over = np.flatnonzero(spent > limit)
    return float(gain[order[over[0]]]) if len(over) else 0.0


def _filled(costs, losses, limit: float, price: float) -> list[int]:
    """A feasible choice: the cheap end at the price, then the largest gain that fits, again and again."""
    dearer = price * (1.0 + 1e-9)  # ties go to the cheap end
    choice = [int((f + dearer * c).argmin()) for c, f in zip(costs, losses, strict=True)]
    if _total(costs, choice) > limit:
        choice = [0] * len(costs)
    while True:
        slack = limit - _total(costs, choice)
        best, move = 0.0, None
        for i, (c, f) in enumerate(zip(costs, losses, strict=True)):
            j = int(np.searchsorted(c, c[choice[i]] + slack, side="right")) - 1
            if f[choice[i]] - f[j] > best:
                best, move = f[choice[i]] - f[j], (i, j)
        if move is None:
            return choice
        choice[move[0]] = move[1]


def _search(costs, losses, priced, limit, price, start) -> tuple[list[int], bool]:
    """(choice, exhaustive). A state is a choice for the first layers; its bound completes it at the price."""
    floor = [float(p.min()) for p in priced]
    least = [float(c[0]) for c in costs]
    cheap = [int(p.argmin()) for p in priced]
    rest_bound, rest_least = sum(floor), sum(least)
    rest_cost, rest_loss = _total(costs, cheap), _total(losses, cheap)
    best = _total(losses, start)
    # A better answer has a loss below `best`: rounding may not hide it.
    margin = ROUNDING * sum(float(np.abs(f).max()) for f in losses)
    cost, loss, exhaustive, back = np.zeros(1), np.zeros(1), True, []
    for i, (c, f, p) in enumerate(zip(costs, losses, priced, strict=True)):
        rest_bound, rest_least = rest_bound - floor[i], rest_least - least[i]
        rest_cost, rest_loss = rest_cost - c[cheap[i]], rest_loss - f[cheap[i]]
        bound = loss + price * cost + (rest_bound - price * limit)
        # Only candidates that could follow the best state; then only states that could still win.
        use = np.flatnonzero(bound.min() + p <= best + margin)
        pair_bound = (bound[:, None] + p[use]).ravel()
        pair_cost = (cost[:, None] + c[use]).ravel()
        alive = np.flatnonzero((pair_bound <= best + margin) & (pair_cost + rest_least <= limit))
        pair_cost = pair_cost[alive]
        pair_loss = (loss[:, None] + f[use]).ravel()[alive]
        keep = pareto(pair_cost, pair_loss) if len(alive) else alive
        if len(keep) > MAX_STATES:
            keep = np.sort(keep[np.argsort(pair_bound[alive[keep]], kind="stable")[:MAX_STATES]])
            exhaustive = False
        cost, loss, alive = pair_cost[keep], pair_loss[keep], alive[keep]
        back.append((alive // len(use), use[alive % len(use)]))
        fits = loss[cost + rest_cost <= limit]
        best = min(best, float(fits.min(initial=np.inf)) + rest_loss)
    found = _traced(back, int(loss.argmin())) if len(loss) else start
    return min(start, found, key=lambda choice: _total(losses, choice)), exhaustive


def _traced(back, state: int) -> list[int]:
    choice = []
    for parent, candidate in reversed(back):
        choice.append(int(candidate[state]))
        state = int(parent[state])
    return choice[::-1]


def _total(values: list[np.ndarray], choice: list[int]) -> float:
    return sum(float(v[j]) for v, j in zip(values, choice, strict=True))
