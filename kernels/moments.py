"""The additive record of a data set: everything that a squared-loss solve needs, and no row."""

from dataclasses import dataclass

import numpy as np

TILE_FLOATS = 1 << 20
"""Most float64 values that `Moments.of` copies at a time (8 MiB)."""


@dataclass(frozen=True, slots=True, eq=False)
class Moments:
    """Sums over rows x (d,) and targets t (c,), always float64. Additive; holds no row.

    n : number of rows, or their total weight after `scaled`.
    sx (d,), sxx (d, d), stx (c, d), st (c,), stt : the sums of x, xx', tx', t and ||t||^2.

    Laws: any split of the rows adds up to the whole, in any order; (a + b) - b is a to rounding.
    The arrays are owned by the record: do not write into them.
    """

    n: float
    sx: np.ndarray
    sxx: np.ndarray
    stx: np.ndarray
    st: np.ndarray
    stt: float

    def __post_init__(self):
        for name in ("sx", "sxx", "stx", "st"):
            object.__setattr__(self, name, np.asarray(getattr(self, name), np.float64))
        for name in ("n", "stt"):
            object.__setattr__(self, name, float(getattr(self, name)))
        d, c = self.d, self.c
        found = (self.sx.shape, self.sxx.shape, self.stx.shape, self.st.shape)
        if found != ((d,), (d, d), (c, d), (c,)):
            raise ValueError(
                f"sx, sxx, stx, st must have shapes (d,), (d, d), (c, d), (c,), got {found}."
            )

    @property
    def d(self) -> int:
        """Number of features."""
        return self.sx.size

    @property
    def c(self) -> int:
        """Number of targets."""
        return self.st.size

    @classmethod
    def zeros(cls, d: int, c: int) -> "Moments":
        """The record of no rows: neutral under `+`."""
        return cls(0.0, np.zeros(d), np.zeros((d, d)), np.zeros((c, d)), np.zeros(c), 0.0)

    @classmethod
    def of(cls, x: np.ndarray, t: np.ndarray) -> "Moments":
        """The record of rows x (n, d) and targets t (n, c), any float dtype, neither kept.

        Rows are taken in tiles, so that the float64 copy stays below about 16 MiB.
        ValueError: shapes that do not fit, no rows, or values that are not finite.
        """
        x, t = np.asarray(x), np.asarray(t)
        if x.ndim != 2 or t.ndim != 2 or len(x) != len(t):
            raise ValueError(f"x and t must be (n, d) and (n, c), got {x.shape} and {t.shape}.")
        if len(x) == 0:
            raise ValueError(f"x of shape {x.shape} has no rows: moments need at least one.")
        d, c = x.shape[1], t.shape[1]
        _check_finite("x", x)
        _check_finite("t", t)
        step = max(1, TILE_FLOATS // max(1, d + c))
        if len(x) <= step:
            x, t = np.asarray(x, np.float64), np.asarray(t, np.float64)
            return cls(len(x), x.sum(axis=0), x.T @ x, t.T @ x, t.sum(axis=0), np.vdot(t, t))
        sums = cls.zeros(d, c)
        stt = 0.0
        for start in range(0, len(x), step):
            xs = np.asarray(x[start : start + step], np.float64)
            ts = np.asarray(t[start : start + step], np.float64)
            sums.sx[:] += xs.sum(axis=0)
            sums.sxx[:] += xs.T @ xs
            sums.stx[:] += ts.T @ xs
            sums.st[:] += ts.sum(axis=0)
            stt += np.vdot(ts, ts)
        return cls(len(x), sums.sx, sums.sxx, sums.stx, sums.st, stt)

    def __add__(self, other: "Moments") -> "Moments":
        """The record of both sets of rows."""
        return self._combined(other, 1.0)

    def __sub__(self, other: "Moments") -> "Moments":
        """The record without the rows of `other`, which must have been added before (un-learning).

        Eigenvalues of `sxx` that rounding made slightly negative are clipped at zero.
        ValueError: the result counts fewer than no rows, or is no record of any rows.
        """
        left = self._combined(other, -1.0)
        if left.n < -1e-9 * self.n or left.stt < -1e-9 * self.stt:
            raise ValueError(
                f"cannot un-learn {other.n:g} rows from {self.n:g}: they were never part of them."
            )
        floor = -1e-9 * np.max(np.diag(self.sxx), initial=0.0)
        sxx = _clipped_psd(left.sxx, floor)
        if left.n <= 1e-9 * self.n:
            return Moments.zeros(self.d, self.c)
        return Moments(left.n, left.sx, sxx, left.stx, left.st, max(left.stt, 0.0))

    def scaled(self, a: float) -> "Moments":
        """The record with every row weighted by `a` >= 0 more: a < 1 forgets."""
        if not (np.isfinite(a) and a >= 0):
            raise ValueError(f"a row weight must be finite and not negative, got {a}.")
        return Moments(
            a * self.n, a * self.sx, a * self.sxx, a * self.stx, a * self.st, a * self.stt
        )

    def means(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean of the rows (d,) and of the targets (c,)."""
        self._need_rows()
        return self.sx / self.n, self.st / self.n

    def centred(self) -> tuple[np.ndarray, np.ndarray, float]:
        """Covariances S (d, d) of x and C (c, d) of t with x, and v = E||t - mean||^2, over n."""
        mu_x, mu_t = self.means()
        S = self.sxx / self.n - np.outer(mu_x, mu_x)
        C = self.stx / self.n - np.outer(mu_t, mu_x)
        return S, C, max(self.stt / self.n - float(mu_t @ mu_t), 0.0)

    def mean_squared_error(self, W: np.ndarray, b: np.ndarray) -> float:
        """E||t - W'x - b||^2 over the rows, summed over targets. Exact; W (d, c), b (c,)."""
        W, b = np.asarray(W, np.float64), np.asarray(b, np.float64)
        if W.shape != (self.d, self.c) or b.shape != (self.c,):
            raise ValueError(
                f"W and b must be ({self.d}, {self.c}) and ({self.c},), got {W.shape}, {b.shape}."
            )
        S, C, v = self.centred()
        mu_x, mu_t = self.means()
        bias = mu_t - mu_x @ W - b
        spread = v - 2.0 * np.vdot(C.T, W) + np.vdot(W, S @ W)
        return max(float(spread), 0.0) + float(bias @ bias)

    def to_arrays(self, dtype=np.float32) -> dict[str, np.ndarray]:
        """The record for storage: n, mean_x, mean_t, s (packed lower triangle), c, v.

        The covariance `s` (d(d+1)/2,) has the given dtype, all else is float64. It is centred, so
        float32 costs 6e-8 of each covariance and not of the squared means.
        """
        S, C, v = self.centred()
        mu_x, mu_t = self.means()
        packed = S[np.tril_indices(self.d)].astype(dtype)
        n, v = np.array(self.n), np.array(v)
        return {"n": n, "mean_x": mu_x, "mean_t": mu_t, "s": packed, "c": C, "v": v}

    @classmethod
    def from_arrays(cls, arrays: dict[str, np.ndarray]) -> "Moments":
        """The record that `to_arrays` stored. ValueError: a missing or ill-shaped array."""
        missing = {"n", "mean_x", "mean_t", "s", "c", "v"} - set(arrays)
        if missing:
            raise ValueError(f"stored moments lack {', '.join(sorted(missing))}.")
        n, v = (np.asarray(arrays[k], np.float64).item() for k in ("n", "v"))
        mu_x, mu_t, C = (np.asarray(arrays[k], np.float64) for k in ("mean_x", "mean_t", "c"))
        d, c = mu_x.size, mu_t.size
        if np.shape(arrays["s"]) != (d * (d + 1) // 2,) or C.shape != (c, d):
            raise ValueError(
                f"stored moments of {d} features and {c} targets have s of shape "
                f"{np.shape(arrays['s'])} and c of shape {C.shape}."
            )
        S = np.zeros((d, d))
        S[np.tril_indices(d)] = arrays["s"]
        S += np.tril(S, -1).T
        sxx = n * (S + np.outer(mu_x, mu_x))
        stx = n * (C + np.outer(mu_t, mu_x))
        return cls(n, n * mu_x, sxx, stx, n * mu_t, n * (v + float(mu_t @ mu_t)))

    def _combined(self, other, sign):
        if (self.d, self.c) != (other.d, other.c):
            raise ValueError(
                f"moments of {self.d} features and {self.c} targets cannot meet moments of "
                f"{other.d} and {other.c}."
            )
        return Moments(
            self.n + sign * other.n,
            self.sx + sign * other.sx,
            self.sxx + sign * other.sxx,
            self.stx + sign * other.stx,
            self.st + sign * other.st,
            self.stt + sign * other.stt,
        )

    def _need_rows(self):
        if not self.n > 0:
            raise ValueError("moments of no rows have no mean: add rows first.")


def pooled(source: Moments, window: Moments, mass: float) -> Moments:
    """(M_source/n_source + mass M_window/n_window) / (1 + mass), counted as n_source rows.

    `mass` is a mass ratio: 1 gives both sides equal say whatever their row counts. A row weight w
    is mass = w n_window / n_source.
    """
    if not (np.isfinite(mass) and mass >= 0):
        raise ValueError(f"mass must be finite and not negative, got {mass}.")
    source._need_rows()
    window._need_rows()
    share = 1.0 / (1.0 + mass)
    return source.scaled(share) + window.scaled(mass * share * source.n / window.n)


def _check_finite(name, values):
    """Raise on the first row that is not finite; looks at rows in tiles."""
    step = max(1, TILE_FLOATS // max(1, values.shape[1]))
    bad = 0
    first = None
    for start in range(0, len(values), step):
        finite = np.isfinite(values[start : start + step])
        if finite.all():
            continue
        bad += int(finite.size - finite.sum())
        if first is None:
            first = start + int(np.argmin(finite.all(axis=1)))
    if bad:
        raise ValueError(
            f"{name} of shape {values.shape} has {bad} values that are not finite, the first in "
            f"row {first}."
        )


def _clipped_psd(sxx, floor):
    """`sxx` with eigenvalues in [floor, 0) set to zero; below `floor` it was no sum of squares."""
    try:
        np.linalg.cholesky(sxx)
        return sxx
    except np.linalg.LinAlgError:
        pass
    values, vectors = np.linalg.eigh(sxx)
    if values[0] < floor:
        raise ValueError(
            "cannot un-learn rows that were never part of the moments: the smallest eigenvalue of "
            f"sxx would be {values[0]:.3g}."
        )
    return (vectors * np.maximum(values, 0.0)) @ vectors.T
