"""What refining buys after a closed-form compression: block refit, label-free fine-tuning, orthogonal training.

    make bench-refit                                   everything, about 30 minutes on two cores
    python benchmarks/bench_refit.py --only resnet20 --epochs 20
    python benchmarks/bench_refit.py --quick           few frames, to see that it runs

ResNet-20 is shrunk by the closed form on 1,024 unlabelled images. The refit's and the fine-tuning's choices are made
on 512 others; agreement and KL are of 2,000 more that no choice sees, accuracy of the 10,000 test images. Tables go
to stdout, progress to stderr, everything to OUT/refit.json and .md (--quick: to OUT/quick). A missed bar is printed
as MISSED and does not change the exit code.
"""

from __future__ import annotations

import argparse
import os
import time
from copy import deepcopy
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import real_data
import torch
from compression_cases import Case, resnet
from compression_methods import ours, prepare
from environment import say
from figures import Figure, at_least, at_most, plain
from measure import measure, parsed, parser, shares, with_one_blas_thread
from torch import nn
from torch.nn import functional as F

from edgesolve.host.finetune import FinetuneOptions, finetune
from edgesolve.host.orthogonal import over_parameterise, penalty, train, truncate, vbmf_ranks
from edgesolve.host.refit import refitted
from edgesolve.host.refit_problem import RefitOptions
from edgesolve.host.sensitivity import divergence

IMAGES, JUDGES = 1024, 512
Result = tuple[list[Figure], dict[str, Any]]


@dataclass(frozen=True)
class Row:
    """drop in points on the test frames; KL and agreement with the original on frames that nothing was chosen on."""

    method: str
    budget: float
    drop: float
    kl: float
    agreement: float
    seconds: float


def resnet20(args) -> Result:
    """Closed form only, then with the block refit, then with fine-tuning on top of both."""
    few = args.quick
    case = resnet(20, 256 if few else IMAGES, 500 if few else 2000, 1000 if few else 10_000)
    frames = real_data.cifar_train()
    judges = frames[IMAGES : IMAGES + (128 if few else JUDGES)]
    say(f"{case.title}: original {case.expected[0]:.2f} %")
    prepared = prepare(case, ("tucker2",) if few else ("tucker2", "cp"))
    figures, rows, blocks = [], [], {}
    for budget in args.budgets:
        began = time.process_time()
        answer = ours(prepared, budget)
        spent = time.process_time() - began
        first = _row(case, "closed form", budget, answer.module, spent)
        began = time.process_time()
        made, report = refitted(
            case.walk(), case.walk(judges), answer.compression, RefitOptions(sweeps=args.sweeps)
        )
        spent = time.process_time() - began
        second = _row(case, "+ block refit", budget, made.module, spent)
        rows += [first, second]
        blocks[budget] = report
        rose = sum(b > a * (1 + 1e-5) for r in report for a, b in pairwise(r.objective))
        kept = sum(r.accepted for r in report)
        figures += _improves(budget, first, second, f"{kept} of {len(report)} blocks accepted")
        figures.append(at_most(f"{budget:.0%}: rises of the objective", rose, 0, " of all sweeps"))
        options = FinetuneOptions(epochs=args.epochs, flip=True, shift=2)
        began = time.process_time()
        tuned = finetune(made.module, case.preprocess, case.x, judges, options)
        spent = time.process_time() - began
        third = _row(case, f"+ {args.epochs} epochs of fine-tuning", budget, tuned.module, spent)
        rows.append(third)
        say(f"    epoch {tuned.epoch} of {len(tuned.loss)} kept")
    caption = (
        f"ResNet-20 (base {case.expected[0]:.2f} %), shares of the weights; drop in points on {len(case.test):,} "
        f"images, KL (nats) and agreement (%) with the original on {len(case.held):,} frames apart; processor "
        f"seconds of the step alone (the survey before all of them: {sum(prepared.seconds.values()):.0f})"
    )
    tables = {caption: _table(rows)}
    for budget, report in blocks.items():
        tables[f"Block by block at {budget:.0%}"] = _blocks(report)
    return figures, {"tables": tables, "rows": [asdict(r) for r in rows]}


