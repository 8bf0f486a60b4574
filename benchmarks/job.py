"""What the sections of the main job share: sizes, folders, and bundles built by the real command."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import real_data
from environment import ROOT, commit, edgesolve, say

IMAGENET = ("--mean", ".485,.456,.406", "--std", ".229,.224,.225")


@dataclass(frozen=True, slots=True)
class Recipe:
    """One network and the options that its bundle is built with."""

    title: str
    model: str
    weights: str
    calibration: str
    options: tuple[str, ...]


RECIPES = {
    "resnet56": Recipe(
        "ResNet-56",
        "cifar_resnet(56)",
        "cifar10_resnet56",
        "cifar_calibration",
        (*IMAGENET, "--split", "layer3.6", "--flip"),
    ),
    "resnet20": Recipe(
        "ResNet-20",
        "cifar_resnet(20)",
        "cifar10_resnet20",
        "cifar_calibration",
        (*IMAGENET, "--split", "layer3.2", "--flip"),
    ),
    "resnet56_small": Recipe(
        "ResNet-56, head, decomposition and int8",
        "cifar_resnet(56)",
        "cifar10_resnet56",
        "cifar_calibration",
        (
            *IMAGENET,
            *("--split", "layer3.6", "--flip", "--decompose", "--int8", "add"),
            *("--target", "latency=0.475", "--backends", "onnx"),
        ),
    ),
    # Named, since --target drop=3 is refused: from 600 items no candidate comes that close.
    "dscnn": Recipe(
        "DS-CNN",
        "dscnn",
        "kws_dscnn_mlperftiny",
        "kws_calibration",
        ("--split", "pw.2"),
    ),
}


@dataclass(frozen=True)
class Job:
    """`quick`: small subsets, to see that everything runs; its figures are not to be quoted.

    `reuse`: keep bundles under `out` that were built from other sources.
    """

    out: Path
    quick: bool
    reuse: bool
    threads: int
    builds: dict[str, dict[str, Any]] = field(default_factory=dict)

    def size(self, full: int, quick: int) -> int:
        return quick if self.quick else full

    def names(self, *names: str) -> list[str]:
        """The networks to measure; a quick run leaves out those that take minutes to build."""
        return [n for n in names if not (self.quick and n.startswith("resnet56"))]

    @cached_property
    def cifar(self) -> real_data.Labelled:
        return real_data.cifar_test()

    @cached_property
    def keywords(self) -> real_data.Labelled:
        return real_data.keywords()[1]

    def test(self, name: str) -> real_data.Labelled:
        return self.keywords if name.startswith("dscnn") else self.cifar

    def original(self, name: str) -> Path:
        """The unchanged network as ONNX, written by the same build."""
        self.bundle(name)
        return self.out / f"{name}.onnx"

    def bundle(self, name: str) -> Path:
        """The bundle `name`, built unless these very sources and options built it before."""
        target = self.out / f"{name}.bundle"
        if name in self.builds:
            return target
        recipe, record = RECIPES[name], self.out / f"{name}.build.json"
        model = f"benchmarks/networks.py:{recipe.model}"
        args = ("build", model, "--weights", real_data.weights(recipe.weights))
        args += ("--data", self.calibration(recipe.calibration), "--out", target)
        args += ("--original", self.out / f"{name}.onnx", *recipe.options)
        stamp = _stamp(args)
        if target.is_dir() and record.is_file():
            found = json.loads(record.read_text())
            if self.reuse or found["stamp"] == stamp:
                self.builds[name] = found
                return target
        say(f"building {name}")
        shutil.rmtree(target, ignore_errors=True)
        record.unlink(missing_ok=True)
        before = commit()
        done = edgesolve(*args, quiet=False)
        found = {
            "stamp": stamp,
            "commit": before,
            "command": done.command.removesuffix(" --json"),
            "seconds": done.wall_s,
            "report": done.report,
        }
        record.write_text(json.dumps(found, indent=1))
        self.builds[name] = found
        return target

    def calibration(self, name: str) -> Path:
        path = self.out / f"{name}.npz"
        if not path.is_file():
            cifar = name == "cifar_calibration"
            x = real_data.cifar_train() if cifar else real_data.keywords()[0]
            np.savez(path, x=x[: self.size(len(x), 4000)])
        return path

    def window(self, name: str, x: np.ndarray) -> Path:
        """Unlabelled frames as a file for the command line."""
        path = self.out / "windows" / f"{name}.npz"
        path.parent.mkdir(exist_ok=True)
        np.savez(path, x=x)
        return path

    def state(self, name: str) -> Path:
        """A state folder in which nothing was learnt yet."""
        path = self.out / "state" / name
        shutil.rmtree(path, ignore_errors=True)
        return path


def _stamp(args: tuple) -> str:
    """Of the sources that decide what a build gives, and its arguments."""
    digest = hashlib.sha256(repr([str(a) for a in args]).encode())
    sources = [p for part in ("host", "kernels", "device") for p in (ROOT / part).glob("*.py")]
    for path in [*sorted(sources), ROOT / "benchmarks" / "networks.py"]:
        digest.update(path.read_bytes())
    return digest.hexdigest()
