"""The row vector, against loops that follow its definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from edgesolve.host.rows import Rows, grid_pool


def make(d=3, m=4, r=2, k=3, side=(4, 5), cells=2, offsets=(0.0,), seed=0):
    g = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=g)

    return Rows(
        *(draw(m, d, k, k), draw(m), draw(r, d), draw(r), draw(d), draw(d).abs() + 0.5),
        grid_pool(*side, cells),
        offsets,
    )


def by_loops(rows, z):
    """One row per item, position by position."""
    W, b = rows.gate_weight.numpy(), rows.gate_bias.numpy()
    P, o = rows.value_weight.numpy()[:-1, :, 0, 0], rows.value_bias.numpy()[:-1]
    mean, inverse, pool = (t.numpy() for t in (rows.mean, rows.inverse_scale, rows.pool))
    n, _, h, w = z.shape
    k = W.shape[2]
    z = z.numpy().astype(np.float64)
    padded = np.pad(z, ((0, 0), (0, 0), (k // 2, k // 2), (k // 2, k // 2)))
    out = []
    for i in range(n):
        gated = np.zeros((len(rows.offsets) * len(W), len(P) + 1))
        cells = np.zeros((pool.shape[1], z.shape[1]))
        for y in range(h):
            for x in range(w):
                here = z[i, :, y, x]
                s = (W * padded[i, :, y : y + k, x : x + k]).sum((1, 2, 3)) + b
                gates = np.concatenate([np.clip(s - off + 0.5, 0, 1) for off in rows.offsets])
                gated += np.outer(gates, np.append(P @ here + o, 1.0)) / (h * w)
                cells += np.outer(pool[y * w + x], here)
        out.append(np.concatenate([gated.ravel(), ((cells - mean) * inverse).ravel()]))
    return np.stack(out)


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("offsets", [(0.0,), (-0.5, 0.5), (-1.0, 0.0, 1.0)])
@pytest.mark.parametrize("cells", [1, 2])
def test_rows_follow_their_definition(k, offsets, cells, accepts_only):
    rows = make(k=k, offsets=offsets, cells=cells)
    z = torch.randn(6, 3, 4, 5, generator=torch.Generator().manual_seed(1))
    expected = by_loops(rows, z)

    def equal(answer):
        np.testing.assert_allclose(answer, expected, rtol=1e-4, atol=1e-5)

    accepts_only(equal, rows(z).numpy())
    assert expected.shape == (6, rows.starts[-1])


def test_the_starts_of_the_groups():
    rows = make(d=3, m=4, r=2, offsets=(-0.5, 0.5), cells=2)
    assert rows.n_gates == 8
    assert rows.starts == [*range(0, 24, 3), 24, 27, 30, 33, 36]
    assert len(rows.starts) == rows.n_gates + 4 + 1


def test_a_flat_activation_is_one_position():
    rows = make(d=3, k=1, side=(1, 1), cells=1)
    z = torch.randn(4, 3)
    torch.testing.assert_close(rows(z), rows(z[:, :, None, None]))


def test_an_open_gate_passes_and_a_closed_one_blocks():
    rows = make(k=1, side=(2, 2), cells=1)
    rows.gate_weight.zero_()
    rows.gate_bias.copy_(torch.tensor([9.0, -9.0, 0.0, 9.0]))
    z = torch.randn(3, 3, 2, 2)
    found = rows(z)
    values = rows.values(z).mean((2, 3))
    torch.testing.assert_close(found[:, 0:3], values)
    assert not found[:, 3:6].any()
    torch.testing.assert_close(found[:, 6:9], values / 2)


@pytest.mark.parametrize("h, w, cells", [(4, 4, 1), (4, 4, 2), (5, 7, 2), (3, 3, 3), (8, 6, 2)])
def test_a_grid_pool_averages_every_position_once(h, w, cells):
    pool = grid_pool(h, w, cells)
    assert pool.shape == (h * w, cells * cells)
    torch.testing.assert_close(pool.sum(0), torch.ones(cells * cells))
    assert ((pool > 0).sum(1) == 1).all()
    image = torch.arange(h)[:, None].expand(h, w).flatten().float()
    means = (image @ pool).view(cells, cells)
    torch.testing.assert_close(means, means[:, :1].expand_as(means))
    assert cells == 1 or (means.diff(dim=0) > 0.5).all()


def test_sizes():
    rows = make(d=3, m=4, r=2, k=3, offsets=(-0.5, 0.5))
    assert rows.n_params() == 4 * 27 + 4 + 2 * 3 + 2 + 2 * 3
    assert rows.macs((3, 4, 5)) == 20 * (4 * 27 + 2 * 3 + 8 * 3 + 3)
    assert make(k=1, side=(1, 1), cells=1).macs((3,)) == 4 * 3 + 2 * 3 + 4 * 3 + 3
