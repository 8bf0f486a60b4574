"""The newest frame of a camera, by OpenCV or picamera2."""

from __future__ import annotations

import contextlib
import threading
import time
from typing import Any, Protocol

import numpy as np

from edgesolve.device.bundle import Contract
from edgesolve.device.decode import contract_frame, image_shape
from edgesolve.device.errors import BackendError, InputError, UsageError
from edgesolve.device.sources import Item, SourceEnded

FIRST_WAIT_S, LONGEST_WAIT_S = 0.25, 30.0
SILENT_S = 15.0  # OpenCV itself gives up waiting for a V4L2 frame after 10
GIVE_UP_S = 600.0


class Camera(Protocol):
    def read(self) -> np.ndarray:
        """The next frame, (h, w, 3) uint8 RGB, waiting for it. Raises anything when there is none."""
        ...

    def close(self) -> None: ...


class CameraSource:
    """A thread reads the camera and keeps only the newest frame, so that inference never lags behind it.

    `dropped` counts frames that a newer one replaced, `lost` how often reading failed. Then the camera is released and
    opened again, after 0.25 s, 0.5 s, … 30 s; each outage is one problem. Ten minutes without a frame end the source:
    a supervisor's restart is the next thing to try. A driver that hangs inside a call can't be interrupted: the
    silence is reported, and `close` leaves the thread behind after a second.
    """

    def __init__(self, name: str, contract: Contract, *, give_up_s: float = GIVE_UP_S) -> None:
        """`name`: "", a number, "opencv" or "picamera2". Raises UsageError, InputError or BackendError."""
        self._openers = _openers(name)
        self._index = int(name) if name.isdecimal() else 0
        self._contract, self._give_up_s = contract, give_up_s
        h, w, _ = image_shape(contract, "camera")
        self._size = max(640, w), max(480, h)
        # What resizing lacks is said now, not at the first frame.
        contract_frame(np.zeros((*self._size[::-1], 3), np.uint8), contract, "camera")
        self.dropped = self.lost = 0
        self._count = 0
        self._changed = threading.Condition()
        self._newest: np.ndarray | None = None
        self._problem = self._said = ""
        self._alive_at = time.monotonic()  # the last frame, or the start
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._read, name="edgesolve-camera", daemon=True)
        self._thread.start()

    def next(self, timeout: float) -> Item | None:
        with self._changed:
            self._changed.wait_for(
                lambda: self._newest is not None or self._problem or self._closed.is_set(), timeout
            )
            if self._closed.is_set():
                raise SourceEnded("camera: closed.")
            silent_s = time.monotonic() - self._alive_at
            if self._newest is None and silent_s > self._give_up_s:
                raise SourceEnded(f"camera: no frame for {silent_s:.0f} s. {self._said}".strip())
            if self._newest is None and silent_s > SILENT_S and not self._said:
                self._problem = self._said = (
                    f"camera: no frame for {SILENT_S:.0f} s, no error either."
                )
            if self._problem:
                problem, self._problem = self._problem, ""
                return Item("camera", None, problem)
            frame, self._newest = self._newest, None
            if frame is None:
                return None
            self._count += 1
            name = f"camera {self._count - 1}"
        try:
            return Item(name, contract_frame(frame, self._contract, name))
        except (InputError, BackendError) as error:
            return Item(name, None, str(error))

    def close(self) -> None:
        with self._changed:
            self._closed.set()
            self._newest = None
            self._changed.notify_all()
        self._thread.join(0.9)

    def _read(self) -> None:
        wait_s = FIRST_WAIT_S
        while not self._closed.is_set():
            camera, before = None, self._alive_at
            try:
                camera = self._open()
                while not self._closed.is_set():
                    self._keep(camera.read())
            except Exception as error:  # whatever a driver raises
                self._fail(error)
            finally:
                if camera is not None:
                    with contextlib.suppress(Exception):
                        camera.close()
            if self._alive_at != before:
                wait_s = FIRST_WAIT_S
            self._closed.wait(wait_s)
            wait_s = min(2 * wait_s, LONGEST_WAIT_S)

    def _open(self) -> Camera:
        """By the first library that can; it's then the only one asked again."""
        reasons = []
        for opener in self._openers:
            try:
                camera = opener(self._index, self._size)
            except Exception as error:  # whatever a driver raises
                reasons.append(_reason(error))
            else:
                self._openers = [opener]
                return camera
        raise OSError("; ".join(reasons))

    def _keep(self, frame: np.ndarray) -> None:
        with self._changed:
            if self._closed.is_set():
                return
            self.dropped += self._newest is not None
            self._newest, self._alive_at, self._said = frame, time.monotonic(), ""
            self._changed.notify_all()

    def _fail(self, error: Exception) -> None:
        reason = _reason(error).rstrip(".")
        with self._changed:
            self.lost += 1
            if not self._said:
                self._problem = f"camera {self._index}: {reason}; trying again."
                self._changed.notify_all()
            self._said = f"camera {self._index}: {reason}."


class _OpenCV:
    def __init__(self, index: int, size: tuple[int, int]) -> None:
        import cv2

        self._capture = cv2.VideoCapture(index)
        if not self._capture.isOpened():
            self._capture.release()
            raise OSError("OpenCV can't open it")
        self._capture.set(cv2.CAP_PROP_FRAME_WIDTH, size[0])
        self._capture.set(cv2.CAP_PROP_FRAME_HEIGHT, size[1])
        self._capture.set(cv2.CAP_PROP_BUFFERSIZE, 1)

    def read(self) -> np.ndarray:
        good, frame = self._capture.read()
        if not good or frame is None or not frame.size:
            raise OSError("gives no frame")
        return frame[:, :, ::-1] if frame.ndim == 3 else frame  # BGR

    def close(self) -> None:
        self._capture.release()


class _Picamera2:
    def __init__(self, index: int, size: tuple[int, int]) -> None:
        from picamera2 import Picamera2

        self._camera: Any = Picamera2(index)
        try:
            # libcamera names the bytes of a little-endian word: its BGR888 is R, G, B in memory.
            main = {"size": size, "format": "BGR888"}
            self._camera.configure(self._camera.create_video_configuration(main=main))
            self._camera.start()
        except BaseException:
            self._camera.close()
            raise

    def read(self) -> np.ndarray:
        return self._camera.capture_array("main")

    def close(self) -> None:
        try:
            self._camera.stop()
        finally:
            self._camera.close()


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _openers(name: str) -> list[Any]:
    """What can open cameras here, of those that `name` admits. Raises UsageError or BackendError."""
    libraries = {"opencv": ("cv2", _OpenCV), "picamera2": ("picamera2", _Picamera2)}
    if name in libraries:
        libraries = {name: libraries[name]}
    elif name and not name.isdecimal():
        raise UsageError(
            f"camera:{name}: no such camera; camera, camera:1, camera:opencv or camera:picamera2."
        )
    found, missing = [], []
    for module, opener in libraries.values():
        try:
            __import__(module)
            found.append(opener)
        except (
            Exception
        ) as error:  # not there, lacking a system library, or built for another NumPy
            missing.append(str(error))
    if not found:
        raise BackendError(
            f"a camera needs OpenCV, pip install 'edgesolve[camera]', or on a Raspberry Pi "
            f"apt install python3-picamera2 ({'; '.join(missing)})."
        )
    return found
