"""`edgesolve`: one command. Imports happen inside the commands, so that `predict` starts fast."""

from __future__ import annotations

import argparse
import json
import os
import sys

from edgesolve.device import commands, serve_commands
from edgesolve.device.errors import EdgeError, UsageError

EXIT_CODES = """exit codes: 0 done (any decision of recalibrate) · 1 a defect of ours · 2 usage ·
3 bundle damaged or too new · 4 signature · 5 parity failed · 6 runtime or extra missing ·
7 input outside the contract · 8 state unusable · 9 busy · 10 kept, 11 proposed (with --exit-code) ·
12 bench invalid (--strict) · 13 regression · 14 doctor fault"""
COMMANDS = {**commands.COMMANDS, **serve_commands.COMMANDS}


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        return _dispatch(argv)
    except EdgeError as error:
        if "--json" in argv:
            print(json.dumps({"error": str(error), "exit_code": error.exit_code}))
        print(f"edgesolve: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("edgesolve: interrupted; nothing was changed.", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 0
    except Exception as error:
        if "-v" in argv:
            raise
        print(
            f"edgesolve: a defect: {type(error).__name__}: {error} (run again with -v for the traceback)",
            file=sys.stderr,
        )
        return 1


def _dispatch(argv: list[str]) -> int:
    argv = [a for a in argv if a != "-v"]
    if not argv or argv[0] in ("-h", "--help"):
        print(_overview())
        return 0 if argv else 2
    if argv[0] == "--version":
        from importlib.metadata import version

        print(f"edgesolve {version('edgesolve')}")
        return 0
    name, rest = argv[0], argv[1:]
    if name in COMMANDS:
        command, build, _ = COMMANDS[name]
        parser = argparse.ArgumentParser(
            f"edgesolve {name}",
            description=command.__doc__,
            epilog=EXIT_CODES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        build(parser)
        if not any("--json" in action.option_strings for action in parser._actions):
            parser.add_argument("--json", action="store_true", help="machine-readable result")
        return command(parser.parse_args(rest))
    return _plugin(name, rest)


def _plugin(name: str, rest: list[str]) -> int:
    """Commands of other parts (the host's `build`), known from package metadata alone until they run."""
    from importlib.metadata import entry_points

    for point in entry_points(group="edgesolve.commands"):
        if point.name == name:
            try:
                return point.load()(rest)
            except ModuleNotFoundError as error:
                raise _missing(name, error) from error
    raise UsageError(f"{name}: no such command. edgesolve --help lists them.")


def _missing(name: str, error: ModuleNotFoundError) -> EdgeError:
    from edgesolve.device.errors import BackendError

    return BackendError(
        f"edgesolve {name} needs {error.name}, which is not installed: pip install 'edgesolve[host]'"
    )


def _overview() -> str:
    from importlib.metadata import entry_points

    lines = [
        "usage: edgesolve COMMAND …",
        "",
        "Run and recalibrate a compressed CNN on a small device.",
        "",
    ]
    lines += [f"  {name:<14} {text}" for name, (_, _, text) in COMMANDS.items()]
    names = sorted(p.name for p in entry_points(group="edgesolve.commands"))
    lines += [f"  {name:<14} on the workstation: needs edgesolve[host]" for name in names]
    lines += ["", "edgesolve COMMAND --help has an example.", "", EXIT_CODES]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
