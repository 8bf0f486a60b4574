"""Seeded gate vectors, the same on every platform, and the pattern of open gates."""

import numpy as np

_MASK = (1 << 64) - 1


def seeded_gates(d: int, m: int, seed: int) -> np.ndarray:
    """Gate vectors (m, d) float32 of +-1 from an integer hash: nothing but the seed is stored.

    Bit j of word w of gate i, hash mix(mix(mix(seed) ^ i) ^ w), is entry 64 w + j; 1 means +1.
    mix is one step of splitmix64 (Steele, Lea, Flood 2014). Gate i does not depend on m: a larger
    bank begins with the smaller one. ValueError: d or m below 1, or a seed outside 0..2^64 - 1.
    """
    if d < 1 or m < 1:
        raise ValueError(f"d and m must be at least 1, got {d} and {m}.")
    if not 0 <= seed <= _MASK:
        raise ValueError(f"seed must lie in 0..2^64 - 1, got {seed}.")
    gates = np.arange(m, dtype=np.uint64)[:, None]
    words = np.arange((d + 63) // 64, dtype=np.uint64)
    hashed = _mix(_mix(_mix(np.array([seed], np.uint64)) ^ gates) ^ words)
    bits = (hashed[:, :, None] >> np.arange(64, dtype=np.uint64)) & np.uint64(1)
    return 2.0 * bits.reshape(m, -1)[:, :d].astype(np.float32) - np.float32(1.0)


def pattern(z: np.ndarray, G: np.ndarray, b: np.ndarray, tau: float = 0.0) -> np.ndarray:
    """How far each gate is open at each position: s = z G' + b, z (..., d), G (m, d), b (m,).

    tau = 0 : bool (..., m), s >= 0. tau > 0 : the ramp clip(s/tau + 1/2, 0, 1) in s's dtype; unlike
    the hard gate it moves little when another runtime rounds z differently.
    """
    if z.shape[-1] != G.shape[1] or np.shape(b) != (len(G),):
        raise ValueError(
            f"z, G, b must be (..., d), (m, d), (m,), got {z.shape}, {G.shape}, {np.shape(b)}."
        )
    if not (np.isfinite(tau) and tau >= 0):
        raise ValueError(f"tau must be finite and not negative, got {tau}.")
    s = z @ G.T + b
    if tau == 0.0:
        return s >= 0
    s *= 1.0 / tau
    s += 0.5
    return np.clip(s, 0.0, 1.0, out=s)


def _mix(z):
    """One step of splitmix64, on arrays: NumPy scalars would warn about the intended overflow."""
    z = z + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
