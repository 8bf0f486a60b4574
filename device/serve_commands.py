"""The commands around the service: `serve`, what an operator decides, and what the state is worth."""

from __future__ import annotations

import os
from pathlib import Path

from edgesolve.device.arguments import emit, running, signature_arguments, state_folder
from edgesolve.device.errors import InputError, UsageError


def _serve_arguments(p):
    running(p)
    p.add_argument(
        "--source", required=True, metavar="S", help="a folder to watch, camera[:N], or stdin"
    )
    p.add_argument("--mode", choices=("off", "observe", "propose", "auto"), default="propose")
    p.add_argument("--device", metavar="NAME", help="how it is called in messages (default: host)")
    p.add_argument("--http", metavar="ADDR", help="listen here, e.g. 127.0.0.1:8080 (default: no)")
    p.add_argument("--token-file", metavar="F", help="holds the token that HTTP commands need")
    p.add_argument("--mqtt", metavar="URL", help="mqtt://user:password@host, or EDGESOLVE_MQTT")
    p.add_argument("--discovery", action="store_true", help="announce to Home Assistant")
    p.add_argument("--frames", type=int, default=512, help="largest window kept, in memory only")
    p.add_argument("--seconds", type=float, default=60.0, help="time budget of an adaptation")
    p.add_argument("--memory-mib", type=float, help="memory budget of an adaptation")
    p.add_argument(
        "--look-every", type=float, default=60.0, metavar="S", help="between drift tests"
    )
    p.add_argument(
        "--min-interval", type=float, default=3600.0, metavar="S", help="between updates"
    )
    p.add_argument("--daily-limit", type=int, default=4, help="updates a day")
    p.add_argument("--cooldown", type=float, default=86400.0, metavar="S", help="after a rollback")
    p.add_argument(
        "--confirmations", type=int, default=2, help="drifted windows in a row to act on"
    )
    p.add_argument("--probation", type=float, default=900.0, metavar="S", help="watch a new head")
    p.add_argument("--write-budget-mib", type=float, default=32.0, help="written a day at most")
    p.add_argument("--deadline-ms", type=float, help="count answers that took longer")
    signature_arguments(p)
    p.add_argument("--new-only", action="store_true", help="leave out what lies in the folder now")
    p.add_argument("--quiet", action="store_true", help="events only, no line per answer")


def serve(args) -> int:
    """Answer frames as they come, watch for drift, adapt inside a budget, and go back when it did harm.

    example: edgesolve serve resnet20.bundle --source frames/ --mode auto --http 127.0.0.1:8080"""
    from edgesolve.device.adapt import Options
    from edgesolve.device.bundle import open_bundle
    from edgesolve.device.console import run
    from edgesolve.device.policy import Policy
    from edgesolve.device.service import ServeOptions
    from edgesolve.device.signature import check, trusted_keys

    positive = ("frames", "seconds", "look_every", "daily_limit", "confirmations", "threads")
    for name in positive:
        if getattr(args, name) <= 0:
            raise UsageError(
                f"--{name.replace('_', '-')} is {getattr(args, name)}, must be positive."
            )
    for name in ("min_interval", "cooldown", "probation", "write_budget_mib"):
        if getattr(args, name) < 0:
            raise UsageError(f"--{name.replace('_', '-')} is {getattr(args, name)}, must be >= 0.")
    least = Policy().min_samples
    if args.frames < least:
        raise UsageError(f"--frames is {args.frames}; a drift test takes at least {least}.")
    bundle = open_bundle(args.bundle)
    signature = check(
        bundle, trusted_keys(args.key), args.require_signature or args.key is not None
    )
    policy = Policy(
        mode=args.mode,
        min_interval_s=args.min_interval,
        daily_limit=args.daily_limit,
        cooldown_s=args.cooldown,
        confirmations=args.confirmations,
        look_every_s=args.look_every,
        write_budget_mib=args.write_budget_mib,
    )
    options = ServeOptions(
        source=args.source,
        existing=not args.new_only,
        state=state_folder(args, bundle),
        backend=args.backend,
        threads=args.threads,
        device=args.device or _host_name(),
        policy=policy,
        adapt=Options(seconds=args.seconds, memory_mib=args.memory_mib, max_frames=args.frames),
        probation_s=args.probation,
        deadline_ms=args.deadline_ms,
        http=args.http,
        token=_token(args.token_file),
        mqtt=args.mqtt or os.environ.get("EDGESOLVE_MQTT"),
        discovery=args.discovery,
        signature=signature,
    )
    return run(bundle, options, as_json=args.json, answers=not args.quiet)


