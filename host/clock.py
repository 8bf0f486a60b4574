"""How long a whole network takes on this machine: as the device runs it, one thread, one frame."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import torch

from edgesolve.device.graph import open_graph
from edgesolve.host.adaptable import Preprocess, Upto
from edgesolve.host.decompose import Decomposed
from edgesolve.host.export import to_onnx
from edgesolve.host.network import Network
from edgesolve.host.shards import ALONE, Shards

RUNS = 200
MOST_S = 4.0


@dataclass(frozen=True)
class Clock:
    """Median seconds of a frame: of the original network, or of a decomposed one up to its cut.

    Of several processes the first one's clock counts.
    """

    network: Network
    preprocess: Preprocess
    frame: np.ndarray  # (1, h, w, c)
    shards: Shards = ALONE

    def __call__(self, decomposed: Decomposed | None) -> float:
        module = Upto(self.network, self.preprocess)
        if decomposed is not None:
            module = Upto(decomposed.network, self.preprocess, decomposed.cut.node)
        frame = np.ascontiguousarray(self.frame)
        example = (torch.from_numpy(frame),)
        model = to_onnx(module, example, ("frames",), free_batch=False)
        graph = open_graph(model, backend="onnx")
        took, began = [], time.perf_counter()
        while len(took) < RUNS and time.perf_counter() - began < MOST_S:
            start = time.perf_counter()
            graph(frame)
            took.append(time.perf_counter() - start)
        return float(self.shards.first(np.median(took)))
