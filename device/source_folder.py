"""Frames from a folder that other programs write images and arrays into."""

from __future__ import annotations

import contextlib
import errno
import heapq
import os
import stat
import threading
import time
from collections.abc import Iterator
from typing import BinaryIO

from edgesolve.device.bundle import Contract
from edgesolve.device.decode import SUFFIXES, decode, read_frames, read_header
from edgesolve.device.errors import InputError
from edgesolve.device.sources import Item, SourceEnded

ARRAYS = (".npy", ".npz")
MAX_FILE_BYTES = 64 << 20  # of an image; arrays are read frame by frame
POLL_S = 0.25
SLICE_S = 0.03
SETTLED_NS = 1_000_000_000


class FolderSource:
    """Each image, `.npy` or `.npz` (its x) in `path` once, and again when it changed, ordered by time of change.

    The folder is polled: inotify is Linux only and blind on network mounts. A sweep is cut into slices of 30 ms and
    takes at most a fifth of a core and half of the time, so 100,000 files are looked through every few seconds. A file
    is ready when it's over a second old, or two sweeps found it unchanged.

    Only regular files of the folder itself count: no sub-folders, no links, no names that begin with a dot. Nothing is
    ever moved, changed or deleted. A folder that disappears is one problem, and looked for until it's back.
    What is remembered is one number for each file that is there now.
    """

    def __init__(self, path: str, contract: Contract, *, existing: bool = True) -> None:
        if not os.path.isdir(path):
            raise InputError(f"{path}: no such folder.")
        self._path, self._contract = path, contract
        self._closed, self._busy = threading.Event(), threading.Lock()
        self._done: set[int] = set()  # keys of files that were delivered, or refused
        self._before: set[int] = set()  # keys that the last sweep found too young
        self._ready: list[tuple[int, str, int]] = []  # heap of (mtime_ns, name, key)
        self._frames: Iterator[Item] | None = None  # of the file being read
        self._sweep: Iterator[bool] | None = None
        self._due = self._spent = self._worked = 0.0
        self._lost = False
        if not existing:
            try:
                for _ in self._sweep_slices():
                    pass
            except OSError as error:
                raise InputError(f"{path}: can't be read ({error.strerror or error}).") from error
            self._done = self._before | {key for _, _, key in self._ready}
            self._before, self._ready = set(), []

    def next(self, timeout: float) -> Item | None:
        end = time.monotonic() + timeout
        with self._busy:
            return self._next(end)

    def _next(self, end: float) -> Item | None:
        while not self._closed.is_set():
            if (item := self._next_frame()) is not None:
                return item
            pause = self._look()
            if isinstance(pause, Item):
                return pause
            if self._ready:
                continue
            left = end - time.monotonic()
            if left <= 0:
                return None
            if pause > 0:
                self._closed.wait(min(pause, left))
        raise SourceEnded(f"{self._path}: closed.")

    def close(self) -> None:
        self._closed.set()
        if self._busy.acquire(timeout=0.9):  # else a slow disk holds `next`: it's then the last
            with contextlib.suppress(OSError):
                self._let_go()
            self._busy.release()

    # -- looking -------------------------------------------------------------------------------

    def _look(self) -> float | Item:
        """One slice of a sweep if one is due. Returns the pause (s) until the next, or a problem."""
        now = time.monotonic()
        if self._sweep is None:
            if now < self._due:
                return self._due - now
            self._sweep, self._spent, self._worked = self._sweep_slices(), 0.0, 0.0
        worked = time.thread_time()
        try:
            finished = next(self._sweep)
        except OSError as error:
            self._sweep, self._due = None, now + 4 * POLL_S
            if self._lost:
                return 4 * POLL_S
            self._lost = True
            reason = error.strerror or str(error)
            return Item(
                self._path, None, f"{self._path}: can't be read ({reason}); waiting for it."
            )
        self._spent += time.monotonic() - now
        self._worked += time.thread_time() - worked
        if not finished:
            return 0.0
        self._sweep, self._lost = None, False
        self._due = time.monotonic() + max(POLL_S, self._spent, 4 * self._worked)
        return self._due - time.monotonic()

    def _sweep_slices(self) -> Iterator[bool]:
        """List the folder: False after each slice, True once `_ready`, `_before`, `_done` are what it holds."""
        ready, young, done = [], set(), set()
        pause_at, wall = time.monotonic() + SLICE_S, time.time_ns()
        with os.scandir(self._path) as entries:
            for n, entry in enumerate(entries, 1):
                if n % 64 == 0 and time.monotonic() > pause_at:
                    yield False
                    pause_at = time.monotonic() + SLICE_S
                found = _identify(entry)
                if found is None:
                    continue
                key, mtime_ns = found
                if key in self._done:
                    done.add(key)
                elif wall - mtime_ns > SETTLED_NS or key in self._before:
                    ready.append((mtime_ns, entry.name, key))
                else:
                    young.add(key)
        heapq.heapify(ready)
        self._ready, self._before, self._done = ready, young, done
        yield True

    # -- reading -------------------------------------------------------------------------------

    def _next_frame(self) -> Item | None:
        while True:
            if self._frames is not None:
                if (item := next(self._frames, None)) is not None:
                    return item
                self._frames = None
            if not self._ready or self._closed.is_set():
                return None
            _, name, key = heapq.heappop(self._ready)
            self._frames = self._read(name, key)

    def _read(self, name: str, key: int) -> Iterator[Item]:
        """The items of one file; none if it vanished, or changed since it was listed."""
        label = "".join(c if c.isprintable() else "?" for c in name)  # for logs and JSON
        try:
            with _open_regular(os.path.join(self._path, name)) as file:
                if _key(name, os.fstat(file.fileno())) != key:
                    return
                self._done.add(key)
                yield from self._items(file, label)
        except InputError as error:
            yield Item(label, None, str(error))
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ELOOP, errno.ENODEV, errno.ESTALE):
                self._done.discard(key)  # gone: its folder may be back with it
                return
            self._done.add(key)
            yield Item(label, None, f"{label}: can't be read ({error.strerror or error}).")
        except Exception as error:  # zipfile's, for a damaged archive
            yield Item(
                label, None, f"{label}: not readable ({' '.join(str(error).split())[:200]})."
            )

    def _items(self, file: BinaryIO, name: str) -> Iterator[Item]:
        suffix = os.path.splitext(name)[1].lower()
        if suffix not in ARRAYS:
            data = file.read(MAX_FILE_BYTES + 1)
            if len(data) > MAX_FILE_BYTES:
                raise InputError(f"{name}: an image file of over 64 MiB.")
            yield Item(name, decode(data, self._contract, name))
            return
        with contextlib.ExitStack() as stack:
            if suffix == ".npz":
                import zipfile

                archive = stack.enter_context(zipfile.ZipFile(file))
                if "x.npy" not in archive.namelist():
                    raise InputError(f"{name}: holds no x (n, h, w, c).")
                file = stack.enter_context(archive.open("x.npy"))
            try:
                header = read_header(file, name)
            except EOFError as error:
                raise InputError(f"{name}: an empty file.") from error
            several = header.count(self._contract, name) > 1
            for i, frame in enumerate(read_frames(file, header, self._contract, name)):
                problem = str(frame) if isinstance(frame, InputError) else ""
                label = f"{name}[{i}]" if several else name
                yield Item(label, None if problem else frame, problem)

    def _let_go(self) -> None:
        for generator in (self._frames, self._sweep):
            if generator is not None:
                generator.close()
        self._frames = self._sweep = None


def _identify(entry: os.DirEntry[str]) -> tuple[int, int] | None:
    """(key, mtime_ns) of a regular file that is an image or an array by its name; None for all else."""
    name = entry.name
    if name.startswith(".") or not name.lower().endswith(SUFFIXES + ARRAYS):
        return None
    try:
        if not entry.is_file(follow_symlinks=False):
            return None
        found = entry.stat(follow_symlinks=False)
    except OSError:  # it vanished
        return None
    return _key(name, found), found.st_mtime_ns


def _key(name: str, found: os.stat_result) -> int:
    return hash((name, found.st_mtime_ns, found.st_size))


def _open_regular(path: str) -> BinaryIO:
    """Open a regular file, never through a link, never waiting for a pipe's writer. Raises OSError."""
    flags = (
        getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)
    )
    descriptor = os.open(path, os.O_RDONLY | flags)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise FileNotFoundError(errno.ENOENT, "no longer a file", path)
    return open(descriptor, "rb")
