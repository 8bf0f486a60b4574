"""What a long build has finished, so that it can go on after an interruption."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import numpy as np

from edgesolve.host.chain import Chain, Factor
from edgesolve.host.fit import Fitted
from edgesolve.host.plan import Candidate, Harm, Survey
from edgesolve.host.sites import Site


def digest(*parts: object) -> str:
    """SHA-256 of arrays and of the JSON of anything else."""
    sha = hashlib.sha256()
    for part in parts:
        if isinstance(part, np.ndarray):
            sha.update(f"{part.dtype}{part.shape}".encode())
            sha.update(np.ascontiguousarray(part).tobytes())
        else:
            sha.update(json.dumps(part, sort_keys=True, default=str).encode())
    return sha.hexdigest()


class Checkpoint:
    """Results by name in `folder`, thrown away where it was begun for another `key` (network, frames, options).

    Every file is written aside and renamed, so that one that is there is whole.
    """

    def __init__(self, folder: Path, key: str):
        self.folder = folder
        mark = folder / "key"
        if folder.exists() and (not mark.exists() or mark.read_text() != key):
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if not mark.exists():
            self._write("key", key.encode())

    def surveys(self, found: list[Site]) -> list[Survey] | None:
        """The surveys saved before, for the same sites."""
        raw = self._read("survey.json")
        if raw is None:
            return None
        made = []
        for site, entry in zip(found, json.loads(raw), strict=True):
            candidates = tuple(
                Candidate(**c | {"ranks": tuple(c["ranks"])}) for c in entry["candidates"]
            )
            harm = Harm(*(tuple(v) for v in entry["harm"]))
            made.append(Survey(site, candidates, harm, entry["reason"]))
        return made

    def save_surveys(self, surveys: list[Survey]) -> None:
        rows = [
            {
                "candidates": [asdict(c) for c in s.candidates],
                "harm": [s.harm.distortion, s.harm.divergence],
                "reason": s.reason,
            }
            for s in surveys
        ]
        self._write("survey.json", json.dumps(rows).encode())

    def arrays(self, name: str) -> dict[str, np.ndarray] | None:
        from safetensors.numpy import load

        raw = self._read(f"{name}.safetensors")
        return None if raw is None else load(raw)

    def save_arrays(self, name: str, arrays: Mapping[str, np.ndarray]) -> None:
        from safetensors.numpy import save

        kept = {k: np.ascontiguousarray(v) for k, v in arrays.items()}
        self._write(f"{name}.safetensors", save(kept))

    def layer(self, name: str) -> Fitted | None:
        """The fitted layer saved under `name`."""
        found, raw = self.arrays(name), self._read(f"{name}.json")
        if found is None or raw is None:
            return None
        entry = json.loads(raw)
        factors = tuple(
            Factor(found[f"weight_{i}"], f["axes"], f["groups"], tuple(f["pivots"]))
            for i, f in enumerate(entry["factors"])
        )
        chain = Chain(entry["format"], tuple(entry["ranks"]), factors)
        return Fitted(chain, found["bias"], **entry["figures"])

    def save_layer(self, name: str, fitted: Fitted) -> None:
        chain = fitted.chain
        arrays = {f"weight_{i}": f.weight for i, f in enumerate(chain.factors)}
        self.save_arrays(name, arrays | {"bias": fitted.bias})
        figures = ("ridge", "rows", "predicted", "measured", "held_out")
        entry = {
            "format": chain.format,
            "ranks": chain.ranks,
            "factors": [
                {"axes": f.axes, "groups": f.groups, "pivots": f.pivots} for f in chain.factors
            ],
            "figures": {k: getattr(fitted, k) for k in figures},
        }
        self._write(f"{name}.json", json.dumps(entry).encode())

    def discard(self) -> None:
        """Remove everything: the build is finished."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _read(self, name: str) -> bytes | None:
        path = self.folder / name
        return path.read_bytes() if path.exists() else None

    def _write(self, name: str, data: bytes) -> None:
        aside = self.folder / f"{name}.partial"
        aside.write_bytes(data)
        os.replace(aside, self.folder / name)
