"""Where `edgesolve serve` gets its frames: a camera, a watched folder, or arrays on standard input."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from edgesolve.device.bundle import Contract


@dataclass(frozen=True, slots=True)
class Item:
    """`frame` (h, w, c) in the contract; or None and `problem`, one sentence that says why."""

    name: str
    frame: np.ndarray | None
    problem: str = ""


class SourceEnded(Exception):
    """There will be no more frames; the message says why. Not an error: a pipe ends when its writer is done."""


class Source(Protocol):
    def next(self, timeout: float) -> Item | None:
        """The next item; None if there is none within `timeout` seconds. Raises SourceEnded after the last."""
        ...

    def close(self) -> None:
        """Let go of everything within a second; may be called twice, and while another thread is in `next`."""
        ...


def open_source(spec: str, contract: Contract, *, existing: bool = True) -> Source:
    """The source that `spec` names: "camera", "camera:1", "camera:picamera2", "stdin" or "-", or a folder's path.

    `existing`: whether files that a folder holds already are frames too, or only those that come. Raises InputError
    (no such folder, a contract that pictures can't meet), UsageError (no such camera name) or BackendError.
    """
    if spec in ("stdin", "-"):
        from edgesolve.device.source_stdin import StdinSource

        return StdinSource(contract)
    if spec.partition(":")[0] == "camera":
        from edgesolve.device.source_camera import CameraSource

        return CameraSource(spec.partition(":")[2], contract)
    from edgesolve.device.source_folder import FolderSource

    return FolderSource(os.path.expanduser(spec), contract, existing=existing)
