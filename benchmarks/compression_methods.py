"""Ways to shrink a network under one budget of weights, ours and the baselines, and what each answer is worth."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from balf import balf_allocate, balf_factor, balf_spectrum, uniform_svd
from compression_cases import Case
from torch import nn

from edgesolve.host.allocate import Allocation
from edgesolve.host.chain import Chain, Factor, dense
from edgesolve.host.compress import Compression, compress, refittable
from edgesolve.host.decompose import only_faster
from edgesolve.host.fit import FitOptions, fit
from edgesolve.host.latency import survey_seconds
from edgesolve.host.plan import FORMATS, Candidate, Plan, Survey, choose
from edgesolve.host.rank_search import SearchOptions, search
from edgesolve.host.sensitivity import divergence, fisher
from edgesolve.host.sites import Site
from edgesolve.host.splice import Compressed, Factored
from edgesolve.host.survey import layer_moments, survey
from edgesolve.host.vbmf import tucker2_ranks, weakened

OURS = "closed form"
ROUNDS, RUNS = 7, 30


@dataclass(frozen=True)
class Prepared:
    """What one look at the calibration frames gives, for every budget."""

    case: Case
    surveys: list[Survey]
    gammas: Mapping[str, np.ndarray]
    seconds: dict[str, float]


@dataclass(frozen=True)
class Answer:
    """A shrunk network. Shares are of the original's convolution and linear weights and multiply-adds."""

    method: str
    budget: float
    module: nn.Module
    weights: float
    macs: float
    seconds: float
    compression: Compression | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Worth:
    """drop in points on the test frames, KL to the original on frames apart; `latency`, `file`: p50 and bytes of the
    ONNX file over the original's, or None."""

    method: str
    budget: float
    weights: float
    macs: float
    drop: float
    kl: float
    seconds: float
    latency: float | None
    file: float | None


def prepare(
    case: Case, formats: tuple[str, ...] = FORMATS, pivots: bool = True, align: int = 1
) -> Prepared:
    began = time.perf_counter()
    surveys = survey(
        case.walk(),
        case.layers[1],
        formats=formats,
        pivots=pivots,
        align=align,
        n_probe=case.n_probe,
    )
    middle = time.perf_counter()
    gammas = fisher(case.walk(), case.n_fisher)
    spent = {"survey": middle - began, "fisher": time.perf_counter() - middle}
    return Prepared(case, surveys, gammas, spent)


def ours(
    prepared: Prepared,
    budget: float,
    options: FitOptions | None = None,
    method: str = OURS,
    gammas: bool = True,
) -> Answer:
    plan = choose(prepared.surveys, "params", budget * prepared.case.weights)
    return carried_out(prepared, plan, budget, options, method, gammas)


def carried_out(
    prepared: Prepared,
    plan: Plan,
    budget: float,
    options: FitOptions | None = None,
    method: str = OURS,
    gammas: bool = True,
) -> Answer:
    """`plan` by the sequential pass."""
    case, began = prepared.case, time.perf_counter()
    reasons = {s.site.name: s.reason for s in prepared.surveys if s.reason}
    metrics = prepared.gammas if gammas else None
    done = compress(case.walk(), plan, reasons, metrics, options or FitOptions())
    seconds = time.perf_counter() - began
    chains = {node: f.chain for node, f in done.fitted.items()}
    return replace(_answer(case, method, budget, chains, done.module, seconds), compression=done)


def independent(prepared: Prepared, budget: float) -> Answer:
    """Every layer fitted behind the unchanged original: symmetric moments."""
    case, began = prepared.case, time.perf_counter()
    plan, walk = choose(prepared.surveys, "params", budget * case.weights), case.walk()
    fitted = {}
    for site in case.found:
        candidate = plan.chosen[site.node]
        if refittable(site, len(case.x)) and candidate.format != "dense":
            fitted[site.node] = fit(walk, site, candidate, prepared.gammas[site.node], FitOptions())
    layers = {s.node: fitted[s.node].module(s) for s in case.found if s.node in fitted}
    module = Compressed(case.network, case.found, layers)
    seconds = time.perf_counter() - began
    chains = {node: f.chain for node, f in fitted.items()}
    return _answer(case, "independent layers", budget, chains, module, seconds)


