"""The commands of a device, one function each; their docstrings are what --help says. Imports happen inside."""

from __future__ import annotations

import argparse
import contextlib
import json
from pathlib import Path

from edgesolve.device.arguments import (
    BACKENDS,
    bundle_argument,
    emit,
    nothing,
    open_frames,
    running,
    say,
    signature_arguments,
    state_folder,
    with_input,
)
from edgesolve.device.errors import EdgeError, InputError, UsageError


def _recalibrate_arguments(p):
    with_input(p)
    p.add_argument(
        "--labels", metavar="F", help=".npy of class indices, -1 = unlabelled; or a JSON list"
    )
    p.add_argument(
        "--use-labels", action="store_true", help="learn from the y stored in an .npz INPUT"
    )
    p.add_argument(
        "--mode", choices=("auto", "backbone", "head"), default="auto", help="what may change"
    )
    p.add_argument("--frames", type=int, default=512, help="largest window that is looked at")
    p.add_argument("--seconds", type=float, help="time budget")
    p.add_argument("--memory-mib", type=float, help="memory budget")
    p.add_argument("--dry-run", action="store_true", help="decide and show, write nothing")
    p.add_argument("--exit-code", action="store_true", help="10 for kept, 11 for proposed")


def _bench_arguments(p):
    running(p)
    p.add_argument("second", nargs="?", metavar="B.json", help="with: bench compare A.json B.json")
    p.add_argument("third", nargs="?", help=argparse.SUPPRESS)
    p.add_argument("--mode", choices=("steady",), default="steady")
    p.add_argument("--against", metavar="MODEL", help="an .onnx or .tflite file, interleaved")
    p.add_argument("--repeats", type=int, default=5)
    p.add_argument("--runs", type=int, default=200)
    p.add_argument("--quick", action="store_true", help="one repeat, 64 runs")
    p.add_argument("--strict", action="store_true", help="exit 12 if the run is INVALID")
    p.add_argument("--out", metavar="R.json")
    p.add_argument("--html", metavar="R.html")


def _verify_arguments(p):
    bundle_argument(p)
    p.add_argument("--backend", choices=("all", *BACKENDS), default="all")
    p.add_argument("--threads", type=int, default=1)
    signature_arguments(p)


def inspect(args) -> int:
    """What is in a bundle: sizes, multiply-adds, accuracy, layers.

    example: edgesolve inspect resnet20.bundle"""
    from edgesolve.device import views
    from edgesolve.device.bundle import open_bundle

    bundle = open_bundle(args.bundle)
    found = views.inspect(bundle)
    emit(args, found, views.inspect_text)
    return 0


def verify(args) -> int:
    """Check the signature, every hash, and every backend's answers on this machine.

    example: edgesolve verify resnet20.bundle --key vendor.pub --require-signature"""
    from edgesolve.device import views
    from edgesolve.device.bundle import open_bundle
    from edgesolve.device.signature import trusted_keys
    from edgesolve.device.verify import verify as check

    found = check(
        open_bundle(args.bundle),
        backends=None if args.backend == "all" else [args.backend],
        threads=args.threads,
        trusted=trusted_keys(args.key),
        signature_required=args.require_signature or args.key is not None,
    )
    emit(args, found, views.verify_text)
    return 0


def predict(args) -> int:
    """Class and score of every item.

    example: edgesolve predict resnet20.bundle photo.png"""
    runtime, found = _open(args)
    from edgesolve.device import views
    from edgesolve.device.gate import softmax

    frames = runtime.bundle.contract.check(found.frames, args.input)
    scores = softmax(runtime.logits(frames))
    best = scores.argmax(1)
    items = [
        {
            "name": name,
            "top1": int(k),
            "class": runtime.bundle.classes[k],
            "score": round(float(s[k]), 6),
        }
        for name, k, s in zip(found.names, best, scores, strict=True)
    ]
    result = {"items": items, "skipped": found.skipped, "generation": runtime.generation}
    emit(args, result, views.predict_text)
    return 0


