"""Write a bundle so that a half-built one never looks whole: aside, checked on a device runtime, then renamed."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import platform
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from edgesolve.device.bundle import MANIFEST, SCHEMA_VERSION
from edgesolve.device.errors import ParityError, StateError, UsageError
from edgesolve.host import heads
from edgesolve.host import report as reporting
from edgesolve.host.adaptable import nodes_until
from edgesolve.host.compress import as_rows
from edgesolve.host.network import costs


def write(built, folder: Path, options: dict, log, provenance: dict) -> dict:
    """The report. Raises ParityError where a backend disagrees with torch, StateError where nothing can be written."""
    check_replaceable(folder)
    partial, aside = (folder.with_name(f"{folder.name}.{end}") for end in ("partial", "replaced"))
    try:
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir(parents=True)
        log.step("write and verify the bundle")
        files = _files(built)
        manifest = _manifest(built, folder.name, options, provenance)
        report = _report(built, files, folder.name)
        _store(partial, files, manifest)
        report["parity"] = _verify(partial)
        log.end()
        report["seconds"] = {**log.seconds, "total": round(sum(log.seconds.values()), 2)}
        files["report.json"] = json.dumps(report, indent=1).encode()
        files["report.html"] = reporting.html(report).encode()
        _store(partial, files, manifest)
        if options.get("original"):
            Path(options["original"]).write_bytes(built.original_onnx)
        _exchange(partial, folder, aside)
    except OSError as error:
        raise StateError(
            f"{error.filename or folder}: cannot be written ({error.strerror})."
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return report


def check_replaceable(folder: Path) -> None:
    """Raises UsageError where `folder` holds something that is no bundle: it would be deleted."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    with contextlib.suppress(OSError, ValueError, TypeError):
        if "schema_version" in json.loads((folder / MANIFEST).read_bytes()):
            return
    raise UsageError(f"{folder}: exists and is no bundle. Remove it, or name another --out.")


def _exchange(partial: Path, folder: Path, aside: Path) -> None:
    """Put `partial` in the place of `folder`, which stays whole under another name until that is done."""
    shutil.rmtree(aside, ignore_errors=True)
    replaced = folder.exists()
    if replaced:
        os.rename(folder, aside)
    try:
        os.rename(partial, folder)
    except OSError:
        if replaced:
            os.rename(aside, folder)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _files(built) -> dict[str, bytes]:
    parity = io.BytesIO()
    np.savez(parity, **built.parity)
    return {
        **built.files,
        "head.safetensors": save(heads.head_arrays(built.distilled)),
        "statistics.safetensors": save(built.statistics),
        "reference.safetensors": save(built.reference),
        "parity.npz": parity.getvalue(),
    }


def _store(folder: Path, files: dict[str, bytes], manifest: dict) -> None:
    manifest["files"] = {
        name: {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
        for name, data in sorted(files.items())
    }
    for name, data in files.items():
        _write(folder / name, data)
    _write(folder / MANIFEST, json.dumps(manifest, indent=1).encode())


def _write(path: Path, data: bytes) -> None:
    with open(path, "wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


def _manifest(built, name: str, options: dict, provenance: dict) -> dict:
    found, n_classes = built.distilled, built.distilled.solution.weights.shape[1]
    rows = found.rows
    classes = options["classes"] or [str(k) for k in range(n_classes)]
    basis = hashlib.sha256()
    for key in sorted(rows.state_dict()):
        basis.update(rows.state_dict()[key].numpy().tobytes())
    return {
        "schema_version": SCHEMA_VERSION,
        "edgesolve": version("edgesolve"),
        "name": name,
        "input": {
            "shape": list(built.data.x.shape[1:]),
            "dtype": str(built.data.x.dtype),
            "scale": built.preprocess.scale,
            "mean": list(built.preprocess.mean),
            "std": list(built.preprocess.std),
        },
        "classes": list(classes)[:n_classes],
        "split": found.cut.name,
        "rows": {
            "length": rows.starts[-1],
            "gates": rows.n_gates,
            "gate_source": found.gate_source,
            "basis_sha256": basis.hexdigest(),
        },
        "solve": {
            "penalty": options["head"]["penalty"],
            "lam": options["head"]["lam"],
            "ridge": found.ridge,
            "rows": found.moments.n,
        },
        "adapt": {"backbone": "fixed" if options["fixed_backbone"] else "adaptable"},
        "drift": built.drift,
        "backends": built.backends,
        **({"prefer": list(built.prefer)} if built.prefer else {}),
        "licences": {"runtime": "Apache-2.0", "weights": "the licence of the model you built from"},
        "provenance": {
            **provenance,
            "python": platform.python_version(),
            "torch": version("torch"),
            "options": {k: v for k, v in options.items() if k != "original"},
        },
    }


def _verify(folder: Path) -> dict:
    """`edgesolve verify` in a process of its own: what a device would say."""
    command = [sys.executable, "-m", "edgesolve.device.cli", "verify", str(folder), "--json"]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "PYTHONSAFEPATH": "1"}
    )
    if done.returncode:
        lines = [line for line in done.stderr.strip().splitlines() if line]
        raise ParityError(
            f"the exported bundle fails its own check: {lines[-1] if lines else done.returncode}"
        )
    return json.loads(done.stdout)["backends"]


