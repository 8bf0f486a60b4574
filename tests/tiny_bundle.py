"""Writes OUT/bundle and OUT/int8, by the command line from a network trained here, and OUT/test.npz (x, y)."""

import argparse
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parent))
from tiny_model import tiny

SIDE, MEAN, STD = 16, 0.5, 0.25


def build_command(folder: Path, name: str = "bundle") -> list[str]:
    """The command that makes `folder`/`name`. The only place that names its options."""
    return [
        *(sys.executable, "-m", "edgesolve.device.cli", "build"),
        f"{Path(__file__).with_name('tiny_model.py')}:tiny",
        *("--weights", str(folder / "tiny.safetensors")),
        *("--data", str(folder / "calibration.npz")),
        *("--mean", ",".join([str(MEAN)] * 3), "--std", ",".join([str(STD)] * 3)),
        *("--out", str(folder / name), "--split", "4"),
    ]


def frames(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """`n` noisy gratings (n, 16, 16, 3) uint8; their direction is the class."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 4, n)
    angle = np.pi * y[:, None, None] / 4
    row, column = np.mgrid[:SIDE, :SIDE]
    phase = rng.uniform(0, 2 * np.pi, (n, 1, 1))
    wave = np.sin(0.9 * (row * np.sin(angle) + column * np.cos(angle)) + phase)
    colour = rng.uniform(0.1, 1.0, (n, 1, 1, 3))
    x = 127 + 70 * wave[..., None] * colour + rng.normal(0, 100, (n, SIDE, SIDE, 3))
    return np.clip(x, 0, 255).astype(np.uint8), y


def train(x: np.ndarray, y: np.ndarray, epochs: int = 4) -> dict[str, torch.Tensor]:
    """The weights of `tiny` after a few epochs of Adam."""
    torch.manual_seed(0)
    model = tiny().train()
    inputs, labels = torch.from_numpy(x).permute(0, 3, 1, 2), torch.from_numpy(y)
    inputs = (inputs / 255 - MEAN) / STD
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    for _ in range(epochs):
        for batch in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(inputs[batch]), labels[batch]).backward()
            optimizer.step()
    return {name: value.contiguous() for name, value in model.state_dict().items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--int8", action="store_true", help="also OUT/int8, with int8 backends")
    args = parser.parse_args()
    out = args.out
    out.mkdir(parents=True, exist_ok=True)
    x, y = frames(1024, seed=0)
    save_file(train(x, y), out / "tiny.safetensors")
    np.savez(out / "calibration.npz", x=x, y=y)
    test_x, test_y = frames(512, seed=1)
    np.savez(out / "test.npz", x=test_x, y=test_y)
    commands = [build_command(out)]
    if args.int8:
        commands.append([*build_command(out, "int8"), "--int8", "add"])
    sys.exit(max(subprocess.run(command).returncode for command in commands))


if __name__ == "__main__":
    main()