def evaluate(args) -> int:
    """Accuracy where labels are there, agreement with the original network, per class.

    example: edgesolve eval resnet20.bundle test.npz"""
    runtime, found = _open(args)
    from edgesolve.device import views
    from edgesolve.device.evaluate import evaluate as run

    frames = runtime.bundle.contract.check(found.frames, args.input)
    result = run(runtime, frames, found.labels, threads=args.threads, say=say)
    result["skipped"] = found.skipped
    emit(args, result, views.eval_text)
    return 0


def recalibrate(args) -> int:
    """Adapt to unlabelled frames: drift test, re-normalisation, head re-solve, gate, atomic swap.

    example: edgesolve recalibrate resnet20.bundle frames.npz --state state --dry-run"""
    import numpy as np

    from edgesolve.device import views
    from edgesolve.device.adapt import Options
    from edgesolve.device.bundle import open_bundle
    from edgesolve.device.recalibrate import run

    if args.frames < 1 or any(v is not None and v <= 0 for v in (args.seconds, args.memory_mib)):
        raise UsageError("--frames, --seconds and --memory-mib must be positive.")
    bundle = open_bundle(args.bundle)
    found = open_frames(bundle, args.input)
    labels = _labels(args.labels, found) if args.labels else None
    if args.use_labels:
        if found.labels is None:
            raise InputError(f"{args.input}: --use-labels, but there are no labels y in it.")
        labels = found.labels
    result = run(
        args.bundle,
        np.asarray(found.frames),
        labels,
        state=state_folder(args, bundle),
        backend=args.backend,
        threads=args.threads,
        action="show" if args.dry_run else "commit",
        options=Options(
            mode=args.mode,
            seconds=args.seconds,
            memory_mib=args.memory_mib,
            max_frames=args.frames,
        ),
        say=say,
    )
    result["skipped"] = found.skipped
    emit(args, result, views.recalibrate_text)
    if args.exit_code:
        return {"kept": 10, "proposed": 11}.get(result["decision"], 0)
    return 0


def status(args) -> int:
    """Which head is in force here, where it came from, and the last decision.

    example: edgesolve status resnet20.bundle --state state"""
    from edgesolve.device import views
    from edgesolve.device.bundle import open_bundle
    from edgesolve.device.store import Store

    bundle = open_bundle(args.bundle)
    state = state_folder(args, bundle)
    emit(args, views.status(bundle, Store(state)), views.status_text)
    return 0


def rollback(args) -> int:
    """Go back to the generation before the one in force; again for the one before that.

    example: edgesolve rollback resnet20.bundle --state state"""
    return _move(args, "rollback")


def factory_reset(args) -> int:
    """Forget everything learnt here; the factory head is in force. Works on a damaged state.

    example: edgesolve factory-reset resnet20.bundle --state state"""
    return _move(args, "factory_reset")


def doctor(args) -> int:
    """Is this board fit to run? Every runtime is tried in a process of its own.

    example: edgesolve doctor"""
    from edgesolve.device import views
    from edgesolve.device.doctor import checks

    found = checks()
    emit(args, views.doctor(found), views.doctor_text)
    return 14 if any(check.status == "fault" for check in found) else 0


def warmup(args) -> int:
    """Compile every kernel now, at install time, instead of at the first recalibration.

    example: edgesolve warmup"""
    from edgesolve.device import views
    from edgesolve.device.warmup import cache_folder
    from edgesolve.device.warmup import warmup as run

    kernels = [{"kernel": name, "seconds": seconds} for name, seconds in run()]
    emit(args, {"kernels": kernels, "cache": str(cache_folder())}, views.warmup_text)
    return 0


