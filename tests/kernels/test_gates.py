import numpy as np
import pytest
from numpy.testing import assert_allclose

from edgesolve.kernels import gates
from edgesolve.kernels.gates import pattern, seeded_gates

MASK = (1 << 64) - 1
GOLDEN = [
    "-++---+-+++++++------+--",
    "--++--+-+--+++-++-+-+-+-",
    "-+++-+----+++++-+-+--++-",
]


def splitmix64(z):
    """One step on Python's integers, from Steele, Lea and Flood 2014."""
    z = (z + 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def test_mix_is_the_published_splitmix64():
    # The first output of the reference implementation from state 0.
    assert splitmix64(0) == 0xE220A8397B1DCDAF
    states = [0, 1, 12345, MASK]
    got = gates._mix(np.array(states, np.uint64))
    assert [int(g) for g in got] == [splitmix64(s) for s in states]


@pytest.mark.parametrize("seed", [0, 1, 2026, MASK])
def test_gates_follow_their_definition(seed):
    G = seeded_gates(130, 4, seed)
    for i in range(4):
        words = [splitmix64(splitmix64(splitmix64(seed) ^ i) ^ w) for w in range(3)]
        bits = [words[j // 64] >> (j % 64) & 1 for j in range(130)]
        assert G[i].tolist() == [2.0 * bit - 1.0 for bit in bits]


def test_golden_gates():
    """Deployed bundles hold only the seed: these may never change."""
    signs = ["".join("+" if g > 0 else "-" for g in row) for row in seeded_gates(24, 3, 42)]
    assert signs == GOLDEN
    assert seeded_gates(24, 3, 42).dtype == np.float32


def test_a_larger_bank_begins_with_the_smaller():
    assert np.array_equal(seeded_gates(100, 8, 3)[:5, :70], seeded_gates(70, 5, 3))
    assert not np.array_equal(seeded_gates(64, 8, 3), seeded_gates(64, 8, 4))


def test_gates_look_independent():
    G = seeded_gates(1024, 256, 5).astype(np.float64)
    gram = G @ G.T / 1024
    assert np.array_equal(np.diag(gram), np.ones(256))
    off = gram[~np.eye(256, dtype=bool)]
    assert np.abs(off).max() < 6 / 32 and abs(off.std() * 32 - 1) < 0.05


def test_hard_gate_is_open_at_zero(rng):
    z, G, b = rng.standard_normal((4, 3, 6)), seeded_gates(6, 5, 1), rng.standard_normal(5)
    D = pattern(z, G, b)
    assert D.dtype == bool and D.shape == (4, 3, 5)
    assert np.array_equal(D, np.einsum("npd,md->npm", z, G) + b >= 0)
    assert pattern(np.zeros((1, 6)), G, np.zeros(5)).all()


def test_ramp_gate_is_the_clipped_line_and_tends_to_the_hard_gate(rng):
    z = rng.standard_normal((50, 6)).astype(np.float32)
    G, b = seeded_gates(6, 5, 1), np.zeros(5, np.float32)
    s = z @ G.T
    D = pattern(z, G, b, 2.0)
    assert D.dtype == np.float32
    assert_allclose(D, np.clip(s / 2 + 0.5, 0, 1), rtol=1e-6, atol=1e-6)
    assert np.array_equal(pattern(z, G, b, 1e-6) > 0.5, pattern(z, G, b))


def test_errors(rng):
    with pytest.raises(ValueError, match="seed"):
        seeded_gates(4, 4, -1)
    with pytest.raises(ValueError, match="at least 1"):
        seeded_gates(0, 4, 1)
    with pytest.raises(ValueError, match="tau"):
        pattern(np.zeros((2, 4)), np.ones((3, 4)), np.zeros(3), -1.0)
    with pytest.raises(ValueError, match=r"\(2, 5\)"):
        pattern(np.zeros((2, 5)), np.ones((3, 4)), np.zeros(3))