def faster(prepared: Prepared) -> Prepared:
    """With only the forms that took less time here than the layer they replace: what `edgesolve build` does."""
    took = survey_seconds(prepared.surveys)
    surveys = [
        only_faster(s, dict(zip(s.candidates, t, strict=True)))
        for s, t in zip(prepared.surveys, took, strict=True)
    ]
    return replace(prepared, surveys=surveys)


class Balf:
    """BALF as rebuilt in balf.py, on the same frames."""

    def __init__(self, case: Case):
        self.case, began = case, time.perf_counter()
        self.sites = _replaceable(case)
        walk = case.walk()
        moments = (layer_moments(walk, s, 0)[0] for s in self.sites)
        self.sigma = [m.sxx / m.n for m in moments]
        self.spectra = [
            (balf_spectrum(_matrix(s), S), *_matrix(s).shape)
            for s, S in zip(self.sites, self.sigma, strict=True)
        ]
        self.seconds = time.perf_counter() - began

    def __call__(self, budget: float) -> Answer:
        began, still = time.perf_counter(), _still(self.case, self.sites)
        ranks = balf_allocate(self.spectra, budget * self.case.weights - still)
        full = [
            balf_factor(_matrix(s), S, r)
            for s, S, r in zip(self.sites, self.sigma, ranks, strict=True)
        ]
        return _low_rank(self.case, "BALF-like", budget, self.sites, full, ranks, began)


def uniform(case: Case, budget: float) -> Answer:
    """Truncated SVD of the weights, the same share in every layer."""
    began, replaceable = time.perf_counter(), _replaceable(case)
    still = _still(case, replaceable)
    share = (budget * case.weights - still) / (case.weights - still)
    ranks = uniform_svd([_matrix(s).shape for s in replaceable], share)
    full = [
        balf_factor(W, np.eye(W.shape[1]), r)
        for W, r in zip(map(_matrix, replaceable), ranks, strict=True)
    ]
    return _low_rank(case, "uniform SVD", budget, replaceable, full, ranks, began)


def in_weight_space(
    case: Case, method: str, budget: float, chains: Mapping[str, Chain], seconds: float
) -> Answer:
    """Layers replaced by `chains` by call site, biases copied."""
    layers = {s.node: Factored(s, chains[s.node], s.bias) for s in case.found if s.node in chains}
    module = Compressed(case.network, case.found, layers)
    return _answer(case, method, budget, chains, module, seconds)


def planned(case: Case, chosen: Mapping[str, Candidate], budget: float) -> Plan:
    """A plan whose ranks came from elsewhere; layers not in `chosen` stay dense."""
    whole = {
        s.node: chosen.get(s.node, Candidate("dense", (), s.weight.size, s.macs, 0.0))
        for s in case.found
    }
    cost = float(sum(c.params for c in whole.values()))
    nothing = Allocation(np.zeros(0, int), cost, np.nan, np.nan, False)
    return Plan(whole, "params", budget * case.weights, nothing)


def worth(case: Case, answer: Answer, *, latency: bool = True) -> Worth:
    accuracy, held = case.expected
    drop = accuracy - case.accuracy(answer.module)
    kl = divergence(held, case.logits(answer.module, case.held))
    ratios = exported(case, answer.module) if latency else (None, None)
    a = answer
    return Worth(a.method, a.budget, a.weights, a.macs, drop, kl, a.seconds, *ratios)


def exported(case: Case, module: nn.Module) -> tuple[float, float]:
    """Over the original's: p50 of one frame on one thread of ONNX Runtime, the two taking turns; bytes of the file."""
    import onnxruntime as ort

    x = {"x": case.network.example[:1].numpy()}
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    files = case.original_onnx, case.onnx(module)
    runs = [ort.InferenceSession(f, options, providers=["CPUExecutionProvider"]) for f in files]
    taken = [[], []]
    for _ in range(ROUNDS):
        for run, seconds in zip(runs, taken, strict=True):
            for _ in range(RUNS):
                began = time.perf_counter()
                run.run(None, x)
                seconds.append(time.perf_counter() - began)
    before, after = (float(np.median(t)) for t in taken)
    return after / before, len(files[1]) / len(files[0])


def digest(module: nn.Module) -> str:
    """SHA-256 of every stored number with its name."""
    found = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        found.update(name.encode() + value.contiguous().numpy().tobytes())
    return found.hexdigest()


def _replaceable(case: Case) -> list[Site]:
    return [s for s in case.found if s.groups == 1 and s.name not in case.layers[1]]


