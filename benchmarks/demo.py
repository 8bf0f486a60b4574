"""The main job on the embedded default: scikit-learn's digits, from training to a recalibrated device.

Runs the command line as a user would and prints every command; ends with the path of an HTML report.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from torch import nn

HERE = Path(__file__).resolve().parent
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


class Block(nn.Module):
    """Two 3×3 convolutions around a shortcut."""

    def __init__(self, c: int):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(c, c, 3, padding=1, bias=False), nn.BatchNorm2d(c)
        self.conv2, self.bn2 = nn.Conv2d(c, c, 3, padding=1, bias=False), nn.BatchNorm2d(c)

    def forward(self, x):
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(x + self.bn2(self.conv2(y)))


def digits_cnn() -> nn.Module:
    """(n, 1, 16, 16) to (n, 10) logits."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        Block(32),
        Block(32),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 10),
    )


def frames() -> tuple[np.ndarray, np.ndarray]:
    """x (1797, 16, 16, 1) uint8, y (1797,), shuffled by a fixed seed."""
    digits = load_digits()
    x = np.kron(digits.images / 16.0 * 255.0, np.ones((1, 2, 2))).astype(np.uint8)[..., None]
    order = np.random.default_rng(0).permutation(len(x))
    return x[order], digits.target[order]


def another_sensor(x: np.ndarray, seed: int = 1) -> np.ndarray:
    """A dimmer, foggier, noisier camera."""
    noise = np.random.default_rng(seed).normal(0, 12, x.shape)
    return np.clip(0.35 * x + 90 + noise, 0, 255).astype(np.uint8)


def train(x: np.ndarray, y: np.ndarray, epochs: int = 12) -> nn.Module:
    """`digits_cnn` after a few seconds of Adam."""
    torch.manual_seed(0)
    model = digits_cnn().train()
    inputs = torch.from_numpy(x).permute(0, 3, 1, 2).float() / 255
    labels = torch.from_numpy(y)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(epochs):
        for batch in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs[batch]), labels[batch]).backward()
            optimizer.step()
    return model.eval()


class Story:
    """Runs `edgesolve` commands and remembers what they printed."""

    def __init__(self, folder: Path):
        self.folder, self.steps = folder, []

    def run(self, title: str, *args: str) -> dict:
        shown = "edgesolve " + " ".join(args)
        print(f"\n$ {shown}", flush=True)
        began = time.perf_counter()
        command = [sys.executable, "-m", "edgesolve.device.cli", *args, "--json"]
        done = subprocess.run(command, cwd=self.folder, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            sys.exit(f"demo: this step failed with exit code {done.returncode}: {done.stdout}")
        seconds = time.perf_counter() - began
        found = json.loads(done.stdout)
        self.steps.append({"title": title, "command": shown, "seconds": seconds})
        return found

    def accuracy(self, title: str, data: str) -> float:
        found = self.run(title, "eval", "digits.bundle", data, "--state", "state")["accuracy"]
        self.steps[-1]["result"] = f"accuracy {100 * found:.1f} %"
        print(self.steps[-1]["result"])
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("demo_out"))
    out = parser.parse_args().out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    if (out / "state").exists():
        import shutil

        shutil.rmtree(out / "state")
    began = time.perf_counter()
    print("training a small CNN on 1,000 of scikit-learn's digits …", flush=True)
    x, y = frames()
    model = train(x[:1000], y[:1000])
    save_file(model.state_dict(), out / "digits.safetensors")
    np.savez(out / "calibration.npz", x=x[:1000])
    np.savez(out / "clean.npz", x=x[1000:], y=y[1000:])
    shifted = another_sensor(x[1000:])
    np.savez(out / "window.npz", x=shifted[:128])
    np.savez(out / "shifted.npz", x=shifted[128:], y=y[1000:][128:])
    Image.fromarray(x[1000, :, :, 0]).save(out / "digit.png")
    found = story(out)
    page = out / "report.html"
    page.write_text(html(found, x[1000:1008], shifted[:8]))
    print(f"\ndone in {time.perf_counter() - began:.0f} s; open {page}")


def story(out: Path) -> dict:
    """Every command of the main job, and the figures that they gave."""
    s = Story(out)
    build = s.run(
        "build", "build", f"{HERE / 'demo.py'}:digits_cnn", "--weights", "digits.safetensors",
        "--data", "calibration.npz", "--out", "digits.bundle", "--classes", ",".join(NAMES),
        "--original", "digits.onnx", "--target", "drop=2",
    )  # fmt: skip
    s.steps[-1]["command"] = s.steps[-1]["command"].replace(f"{HERE}/", "benchmarks/")
    s.steps[-1]["result"] = (
        f"{build['params']['before']:,} parameters became {build['params']['after']:,}, "
        f"agreement {100 * build['agreement']['after']:.1f} %"
    )
    print(s.steps[-1]["result"])
    item = s.run("predict", "predict", "digits.bundle", "digit.png", "--state", "state")["items"][0]
    s.steps[-1]["result"] = f"{item['class']}, score {item['score']:.3f}"
    print(s.steps[-1]["result"])
    clean = s.accuracy("clean frames", "clean.npz")
    broken = s.accuracy("another sensor", "shifted.npz")
    decision = s.run(
        "recalibrate", "recalibrate", "digits.bundle", "window.npz", "--state", "state"
    )
    s.steps[-1]["result"] = (
        f"{decision['decision']} ({decision['reason']}), {decision['n']} unlabelled frames, "
        f"{decision['seconds']:.1f} s, relative gap {decision['relative_gap'] or 0:.0e}"
    )
    print(s.steps[-1]["result"])
    repaired = s.accuracy("another sensor, recalibrated", "shifted.npz")
    bench = s.run(
        "bench", "bench", "digits.bundle", "--state", "state", "--quick",
        "--against", "digits.onnx", "--html", "bench.html",
    )  # fmt: skip
    s.steps[-1]["result"] = (
        f"p50 {bench['p50_ms']:.3f} ms, cold start {bench['cold_start_ms']:.0f} ms"
    )
    print(s.steps[-1]["result"])
    s.run("roll back", "rollback", "digits.bundle", "--state", "state")
    s.steps[-1]["result"] = "the factory head is in force again"
    s.accuracy("another sensor, rolled back", "shifted.npz")
    return {
        "clean": clean,
        "broken": broken,
        "repaired": repaired,
        "steps": s.steps,
        "build": build,
    }


def html(found: dict, clean: np.ndarray, shifted: np.ndarray) -> str:
    """One self-contained page, readable light and dark."""
    from jinja2 import Environment

    template = (HERE / "demo.html.j2").read_text()
    strips = {"clean": _strip(clean), "shifted": _strip(shifted)}
    return Environment(autoescape=True).from_string(template).render(f=found, strips=strips)


def _strip(frames: np.ndarray) -> str:
    """Frames side by side as a PNG data address."""
    row = np.kron(np.concatenate(list(frames[..., 0]), axis=1), np.ones((4, 4), np.uint8))
    data = io.BytesIO()
    Image.fromarray(row.astype(np.uint8)).save(data, "PNG")
    return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()


if __name__ == "__main__":
    main()
