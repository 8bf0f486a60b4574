"""Fails unless this interpreter has edgesolve from its wheel and nothing of the workstation."""

import importlib.util
import sys
from pathlib import Path

import edgesolve.device

found = [n for n in ("torch", "onnx", "sklearn", "scipy") if importlib.util.find_spec(n)]
if found:
    sys.exit(f"{sys.prefix} holds {', '.join(found)}: not what a device has.")
installed = Path(edgesolve.device.__file__).resolve()
if "site-packages" not in installed.parts and "site" not in installed.parts:
    sys.exit(f"edgesolve.device comes from {installed}, expected the installed wheel.")
