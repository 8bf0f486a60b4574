"""Adaptation beyond images: keywords in noise, and people whom an activity recogniser never saw."""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import real_data
import torch
from adaptation_common import Bench, Result, Row, compared, means, summary
from adaptation_methods import CANDIDATES, METHODS, Student
from adaptation_network import activity as activity_network
from environment import edgesolve, say
from figures import Figure, at_least, plain
from job import Job
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

LENGTH = 64
"""Samples of a window: 2.56 s at 25 Hz."""
STRANGERS = (10, 11, 12, 13, 14)
"""Subjects whom neither training nor calibration saw."""
NATS_PER_DB = np.log(10) / 20
OURS = ("ours", "ours, head only")


def keywords(bench: Bench) -> Result:
    """DS-CNN under broadband noise. The audio isn't at hand: noise joins the mel magnitudes that the MFCC's
    pseudo-inverse gives, so this is an approximation."""
    job, test = bench.job, bench.job.keywords
    student = Student(job.bundle("dscnn"), job.threads)
    order = np.random.default_rng(5).permutation(len(test))
    rows: list[Row] = []
    for name, snr in (("no noise", None), ("10 dB", 10.0), ("0 dB", 0.0)):
        say(f"keywords: {name}")
        x = test.x if snr is None else noisy(test.x, snr)
        pool, judged = x[order[:160]], x[order[160:]]
        rows += compared(
            bench, student, name, pool, judged, test.y[order[160:]], METHODS | CANDIDATES
        )
    return _figures(rows, "keywords, "), summary(bench, rows, "Accuracy (%), keywords in noise")


def noisy(mfcc: np.ndarray, snr_db: float, bands: int = 40, seed: int = 0) -> np.ndarray:
    """mfcc (n, frames, k, 1) float32: DCT-II of natural-log mel magnitudes. Broadband noise `snr_db` below each
    item's loudest frame; what the k coefficients can't tell is left as it was."""
    m = mfcc[..., 0].astype(np.float64)
    k = m.shape[2]
    angle = np.pi / bands * np.outer(np.arange(k), np.arange(bands) + 0.5)
    C = 2 * np.cos(angle) / np.sqrt(2 * bands)
    mel = m @ np.linalg.pinv(C).T
    loudest = mel.mean(2).max(1)[:, None, None]
    jitter = 0.3 * np.random.default_rng(seed).standard_normal(mel.shape)
    noise = loudest - snr_db * NATS_PER_DB + jitter
    moved = m + (0.5 * np.logaddexp(2 * mel, 2 * noise) - mel) @ C.T
    return moved[..., None].astype(np.float32)


def activity(bench: Bench) -> Result:
    """A convolutional network trained on nine people of USC-HAD, adapted to each of five others."""
    student = Student(_built(bench.job), bench.job.threads)
    data = _sensors()
    rows: list[Row] = []
    for subject in STRANGERS[: bench.job.size(len(STRANGERS), 1)]:
        say(f"activity: subject {subject}")
        mine = np.flatnonzero(data.subject == subject)
        mine = np.random.default_rng(subject).permutation(mine)
        pool, judged = mine[: len(mine) // 2], mine[len(mine) // 2 :]
        rows += compared(
            bench,
            student,
            f"subject {subject}",
            data.x[pool],
            data.x[judged],
            data.y[judged],
            METHODS | CANDIDATES,
        )
    return _figures(rows, "activity, "), summary(bench, rows, "Accuracy (%), USC-HAD by person")


def _figures(rows: list[Row], title: str) -> list[Figure]:
    """The bar is to do no harm; how much it helps is a figure without one."""
    found = []
    for case in dict.fromkeys(r.case for r in rows):
        value = means([r for r in rows if r.case == case])
        for name in OURS:
            kept = sum(r.decision == "kept" for r in rows if (r.case, r.method) == (case, name))
            found.append(
                at_least(
                    f"{title}{case}: {name}, over doing nothing",
                    value[name] - value["none"],
                    -0.5,
                    " points",
                    baseline=f"none {value['none']:.2f} %; kept {kept} windows",
                )
            )
    every = means(rows)
    found += [plain(f"{title}mean: {name}", value) for name, value in every.items()]
    return found


@dataclass(frozen=True)
class Sensors:
    """x (n, 64, 1, 6) float32, each channel scaled by what the nine known people show; y, subject (n,)."""

    x: np.ndarray
    y: np.ndarray
    subject: np.ndarray


def _sensors() -> Sensors:
    with np.load(real_data.folder() / "usc_had" / "usc_had_25hz.npz") as archive:
        x, offsets = archive["x"], archive["offsets"]
        subject, y = archive["subject"], archive["activity"].astype(np.int64)
    starts = [np.arange(a, b - LENGTH + 1, LENGTH) for a, b in pairwise(offsets)]
    trial = np.repeat(np.arange(len(starts)), [len(s) for s in starts])
    windows = x[np.concatenate(starts)[:, None] + np.arange(LENGTH)][:, :, None, :]
    known = ~np.isin(subject[trial], STRANGERS)
    mean, std = windows[known].mean((0, 1, 2)), windows[known].std((0, 1, 2))
    return Sensors(((windows - mean) / std).astype(np.float32), y[trial], subject[trial])


def _built(job: Job) -> Path:
    """The bundle, its network trained here first; kept as long as it is there."""
    bundle, weights = job.out / "activity.bundle", job.out / "activity.safetensors"
    if (bundle / "manifest.json").is_file():
        return bundle
    data = _sensors()
    known = ~np.isin(data.subject, STRANGERS)
    say("training the activity network")
    save_file(_trained(data.x[known], data.y[known], job.size(12, 2)).state_dict(), str(weights))
    frames = job.out / "activity_calibration.npz"
    np.savez(frames, x=data.x[known])
    args = (
        "build",
        "benchmarks/adaptation_network.py:activity",
        "--weights",
        weights,
        "--data",
        frames,
    )
    done = edgesolve(
        *args, "--out", bundle, "--split", "convs.3", "--backends", "onnx", quiet=False
    )
    (job.out / "activity.build.json").write_text(json.dumps(done.report, indent=1))
    return bundle


def _trained(x: np.ndarray, y: np.ndarray, epochs: int) -> nn.Module:
    torch.manual_seed(0)
    model = activity_network().train()
    frames = torch.from_numpy(x).permute(0, 3, 1, 2).contiguous()
    labels = torch.from_numpy(y)
    steps = epochs * (len(x) // 128)
    adam = torch.optim.Adam(model.parameters(), lr=3e-3, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(adam, 3e-3, total_steps=steps)
    for _ in range(epochs):
        for part in torch.randperm(len(x))[: len(x) // 128 * 128].split(128):
            adam.zero_grad()
            F.cross_entropy(model(frames[part]), labels[part], label_smoothing=0.1).backward()
            adam.step()
            schedule.step()
    return model.eval()
