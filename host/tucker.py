"""Tucker-2 in a layer's own metric: 1×1 in, a small kh×kw core, 1×1 out."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy.linalg import cho_factor, cho_solve, solve_triangular
from scipy.sparse.linalg import LinearOperator, cg, minres

from edgesolve.host.chain import Chain, Factor
from edgesolve.host.lowrank import checked, in_range, leading, oriented, reduced_rank
from edgesolve.host.metric import Metric

DENSE_UNKNOWNS = 500
"""Normal equations up to this size are factored, larger ones iterated."""
STEPS = 10
"""Of conjugate gradients: after four alternations 50 of them end within .1 % of the same distortion, in 1.5 times
the time (ResNet-20 layers, CP)."""
PROXIMAL = 1e-10
"""Weight on the step's own length, relative to the mean diagonal: singular equations still descend."""


def tucker2(
    metric: Metric,
    shape: tuple[int, ...],
    ranks: tuple[int, int],
    *,
    sweeps: int = 10,
    tol: float = 1e-4,
    start: Chain | None = None,
) -> Chain:
    """1×1 (c to r_in), kh×kw (r_in to r_out), 1×1 (r_out to T) for a weight of `shape` (T, c, kh, kw).

    ranks : (r_out, r_in), in 1..T and 1..c. r_in = c drops the first factor, r_out = T the last one: low rank
        on one side and the dense least-squares weight are special cases.
    sweeps, tol : at most so many updates of u_in; they end where one lowers the distortion by a share < tol.
    start : a chain of the same shape and ranks whose u_in is the first.

    Laws: given u_in, core and u_out are jointly optimal (reduced-rank regression); more sweeps never give a
    higher distortion; a 1×1 layer, r_in = c included, gets the global optimum. Outer factors are orthonormal.
    (compression.md, section 4, "Ours".)
    """
    T, c, *_ = checked(metric, shape)
    r_out, r_in = ranks
    in_range("tucker2", shape, r_out=(r_out, T), r_in=(r_in, c))
    if r_in == c:
        u_out, core = reduced_rank(metric, r_out)
        return _chain(shape, np.eye(c), core, u_out)
    if start is None:
        u_in = input_basis(metric, c)[:, :r_in]
    else:
        u_in = orthonormal(start.factors[0].weight[:, :, 0, 0].T)
    best = np.inf
    for sweep in range(sweeps + 1):
        small = narrowed(metric, u_in)
        u_out, core = reduced_rank(small, r_out)
        error = small.distortion(u_out @ core)
        if error < best:
            kept = u_in, core, u_out
        if sweep == sweeps or not error < (1.0 - tol) * best:
            break
        best = error
        cores = core.reshape(r_out, r_in, -1).transpose(1, 2, 0)
        u_in = orthonormal(refitted(metric.S, metric.C.T @ u_out, u_in, cores))
    return _chain(shape, *kept)


def tucker2_curves(metric: Metric, shape: tuple[int, ...]) -> np.ndarray:
    """Distortion (c, T) of tucker2(..., ranks=(j + 1, i + 1), sweeps=0) at [i, j], every pair of ranks at once.

    The columns of u_in are nested, so one Cholesky factor of S in their basis serves every r_in: its leading
    blocks. Never rises along either axis; the last row is `lowrank_curve`. Where S is singular it is 1e-10 of
    its mean diagonal away from that.
    """
    T, c, *_ = checked(metric, shape)
    basis = narrowed(metric, input_basis(metric, c))
    try:
        L = np.linalg.cholesky(basis.S)
        usable = np.min(np.diag(L)) ** 2 > 1e-13 * np.max(np.diag(basis.S))
    except np.linalg.LinAlgError:
        usable = False
    if not usable:
        basis = basis.ridged(basis.least_squares(), 1e-10)
        L = np.linalg.cholesky(basis.S)
    Z = solve_triangular(L, basis.C.T, lower=True).reshape(c, -1, T)
    table, gram = np.empty((c, T)), np.zeros((T, T))
    for i, z in enumerate(Z):
        gram += z.T @ z
        energy = np.maximum(np.linalg.eigvalsh(gram), 0.0)
        floor = max(metric.v - float(np.trace(gram)), 0.0)
        table[i] = floor + np.append(energy[:-1].cumsum()[::-1], 0.0)
    return table


