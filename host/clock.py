"""How long a whole network takes on this machine: ONNX Runtime, one thread, one frame."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import torch

from edgesolve.host.adaptable import Preprocess
from edgesolve.host.decompose import Decomposed
from edgesolve.host.export import to_onnx
from edgesolve.host.network import Network

RUNS = 200
MOST_S = 4.0


class _Upto(torch.nn.Module):
    def __init__(self, network: Network, until: str | None, preprocess: Preprocess):
        super().__init__()
        self.network, self.until, self.preprocess = network, until, preprocess

    def forward(self, frames):
        return self.network.run(self.preprocess(frames), until=self.until)


@dataclass(frozen=True)
class Clock:
    """Median seconds of a frame: of the original network, or of a decomposed one up to its cut."""

    network: Network
    preprocess: Preprocess
    frame: np.ndarray  # (1, h, w, c)

    def __call__(self, decomposed: Decomposed | None) -> float:
        import onnxruntime as ort

        network, until = self.network, None
        if decomposed is not None:
            network, until = decomposed.network, decomposed.cut.node
        frames = torch.from_numpy(np.ascontiguousarray(self.frame))
        module = _Upto(network, until, self.preprocess)
        model = to_onnx(module, (frames,), ("frames",), free_batch=False)
        options = ort.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        x, took, began = {"frames": self.frame}, [], time.perf_counter()
        while len(took) < RUNS and time.perf_counter() - began < MOST_S:
            start = time.perf_counter()
            session.run(None, x)
            took.append(time.perf_counter() - start)
        return float(np.median(took))
