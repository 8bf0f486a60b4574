"""What commands share: arguments, the state folder, what is printed."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path

BACKENDS = ("onnx", "litert", "onnx-int8", "litert-int8")


def bundle_argument(p):
    p.add_argument("bundle", metavar="BUNDLE")


def running(p):
    bundle_argument(p)
    p.add_argument(
        "--state", metavar="DIR", help="what was learnt here (default: per bundle, see status)"
    )
    p.add_argument("--backend", choices=("auto", *BACKENDS), default="auto")
    p.add_argument("--threads", type=int, default=1)


def with_input(p):
    running(p)
    p.add_argument("input", metavar="INPUT", help="image, folder, .npy or .npz with x (n, h, w, c)")


def signature_arguments(p):
    p.add_argument("--key", metavar="F", help="public key (or a folder of them) of the vendor")
    p.add_argument("--require-signature", action="store_true", help="refuse an unsigned bundle")


def nothing(p):
    pass


def open_frames(bundle, path):
    from edgesolve.device.frames import load_frames

    shape = bundle.contract.shape
    return load_frames(path, size=shape[:2], channels=1 if shape[-1] == 1 else 3)


def state_folder(args, bundle) -> Path:
    """--state, or a folder of this bundle's own under the user's state directory."""
    if args.state:
        return Path(args.state)
    root = os.environ.get("EDGESOLVE_STATE")
    if root:
        return Path(root)
    home = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
    where = hashlib.sha256(str(bundle.path.resolve()).encode()).hexdigest()[:8]
    return home / "edgesolve" / f"{bundle.manifest['name']}-{where}"


def emit(args, result: dict, text) -> None:
    print(json.dumps(result, default=float) if args.json else text(result))


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
