"""What an upload or a source's spec may be: decoded as load_frames does, or one sentence, within bounds."""

import io
import struct
import sys
import zlib

import numpy as np
import pytest

from edgesolve.device import decode
from edgesolve.device.bundle import Contract
from edgesolve.device.errors import BackendError, InputError, UsageError
from edgesolve.device.frames import load_frames
from edgesolve.device.sources import open_source

PICTURES = Contract((8, 8, 3), np.dtype(np.uint8))
GREY = Contract((8, 8, 1), np.dtype(np.uint8))
SOUND = Contract((16, 4, 1), np.dtype(np.float32))


def saved(array, **options):
    out = io.BytesIO()
    np.save(out, array, **options)
    return out.getvalue()


def picture(h=20, w=30, c=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (h, w, c), dtype=np.uint8)


def encoded(array, kind="PNG", **options):
    Image = pytest.importorskip("PIL.Image", reason="images need Pillow")
    out = io.BytesIO()
    Image.fromarray(array.squeeze(-1) if array.shape[-1] == 1 else array).save(out, kind, **options)
    return out.getvalue()


def png_header(w, h):
    def chunk(kind, body):
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    size = chunk(b"IHDR", struct.pack(">IIBBBBB", w, h, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + size + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def npy_header(shape, dtype="|u1"):
    text = repr({"descr": dtype, "fortran_order": False, "shape": shape}).encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


# -- images ------------------------------------------------------------------------------------


@pytest.mark.parametrize("contract", [PICTURES, GREY], ids=["rgb", "grey"])
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "BMP", "WEBP", "PPM"])
def test_image_bytes_are_the_frame_that_load_frames_reads(tmp_path, contract, kind):
    data = encoded(picture(), kind)
    path = tmp_path / f"x.{kind.lower()}"
    path.write_bytes(data)
    h, w, c = contract.shape
    frame = decode.decode(data, contract)
    assert frame.shape == contract.shape and frame.dtype == np.uint8
    np.testing.assert_array_equal(frame, load_frames(path, size=(h, w), channels=c).frames[0])


@pytest.mark.parametrize("contract", [PICTURES, GREY], ids=["rgb", "grey"])
@pytest.mark.parametrize("shape", [(20, 30, 3), (8, 8, 3), (3, 5, 3), (20, 30, 1), (20, 30, 4)])
def test_a_raw_picture_is_what_its_lossless_file_is(contract, shape, accepts_only):
    image = picture(*shape)
    expected = decode.decode(encoded(image), contract)

    def check(frame):
        np.testing.assert_array_equal(frame, expected)

    blind = ("flipped",) if 1 in (shape[2], contract.shape[2]) else ()  # along the channels
    accepts_only(check, decode.contract_frame(image, contract), blind)


def test_greys_of_every_colour_are_pillows():
    Image = pytest.importorskip("PIL.Image", reason="compared with Pillow")
    contract = Contract((64, 4096, 1), np.dtype(np.uint8))
    image = picture(64, 4096)
    expected = np.asarray(Image.fromarray(image).convert("L"))[:, :, None]
    np.testing.assert_array_equal(decode.contract_frame(image, contract), expected)


def test_two_axes_are_a_grey_picture():
    grey = picture(8, 8, 1)[:, :, 0]
    np.testing.assert_array_equal(decode.contract_frame(grey, GREY)[:, :, 0], grey)
    np.testing.assert_array_equal(decode.contract_frame(grey, PICTURES)[:, :, 2], grey)


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((4, 4, 2), np.uint8),
        np.zeros((4, 4, 3)),
        np.zeros((0, 4, 3), np.uint8),
        np.uint8(3),
    ],
    ids=["two channels", "float", "empty", "scalar"],
)
def test_what_is_no_picture_is_refused(image):
    with pytest.raises(InputError, match="expected uint8"):
        decode.contract_frame(image, PICTURES)