def _still(case: Case, replaceable: list[Site]) -> int:
    """Weights of the layers that the baselines leave alone."""
    return case.weights - sum(s.weight.size for s in replaceable)


def _matrix(site: Site) -> np.ndarray:
    return site.weight.reshape(len(site.weight), -1)


def _low_rank(case, method, budget, replaceable, full, ranks, began) -> Answer:
    """k×k to r channels, then 1×1, from weights (T, D) of rank r; biases copied."""
    chains = {}
    for site, W, r in zip(replaceable, full, ranks, strict=True):
        if r is None:
            chains[site.node] = dense(W.reshape(site.weight.shape))
            continue
        U, s, Vt = np.linalg.svd(W, full_matrices=False)
        first = (s[:r, None] * Vt[:r]).reshape(r, *site.weight.shape[1:])
        factors = (Factor(first, "hw"), Factor(U[:, :r, None, None]))
        chains[site.node] = Chain("lowrank", (r,), factors)
    return in_weight_space(case, method, budget, chains, time.perf_counter() - began)


def _answer(case, method, budget, chains: Mapping[str, Chain], module, seconds) -> Answer:
    stored = macs = 0
    for s in case.found:
        chain = chains.get(s.node)
        stored += s.weight.size if chain is None else chain.n_params
        macs += s.macs if chain is None or chain.format == "dense" else chain.macs(s.at)
    return Answer(method, budget, module.eval(), stored / case.weights, macs / case.macs, seconds)


def vbmf_ranks(case: Case, layers: list[Site]) -> dict[str, tuple[int, int]]:
    """(r_out, r_in); a layer of which VBMF makes nothing but noise keeps its channels, as MUSCO has it."""
    found = {}
    for s in layers:
        picked = zip(tucker2_ranks(s.weight), s.weight.shape[:2], strict=True)
        found[s.node] = tuple(weakened(r, full, 1.0) for r, full in picked)
    return found


def searched_ranks(
    case: Case, layers: list[Site], options: SearchOptions
) -> dict[str, tuple[int, int]]:
    """r_in = r_out from two rounds, the loss being KL to the original on 64 calibration frames."""
    x = case.preprocess(torch.from_numpy(case.x[:64]))
    network, walk = case.network, case.walk()
    with torch.no_grad():
        expected = network.run(x, norm=walk.norm, layers=walk.original).log_softmax(1)
    weights = {s.node: walk.original[s.node][0] for s in layers}

    def loss(mixed: Mapping[str, torch.Tensor]) -> torch.Tensor:
        own = {n: (w, walk.original[n][1]) for n, w in mixed.items()}
        logits = network.run(x, norm=walk.norm, layers={**walk.original, **own})
        return torch.nn.functional.kl_div(
            logits.log_softmax(1), expected, log_target=True, reduction="batchmean"
        )

    ranges = {}
    for s in layers:
        full = min(s.weight.shape[:2])
        step = max(1, full // 8)
        ranges[s.node] = range(step, full + 1, step)
    return {n: (r, r) for n, r in search(weights, ranges, loss, options=options).items()}


def to_budget(case: Case, layers: list[Site], wanted, budget: float) -> dict[str, Candidate]:
    """All ranks times one factor, the largest that meets the budget; a layer that gains nothing stays dense."""

    def at(scale: float) -> dict[str, Candidate]:
        found = {}
        for s in layers:
            pair = zip(wanted[s.node], s.weight.shape[:2], strict=True)
            r_out, r_in = (int(np.clip(round(scale * r), 1, full)) for r, full in pair)
            size = _tucker2_size(s, r_out, r_in)
            if size < s.weight.size:
                found[s.node] = Candidate("tucker2", (r_out, r_in), size, 0, 0.0)
        return found

    def stored(found: dict[str, Candidate]) -> int:
        return case.weights - sum(
            s.weight.size - found[s.node].params for s in layers if s.node in found
        )

    low, high = 0.0, float(max(max(s.weight.shape[:2]) for s in layers))
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if stored(at(middle)) <= budget * case.weights else (low, middle)
    return at(low)


def _tucker2_size(site: Site, r_out: int, r_in: int) -> int:
    """Weights stored, identity blocks not counted, as in our own plans."""
    T, c, kh, kw = site.weight.shape
    return r_in * (c - r_in) + kh * kw * r_in * r_out + r_out * (T - r_out)