def _improves(budget: float, before: Row, after: Row, note: str) -> list[Figure]:
    what = f"ResNet-20 at {budget:.0%} of the weights, block refit: "
    gain = after.agreement - before.agreement
    return [
        Figure(
            what + "held-out agreement gained",
            f"{gain:+.2f} points",
            "> 0",
            gain > 0,
            f"one-shot {before.agreement:.2f} %; {note}",
            value=gain,
        ),
        at_most(
            what + "held-out KL over the one-shot's",
            after.kl / before.kl,
            1.0,
            " times",
            baseline=f"one-shot {before.kl:.4f} nats",
        ),
        plain(
            what + "drop",
            after.drop,
            " points",
            baseline=f"one-shot {before.drop:.2f} points",
        ),
    ]


def _row(case: Case, method: str, budget: float, module: nn.Module, seconds: float) -> Row:
    base, expected = case.expected
    logits = case.logits(module, case.held)
    agreed = 100.0 * float((logits.argmax(1) == expected.argmax(1)).double().mean())
    drop = base - case.accuracy(module)
    row = Row(method, budget, drop, divergence(expected, logits), agreed, seconds)
    say(f"  {method} at {budget:g}: drop {drop:.2f}, KL {row.kl:.4f}, agreement {agreed:.2f} %")
    return row


def _table(rows: list[Row]) -> list[list[str]]:
    return [
        ["method", "weights", "drop", "KL", "agreement", "seconds"],
        *[
            [
                r.method,
                f"{r.budget:.2f}",
                f"{r.drop:.2f}",
                f"{r.kl:.4f}",
                f"{r.agreement:.2f}",
                f"{r.seconds:.0f}",
            ]
            for r in rows
        ],
    ]


def _blocks(report) -> list[list[str]]:
    heading = ["block", "objective", "block error", "KL of the choice's frames", "kept", "seconds"]
    lines = [
        [
            r.block,
            " ".join(f"{v:.4g}" for v in r.objective),
            " ".join(f"{v:.4g}" for v in r.error),
            " ".join(f"{v:.4f}" for v in r.divergence),
            f"sweep {r.sweep}" if r.accepted else "as it was",
            f"{r.seconds:.0f}",
        ]
        for r in report
    ]
    return [heading, *lines]


