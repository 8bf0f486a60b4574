"""Find where an exporter put each adaptable weight, so that the device can fold new statistics into the file.

Before export every such weight and bias is overwritten with random numbers (a stamp) that occur nowhere else;
afterwards the stamp's bytes are looked up in the file and replaced by the true values. Zero or repeated
constants, which exporters drop or share, thus can't be lost or confused, and no file format is parsed.
"""

from __future__ import annotations

from itertools import permutations

import numpy as np
import torch

from edgesolve.host.adaptable import Backbone
from edgesolve.host.errors import ModelError


def stamped(backbone: Backbone, seed: int = 1) -> dict[str, torch.Tensor]:
    """Overwrite every site's weight and bias with stamps; returns the true values by buffer name."""
    generator = torch.Generator().manual_seed(seed)
    true = {}
    for _, *names in backbone.sites:
        for name in names:
            buffer = getattr(backbone, name)
            true[name] = buffer.clone()
            buffer.copy_(torch.randn(buffer.shape, generator=generator))
    return true


def restore(backbone: Backbone, true: dict[str, torch.Tensor]) -> None:
    for name, value in true.items():
        getattr(backbone, name).copy_(value)


def locate_and_fill(
    model: bytes, backbone: Backbone, true: dict[str, torch.Tensor], channels: dict[str, list[int]]
) -> tuple[bytes, list[dict]]:
    """`model` with the true values in place of the stamps, and the table that device/patch.py reads.

    `channels`: [start, stop) in the statistics by normalisation node. Raises ModelError naming a layer whose
    stamp is not there exactly once.
    """
    out = bytearray(model)
    table = []
    for norm, weight_name, bias_name in backbone.sites:
        weight = getattr(backbone, weight_name).numpy()
        bias = getattr(backbone, bias_name).numpy()
        offset, order = _find(model, weight, norm.name)
        place = np.ascontiguousarray(true[weight_name].numpy().transpose(order))
        out[offset : offset + place.nbytes] = place.astype("<f4").tobytes()
        bias_offset, _ = _find(model, bias, norm.name)
        out[bias_offset : bias_offset + bias.nbytes] = (
            true[bias_name].numpy().astype("<f4").tobytes()
        )
        table.append(
            {
                "name": norm.name,
                "channels": channels[norm.node],
                "weight": {"offset": offset, "shape": list(place.shape), "axis": order.index(0)},
                "bias": {"offset": bias_offset},
            }
        )
    return bytes(out), table


def _find(model: bytes, stamp: np.ndarray, name: str) -> tuple[int, tuple[int, ...]]:
    """Byte offset of the stamp and the axis order in which it is stored (TFLite keeps channels elsewhere)."""
    for order in permutations(range(stamp.ndim)):
        data = np.ascontiguousarray(stamp.transpose(order)).astype("<f4").tobytes()
        offset = model.find(data)
        if offset >= 0:
            if model.find(data, offset + 1) >= 0:
                break
            return offset, order
    raise ModelError(
        f"{name}: its weights can't be located in the exported file, so statistics couldn't be folded in later. "
        "Build with --fixed-backbone to ship a backbone that is never touched."
    )