def test_without_pillow_opencv_resizes(monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    calls = []

    class cv2:
        INTER_AREA, INTER_LINEAR = "area", "linear"

        @staticmethod
        def resize(image, size, interpolation):
            calls.append((size, interpolation))
            return np.zeros((size[1], size[0], image.shape[2]), np.uint8)

    monkeypatch.setitem(sys.modules, "cv2", cv2)
    for h, w in ((20, 30), (4, 30)):
        assert decode.contract_frame(picture(h, w), PICTURES).shape == (8, 8, 3)
    assert calls == [((8, 8), "area"), ((8, 8), "linear")]
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(BackendError, match=r"edgesolve\[images\]"):
        decode.contract_frame(picture(), PICTURES)
    assert decode.contract_frame(picture(8, 8), PICTURES).shape == (8, 8, 3)  # nothing to resize
    with pytest.raises(InputError, match=r"edgesolve\[images\]"):
        decode.decode(png_header(8, 8), PICTURES)


# -- bounds and damage -------------------------------------------------------------------------


def test_a_picture_for_sound_is_one_sentence():
    with pytest.raises(
        InputError, match=r"expects float32 arrays of shape \(16, 4, 1\): give .npy"
    ):
        decode.decode(png_header(8, 8), SOUND)


def forbid_decoding(monkeypatch):
    from PIL import ImageFile

    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("it was decoded"))


@pytest.mark.parametrize(
    "size", [(8001, 8000), (9600, 9600), (13000, 13000), (60000, 60000)], ids=str
)
def test_a_header_of_over_64_megapixels_is_refused_unread(size, monkeypatch):
    pytest.importorskip("PIL", reason="images need Pillow")
    forbid_decoding(monkeypatch)
    with pytest.raises(InputError, match="64 megapixels"):
        decode.decode(png_header(*size), PICTURES)


def test_64_megapixels_are_not_refused_by_size(monkeypatch):
    pytest.importorskip("PIL", reason="images need Pillow")
    with pytest.raises(InputError, match="not readable") as caught:
        decode.decode(png_header(8, 8), PICTURES)  # no data: the decoder is asked
    assert "megapixels" not in str(caught.value)
    decode.check_pixels((8000, 8000), "x")


def test_a_huge_webp_canvas_is_refused_before_its_reader_runs(monkeypatch):
    Image = pytest.importorskip("PIL.Image", reason="images need Pillow")
    monkeypatch.setattr(Image, "open", lambda *a, **k: pytest.fail("it was opened"))
    size = (16383 - 1).to_bytes(3, "little")
    data = b"RIFF" + bytes(4) + b"WEBPVP8X" + bytes(8) + size + size + bytes(20)
    with pytest.raises(InputError, match="16383 x 16383"):
        decode.decode(data, PICTURES)


def test_webp_size_is_that_of_a_real_file():
    image = np.dstack([picture(20, 30), picture(20, 30, 1)])
    data = encoded(image, "WEBP", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\0\0\0\0\0")
    assert decode.webp_size(data) == (30, 20)


def test_an_array_of_over_64_mib_is_refused_unread():
    for shape in ((8193, 8192), (10**9, 10**9, 10**9, 3), (2,) * 70):
        with pytest.raises(InputError, match=r"over 64 MiB|shape"):
            decode.decode(npy_header(shape), PICTURES)


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"", "not a readable image"),
        (b"GIF89a" + bytes(100), "not a readable image"),
        (b"\x93NUMPY", "ends early"),
        (b"\x93NUMPY\x03\x00" + bytes(10), "np.save"),
        (b"\x93NUMPY\x02\x00\xff\xff\xff\xff", "header is 4294967295 bytes"),
        (b"\x93NUMPY\x01\x00\x04\x00nope", "damaged array header"),
        (npy_header((8, -8, 3)), "expected plain numbers"),
        (npy_header((8, 8, 3), "|O"), "expected plain numbers"),
        (npy_header((8, 8, 3), [("a", "<f4")]), "expected plain numbers"),
        (npy_header((8, 8, 3), "<U0"), "expected plain numbers"),
        (npy_header((8, 8, 3)) + bytes(191), "ends early, 1 bytes"),
        (npy_header((8, 8, 3)) + bytes(193), "left after"),
        (npy_header((0, 8, 8, 3)), "no frames"),
        (npy_header((2, 8, 8, 3)) + bytes(384), "holds 2 frames"),
        (npy_header((9, 8, 3)) + bytes(216), r"shape \(9, 8, 3\), this bundle expects \(8, 8, 3\)"),
        (npy_header((8, 8, 3), "<i4") + bytes(768), "are int32"),
    ],
)
def test_other_bytes_are_one_sentence(data, sentence):
    if not data.startswith(b"\x93NUMPY"):
        pytest.importorskip("PIL", reason="images need Pillow")
    with pytest.raises(InputError, match=sentence) as caught:
        decode.decode(data, PICTURES, "upload")
    assert str(caught.value).startswith("upload: ") and "\n" not in str(caught.value)


