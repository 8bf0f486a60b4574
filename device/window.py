"""A window of frames in bounded memory that spans the whole time since it was opened, however long."""

from __future__ import annotations

import numpy as np

_SAMPLE = 64


class Window:
    """At most `capacity` frames of `shape` and `dtype`, preallocated, evenly spread over those offered.

    Every `stride`-th usable frame is kept. When the room runs out, every second kept one is given up and the
    stride doubles: no chance involved, and between half and all of the room is in use from then on. Giving up
    moves slot numbers, not frames, so that no single `add` is slow.
    """

    def __init__(self, capacity: int, shape: tuple[int, ...], dtype: np.dtype | type | str):
        if capacity < 2:
            raise ValueError(f"capacity must be at least 2 frames, got {capacity}.")
        self.capacity = capacity
        self._frames = np.empty((capacity, *shape), dtype)
        self._times = np.zeros(capacity)
        # A permutation of the slots: the first n hold the kept frames in time order, the rest are free.
        self._slots = np.arange(capacity)
        self.clear()

    def clear(self) -> None:
        """Forget every frame and count; the memory stays."""
        self.n = self.n_seen = self.n_bad = 0
        self.stride = 1

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one frame."""
        return self._frames.shape[1:]

    @property
    def dtype(self) -> np.dtype:
        return self._frames.dtype

    def __len__(self) -> int:
        return self.n

    def add(self, frame: np.ndarray, now_s: float) -> bool:
        """Offer a frame at `now_s` (monotonic seconds); False if it is refused as unusable.

        A constant frame (a covered lens, a dead sensor) or one with NaN or inf says nothing about the scene: it
        counts in `n_bad` and `n_seen`. Raises ValueError on another shape or dtype.
        """
        if frame.shape != self._frames.shape[1:] or frame.dtype != self._frames.dtype:
            raise ValueError(
                f"the frame is {frame.dtype} {frame.shape}, this window holds "
                f"{self._frames.dtype} {self._frames.shape[1:]}."
            )
        self.n_seen += 1
        if not usable(frame):
            self.n_bad += 1
            return False
        if (self.n_seen - self.n_bad - 1) % self.stride:
            return True
        if self.n == self.capacity:
            self._thin()
            if (self.n_seen - self.n_bad - 1) % self.stride:
                return True
        slot = self._slots[self.n]
        self._frames[slot] = frame
        self._times[slot] = now_s
        self.n += 1
        return True

    def frames(self, out: np.ndarray | None = None) -> np.ndarray:
        """The kept frames (n, *shape), oldest first, as a copy: into `out` (at least n frames) if it is given."""
        if out is None:
            return self._frames[self._slots[: self.n]]
        for row, slot in enumerate(self._slots[: self.n]):
            out[row] = self._frames[slot]
        return out[: self.n]

    @property
    def seconds(self) -> float:
        """From the oldest kept frame to the newest."""
        if self.n < 2:
            return 0.0
        first, last = self._slots[0], self._slots[self.n - 1]
        return float(self._times[last] - self._times[first])

    def _thin(self) -> None:
        self._slots = np.concatenate([self._slots[::2], self._slots[1::2]])
        self.n = (self.capacity + 1) // 2
        self.stride *= 2


def usable(frame: np.ndarray) -> bool:
    """Whether `frame` varies, and is finite throughout."""
    if frame.dtype.kind == "f" and not np.isfinite(frame).all():
        return False
    flat = frame.reshape(-1)
    if flat.size == 0:
        return False
    # A few values nearly always settle it; only a frame that looks constant is read to the end.
    few = flat[:: max(1, flat.size // _SAMPLE)]
    return bool((few != flat[0]).any() or (flat != flat[0]).any())
