"""CIFAR-10-C's corruptions as the benchmarks make them, against closed forms and other implementations."""

import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("PIL")
ndimage = pytest.importorskip("scipy.ndimage")


@pytest.fixture(scope="module")
def made():
    folder = Path(__file__).resolve().parents[2] / "benchmarks"
    sys.path.insert(0, str(folder))
    import adaptation_corruptions

    sys.path.remove(str(folder))
    return adaptation_corruptions


@pytest.fixture(scope="module")
def x():
    """Smooth scenes with texture, (12, 32, 32, 3) uint8."""
    rng = np.random.default_rng(0)
    scene = ndimage.gaussian_filter(rng.random((12, 32, 32, 3)), (0, 4, 4, 0))
    scene = (scene - scene.min()) / np.ptp(scene)
    return np.uint8(255 * np.clip(scene + 0.1 * rng.standard_normal(scene.shape), 0, 1))


def test_fifteen_of_them_give_uint8_images_that_differ_and_repeat(made, x):
    assert len(made.CORRUPTIONS) == 15
    for name in made.CORRUPTIONS:
        y = made.corrupted(name, x)
        assert (y.dtype, y.shape) == (np.uint8, x.shape)
        assert (y != x).mean() > 0.05, name
        np.testing.assert_array_equal(y, made.corrupted(name, x))
    assert (made.corrupted("snow", x, seed=1) != made.corrupted("snow", x)).any()


def test_other_images_are_refused(made):
    with pytest.raises(ValueError, match="expected uint8"):
        made.corrupted("fog", np.zeros((1, 32, 32, 3), np.float32))


def test_noise_has_the_published_moments(made):
    grey = np.full((40, 32, 32, 3), 128, np.uint8)
    found = {
        n: made.corrupted(n, grey).astype(float) / 255 for n in made.CORRUPTIONS if "noise" in n
    }
    v = 128 / 255
    assert found["gaussian_noise"].std() == pytest.approx(0.10, rel=0.02)
    assert found["shot_noise"].std() == pytest.approx(np.sqrt(v / 50), rel=0.02)
    hit = found["impulse_noise"] != v
    assert hit.mean() == pytest.approx(0.07, rel=0.05)
    assert found["impulse_noise"][hit].mean() == pytest.approx(0.5, abs=0.02)


def test_contrast_is_the_distance_to_the_mean(made, x):
    y = made.corrupted("contrast", x).astype(float)
    mean = x.mean((1, 2), keepdims=True)
    np.testing.assert_allclose(y, 0.15 * (x - mean) + mean, atol=1.0)  # cut to whole values


def test_brightness_is_hsv_with_a_greater_value(made, x):
    from colorsys import hsv_to_rgb, rgb_to_hsv

    y = made.corrupted("brightness", x)
    for pixel, found in zip(x[0, 5], y[0, 5], strict=True):
        h, s, v = rgb_to_hsv(*(pixel / 255))
        expected = np.array(hsv_to_rgb(h, s, min(v + 0.3, 1.0))) * 255
        np.testing.assert_allclose(found, expected, atol=1.0)
    black = np.zeros((1, 32, 32, 3), np.uint8)
    assert np.unique(made.corrupted("brightness", black)).tolist() == [76]


def test_zoom_blur_is_the_mean_of_scipy_s_enlargements(made, x):
    scene = x[0].astype(np.float32) / 255
    total = scene.copy()
    for factor in np.arange(1, 1.26, 0.01):
        crop = int(np.ceil(32 / factor))
        top = (32 - crop) // 2
        part = scene[top : top + crop, top : top + crop]
        large = ndimage.zoom(part, (factor, factor, 1), order=1)
        trim = (len(large) - 32) // 2
        total += large[trim : trim + 32, trim : trim + 32]
    expected = np.clip(total / 27, 0, 1) * 255
    np.testing.assert_allclose(made.corrupted("zoom_blur", x)[0], expected, atol=1.0)


def test_bilinear_sampling_is_scipy_s(made, x):
    rng = np.random.default_rng(1)
    rows, columns = rng.uniform(-4, 36, (2, 1, 32, 32))
    scene = x[:1].astype(np.float64)
    for mode in ("mirror", "reflect"):
        found = made._sampled(scene, rows, columns, mode)
        for c in range(3):
            expected = ndimage.map_coordinates(
                scene[0, ..., c], [rows[0], columns[0]], order=1, mode=mode
            )
            np.testing.assert_allclose(found[0, ..., c], expected, atol=1e-9)


def test_motion_draws_a_point_out_along_the_angle(made):
    point = np.zeros((2, 32, 32, 1), np.float32)
    point[:, 16, 16] = 1.0
    flat, steep = made._motion(point, 9, 2.5, np.array([0.0, 90.0]))[..., 0]
    assert np.flatnonzero(flat.any(1)).tolist() == [16]
    assert np.flatnonzero(steep.any(0)).tolist() == [16]
    weight = flat[16, 16::-1]  # half a Gaussian, on one side only
    expected = np.exp(-(np.arange(17) ** 2) / 12.5)
    np.testing.assert_allclose(weight / weight[0], expected, atol=1e-6)
    assert flat[16, 17:].max() == 0 and flat.sum() == pytest.approx(1.0)


def test_glass_blur_only_moves_values_by_two_pixels(made):
    """Each pixel becomes one that was near: a distant region can't be seen."""
    left = np.zeros((4, 32, 32, 3), np.uint8)
    left[:, :, :10] = 255
    y = made.corrupted("glass_blur", left)
    assert (y[:, :, 18:] == 0).all() and (y[:, :, 9:12] > 0).any()


def test_fractals_are_rougher_where_jitter_decays_less(made):
    rng = np.random.default_rng(2)
    rough, smooth = (made.diamond_square(20, 32, d, rng) for d in (1.3, 3.0))
    for surface in (rough, smooth):
        assert surface.min() == 0 and surface.max() == 1
    step = [np.abs(np.diff(s, axis=1)).mean() for s in (rough, smooth)]
    assert step[0] > 2 * step[1]


def test_jpeg_is_pillow_s(made, x):
    import io

    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(x[3]).save(file, "JPEG", quality=40)
    expected = np.asarray(Image.open(file))
    np.testing.assert_array_equal(made.corrupted("jpeg_compression", x)[3], expected)
