"""The camera against libraries that behave as OpenCV and picamera2 do, well and badly."""

import sys
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest

from edgesolve.device import source_camera
from edgesolve.device.bundle import Contract
from edgesolve.device.errors import BackendError, InputError
from edgesolve.device.sources import SourceEnded, open_source

CONTRACT = Contract((4, 6, 3), np.dtype(np.uint8))
pytest.importorskip("PIL", reason="a camera's frames are resized by Pillow")


class Stage:
    """What the fake libraries do next, and what was done to them."""

    def __init__(self):
        self.opens, self.reads = True, "frame"
        self.value, self.opened, self.released, self.made = 0, 0, 0, []
        self.hang = threading.Event()
        self.lock = threading.Lock()

    def act(self):
        """A camera of some 200 frames a second; each frame's red is its number."""
        if self.reads == "hang":
            self.hang.wait()
        time.sleep(0.005)
        if self.reads == "exception":
            raise RuntimeError("VIDIOC_DQBUF:\nno such device")
        if self.reads != "frame":
            return None
        with self.lock:
            self.value += 1
        return self.value


@pytest.fixture
def stage(monkeypatch):
    stage = Stage()

    class VideoCapture:
        def __init__(self, index):
            stage.made.append(("cv2", index))
            stage.opened += 1
            self.size = [640, 480]

        def isOpened(self):
            return stage.opens

        def set(self, prop, value):
            if prop in (3, 4):
                self.size[prop - 3] = value
            return False

        def read(self):
            n = stage.act()
            if n is None:
                return False, None
            image = np.zeros((self.size[1], self.size[0], 3), np.uint8)
            image[:] = (30, 20, n % 256)  # blue, green, red
            return True, image

        def release(self):
            if stage.reads == "hang on release":
                stage.hang.wait()
            stage.released += 1

    class Picamera2:
        def __init__(self, index=0):
            stage.made.append(("picamera2", index))
            if not stage.opens:
                raise IndexError("list index out of range")
            stage.opened += 1

        def create_video_configuration(self, main):
            return {"main": main}

        def configure(self, configuration):
            self.main = configuration["main"]

        def start(self):
            pass

        def capture_array(self, name):
            n = stage.act()
            if n is None:
                raise TimeoutError
            rgb = {"BGR888": (n % 256, 20, 30), "RGB888": (30, 20, n % 256)}[self.main["format"]]
            image = np.zeros((*self.main["size"][::-1], 3), np.uint8)
            image[:] = rgb
            return image

        def stop(self):
            raise RuntimeError("already stopped")

        def close(self):
            stage.released += 1

    cv2 = SimpleNamespace(
        VideoCapture=VideoCapture,
        CAP_PROP_FRAME_WIDTH=3,
        CAP_PROP_FRAME_HEIGHT=4,
        CAP_PROP_BUFFERSIZE=38,
    )
    monkeypatch.setitem(sys.modules, "cv2", cv2)
    monkeypatch.setitem(sys.modules, "picamera2", SimpleNamespace(Picamera2=Picamera2))
    monkeypatch.setattr(source_camera, "FIRST_WAIT_S", 0.01)
    return stage


@pytest.fixture
def camera(stage):
    sources, before = [], threading.active_count()

    def make(spec="camera", contract=CONTRACT):
        sources.append(open_source(spec, contract))
        return sources[-1]

    yield make
    for source in sources:
        started = time.monotonic()
        source.close()
        assert time.monotonic() - started < 1.2
        with pytest.raises(SourceEnded):
            source.next(0.0)
    stage.hang.set()
    for source in sources:
        source._thread.join(2.0)
        assert not source._thread.is_alive()
    ended = time.monotonic() + 1.0  # a test's own writer may still be leaving
    while threading.active_count() > before and time.monotonic() < ended:
        time.sleep(0.01)
    assert threading.active_count() <= before
    assert stage.released == stage.opened


def until(check, source, limit_s=3.0):
    end = time.monotonic() + limit_s
    while time.monotonic() < end:
        item = source.next(0.1)
        if item is not None and check(item):
            return item
    return pytest.fail("it never came")


@pytest.mark.parametrize("spec", ["camera:opencv", "camera:picamera2", "camera", "camera:1"])
def test_frames_are_rgb_and_in_the_contract(camera, stage, spec):
    item = camera(spec).next(2.0)
    assert item.frame.shape == CONTRACT.shape and item.frame.dtype == np.uint8
    assert tuple(item.frame[2, 3, 1:]) == (20, 30)  # red counts, green 20, blue 30
    library = "picamera2" if spec.endswith("picamera2") else "cv2"
    assert stage.made == [(library, 1 if spec.endswith("1") else 0)]


