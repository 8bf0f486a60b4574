"""`edgesolve build`: the workstation's command."""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from pathlib import Path

DESCRIPTION = "Turn a trained model into a bundle for a small device: no labels, no fine-tuning."
EPILOG = """example:
  edgesolve build nets.py:resnet20 --weights resnet20.safetensors --data frames.npz --out resnet20.bundle \\
      --mean .485,.456,.406 --std .229,.224,.225 --target drop=5

MODEL is file.py:callable, package.module:callable (literal arguments allowed, nets.py:resnet(20)), or a .pt2 file.
CALIB is a folder of images, an .npy, or an .npz with x (n, h, w, c) and optional y, which is only reported on.
A --decompose build that is interrupted, or fails, leaves BUNDLE.work; the same command goes on from there.
Frames enter the model as (x * scale - mean) / std; scale defaults to 1/255 for uint8 and to 1 otherwise.
exit codes: 0 done, 2 usage, 5 an exported file disagrees with torch, 7 model or data unusable, 8 cannot write."""

TARGETS, MEASURED = ("drop", "params", "macs"), ("bytes", "latency", "latency-ms")


def parser() -> argparse.ArgumentParser:
    """All of its options may also stand in a --recipe file (TOML, same names with underscores)."""
    p = argparse.ArgumentParser(
        "edgesolve build",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("model", metavar="MODEL")
    p.add_argument("--data", required=True, metavar="CALIB")
    p.add_argument("--out", required=True, metavar="BUNDLE")
    p.add_argument(
        "--weights", metavar="F", help="safetensors, or a state dict read without pickle"
    )
    p.add_argument("--recipe", metavar="F.toml", help="defaults for the options below")
    p.add_argument(
        "--split", help="first module that the head replaces; otherwise found by --target"
    )
    p.add_argument(
        "--target",
        default="drop=1.0",
        help="drop=POINTS (default 1.0), params=R or macs=R; with --decompose also bytes=R, latency=R or "
        "latency-ms=T as measured here; R of the original",
    )
    p.add_argument(
        "--decompose",
        action="store_true",
        help="also decompose the layers before the head: low rank, Tucker-2, CP, in closed form",
    )
    p.add_argument(
        "--formats", default="tucker2,cp", help="decompositions allowed; 1×1 layers are low rank"
    )
    p.add_argument(
        "--frames", type=int, default=1024, help="calibration frames that --decompose walks"
    )
    p.add_argument(
        "--slower",
        action="store_true",
        help="keep decomposed layers that are smaller but were not faster when timed here",
    )
    p.add_argument(
        "--align",
        type=int,
        default=8,
        help="ranks are multiples of it, as runtimes compute channels in blocks (default 8; 1: smallest in weights)",
    )
    p.add_argument(
        "--refit",
        action="store_true",
        help="then refit runs of decomposed layers to the original's activations, where held-out answers improve",
    )
    p.add_argument(
        "--finetune",
        type=int,
        default=0,
        metavar="EPOCHS",
        help="then distil the original into the decomposed network by gradient descent, as above (minutes each)",
    )
    p.add_argument("--scale", type=float)
    p.add_argument("--mean", type=_floats, help="comma-separated, after scaling")
    p.add_argument("--std", type=_floats)
    p.add_argument("--classes", help="comma-separated names, or a file with one a line")
    p.add_argument(
        "--gates",
        choices=("auto", "teacher", "seeded", "seeded3"),
        default="auto",
        help="filters of the removed block, or ±1 from the seed, 1×1 or 3×3; default: the removed block's, if any",
    )
    p.add_argument(
        "--n-gates", type=int, help="filters; default: the largest of a ladder that saves"
    )
    p.add_argument(
        "--rank", type=int, help="directions that every gate passes on; default as above"
    )
    p.add_argument("--ramps", type=int, choices=(1, 2, 3), default=2, help="gates per filter")
    p.add_argument("--penalty", choices=("ridge", "group"), default="ridge")
    p.add_argument("--lam", type=float, default=0.003, help="group penalty, relative to lam_max")
    p.add_argument(
        "--flip", action="store_true", help="add mirrored calibration frames (images only)"
    )
    p.add_argument("--backends", default="onnx,litert")
    p.add_argument(
        "--int8",
        choices=("no", "add", "only"),
        default="no",
        help="add int8 backends with heads of their own; only: without the float ones (default no)",
    )
    p.add_argument(
        "--fixed-backbone", action="store_true", help="never fold new statistics into it"
    )
    p.add_argument(
        "--original", metavar="F.onnx", help="also write the unchanged network, for bench"
    )
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--threads", type=int, default=0, help="of torch; default all cores")
    p.add_argument("--json", action="store_true", help="print the report instead of a table")
    return p


def build(argv: list[str]) -> int:
    """Run the command; returns the exit code. EdgeErrors are the caller's to print."""
    p = parser()
    args = p.parse_args(argv)
    if args.recipe:
        p.set_defaults(**_recipe(args.recipe, p))
        args = p.parse_args(argv)
    from edgesolve.device.errors import UsageError

    options = _options(args, p)
    if min(args.n_gates or 1, args.rank or 1) < 1 or 0 in (args.n_gates, args.rank):
        raise UsageError("--n-gates and --rank must be at least 1.")
    import torch

    from edgesolve.host import recipe, report
    from edgesolve.host.bundle_writer import check_replaceable
    from edgesolve.host.load import load_calibration, load_model
    from edgesolve.host.shards import join, leave

    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    check_replaceable(Path(args.out))
    shards = join()
    log = recipe.Log(_say if shards.rank == 0 else _silent)
    log.step("load the model and the calibration frames")
    data = load_calibration(args.data)
    model = load_model(args.model, args.weights)
    provenance = _provenance(args, data)
    work = Path(f"{args.out}.work") if shards.count == 1 else None
    try:
        built = recipe.build(model, data, options, log, shards, work)
        if built is None:
            return 0
        found = recipe.write(built, args.out, options, log, provenance)
    finally:
        leave()
    _say("")
    print(json.dumps(found, indent=1) if args.json else report.table(found, args.out))
    return 0


def _options(args, p):
    from edgesolve.device.errors import UsageError
    from edgesolve.host.distill import HeadOptions
    from edgesolve.host.recipe import BuildOptions

    kind, _, value = args.target.partition("=")
    try:
        target = (kind, float(value))
    except ValueError:
        target = ("", 0.0)
    if target[0] not in (*TARGETS, *MEASURED) or not 0 < target[1] < float("inf"):
        raise UsageError(
            f"--target {args.target}: expected drop=1.0, params=0.5, macs=0.5, bytes=0.25, latency=0.5 or "
            "latency-ms=2.5."
        )
    if target[0] in MEASURED and not args.decompose:
        raise UsageError(
            f"--target {target[0]} needs --decompose: it is met by the forms that layers take."
        )
    if (args.refit or args.finetune) and not args.decompose:
        raise UsageError("--refit and --finetune follow a decomposition: add --decompose.")
    backends = tuple(b for b in args.backends.split(",") if b)
    if not backends or set(backends) - {"onnx", "litert"}:
        raise UsageError(f"--backends {args.backends}: expected onnx, litert or both.")
    return BuildOptions(
        split=args.split,
        target=target,
        scale=args.scale,
        mean=args.mean,
        std=args.std,
        classes=_classes(args.classes),
        backends=backends,
        fixed_backbone=args.fixed_backbone,
        original=args.original,
        head=HeadOptions(
            args.gates,
            args.n_gates,
            args.rank,
            args.ramps,
            args.penalty,
            args.lam,
            args.flip,
            args.seed,
        ),
        decompose=_decompose(args) if args.decompose else None,
        int8=None if args.int8 == "no" else args.int8,
    )


def _decompose(args):
    from edgesolve.device.errors import UsageError
    from edgesolve.host.decompose import DecomposeOptions
    from edgesolve.host.fit import FitOptions
    from edgesolve.host.refine import RefineOptions

    formats = tuple(f for f in args.formats.split(",") if f)
    if set(formats) - {"tucker2", "cp"} or not formats:
        raise UsageError(f"--formats {args.formats}: expected tucker2, cp or both.")
    if args.frames < 64:
        raise UsageError(f"--frames {args.frames}: at least 64 are needed, 1024 are advised.")
    if args.finetune < 0:
        raise UsageError(f"--finetune {args.finetune}: expected a number of epochs, 0 or more.")
    if args.align < 1:
        raise UsageError(f"--align {args.align}: expected a number of channels, 1 or more.")
    return DecomposeOptions(
        frames=args.frames,
        align=args.align,
        formats=formats,
        slower=args.slower,
        fit=FitOptions(pivots=False, seed=args.seed),
        refine=RefineOptions(args.refit, args.finetune, args.flip, args.seed),
    )


def _recipe(path: str, p: argparse.ArgumentParser) -> dict:
    from edgesolve.device.errors import UsageError

    try:
        import tomllib
    except ImportError:  # Python 3.10
        import tomli as tomllib
    try:
        found = tomllib.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: not a readable TOML file ({error}).") from error
    known = {a.dest for a in p._actions}
    if unknown := sorted(set(found) - known):
        raise UsageError(
            f"{path}: unknown {', '.join(unknown)}; known are the options of edgesolve build."
        )
    for action in p._actions:  # argparse checks no default
        if action.choices and found.get(action.dest, action.default) not in action.choices:
            raise UsageError(
                f"{path}: {action.dest} = {found[action.dest]!r}, expected one of "
                f"{', '.join(map(str, action.choices))}."
            )
    for key in ("mean", "std"):
        if key in found:
            found[key] = tuple(float(v) for v in found[key])
    return found


def _classes(given: str | None) -> tuple[str, ...] | None:
    if given is None:
        return None
    names = Path(given).read_text().splitlines() if Path(given).is_file() else given.split(",")
    return tuple(name.strip() for name in names if name.strip())


def _provenance(args, data) -> dict:
    digest = hashlib.sha256(data.x.tobytes()).hexdigest()
    return {"model": Path(args.model).name, "calibration_sha256": digest, "seed": args.seed}


def _floats(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in text.split(","))


def _silent(text: str, transient: bool = False) -> None:
    """Of processes other than the first."""


def _say(text: str, transient: bool = False) -> None:
    """Progress on stderr: lines that stay, and one that is overwritten where stderr is a terminal."""
    if sys.stderr.isatty():
        end = "" if transient else "\n"
        print(f"\r\x1b[2K{text}", end=end, file=sys.stderr, flush=True)
    elif not transient:
        print(text, file=sys.stderr, flush=True)