def bench(args) -> int:
    """Latency of a bundle on this machine, each repeat a fresh process; or compare two results.

    example: edgesolve bench resnet20.bundle --against resnet20.onnx --out r.json
             edgesolve bench compare a.json b.json"""
    from edgesolve.device import bench as module
    from edgesolve.device import bench_report

    if args.bundle == "compare":
        return _bench_compare(args, module)
    from edgesolve.device.bundle import open_bundle

    bundle = open_bundle(args.bundle)
    result = module.run_bench(
        args.bundle,
        backend=args.backend,
        state=state_folder(args, bundle),
        threads=args.threads,
        repeats=args.repeats,
        runs=args.runs,
        quick=args.quick,
        against=args.against,
    )
    if args.out:
        _write(args.out, json.dumps(result, indent=1))
    if args.html:
        _write(args.html, bench_report.html(result))
    emit(args, result, bench_report.table)
    return 12 if args.strict and result["verdict"] != "VALID" else 0


def _bench_compare(args, module) -> int:
    if not (args.second and args.third):
        raise UsageError(
            "bench compare takes two result files: edgesolve bench compare a.json b.json"
        )
    results = []
    for path in (args.second, args.third):
        try:
            results.append(json.loads(Path(path).read_text()))
        except (OSError, ValueError) as error:
            raise InputError(f"{path}: not a readable bench result ({error}).") from error
    found = module.compare(*results)
    emit(args, found, lambda r: r["sentence"])
    return 13 if found.get("regression") else 0


def _open(args):
    from edgesolve.device.bundle import open_bundle
    from edgesolve.device.runtime import open_runtime

    bundle = open_bundle(args.bundle)
    found = open_frames(bundle, args.input)
    runtime = open_runtime(
        bundle, backend=args.backend, state=state_folder(args, bundle), threads=args.threads
    )
    for note in [*runtime.notes, *found.skipped]:
        say(note)
    return runtime, found


def _labels(path: str, found):
    import numpy as np

    try:
        if path.endswith(".npy"):
            return np.load(path, allow_pickle=False)
        given = json.loads(Path(path).read_text())
        if isinstance(given, dict):
            given = [given.get(name, -1) for name in found.names]
        return np.array(given)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(
            f"{path}: expected an .npy, a JSON list, or a JSON object of name: class ({error})."
        ) from error


def _move(args, how: str) -> int:
    from edgesolve.device.bundle import open_bundle
    from edgesolve.device.store import Store

    bundle = open_bundle(args.bundle)
    store = Store(state_folder(args, bundle))
    if how == "rollback":
        generation = store.rollback(bundle.sha256)
    else:
        store.factory_reset()
        generation = 0
    with contextlib.suppress(EdgeError):
        store.journal({"decision": "rollback", "reason": "operator", "generation": generation})
    where = f"generation {generation}" if generation else "the factory head"
    emit(args, {"generation": generation, "reason": "operator"}, lambda _: f"In force: {where}.")
    return 0


def _write(path: str, text: str) -> None:
    from edgesolve.device.atomic import write_atomic

    write_atomic(path, text.encode())


COMMANDS = {
    "inspect": (inspect, bundle_argument, "what is in a bundle"),
    "verify": (verify, _verify_arguments, "hashes, and every backend's answers on this machine"),
    "predict": (predict, with_input, "class and score per item"),
    "eval": (evaluate, with_input, "accuracy, agreement with the original, per class"),
    "recalibrate": (
        recalibrate,
        _recalibrate_arguments,
        "adapt to unlabelled frames, or refuse to",
    ),
    "status": (status, running, "which head is in force, and why"),
    "rollback": (rollback, running, "go back one generation"),
    "factory-reset": (factory_reset, running, "forget everything learnt here"),
    "bench": (bench, _bench_arguments, "latency on this machine; bench compare A.json B.json"),
    "doctor": (doctor, nothing, "is this board fit to run?"),
    "warmup": (warmup, nothing, "compile the kernels at install time"),
}