def tucker2_published(
    metric: Metric,
    shape: tuple[int, ...],
    ranks: tuple[int, int],
    *,
    sweeps: int = 100,
    tol: float = 1e-6,
) -> Chain:
    """The same chain by alternating least squares as published: u_in, u_out, core in turn, from the HOSVD.

    u_in by MINRES from zero (rtol 1e-10, at most 2000 iterations), here in float64. Ends where the relative
    error falls by less than `tol`; a rise restores the last state. Symmetric where `metric` is
    Metric.symmetric(W, Sigma), Sigma of any data set. A baseline: use `tucker2`. (Kalle et al. 2025.)
    """
    T, c, *_ = checked(metric, shape)
    r_out, r_in = ranks
    in_range("tucker2", shape, r_out=(r_out, T), r_in=(r_in, c))
    weight = metric.least_squares()
    u_in = leading(_input_unfolding(weight, c), r_in)
    u_out = leading(weight, r_out)
    core = _core(metric, u_in, u_out)
    last, kept = np.inf, None
    for _ in range(sweeps):
        cores = core.reshape(r_out, r_in, -1).transpose(1, 2, 0)
        u_in = _published_input(metric, cores, u_out, u_in.shape)
        F = narrowed(narrowed(metric, u_in), core.T)
        u_out = F.least_squares()
        core = _core(metric, u_in, u_out)
        whole = u_out @ core @ _expanded(u_in, metric.D // c).T
        error = np.sqrt(metric.distortion(whole) / metric.v)
        if error > last:
            break
        kept = u_in, core, u_out
        if last - error < tol:
            break
        last = error
    return _chain(shape, *(kept or (u_in, core, u_out)))


def input_basis(metric: Metric, n: int) -> np.ndarray:
    """(n, n) orthonormal, columns by importance: the start for inputs that `metric` orders as (n, K).

    S is taken as S_in ⊗ I, S_in (n, n) the mean of its diagonal blocks: the left singular vectors of
    L'·unfolding, S_in = L L', mapped back by L⁻ᵀ. Their leading spans are optimal where K = 1; with S = I
    they are those of the HOSVD. (compression.md, section 4.)
    """
    marginal = Metric.symmetric(
        _input_unfolding(metric.least_squares(), n).T, input_marginal(metric.S, n)
    )
    _, P, M = marginal.whitened()
    return orthonormal(np.hstack([P.T @ leading(M.T, len(P)), np.eye(n)]))[:, :n]


def input_marginal(S: np.ndarray, n: int) -> np.ndarray:
    """The mean (n, n) of the diagonal blocks of S ((n, K), (n, K))."""
    K = len(S) // n
    return np.einsum("ikjk->ij", S.reshape(n, K, n, K)) / K


def narrowed(metric: Metric, u: np.ndarray) -> Metric:
    """The metric of the narrower input (u ⊗ I)'x: u (n, r) for inputs ordered (n, K), to (r, K)."""
    n, r = u.shape
    K = metric.D // n
    C = np.einsum("tik,ip->tpk", metric.C.reshape(-1, n, K), u, optimize=True).reshape(-1, r * K)
    half = (u.T @ metric.S.reshape(n, -1)).reshape(r * K, n, K)
    S = np.einsum("dik,ip->dpk", half, u, optimize=True).reshape(r * K, r * K)
    mu_x = (u.T @ metric.mu_x.reshape(n, K)).ravel()
    return Metric(0.5 * (S + S.T), C, metric.v, mu_x, metric.mu_t)


def refitted(S: np.ndarray, target: np.ndarray, u: np.ndarray, cores: np.ndarray) -> np.ndarray:
    """The u (n, r) that minimises <V, S V> - 2 <V, target> for V[(i, k), q] = Σ_p u[i, p] cores[p, k, q].

    S ((n, K), (n, K)), target ((n, K), q), cores (r, K, q), u the current one. Exact by Cholesky for few
    unknowns, else conjugate gradients from u; either way no step ascends.
    """
    (n, r), (_, K, q) = u.shape, cores.shape
    flat = cores.reshape(r, K * q)

    def normal(x):
        V = (x.reshape(n, r) @ flat).reshape(n * K, q)
        return ((S @ V).reshape(n, K * q) @ flat.T).ravel()

    def matrix():
        gram = cores.reshape(r * K, q) @ cores.reshape(r * K, q).T
        right = gram.reshape(r, K, r, K).transpose(1, 3, 0, 2).reshape(K * K, r * r)
        left = S.reshape(n, K, n, K).transpose(0, 2, 1, 3).reshape(n * n, K * K)
        return (left @ right).reshape(n, n, r, r).transpose(0, 2, 1, 3).reshape(n * r, n * r)

    residual = (target.reshape(n, K * q) @ flat.T).ravel() - normal(u.ravel())
    return u + descent_step(normal, matrix, residual, input_marginal(S, n), flat @ flat.T)


def descent_step(
    normal: Callable[[np.ndarray], np.ndarray],
    matrix: Callable[[], np.ndarray],
    residual: np.ndarray,
    left: np.ndarray,
    right: np.ndarray,
) -> np.ndarray:
    """The step (n, r) that solves the normal equations N step = residual: never uphill.

    normal(x) = N x; matrix() = N (n r, n r), asked for where it is small; left (n, n) ⊗ right (r, r) is near N
    and preconditions the others.
    """
    size = len(left) * len(right)
    if size <= DENSE_UNKNOWNS:
        N = matrix()
        ridge = PROXIMAL * np.trace(N) / size * np.eye(size)
        return cho_solve(cho_factor(N + ridge, lower=True), residual).reshape(len(left), len(right))
    (a, A), (b, B) = np.linalg.eigh(left), np.linalg.eigh(right)
    scale = np.outer(np.maximum(a, 1e-6 * a[-1]), np.maximum(b, 1e-6 * b[-1]))

    def precondition(x):
        return (A @ ((A.T @ x.reshape(scale.shape) @ B) / scale) @ B.T).ravel()

    step, _ = cg(
        LinearOperator((size, size), normal),
        residual,
        rtol=1e-3,
        maxiter=STEPS,
        M=LinearOperator((size, size), precondition),
    )
    return step.reshape(scale.shape)


def orthonormal(u: np.ndarray) -> np.ndarray:
    """An orthonormal basis of the columns of u, leading spans kept, signs fixed."""
    return oriented(np.linalg.qr(u)[0])


def _input_unfolding(weight, n):
    """(n, K T) of a weight (T, n K)."""
    return weight.reshape(len(weight), n, -1).transpose(1, 2, 0).reshape(n, -1)


def _expanded(u_in, K):
    return np.kron(u_in, np.eye(K))


def _core(metric, u_in, u_out):
    """The least-squares core (r_out, r_in K) given both outer factors."""
    return np.linalg.solve(u_out.T @ u_out, u_out.T @ narrowed(metric, u_in).least_squares())


def _published_input(metric, cores, u_out, shape):
    n, r = shape
    K, gram = cores.shape[1], u_out.T @ u_out
    flat = cores.reshape(r, -1)

    def normal(x):
        V = (x.reshape(n, r) @ flat).reshape(n * K, -1)
        return ((metric.S @ V @ gram).reshape(n, -1) @ flat.T).ravel()

    right = ((metric.C.T @ u_out).reshape(n, -1) @ flat.T).ravel()
    answer, _ = minres(LinearOperator((n * r, n * r), normal), right, rtol=1e-10, maxiter=2000)
    return answer.reshape(n, r)


def _chain(shape, u_in, core, u_out):
    """core (r_out, r_in K); a square outer factor goes into it."""
    T, c, kh, kw = shape
    (_, r_in), r_out = u_in.shape, len(core)
    core = core.reshape(r_out, r_in, kh, kw)
    first, last = [Factor(u_in.T[:, :, None, None])], [Factor(u_out[:, :, None, None])]
    if r_in == c:
        core, first = np.einsum("oihw,ci->ochw", core, u_in), []
    if r_out == T:
        core, last = np.einsum("oihw,to->tihw", core, u_out), []
    return Chain("tucker2", (r_out, r_in), (*first, Factor(core, "hw"), *last))