def test_a_contract_of_the_cameras_own_size(camera):
    item = camera(contract=Contract((480, 640, 3), np.dtype(np.uint8))).next(2.0)
    assert tuple(item.frame[2, 3, 1:]) == (20, 30) and item.frame.flags.c_contiguous


def test_a_larger_contract_asks_for_a_larger_picture(camera):
    source = camera(contract=Contract((720, 1280, 1), np.dtype(np.uint8)))
    assert source.next(2.0).frame.shape == (720, 1280, 1)
    assert source._size == (1280, 720)


def test_only_the_newest_frame_is_kept(camera, stage):
    source = camera()
    source.next(2.0)
    time.sleep(0.3)  # a slow inference: many frames pass
    last = stage.value
    red = int(source.next(2.0).frame[0, 0, 0])
    assert last - 1 <= red <= stage.value
    assert 2 <= source.dropped <= stage.value - 2


def test_nothing_within_the_timeout_is_none(camera, stage):
    stage.reads = "hang"
    source = camera()
    assert source.next(0.05) is None


@pytest.mark.parametrize("spec", ["camera:opencv", "camera:picamera2"])
@pytest.mark.parametrize("failure", ["false", "exception", "not opened"])
def test_an_outage_is_one_problem_then_frames_again(camera, stage, spec, failure):
    source = camera(spec)
    assert source.next(2.0).frame is not None
    stage.opens, stage.reads = failure != "not opened", failure
    item = until(lambda i: i.problem, source)
    assert item.frame is None and item.problem.endswith("; trying again.")
    assert "\n" not in item.problem and item.problem.startswith("camera 0: ")
    assert [source.next(0.05) for _ in range(4)] == [None] * 4
    assert source.lost >= 2
    stage.opens, stage.reads = True, "frame"
    assert until(lambda i: True, source).frame is not None
    stage.reads = "false"
    assert until(lambda i: i.problem, source).problem


def test_failures_are_spaced(camera, stage):
    stage.reads = "false"
    source = camera()
    time.sleep(0.6)
    assert 1 <= source.lost <= 7  # after 0.01, 0.03, 0.07, 0.15, 0.31, 0.63 s


def test_a_camera_that_is_gone_for_good_ends_the_source(stage):
    stage.reads = "exception"
    source = source_camera.CameraSource("", CONTRACT, give_up_s=0.2)
    with pytest.raises(SourceEnded, match="no such device"):
        while True:
            source.next(0.05)
    source.close()


def test_a_silent_camera_is_reported_once(camera, stage, monkeypatch):
    monkeypatch.setattr(source_camera, "SILENT_S", 0.1)
    stage.reads = "hang"
    source = camera()
    item = until(lambda i: True, source)
    assert "no error either" in item.problem
    assert source.next(0.2) is None


@pytest.mark.parametrize("reads", ["hang", "hang on release"])
def test_close_does_not_wait_for_a_driver_that_hangs(camera, stage, reads):
    stage.reads = reads
    camera().next(0.05)  # the fixture times `close`


def test_close_wakes_who_waits(camera, stage):
    stage.reads = "hang"
    source = camera()
    timer = threading.Timer(0.1, stage.hang.set), threading.Timer(0.1, source.close)
    for t in timer:
        t.start()
    with pytest.raises(SourceEnded, match="closed"):
        source.next(30.0)
    for t in timer:
        t.join()


def test_picamera2_where_opencv_sees_no_camera(camera, stage, monkeypatch):
    """A ribbon cable's camera on a Raspberry Pi: OpenCV is there and can't open it."""
    monkeypatch.setattr(sys.modules["cv2"].VideoCapture, "isOpened", lambda self: False)
    assert tuple(camera().next(2.0).frame[0, 0, 1:]) == (20, 30)
    assert stage.made == [("cv2", 0), ("picamera2", 0)]


def test_neither_opens(camera, stage):
    stage.opens = False
    problem = camera().next(2.0).problem
    assert "OpenCV can't open it; list index out of range" in problem


def test_one_library_alone_and_a_broken_one(camera, stage, monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    assert camera().next(2.0).frame is not None
    assert stage.made == [("picamera2", 0)]
    with pytest.raises(BackendError, match=r"edgesolve\[camera\]"):
        open_source("camera:opencv", CONTRACT)


def test_sound_from_a_camera_is_one_sentence(stage):
    with pytest.raises(InputError, match=r"expects float32 arrays .*give \.npy"):
        open_source("camera", Contract((16, 4, 1), np.dtype(np.float32)))
    assert stage.made == []


def test_what_resizing_lacks_is_said_at_once(stage, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(BackendError, match=r"edgesolve\[images\]"):
        open_source("camera", CONTRACT)
