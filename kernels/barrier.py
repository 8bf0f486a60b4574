"""Pieces of the primal-dual interior-point methods of `cone_newton.py` and `decompose.py`.

Each of k columns u_j (d,) carries a norm, lam_j ||u_j||, with a dual vector p_j, ||p_j|| < lam_j,
and inequalities s_j > 0 with multipliers eta_j > 0. On the central path p_j = lam_j u_j / t_j and
eta_j s_j = mu, where t_j is the height over u_j of the norm smoothed by mu. Linearised as t p =
lam u with p a variable of its own (Andersen, Christiansen, Conn, Overton 2000).
"""

import numpy as np

EPS = np.finfo(np.float64).eps


class SmoothNorm:
    """The linearised norm terms at u (d, k), p (d, k), for lam and mu numbers or (k,).

    t (k,) : (mu + sqrt(mu^2 + lam^2 ||u||^2)) / lam. pull (d, k) : lam u / t, where p should be.
    """

    def __init__(self, u, p, lam, mu):
        root = np.sqrt(mu * mu + lam * lam * np.einsum("ij,ij->j", u, u))
        self.p, self.lam, self.t = p, lam, (mu + root) / lam
        self.slope = lam * u / root
        self.pull = lam * u / self.t

    def hessian(self):
        """(k, d, d), symmetrised: positive semidefinite since ||p|| <= lam and ||slope|| <= 1."""
        outer = self.p.T[:, :, None] * self.slope.T[:, None, :]
        out = -0.5 * (outer + outer.transpose(0, 2, 1))
        out[:, np.arange(len(self.p)), np.arange(len(self.p))] += np.reshape(self.lam, (-1, 1))
        return out / self.t[:, None, None]

    def times(self, x):
        """`hessian` times x (d, k), column by column, without forming it."""
        px, sx = np.einsum("ij,ij->j", self.p, x), np.einsum("ij,ij->j", self.slope, x)
        return (self.lam * x - 0.5 * (self.p * sx + self.slope * px)) / self.t


def weighted_grams(X, W):
    """X' diag(W_j) X for every column of W (n, k), (k, d, d)."""
    out = np.empty((W.shape[1], X.shape[1], X.shape[1]))
    for j in range(len(out)):
        np.matmul((X * W[:, j, None]).T, X, out=out[j])
    return out


def inverse_factors(M, least=0.0):
    """K (k, d, d) with K_j' K_j = M_j^{-1}; M positive definite, raised by rounding and `least`.

    Late weights spread over 20 decades, and M is definite only on paper: what the raise changes,
    refinement against the true operator gives back. Multiply by K, then by K': their product has
    lost the small directions beside the large. LinAlgError: not definite even so.
    """
    diagonal = np.arange(M.shape[1])
    M = M.copy()
    M[:, diagonal, diagonal] += least + 4.0 * EPS * np.trace(M, axis1=1, axis2=2)[:, None]
    return np.linalg.inv(np.linalg.cholesky(M))


def divide(K, x):
    """M_j^{-1} x_j for K = `inverse_factors`(M) and the columns of x (d, k)."""
    return times(K.transpose(0, 2, 1), times(K, x))


def times(M, x):
    """M_j x_j for M (k, d, d) and the columns of x (d, k)."""
    return np.matmul(M, x.T[:, :, None])[:, :, 0].T


def to_boundary(s, ds):
    """Per column of s (n, k) > 0: the largest step along ds that keeps s >= 0, (k,); inf if all."""
    ratio = np.divide(s, -ds, out=np.full_like(s, np.inf), where=ds < 0)
    return ratio.min(axis=0)


def to_sphere(p, dp, lam):
    """Per column of p (d, k), ||p|| < lam: the step along dp at which ||p|| = lam, (k,)."""
    a, b = np.einsum("ij,ij->j", dp, dp), np.einsum("ij,ij->j", p, dp)
    room = np.maximum(lam * lam - np.einsum("ij,ij->j", p, p), 0.0)
    root = np.sqrt(b * b + a * room)
    # The stable root of a x^2 + 2 b x = room: no difference of near-equal numbers is divided.
    down = b + root
    up = np.divide(root - b, a, out=np.full_like(a, np.inf), where=a > 0)
    return np.where(b > 0, np.divide(room, down, out=np.full_like(a, np.inf), where=down > 0), up)
