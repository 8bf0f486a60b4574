"""Two networks walked side by side, against plain runs of each."""

from __future__ import annotations

import numpy as np
import pytest
import small_nets as small
import torch

from edgesolve.host import walk as module
from edgesolve.host.errors import DataError
from edgesolve.host.shards import Shards
from edgesolve.host.splice import Dense
from edgesolve.host.walk import live_bytes


@pytest.fixture(scope="module")
def network():
    return small.made("small")[1]


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    monkeypatch.setattr(module, "BATCH", 8)


def walk_of(network, n=20, **options):
    return small.walk(network, n, **options)


def halved(walk):
    """Every layer with half its weight, set ahead of the walk."""
    return {s.node: Dense(s, 0.5 * s.weight) for s in walk.found}


def plain(network, walk, x, layers, at):
    """(input of `at`, output of `at`, logits) of one plain run."""
    seen = {}

    def watch(node, value, args):
        if node.name == at:
            seen["x"], seen["y"] = args[0], value

    with torch.no_grad():
        frames = small.PLAIN(torch.from_numpy(x))
        logits = network.run(frames, norm=walk.norm, layers=layers, watch=watch)
    return seen.get("x"), seen.get("y"), logits


@pytest.mark.parametrize("bound", [0, 40_000, 1 << 30])
def test_both_networks_are_those_of_plain_runs(network, bound, accepts_only):
    """Whatever is kept between two layers, nothing, the small states or all of them."""
    walk = walk_of(network, bound=bound)
    changed = halved(walk)
    for site in walk.found:
        for k, state in walk.before(site.node):
            x = walk.x[8 * k : 8 * k + 8]
            _, expected, _ = plain(network, walk, x, walk.original, site.node)
            np.testing.assert_allclose(state.teacher[site.node], expected, atol=1e-6)
            given, _, _ = plain(network, walk, x, {**walk.original, **changed}, site.node)
            node = network.nodes[network.index(site.node)]
            found = state.student[node.args[0].name].numpy()
            np.testing.assert_allclose(found, given, atol=1e-6)
            assert site.node not in state.student
        walk.layers[site.node] = changed[site.node]
    for k, (teacher, student) in enumerate(walk.finish()):
        x = walk.x[8 * k : 8 * k + 8]
        for found, layers in ((teacher, {}), (student, changed)):
            _, _, logits = plain(network, walk, x, {**walk.original, **layers}, "")
            accepts_only(
                lambda a, b=logits: np.testing.assert_allclose(a, b, atol=1e-6), found.numpy()
            )


def test_every_frame_is_walked_once(network):
    walk = walk_of(network, 21)
    assert walk.n_batches == 3 and list(walk.mine) == [0, 1, 2]
    seen = [len(state.teacher[walk.found[0].node]) for _, state in walk.before(walk.found[0].node)]
    assert seen == [8, 8, 5]


def test_shards_are_disjoint_and_cover(network):
    parts = [walk_of(network, 50, shards=Shards(rank, 3)) for rank in range(3)]
    assert sorted(k for w in parts for k in w.mine) == list(range(7))
    whole = [teacher for teacher, _ in walk_of(network, 50).finish()]
    for w in parts:
        for k, (teacher, _) in zip(w.mine, w.finish(), strict=True):
            torch.testing.assert_close(teacher, whole[k])


def test_more_processes_than_batches_are_refused(network):
    with pytest.raises(DataError, match="20 frames make 3 batches of 8, fewer than the 4 proc"):
        walk_of(network, 20, shards=Shards(0, 4))


def test_stepping_back_starts_again(network):
    walk = walk_of(network)
    first, last = walk.found[1], walk.found[-1]
    expected = [state.teacher[first.node] for _, state in walk.before(first.node)]
    list(walk.before(last.node))
    for (_, state), y in zip(walk.before(first.node), expected, strict=True):
        torch.testing.assert_close(state.teacher[first.node], y)


def test_a_state_may_be_written_into(network):
    walk, site = walk_of(network), walk_of(network).found[2]
    for _, state in walk.before(site.node):
        state.student.clear()
    for _, state in walk.before(site.node):
        assert network.nodes[network.index(site.node)].args[0].name in state.student


def kept_bytes(walk):
    constants = {n.name for n in walk.network.nodes if n.op == "get_attr"}
    return sum(
        v.numel() * v.element_size()
        for state in walk.kept.values()
        for values in (state.teacher, state.student)
        for name, v in values.items()
        if isinstance(v, torch.Tensor) and v.ndim and name not in constants
    )


@pytest.mark.parametrize("n", [16, 64])
def test_what_is_kept_stays_within_its_bound(network, n):
    bound = 300_000
    walk = walk_of(network, n, bound=bound)
    kept = []
    for site in walk.found:
        list(walk.before(site.node))
        kept.append(kept_bytes(walk))
    # The teacher is one call further than the state that is counted for both.
    assert max(kept) <= 1.5 * bound
    assert kept[0] > 0 and (kept[1] == kept[0]) == (n == 64)  # 64 frames fit at the stem only


def test_nothing_is_kept_without_a_bound(network):
    walk = walk_of(network, bound=0)
    for site in walk.found:
        list(walk.before(site.node))
    assert not walk.kept


def test_live_bytes_are_those_that_a_later_call_reads(network):
    found = live_bytes(network)
    at = {s.name: found[network.index(s.node)] for s in small.walk(network, 1).found}
    frame, wide = 4 * 3 * 80, 4 * 8 * 80
    assert at["stem"] == frame
    assert at["one"] == wide  # the residual's shortcut is the same tensor
    assert at["two"] == 2 * wide
    assert at["right"] == wide + 4 * 8 * 40
    assert at["fc"] == 4 * 8
