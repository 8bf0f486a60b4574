"""What may follow a decomposition: blocks refitted, gradient descent; each kept only where held-out answers improve."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from edgesolve.host.adaptable import Preprocess
from edgesolve.host.compress import Compression
from edgesolve.host.errors import ModelError
from edgesolve.host.finetune import FinetuneOptions, chains, finetune
from edgesolve.host.refit import refitted
from edgesolve.host.shards import Shards
from edgesolve.host.walk import Walk


@dataclass(frozen=True, slots=True)
class RefineOptions:
    """`refit`: blocks by coordinate descent (`refit.py`). `finetune`: epochs of distillation by gradient descent
    (`finetune.py`), 0 for none. `flip`: the epochs also see mirrored frames."""

    refit: bool = False
    finetune: int = 0
    flip: bool = False
    seed: int = 0


def check(options: RefineOptions, shards: Shards) -> None:
    """Raise ModelError where several processes would do what is one process's work: before any of it is done."""
    if (options.refit or options.finetune) and shards.count > 1:
        raise ModelError("--refit and --finetune are one process's work; build without torchrun.")


def refine(
    compression: Compression,
    walk: Walk,
    held: np.ndarray,
    preprocess: Preprocess,
    options: RefineOptions,
    log,
) -> tuple[Compression, list[dict]]:
    """(the better compression, a row per trial for the report). No label is read.

    walk : fresh, over the frames that were fitted on; held (n, h, w, c): others, to judge by. `log` as recipe.Log.
    One process's work (`check`).
    """
    rows = []
    if options.refit and compression.fitted:
        log.step("refit blocks, judged on held-out frames")
        judge = Walk(walk.network, preprocess, held, walk.found)
        compression, found = refitted(walk, judge, compression, progress=log.progress)
        rows += [_row("refit", r.block, r.sweep, r) for r in found]
    if options.finetune and compression.fitted:
        log.step(f"fine-tune for {options.finetune} epochs, judged on held-out frames")
        given = FinetuneOptions(epochs=options.finetune, flip=options.flip, seed=options.seed)
        made = finetune(compression.module, preprocess, walk.x, held, given, log.progress)
        rows.append(_row("finetune", "every layer", made.epoch, made))
        if made.accepted:
            own = chains(made.module)
            fitted = {
                node: replace(f, chain=own[node][0], bias=own[node][1])
                for node, f in compression.fitted.items()
                if node in own
            }
            compression = replace(
                compression,
                module=made.module,
                fitted=compression.fitted | fitted,
                divergence=made.divergence[made.epoch],
            )
    return compression, rows


def _row(kind: str, what: str, kept: int, made) -> dict:
    """`made`: a RefitRow or Finetuned, whose figures are held out; entry 0 is the network as it was."""
    return {
        "kind": kind,
        "what": what,
        "accepted": kept > 0,
        "step": kept,
        "of": len(made.divergence) - 1,
        "divergence": {"before": made.divergence[0], "after": made.divergence[kept]},
        "agreement": {"before": made.agreement[0], "after": made.agreement[kept]},
        "seconds": round(made.seconds, 2),
    }
