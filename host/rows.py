"""From an activation to the row vector that the convex head is linear in: gate every position, then pool.

The design is `head.md`'s, with two changes. A gate is a ramp, D = clip(s - o + 1/2, 0, 1), where s is the
filter's pre-activation in units of its own standard deviation; and a filter carries several ramps, at the
offsets o. A ramp that is infinitely steep is the gated ReLU of the papers. Ramps are continuous, so two
runtimes that differ in the last bit of s agree in the answer, and a second one costs no second convolution.
The program in the weights stays the same convex one, because D doesn't depend on them.
Measured with 64 teacher filters (accuracy on CIFAR-10's test images; D = length of a row):
ResNet-20, last block: hard gates, 16 directions, D = 1344, 90.9 %; one ramp 91.3 %; two ramps, 8 directions,
D = 1408, 91.5 % (original 91.7 %). ResNet-56, last three blocks: 92.2, 92.4, 92.5 % (original 93.4 %).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Rows(nn.Module):
    """z (n, d, h, w) or (n, d) -> rows (n, D), D = k m (r + 1) + g d, standardised.

    gate_weight (m, d, a, a), gate_bias (m,): filters, each in units of its own standard deviation.
    offsets: k numbers; D = clip(conv(z) - offset + 1/2, 0, 1), offset by offset, filter by filter.
    project (r, d), offset (r,): values v = project z - offset, to which a 1 is appended.
    pool (p, g): averages positions into g cells; mean, scale (d,): standardise the plain pooled features.
    Group i < k m is (1/p) sum_p D_i [v, 1]; group k m + j is the pooled standardised z of cell j.
    """

    def __init__(
        self,
        gate_weight: Tensor,
        gate_bias: Tensor,
        project: Tensor,
        offset: Tensor,
        mean: Tensor,
        scale: Tensor,
        pool: Tensor,
        offsets: tuple[float, ...] = (0.0,),
    ):
        super().__init__()
        self.offsets = tuple(offsets)
        r, d = project.shape
        ones = torch.zeros(1, d, 1, 1)
        self.register_buffer("gate_weight", gate_weight)
        self.register_buffer("gate_bias", gate_bias)
        self.register_buffer("value_weight", torch.cat([project.view(r, d, 1, 1), ones]))
        self.register_buffer("value_bias", torch.cat([-offset, torch.ones(1)]))
        self.register_buffer("mean", mean)
        self.register_buffer("inverse_scale", 1.0 / scale)
        self.register_buffer("pool", pool)

    @property
    def n_gates(self) -> int:
        """Filters times ramps."""
        return len(self.offsets) * self.gate_weight.shape[0]

    @property
    def starts(self) -> list[int]:
        """Offsets of the groups in a row, ending with D."""
        m, r1 = self.n_gates, self.value_weight.shape[0]
        d, g = self.mean.shape[0], self.pool.shape[1]
        first = [i * r1 for i in range(m)]
        return first + [m * r1 + j * d for j in range(g + 1)]

    def forward(self, z: Tensor) -> Tensor:
        if z.ndim == 2:
            z = z[:, :, None, None]
        gates, values = self.gates(z), self.values(z)
        gated = torch.matmul(gates.flatten(2), values.flatten(2).transpose(1, 2))
        gated = gated * (1.0 / (z.shape[2] * z.shape[3]))
        cells = torch.matmul(z.flatten(2), self.pool).transpose(1, 2)
        cells = (cells - self.mean) * self.inverse_scale
        return torch.cat([gated.flatten(1), cells.flatten(1)], dim=1)

    def gates(self, z: Tensor) -> Tensor:
        """(n, k m, h, w) in [0, 1]."""
        padding = self.gate_weight.shape[2] // 2, self.gate_weight.shape[3] // 2
        s = F.conv2d(z, self.gate_weight, self.gate_bias, padding=padding)
        return torch.cat([(s + (0.5 - o)).clamp(0.0, 1.0) for o in self.offsets], dim=1)

    def values(self, z: Tensor) -> Tensor:
        """(n, r + 1, h, w); the last channel is 1."""
        return F.conv2d(z, self.value_weight, self.value_bias)

    def macs(self, shape: tuple[int, ...]) -> int:
        """Multiply-adds of one row for z of `shape` (d, h, w), every gate counted as open."""
        d, p = shape[0], shape[1] * shape[2] if len(shape) == 3 else 1
        r1 = self.value_weight.shape[0]
        return p * (self.gate_weight.numel() + (r1 - 1) * d + self.n_gates * r1 + d)

    def n_params(self) -> int:
        """Numbers that must be stored: gates, projection, standardisation; not the fixed pooling pattern."""
        fixed = self.value_weight.shape[1] + 1  # the appended 1 is structure, not a parameter
        stored = (self.gate_weight, self.gate_bias, self.value_weight, self.value_bias)
        return sum(t.numel() for t in stored) - fixed + 2 * self.mean.numel()


def grid_pool(h: int, w: int, cells: int) -> Tensor:
    """(h w, cells²) averaging matrix of a cells x cells grid; each column sums to 1."""
    rows, columns = torch.arange(h), torch.arange(w)
    cell = (rows * cells // h)[:, None] * cells + (columns * cells // w)[None, :]
    pool = F.one_hot(cell.flatten(), cells * cells).float()
    return pool / pool.sum(0, keepdim=True)