def _report(built, files: dict[str, bytes], name: str) -> dict:
    """`params`, `macs`, `bytes`, `accuracy`, `agreement` before and after, and the layers that went."""
    found, network = built.distilled, built.network
    table = costs(network)
    params, macs = (sum(v[i] for v in table.values()) for i in (0, 1))
    inside = nodes_until(built.small, found.cut.node)
    kept = [v for k, v in costs(built.small).items() if k in inside]
    cut = found.cut if built.composed is None else built.composed.head.cut
    removed = {n.name for n in network.nodes} - nodes_until(network, cut.node)
    head_params = (
        found.rows.n_params() + found.solution.weights.size + found.solution.intercept.size
    )
    head_macs = found.rows.macs(found.cut.shape) + found.solution.weights.size
    backbone = next(n for n in files if n.startswith("backbone."))
    before, after = _accuracy(built)
    return {
        "name": name,
        "split": found.cut.name,
        "params": {"before": params, "after": sum(p for p, _ in kept) + head_params},
        "macs": {"before": macs, "after": sum(m for _, m in kept) + head_macs},
        "bytes": {
            "before": len(built.original_onnx),
            "after": len(files[backbone]) + len(files["head.safetensors"]),
        },
        "accuracy": {"before": before, "after": after},
        "agreement": {"before": 1.0, "after": found.agreement},
        "head": {
            "replaced_params": cut.params_after,
            "replaced_macs": cut.macs_after,
            "params": head_params,
            "macs": head_macs,
            "gates": found.rows.n_gates,
            "gate_source": found.gate_source,
            "row_length": found.rows.starts[-1],
            "ridge": found.ridge,
            "ridge_path": found.path,
            "relative_error": found.error,
            "relative_gap": found.solution.relative_gap,
            "status": found.solution.status.name.lower(),
            "rows": found.moments.n,
            "held_out": len(found.capture.rows),
        },
        "search": built.search,
        "layers": _layers(network, table, removed),
        "decomposition": _decomposition(built),
        "int8": built.int8_report,
        "files": {name: len(data) for name, data in sorted(files.items())},
        "drift": built.drift,
    }


def _decomposition(built) -> dict | None:
    """What became of the layers before the head, and what other budgets would have given; None without."""
    composed = built.composed
    if composed is None:
        return None
    found, plan = composed.decomposed.compression, composed.plan
    return {
        "kind": plan.kind,
        "budget": plan.budget,
        "cost": plan.allocation.cost,
        "predicted_divergence": plan.allocation.loss,
        "duality_gap": plan.allocation.gap,
        "divergence": found.divergence,
        "head_divergence": composed.head.divergence,
        "frontier": [{"params": p, "divergence": d} for p, d in composed.frontier],
        "tried": list(composed.tried),
        "refined": list(composed.decomposed.refined),
        "steps": as_rows(found.steps),
    }


def _accuracy(built) -> tuple[float | None, float | None]:
    """Of the original and of the head solved without them, on the held-out frames; None without labels."""
    if built.data.y is None:
        return None, None
    kept = built.distilled.capture
    y = built.data.y[kept.index]
    return (
        float((kept.logits.argmax(1) == y).mean()),
        float((built.distilled.held_out_logits.argmax(1) == y).mean()),
    )


def _operation(node) -> str:
    name = str(getattr(node.target, "_opname", node.target)).split(".")[0]
    return "batch_norm" if "batch_norm" in name else name


def _layers(network, table, removed) -> list[dict]:
    from edgesolve.host.network import module_of

    return [
        {
            "layer": module_of(node) or node.name,
            "op": _operation(node),
            "params": table[node.name][0],
            "macs": table[node.name][1],
            "decision": "replaced" if node.name in removed else "kept",
            "reason": "behind the split: the convex head stands for it"
            if node.name in removed
            else "",
        }
        for node in network.nodes
        if table.get(node.name, (0, 0)) != (0, 0)
    ]
