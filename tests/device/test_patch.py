"""New statistics folded into a model file: the identity, the algebra, and the teacher's own rows."""

from __future__ import annotations

import numpy as np
import pytest

from edgesolve.device.bundle import open_bundle
from edgesolve.device.errors import BundleError
from edgesolve.device.graph import open_graph
from edgesolve.device.patch import Statistics, patched
from edgesolve.device.runtime import adapted_graph, source_statistics
from edgesolve.device.store import Store
from edgesolve.device.teacher import open_teacher


@pytest.fixture
def bundle(bundle_dir):
    return open_bundle(bundle_dir)


def rows(model, frames, bundle, backend):
    graph = open_graph(model, backend=backend)
    if bundle.backends[backend]["batch"] is None:
        return graph(frames)[0]
    return np.concatenate([graph(frames[i : i + 1])[0] for i in range(len(frames))])


def moved(source, seed=3):
    rng = np.random.default_rng(seed)
    mean = source.mean + 0.3 * np.sqrt(source.var) * rng.normal(size=len(source.mean))
    return mean, source.var * np.exp(0.3 * rng.normal(size=len(source.mean)))


def test_the_same_statistics_change_nothing(bundle, frames, backend):
    entry, source = bundle.backends[backend], source_statistics(bundle)
    model = bundle.read(entry["backbone"])
    again = patched(model, entry["patch"], source, source)
    assert len(again) == len(model)
    before, after = (rows(m, frames.x[:4], bundle, backend) for m in (model, again))
    np.testing.assert_allclose(after, before, atol=1e-6 * max(1.0, np.abs(before).max()))
    for place in entry["patch"]:
        size = 4 * int(np.prod(place["weight"]["shape"]))
        here = slice(place["weight"]["offset"], place["weight"]["offset"] + size)
        assert again[here] == model[here], "a ratio of one leaves every bit of a weight"


def test_there_and_back(bundle, backend):
    entry, source = bundle.backends[backend], source_statistics(bundle)
    model = bundle.read(entry["backbone"])
    target = source.replaced(*moved(source))
    away = patched(model, entry["patch"], source, target)
    back = patched(away, entry["patch"], target, source)
    changed = np.flatnonzero(np.frombuffer(away, np.uint8) != np.frombuffer(model, np.uint8))
    inside = np.zeros(len(model), bool)
    for place in entry["patch"]:
        start, stop = place["channels"]
        sizes = (
            (place["weight"], int(np.prod(place["weight"]["shape"]))),
            (place["bias"], stop - start),
        )
        for where, count in sizes:
            here = slice(where["offset"], where["offset"] + 4 * count)
            inside[here] = True
            first, last = (np.frombuffer(m[here], "<f4") for m in (model, back))
            np.testing.assert_allclose(last, first, rtol=3e-6, atol=3e-6)
    assert len(changed) > 1000 and inside[changed].all(), "nothing else of the file is touched"


def test_patched_rows_are_the_teachers_at_those_statistics(bundle, frames, backend, accepts_only):
    mean, var = moved(source_statistics(bundle))
    teacher = open_teacher(bundle, backend, 1).run(frames.x[:8], 0.0, mean, var)
    graph = adapted_graph(bundle, backend, {"mean": mean, "var": var}, 1)
    batch = bundle.backends[backend]["batch"] or 8
    found = np.concatenate([graph(frames.x[i : i + batch])[0] for i in range(0, 8, batch)])
    scale = np.abs(teacher.rows).max()

    def close(answer):
        assert np.abs(answer - teacher.rows).max() <= 1e-4 * scale

    accepts_only(close, found)
    plain = adapted_graph(bundle, backend, None, 1)(frames.x[:batch])[0]
    assert np.abs(plain - teacher.rows[:batch]).max() > 0.1 * scale, "else nothing was moved"


def test_a_generations_rows_are_the_teachers(bundle, frames, adapted, backend):
    statistics = Store(adapted(backend)[0]).current().statistics
    teacher = open_teacher(bundle, backend, 1)
    expected = teacher.run(frames.judge[:8], 0.0, statistics["mean"], statistics["var"]).rows
    graph = adapted_graph(bundle, backend, statistics, 1)
    batch = bundle.backends[backend]["batch"] or 8
    found = np.concatenate([graph(frames.judge[i : i + batch])[0] for i in range(0, 8, batch)])
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()


# -- the algebra, on a layer written here ------------------------------------------------------------


@pytest.mark.parametrize("axis", [0, 1, 3])
def test_one_layer_against_its_formula(axis):
    rng = np.random.default_rng(axis)
    c = 5
    shape = [2, 3, 4, 2]
    shape[axis] = c
    W = rng.normal(size=shape).astype(np.float32)
    along = [1] * 4
    along[axis] = c

    def draw(positive=False):
        return rng.uniform(0.5, 2, c) if positive else rng.normal(size=c)

    gamma, beta, shift, eps = draw(), draw(), draw(), np.full(c, 1e-3)
    source = Statistics(draw(), draw(True), gamma, beta, shift, eps)
    target = source.replaced(draw(), draw(True))

    def folded(s):
        scale = gamma / np.sqrt(s.var + eps)
        return W * scale.reshape(along), beta + (shift - s.mean) * scale

    pad = b"header!", b"between", b"end"
    weight, bias = (a.astype("<f4").tobytes() for a in folded(source))
    model = pad[0] + weight + pad[1] + bias + pad[2]
    place = {
        "channels": [0, c],
        "weight": {"offset": len(pad[0]), "shape": shape, "axis": axis},
        "bias": {"offset": len(pad[0]) + len(weight) + len(pad[1])},
    }
    found = patched(model, [place], source, target)
    assert found[: len(pad[0])] == pad[0] and found.endswith(pad[2])
    expected_weight, expected_bias = folded(target)
    got = np.frombuffer(found[len(pad[0]) : len(pad[0]) + len(weight)], "<f4").reshape(shape)
    np.testing.assert_allclose(got, expected_weight, rtol=2e-6)
    at = place["bias"]["offset"]
    np.testing.assert_allclose(
        np.frombuffer(found[at : at + 4 * c], "<f4"), expected_bias, rtol=2e-6, atol=1e-6
    )


def test_a_dead_channel_stays_dead_and_finite():
    one = np.ones(2)
    source = Statistics(one * 0, one, np.array([0.0, 1.0]), one * 3, one * 0, one * 1e-5)
    model = np.array([0, 1, 3, 3], "<f4").tobytes()
    place = {
        "channels": [0, 2],
        "weight": {"offset": 0, "shape": [2], "axis": 0},
        "bias": {"offset": 8},
    }
    found = np.frombuffer(patched(model, [place], source, source.replaced(one, 4 * one)), "<f4")
    np.testing.assert_allclose(found, [0, 0.5, 3, 2.5], rtol=1e-4)


def test_statistics_that_do_not_fit_are_refused(bundle):
    source = source_statistics(bundle)
    with pytest.raises(BundleError, match="statistics have 3 channels, this bundle's network has"):
        source.replaced(np.zeros(3), np.ones(3))
