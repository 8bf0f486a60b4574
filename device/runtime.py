"""A bundle that answers: the frozen backbone (factory or re-normalised) and the head in force."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgesolve.device.bundle import Bundle, open_bundle
from edgesolve.device.errors import BackendError, BundleError
from edgesolve.device.graph import BACKENDS, Graph, open_graph
from edgesolve.device.patch import Statistics, patched

if TYPE_CHECKING:
    from edgesolve.device.generation import Generation

_CHUNK = 32


@dataclass(frozen=True, slots=True)
class Head:
    """The convex head: logits = rows @ weights + intercept; weights (D, c), intercept (c,) float32."""

    weights: np.ndarray
    intercept: np.ndarray

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        return rows @ self.weights + self.intercept

    def to_arrays(self) -> dict[str, np.ndarray]:
        return {
            "weights": np.ascontiguousarray(self.weights, np.float32),
            "intercept": np.ascontiguousarray(self.intercept, np.float32),
        }

    @classmethod
    def from_arrays(cls, arrays: dict[str, np.ndarray], name: str = "head") -> Head:
        """Raises BundleError where arrays are missing, ill-shaped or not finite."""
        try:
            weights, intercept = arrays["weights"], arrays["intercept"]
        except KeyError as error:
            raise BundleError(f"{name}: lacks {error}.") from error
        if weights.ndim != 2 or intercept.shape != weights.shape[1:]:
            raise BundleError(
                f"{name}: weights {weights.shape} and intercept {intercept.shape} don't fit."
            )
        if not (np.isfinite(weights).all() and np.isfinite(intercept).all()):
            raise BundleError(f"{name}: holds NaN or inf.")
        return cls(np.asarray(weights, np.float32), np.asarray(intercept, np.float32))


@dataclass(frozen=True)
class Runtime:
    """`generation` 0 is the factory head. `notes`: what loading fell back from, one sentence each. `condition`: of the
    window that the head was solved on (`drift.from_condition`), None for the factory's."""

    bundle: Bundle
    backend: str
    graph: Graph
    head: Head
    generation: int
    notes: list[str]
    condition: dict[str, np.ndarray] | None = None

    def rows(self, frames: np.ndarray) -> np.ndarray:
        """Rows (n, D) float32 for frames (n, h, w, c) in the bundle's contract (not checked here)."""
        size = self.bundle.backends[self.backend]["batch"] or _CHUNK
        starts = range(0, len(frames), size)
        parts = [self.graph(np.ascontiguousarray(frames[i : i + size]))[0] for i in starts]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def logits(self, frames: np.ndarray) -> np.ndarray:
        """Logits (n, c) float32."""
        return self.head(self.rows(frames))

    def example(self, n: int) -> np.ndarray:
        """`n` frames in the input contract, from the bundle's parity set, repeated where it is smaller."""
        frames = self.bundle.parity()["frames"]
        return np.ascontiguousarray(frames[np.arange(n) % len(frames)])

    def parity(self) -> dict[str, float]:
        """Greatest difference and top-1 agreement with the logits recorded at build (factory head)."""
        known = self.bundle.parity(self.backend)
        head = self.head if self.generation == 0 else factory_head(self.bundle, self.backend)
        graph = self.graph if self.generation == 0 else _factory_graph(self.bundle, self.backend, 1)
        found = head(Runtime(self.bundle, self.backend, graph, head, 0, []).rows(known["frames"]))
        return {
            "max_abs": float(np.abs(found - known["logits"]).max()),
            "top1": float((found.argmax(1) == known["logits"].argmax(1)).mean()),
        }


def factory_head(bundle: Bundle, backend: str | None = None) -> Head:
    """The head that shipped for the rows of `backend`; by default that of the float backbone."""
    name = "head.safetensors" if backend is None else bundle.file(backend, "head")
    return Head.from_arrays(bundle.arrays(name), name)


def source_statistics(bundle: Bundle) -> Statistics:
    """Every normalisation's factory statistics and affine parameters, (S,) float64 each."""
    arrays = bundle.arrays("statistics.safetensors")
    return Statistics(*(arrays[name].astype(np.float64) for name in Statistics.__slots__))


