"""Laws that every decomposition keeps, over one list of them; and the closed form of low rank."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.linalg import eigh
from scipy.optimize import minimize

from edgesolve.host.chain import Positions, grouped, pivoted
from edgesolve.host.cp import cp
from edgesolve.host.lowrank import lowrank, lowrank_curve
from edgesolve.host.metric import Metric
from edgesolve.host.tensor_train import tensor_train
from edgesolve.host.tucker import tucker2
from edgesolve.kernels.moments import Moments

SHAPES = [(6, 4, 3, 3), (5, 4, 1, 3), (5, 4, 3, 2), (6, 5, 1, 1)]


def cp_ladder(T, c, kh, kw):
    full = kh * kw * min(c, T)
    return sorted({1, max(1, full // 4), max(1, full // 2), full})


def cp4(metric, shape, rank):
    return cp(metric, shape, rank, sweeps=8)


def cp3(metric, shape, rank):
    return cp(metric, shape, rank, separable=False, sweeps=8)


# (fit(metric, shape, ranks), rising ranks for a shape, the last ones full)
FORMATS = {
    "lowrank": (lowrank, lambda T, c, kh, kw: range(1, min(T, c * kh * kw) + 1)),
    "tucker2": (tucker2, lambda T, c, kh, kw: [(1, 1), (2, 2), (T - 1, 2), (T - 1, c - 1), (T, c)]),
    "tucker2 in": (tucker2, lambda T, c, kh, kw: [(T, r) for r in range(1, c + 1)]),
    "tucker2 out": (tucker2, lambda T, c, kh, kw: [(r, c) for r in range(1, T + 1)]),
    "cp4": (cp4, cp_ladder),
    "cp3": (cp3, cp_ladder),
    "tensor_train": (
        tensor_train,
        lambda T, c, kh, kw: [(1, 1, 1), (2, 2, 2), (c, min(c, T), T), (c, min(c * kh, T * kw), T)],
    ),
}


@pytest.fixture(params=list(FORMATS))
def fmt(request):
    return FORMATS[request.param]


@pytest.fixture(params=SHAPES, ids=str)
def shape(request):
    return request.param


def layer(shape, seed=0, n=1500, noise=0.3):
    """Rows x (n, D) of decaying spectrum, not centred; targets t of the same rows without noise; the weight."""
    g = np.random.default_rng(seed)
    D = int(np.prod(shape[1:]))
    mix = g.standard_normal((D, D)) * 0.9 ** np.arange(D)[:, None]
    original = g.standard_normal((n, D)) @ mix + g.standard_normal(D)
    x = original + noise * g.standard_normal((n, D))
    W = g.standard_normal(shape) * np.linspace(1.5, 0.5, shape[1])[:, None, None]
    t = original @ W.reshape(shape[0], D).T + 1.0 + 0.1 * g.standard_normal((n, shape[0]))
    return x, t, W


def metric_of(shape, seed=0):
    x, t, _ = layer(shape, seed)
    return Metric.of(Moments.of(x, t))


def excess(metric, weight):
    """Distortion above the least possible, as a share of v."""
    return (metric.distortion(weight) - metric.distortion(metric.least_squares())) / metric.v


def test_full_rank_is_the_layer(fmt, shape, accepts_only):
    fit, ladder = fmt
    _, _, W = layer(shape)
    S = metric_of(shape).S
    chain = fit(Metric.symmetric(W, S), shape, list(ladder(*shape))[-1])

    def equal(weight):
        np.testing.assert_allclose(weight, W, atol=1e-9)
        assert Metric.symmetric(W, S).distortion(weight) < 1e-10 * Metric.symmetric(W, S).v

    accepts_only(lambda answer: equal(answer.reshape(shape)), chain.full().reshape(shape[0], -1))


def test_full_rank_is_the_least_squares_weight(fmt, shape):
    fit, ladder = fmt
    metric = metric_of(shape)
    assert excess(metric, fit(metric, shape, list(ladder(*shape))[-1]).full()) < 1e-10


def test_the_distortion_falls_with_rank(fmt, shape):
    fit, ladder = fmt
    metric = metric_of(shape)
    found = [metric.distortion(fit(metric, shape, ranks).full()) for ranks in ladder(*shape)]
    assert np.all(np.diff(found) <= 1e-12 * metric.v)
    assert found[0] > 1.05 * found[-1]


def test_the_distortion_is_the_error_on_the_rows(fmt, shape, accepts_only):
    fit, ladder = fmt
    x, t, _ = layer(shape)
    metric = Metric.of(Moments.of(x, t))
    chain = fit(metric, shape, list(ladder(*shape))[1])
    predicted = metric.distortion(chain.full())

    def measured(weight):
        rows = x @ weight.reshape(len(weight), -1).T + metric.bias(chain.full())
        assert np.mean(np.sum((t - rows) ** 2, axis=1)) == pytest.approx(predicted, rel=1e-10)

    accepts_only(measured, chain.full().reshape(len(t[0]), -1))


def test_zeros_and_neighbours_of_the_answer_are_worse(fmt, shape):
    fit, ladder = fmt
    metric = metric_of(shape)
    weight = fit(metric, shape, list(ladder(*shape))[1]).full()
    best = metric.distortion(weight)
    noise = np.random.default_rng(0).standard_normal(shape) * np.std(weight)
    mutants = [0.0 * weight, 0.9 * weight, 1.1 * weight, weight[::-1], weight[:, ::-1], noise]
    assert all(metric.distortion(m) > 1.001 * best for m in mutants)


def test_one_by_one_layers_reach_the_global_optimum(fmt):
    fit, ladder = fmt
    shape = (6, 5, 1, 1)
    metric = metric_of(shape)
    energy = eigh(metric.C.T @ metric.C, metric.S, eigvals_only=True)[::-1]
    for ranks in ladder(*shape):
        least = metric.v - energy[: np.min(ranks)].sum()
        assert metric.distortion(fit(metric, shape, ranks).full()) == pytest.approx(least, rel=1e-8)


def test_anchored_beats_symmetric_and_centred_beats_uncentred(fmt, shape):
    """A law where the format is solved globally; for the others noise and means are large enough here."""
    fit, ladder = fmt
    ranks = list(ladder(*shape))[-2]
    for seed in range(2):
        x, t, W = layer(shape, seed, noise=1.0)
        x += 2.0
        metric = Metric.of(Moments.of(x, t))
        best = metric.distortion(fit(metric, shape, ranks).full())
        symmetric = fit(Metric.symmetric(W, metric.S), shape, ranks)
        zeros = np.zeros(metric.D), np.zeros(metric.T)
        raw = Metric(x.T @ x / len(x), t.T @ x / len(x), float(np.vdot(t, t)) / len(x), *zeros)
        for other in (symmetric, fit(raw, shape, ranks)):
            assert best < metric.distortion(other.full())


def test_its_own_metric_beats_the_weight_space(fmt, shape):
    fit, ladder = fmt
    ranks = list(ladder(*shape))[1]
    metric, (_, _, W) = metric_of(shape), layer(shape)
    plain = fit(Metric.weight_space(W), shape, ranks)
    assert metric.distortion(fit(metric, shape, ranks).full()) < metric.distortion(plain.full())


def test_a_rank_deficient_input_works(fmt, shape):
    fit, ladder = fmt
    x, t, _ = layer(shape)
    x[:, 1] = x[:, 0] - x[:, -1]
    x[:, 3] = 2.0
    metric = Metric.of(Moments.of(x, t))
    design = np.column_stack([x, np.ones(len(x))])
    left = t - design @ np.linalg.lstsq(design, t, rcond=1e-10)[0]
    least = np.mean(np.sum(left**2, axis=1))
    for ranks in list(ladder(*shape))[-2:]:
        chain = fit(metric, shape, ranks)
        assert np.all(np.isfinite(chain.full())) and metric.distortion(chain.full()) >= least * (
            1 - 1e-9
        )
    assert metric.distortion(chain.full()) == pytest.approx(least, rel=1e-8)


def test_pivoting_keeps_the_layer_and_saves_numbers(fmt, shape):
    fit, ladder = fmt
    at = Positions((8, 8), (8, 8))
    for ranks in ladder(*shape):
        chain = fit(metric_of(shape), shape, ranks)
        thin = pivoted(chain)
        np.testing.assert_allclose(thin.full(), chain.full(), atol=1e-10)
        thinner = {f.groups for f in chain.factors} == {1} and any(
            not f.axes for f in chain.factors
        )
        assert (thin.n_params < chain.n_params) == thinner
        assert thin.macs(at) <= chain.macs(at)


def test_grouped_is_block_diagonal(fmt, shape):
    fit, ladder = fmt
    ranks = list(ladder(*shape))[1]
    chains = [fit(metric_of(shape, seed), shape, ranks) for seed in (0, 1)]
    T, c, kh, kw = shape
    expected = np.zeros((2 * T, 2 * c, kh, kw))
    expected[:T, :c], expected[T:, c:] = (chain.full() for chain in chains)
    np.testing.assert_allclose(grouped(chains).full(), expected, atol=1e-12)


def test_equal_input_gives_equal_bytes(fmt, shape):
    fit, ladder = fmt
    ranks = list(ladder(*shape))[1]
    a, b = (fit(metric_of(shape), shape, ranks) for _ in range(2))
    assert [f.weight.tobytes() for f in a.factors] == [f.weight.tobytes() for f in b.factors]


def test_the_largest_entry_of_every_singular_vector_is_positive():
    metric, shape = metric_of(SHAPES[0]), SHAPES[0]
    for chain in (lowrank(metric, shape, 3), tucker2(metric, shape, (3, 2))):
        for outer in (f.weight[..., 0, 0] for f in chain.factors if not f.axes):
            columns = outer if len(outer) > outer.shape[1] else outer.T
            np.testing.assert_allclose(columns.T @ columns, np.eye(columns.shape[1]), atol=1e-10)
            assert np.all(columns.max(axis=0) == np.abs(columns).max(axis=0))


@pytest.mark.parametrize("off", [-1, 1])
def test_ranks_out_of_bounds_are_refused_in_one_sentence(fmt, shape, off):
    fit, ladder = fmt
    ranks = list(ladder(*shape))[-1]
    bad = 0 if off < 0 else np.max(ranks) * 9 + 1
    ranks = bad if np.ndim(ranks) == 0 else (bad, *ranks[1:])
    with pytest.raises(ValueError, match=rf"takes r.* in 1\.\.\d+.*, got r.*={bad}\b"):
        fit(metric_of(shape), shape, ranks)


def test_a_foreign_shape_is_refused(fmt):
    with pytest.raises(ValueError, match=r"T = 6 and c kh kw = 36, got \(4, 6, 3, 3\)"):
        fmt[0](metric_of((6, 4, 3, 3)), (4, 6, 3, 3), 1)


def test_the_curve_is_every_rank_of_low_rank(shape, accepts_only):
    metric = metric_of(shape)
    ranks = range(1, min(metric.T, metric.D) + 1)
    expected = [metric.v, *(metric.distortion(lowrank(metric, shape, r).full()) for r in ranks)]

    def equal(curve):
        np.testing.assert_allclose(curve, expected, rtol=1e-9)

    accepts_only(equal, lowrank_curve(metric))


def test_the_curve_of_a_wide_output_and_of_a_rank_deficient_input():
    x, t, _ = layer((9, 4, 1, 1))
    x[:, 2] = x[:, 1]
    metric = Metric.of(Moments.of(x, t))
    expected = [metric.distortion(lowrank(metric, (9, 4, 1, 1), r).full()) for r in range(1, 5)]
    np.testing.assert_allclose(lowrank_curve(metric)[1:], expected, rtol=1e-9)


def test_no_descent_from_random_starts_ends_below_low_rank():
    shape = (3, 2, 1, 2)
    metric = metric_of(shape)

    def loss(z):
        return metric.distortion(z[:6].reshape(3, 2) @ z[6:].reshape(2, 4))

    starts = np.random.default_rng(0).standard_normal((5, 14))
    found = [minimize(loss, z, method="BFGS", options={"gtol": 1e-7}).fun for z in starts]
    ours = metric.distortion(lowrank(metric, shape, 2).full())
    assert min(found) == pytest.approx(ours, rel=1e-7) and min(found) >= ours * (1 - 1e-9)