def test_a_pickle_is_never_loaded():
    with pytest.raises(InputError, match="plain numbers"):
        decode.decode(saved(np.array([{}], object), allow_pickle=True), PICTURES)


def test_damaged_bytes_raise_input_error_alone():
    """Cut and flipped at many places, every file is a frame or an InputError."""
    rng = np.random.default_rng(1)
    files = [saved(picture(8, 8)), encoded(picture(), "PNG"), encoded(picture(), "JPEG")]
    files += [encoded(picture(), kind) for kind in ("WEBP", "BMP", "PPM")]
    files += [encoded(picture(), "PNG", pnginfo=None, optimize=True)]
    for data in files:
        for _ in range(120):
            bad = bytearray(data)
            for at in rng.integers(0, min(len(bad), 200), 3):
                bad[at] = rng.integers(0, 256)
            bad = bad[: rng.integers(1, len(bad) + 1)]
            try:
                assert decode.decode(bytes(bad), PICTURES).shape == PICTURES.shape
            except InputError as error:
                assert "0x" not in str(error) and "\n" not in str(error)


@pytest.mark.parametrize("form", ["one", "batch of one", "fortran", "float64", "big-endian"])
def test_arrays_as_they_are(form):
    x = np.random.default_rng(2).standard_normal((16, 4, 1)).astype(np.float32)
    given = {
        "one": x,
        "batch of one": x[None],
        "fortran": np.asfortranarray(x[None]),
        "float64": x.astype(np.float64),
        "big-endian": x.astype(">f4"),
    }[form]
    frame = decode.decode(saved(given), SOUND)
    np.testing.assert_array_equal(frame, x)
    assert frame.dtype == SOUND.dtype


def test_not_finite_is_refused():
    x = np.zeros((16, 4, 1), np.float32)
    x[3] = np.nan
    with pytest.raises(InputError, match="NaN or inf"):
        decode.decode(saved(x), SOUND)


# -- specs -------------------------------------------------------------------------------------


def test_specs_that_name_nothing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    monkeypatch.setitem(sys.modules, "picamera2", None)
    with pytest.raises(InputError, match="no such folder"):
        open_source(str(tmp_path / "nowhere"), PICTURES)
    with pytest.raises(UsageError, match="camera:webcam: no such camera"):
        open_source("camera:webcam", PICTURES)
    with pytest.raises(BackendError, match=r"edgesolve\[camera\].*picamera2"):
        open_source("camera", PICTURES)


def test_importing_a_source_imports_no_library(python_command):
    import subprocess

    code = (
        "import sys, edgesolve.device.sources, edgesolve.device.source_folder as f,"
        "edgesolve.device.source_camera, edgesolve.device.source_stdin;"
        "assert not {'cv2', 'PIL', 'picamera2', 'torch', 'onnxruntime'} & set(sys.modules)"
    )
    done = subprocess.run([*python_command, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
