"""`edgesolve keygen` and `edgesolve sign`: the vendor's commands."""

from __future__ import annotations

import argparse
import json

from edgesolve.host.sign import keygen as make
from edgesolve.host.sign import sign as write


def keygen(argv: list[str]) -> int:
    """A new Ed25519 key pair."""
    p = _parser(
        "keygen",
        "Make a key pair: PRIVATE stays with you, PUBLIC goes onto every device.",
        "edgesolve keygen vendor.pem vendor.pub",
    )
    p.add_argument("private", metavar="PRIVATE")
    p.add_argument("public", metavar="PUBLIC")
    args = p.parse_args(argv)
    identity = make(args.private, args.public)
    _print(args, {"key_id": identity}, f"Key {identity}: keep {args.private} to yourself.")
    return 0


def sign(argv: list[str]) -> int:
    """Sign a bundle's manifest, which names every file with its SHA-256."""
    p = _parser(
        "sign",
        "Sign a finished bundle; devices check it with `edgesolve serve --key vendor.pub --require-signature`.",
        "edgesolve sign resnet20.bundle --key vendor.pem",
    )
    p.add_argument("bundle", metavar="BUNDLE")
    p.add_argument("--key", required=True, metavar="PRIVATE")
    args = p.parse_args(argv)
    record = write(args.bundle, args.key)
    _print(args, record, f"Signed with key {record['key_id']}.")
    return 0


def _parser(name: str, text: str, example: str) -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        f"edgesolve {name}",
        description=text,
        epilog=f"example: {example}\n\nneeds PyNaCl: pip install 'edgesolve[sign]'",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--json", action="store_true", help="machine-readable result")
    return p


def _print(args: argparse.Namespace, result: dict, text: str) -> None:
    print(json.dumps(result) if args.json else text)