def choose_backend(bundle: Bundle, backend: str = "auto") -> str:
    """`backend`, or for "auto" the first whose runtime is installed, in the bundle's order of preference.

    Raises BackendError.
    """
    if backend != "auto":
        if backend not in bundle.backends:
            raise BackendError(
                f"the bundle has {', '.join(bundle.backends)}, not {backend}. Build it with --backends."
            )
        return backend
    from importlib.util import find_spec

    wanted = {"onnx": ("onnxruntime",), "litert": ("ai_edge_litert", "tflite_runtime")}
    for name in bundle.manifest.get("prefer") or [n for n in BACKENDS if n in bundle.backends]:
        if any(find_spec(module) for module in wanted[bundle.runtime(name)]):
            return name
    raise BackendError(
        "neither onnxruntime nor ai-edge-litert is installed: "
        "pip install 'edgesolve[onnx]' or 'edgesolve[litert]'"
    )


def open_runtime(
    path: str | Path | Bundle,
    *,
    backend: str = "auto",
    state: str | Path | None = None,
    threads: int = 1,
) -> Runtime:
    """Open a bundle with the generation in force under `state` (the factory head where there is none)."""
    bundle = path if isinstance(path, Bundle) else open_bundle(path)
    backend = choose_backend(bundle, backend)
    if state is None or not Path(state).exists():
        return open_generation(bundle, backend, None, [], threads)
    from edgesolve.device.store import Store

    store = Store(state)
    found = store.current(bundle_sha256=bundle.sha256)
    return open_generation(bundle, backend, found, store.notes, threads)


def open_generation(
    bundle: Bundle, backend: str, found: Generation | None, notes: list[str], threads: int
) -> Runtime:
    """Open `backend` with the learnt head `found`; None, or one that doesn't fit, gives the factory head."""
    if found is not None:
        try:
            name = f"generation {found.number}"
            _check_rows(bundle, found.provenance.get("backend", backend), backend, name)
            head = Head.from_arrays(found.arrays, name)
            expected = (bundle.manifest["rows"]["length"], len(bundle.classes))
            if head.weights.shape != expected:
                raise BundleError(f"{name}: weights are {head.weights.shape}, not {expected}.")
            graph = adapted_graph(bundle, backend, found.statistics, threads)
            seen = {k: v for k, v in (found.window or {}).items() if k.startswith("seen.")}
            return Runtime(bundle, backend, graph, head, found.number, notes, seen or None)
        except BundleError as error:  # whole, but wrong: the device must answer all the same
            notes = [*notes, f"{error} In use instead: the factory head."]
    graph = _factory_graph(bundle, backend, threads)
    return Runtime(bundle, backend, graph, factory_head(bundle, backend), 0, notes)


def _check_rows(bundle: Bundle, learnt: str, backend: str, name: str) -> None:
    """Raises BundleError where a head was learnt on other rows: int8 and float ones differ, their heads too."""
    known = learnt in bundle.backends
    if known and bundle.file(learnt, "head") != bundle.file(backend, "head"):
        raise BundleError(
            f"{name} was learnt on {learnt}, its head doesn't fit the rows of {backend}."
        )


def adapted_graph(
    bundle: Bundle, backend: str, statistics: dict[str, np.ndarray] | None, threads: int
) -> Graph:
    """The backbone with `statistics` (mean, var (S,)) folded in; None leaves it as it shipped."""
    if not statistics:
        return _factory_graph(bundle, backend, threads)
    entry = bundle.backends[backend]
    source = source_statistics(bundle)
    target = source.replaced(statistics["mean"], statistics["var"])
    model = patched(bundle.read(entry["backbone"]), entry["patch"], source, target)
    return open_graph(model, backend=bundle.runtime(backend), threads=threads)


def _factory_graph(bundle: Bundle, backend: str, threads: int) -> Graph:
    model = bundle.read(bundle.backends[backend]["backbone"])
    return open_graph(model, backend=bundle.runtime(backend), threads=threads)