def orthogonal(args) -> Result:
    """A small network trained on MNIST, three seeds: weights, factors, and factors under the penalty, cut alike."""
    n, epochs = (1000, 2) if args.quick else (4000, 6)
    with np.load(real_data.folder() / "mnist" / "mnist.npz") as archive:
        x, y, tx, ty = (archive[k] for k in ("x_train", "y_train", "x_test", "y_test"))
    x, tx = (torch.from_numpy(a[:, None].astype(np.float32) / 255.0) for a in (x[:n], tx))
    y, ty = (torch.from_numpy(a.astype(np.int64).ravel()) for a in (y[:n], ty))
    lines, found = [], {k: [] for k in ("weights", "factors", "orthogonal")}
    for seed in range(1 if args.quick else 3):
        made = {name: _trained(name, seed, x, y, epochs) for name in found}
        chosen = vbmf_ranks(made["orthogonal"])
        full = {k: min(_matrix(m).shape) for k, m in _layers(made["weights"])}
        last = next(reversed(full))  # of ten classes: it stays whole
        for rule, ranks in (
            ("VBMF", {k: max(r, 2) for k, r in chosen.items()} | {last: full[last]}),
            ("half", {k: r // 2 for k, r in full.items()} | {last: full[last]}),
        ):
            for name, model in made.items():
                for by in ("svd",) if name == "weights" else ("svd", "terms"):
                    cut = deepcopy(model)
                    if name == "weights":
                        over_parameterise(cut)
                    away = float(penalty(cut).detach())
                    before = _accuracy(model, tx, ty)
                    truncate(cut, ranks, by)
                    drop = before - _accuracy(cut, tx, ty)
                    found[name].append((rule, by, away, drop))
                    cells = (name, str(seed), rule, "-".join(str(r) for r in ranks.values()), by)
                    lines.append([*cells, f"{away:.2g}", f"{before:.2f}", f"{drop:.2f}"])
                    say(f"  {' '.join(lines[-1])}")
    figures = []
    for rule in ("VBMF", "half"):
        for other, by in (("factors", "terms"), ("factors", "svd"), ("weights", "svd")):
            ours, theirs = (
                float(np.mean([d for r, b, _, d in found[k] if (r, b) == (rule, by)]))
                for k in ("orthogonal", other)
            )
            figures.append(
                at_most(
                    f"drop at ranks by {rule}, cut by {by}: orthogonal less {other}",
                    ours - theirs,
                    0.0,
                    " points",
                    baseline=f"{other} {theirs:.2f}, orthogonal {ours:.2f} points",
                )
            )
    away = {k: float(np.mean([a for _, _, a, _ in v])) for k, v in found.items()}
    figures.append(
        at_least(
            "||U'U - I||² + ||V'V - I||² without the penalty over with it",
            away["factors"] / away["orthogonal"],
            1.0,
            " times",
        )
    )
    heading = ["trained as", "seed", "ranks", "which", "cut by", "penalty", "accuracy", "drop"]
    caption = (
        f"A small CNN on {n:,} MNIST images, {epochs} epochs; accuracy (%) and drop (points) on {len(tx):,} after "
        "each layer but the last is cut to the same ranks, by its SVD or by its strongest terms"
    )
    return figures, {"tables": {caption: [heading, *lines]}}


def _trained(name: str, seed: int, x, y, epochs: int) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU(),
        nn.Flatten(), nn.Linear(1568, 64), nn.ReLU(), nn.Linear(64, 10),
    )  # fmt: skip
    loss = lambda m, pick: F.cross_entropy(m(x[pick]), y[pick])  # noqa: E731

    def batches(epoch):
        return torch.randperm(len(x), generator=torch.Generator().manual_seed(epoch)).split(64)

    if name == "weights":
        optimiser = torch.optim.Adam(model.parameters(), lr=2e-3)
        for epoch in range(epochs):
            for pick in batches(epoch):
                optimiser.zero_grad()
                loss(model, pick).backward()
                optimiser.step()
        return model.eval()
    over_parameterise(model)
    lam = 0.01 if name == "orthogonal" else 0.0
    train(model, batches, loss, epochs=epochs, lam=lam, shrink=1e-3, lr=2e-3)
    return model


def _layers(model):
    return [(k, m) for k, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))]


def _matrix(layer):
    return layer.weight.detach().flatten(1)


def _accuracy(model, x, y) -> float:
    with torch.inference_mode():
        right = sum(
            int((model(a).argmax(1) == b).sum())
            for a, b in zip(x.split(1000), y.split(1000), strict=True)
        )
    return 100.0 * right / len(y)


SECTIONS = {"resnet20": resnet20, "orthogonal": orthogonal}


def main() -> None:
    args = _arguments()
    torch.set_num_threads(args.threads)
    measure(
        SECTIONS,
        args.only,
        args,
        args.out / "refit.json",
        "Refinement after closed-form compression, measured",
        threads=args.threads,
        quick=args.quick,
    )


def _arguments() -> argparse.Namespace:
    p = parser(__doc__, SECTIONS)
    p.add_argument("--budgets", default=".5,.3", metavar=".5,.3", help="shares of the weights")
    p.add_argument("--epochs", type=int, help="of fine-tuning (10)")
    p.add_argument("--sweeps", type=int, default=3, help="of the block refit")
    p.add_argument("--threads", type=int, default=os.cpu_count(), help="of torch")
    args = parsed(p, SECTIONS)
    args.budgets = shares(p, args.budgets)
    args.budgets = args.budgets[:1] if args.quick else args.budgets
    args.epochs = args.epochs or (1 if args.quick else 10)
    return args


if __name__ == "__main__":
    with_one_blas_thread()
    main()