def _host_name() -> str:
    import platform
    import re

    return re.sub(r"[^A-Za-z0-9_-]", "-", platform.node())[:64] or "device"


def _token(path: str | None) -> str | None:
    """From a file, or EDGESOLVE_TOKEN: an argument would be seen by every process."""
    if path is None:
        return os.environ.get("EDGESOLVE_TOKEN") or None
    try:
        token = Path(path).read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as a token ({error}).") from error
    if len(token) < 16:
        raise InputError(f"{path}: the token has {len(token)} characters, at least 16 are needed.")
    return token


# -- an operator's decisions, with the service running or not -----------------------------------


def approve(args) -> int:
    """Put the proposed head in force.

    example: edgesolve approve resnet20.bundle --state state"""
    from edgesolve.device.operator import approve as act

    return _act(args, act)


def reject(args) -> int:
    """Throw the proposed head away.

    example: edgesolve reject resnet20.bundle --state state"""
    from edgesolve.device.operator import reject as act

    return _act(args, act)


def freeze(args) -> int:
    """Stop all learning here until `unfreeze`; answers go on.

    example: edgesolve freeze resnet20.bundle --state state"""
    from edgesolve.device.operator import freeze as act

    return _act(args, act)


def unfreeze(args) -> int:
    """Let it learn again.

    example: edgesolve unfreeze resnet20.bundle --state state"""
    from edgesolve.device.operator import unfreeze as act

    return _act(args, act)


def _act(args, act) -> int:
    from edgesolve.device.bundle import open_bundle
    from edgesolve.device.store import Store

    bundle = open_bundle(args.bundle)
    emit(args, act(bundle, Store(state_folder(args, bundle))), lambda found: found["sentence"])
    return 0


# -- what was learnt ----------------------------------------------------------------------------


def _forget_arguments(p):
    running(p)
    p.add_argument("--generation", type=int, action="append", metavar="N", help="may be repeated")
    p.add_argument("--since", metavar="TIME", help="unix seconds, or 2026-11-22T08:00")


def forget(args) -> int:
    """Unlearn: solve the head again as if a generation's frames had never been seen.

    example: edgesolve forget resnet20.bundle --state state --generation 7"""
    from edgesolve.device.bundle import open_bundle
    from edgesolve.device.forget import forget as act
    from edgesolve.device.store import Store

    if bool(args.generation) == bool(args.since):
        raise UsageError("forget takes either --generation N or --since TIME.")
    bundle = open_bundle(args.bundle)
    found = act(
        bundle,
        Store(state_folder(args, bundle)),
        generations=set(args.generation) if args.generation else None,
        since=_time(args.since) if args.since else None,
    )
    emit(args, found, lambda f: f["sentence"])
    return 0


def _time(text: str) -> float:
    from datetime import datetime

    try:
        return float(text)
    except ValueError:
        pass
    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError:
        raise UsageError(f"--since {text}: expected unix seconds or 2026-11-22T08:00.") from None


def audit(args) -> int:
    """Replay what was learnt here: hashes, seals, and every head solved again from its stored moments.

    example: edgesolve audit resnet20.bundle --state state"""
    from edgesolve.device.audit import audit as act
    from edgesolve.device.audit import audit_text
    from edgesolve.device.bundle import open_bundle
    from edgesolve.device.store import Store

    bundle = open_bundle(args.bundle)
    found = act(bundle, Store(state_folder(args, bundle)))
    emit(args, found, audit_text)
    return 8 if found["verdict"] == "differs" else 0


COMMANDS = {
    "serve": (serve, _serve_arguments, "answer, watch, adapt: the service"),
    "approve": (approve, running, "put the proposed head in force"),
    "reject": (reject, running, "throw the proposed head away"),
    "freeze": (freeze, running, "stop all learning here"),
    "unfreeze": (unfreeze, running, "let it learn again"),
    "forget": (forget, _forget_arguments, "unlearn a window, exactly"),
    "audit": (audit, running, "replay and check what was learnt"),
}
