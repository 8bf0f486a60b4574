"""Frames from a pipe: `.npy` arrays one after the other, as np.save writes them."""

from __future__ import annotations

import os
import select
import threading
from collections import deque

from edgesolve.device.bundle import Contract
from edgesolve.device.decode import read_frames, read_header, skip
from edgesolve.device.errors import InputError
from edgesolve.device.sources import Item, SourceEnded

QUEUE_BYTES = 8 << 20


class StdinSource:
    """A thread reads ahead, at most 16 frames or 8 MiB; then the pipe fills and its writer waits.

    An array of another shape or dtype, or a frame with NaN, is a problem and skipped; bytes that are no array end the
    source, because where the next one starts is unknown. Needs a POSIX system (poll on a pipe).
    """

    def __init__(self, contract: Contract, descriptor: int = 0) -> None:
        try:
            os.fstat(descriptor)
        except OSError as error:
            raise InputError("stdin: is closed; pipe arrays (np.save) into it.") from error
        if os.isatty(descriptor):
            raise InputError("stdin: is a terminal; pipe arrays (np.save) into it.")
        self._contract = contract
        frame_bytes = contract.dtype.itemsize
        for n in contract.shape:
            frame_bytes *= n
        self._capacity = max(1, min(16, QUEUE_BYTES // max(1, frame_bytes)))
        self._queue: deque[Item] = deque()
        self._changed = threading.Condition()
        self._ended = ""
        self._count = 0
        self._pipe = _Pipe(descriptor)
        self._thread = threading.Thread(target=self._read, name="edgesolve-stdin", daemon=True)
        self._thread.start()

    def next(self, timeout: float) -> Item | None:
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._ended, timeout)
            if self._queue:
                self._changed.notify_all()
                return self._queue.popleft()
            if self._ended:
                raise SourceEnded(self._ended)
            return None

    def close(self) -> None:
        with self._changed:
            self._ended = self._ended or "stdin: closed."
            self._queue.clear()
            self._pipe.stop()
            self._changed.notify_all()
        self._thread.join(0.9)

    def _read(self) -> None:
        try:
            while True:
                self._array(f"stdin {self._count}")
        except EOFError:
            end = f"stdin: ended after {self._count} frames."
        except InputError as error:
            self._put(Item(f"stdin {self._count}", None, str(error)))
            end = f"{error} Nothing can be read after it."
        except Exception as error:  # the thread must say why it ends
            end = f"stdin: can't be read ({error})."
        finally:
            self._pipe.close()
        with self._changed:
            self._ended = self._ended or end
            self._changed.notify_all()

    def _array(self, name: str) -> None:
        header = read_header(self._pipe, name)
        try:
            header.count(self._contract, name)
        except InputError as error:
            skip(self._pipe, header.n_bytes, name)
            self._put(Item(name, None, str(error)))
            return
        for frame in read_frames(self._pipe, header, self._contract, name):
            problem = str(frame) if isinstance(frame, InputError) else ""
            self._put(Item(f"stdin {self._count}", None if problem else frame, problem))
            self._count += 1

    def _put(self, item: Item) -> None:
        with self._changed:
            self._changed.wait_for(lambda: len(self._queue) < self._capacity or self._ended)
            if not self._ended:
                self._queue.append(item)
                self._changed.notify_all()


class _Pipe:
    """`readinto` of a descriptor that `stop` ends from another thread: it then reads as ended.

    Python's own stdin can't be interrupted, and a thread inside it would outlive `close`.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._wake, self._waker = os.pipe()
        self._lock = threading.Lock()
        self._poll = select.poll()
        self._poll.register(descriptor, select.POLLIN)
        self._poll.register(self._wake, select.POLLIN)

    def readinto(self, view: memoryview) -> int:
        while True:
            if any(descriptor == self._wake for descriptor, _ in self._poll.poll()):
                return 0
            try:
                return os.readv(self._descriptor, [view])
            except BlockingIOError:  # the other end set O_NONBLOCK, and another reader was faster
                continue

    def stop(self) -> None:
        with self._lock:
            if self._waker >= 0:
                os.write(self._waker, b"x")

    def close(self) -> None:
        """By the reading thread, when it's done."""
        with self._lock:
            os.close(self._wake)
            os.close(self._waker)
            self._waker = -1
