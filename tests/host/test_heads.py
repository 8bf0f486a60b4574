"""What a bundle keeps of a head."""

import numpy as np

from edgesolve.host.heads import HALF_ERROR, halved


def test_half_precision_is_kept_where_no_logit_notices():
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((50, 30)).astype(np.float32)
    arrays = {"weights": rng.standard_normal((30, 4)).astype(np.float32), "intercept": np.ones(4)}
    stored = halved(arrays, rows)
    assert stored["weights"].dtype == np.float16 and stored["intercept"] is arrays["intercept"]
    logits = rows @ arrays["weights"]
    moved = np.abs(rows @ stored["weights"].astype(np.float32) - logits).max()
    assert 0 < moved <= HALF_ERROR * logits.std()


def test_half_precision_is_refused_where_it_would_be_noticed():
    rng = np.random.default_rng(1)
    rows = rng.standard_normal((50, 30)).astype(np.float32)
    weights = rng.standard_normal((30, 4)).astype(np.float32)
    cancelling = np.concatenate([1e4 * weights, weights - 1e4 * weights])
    for w, x in (
        (cancelling, np.hstack([rows, rows])),
        (1e5 * weights, rows),
        (1e-9 * weights, rows),
    ):
        assert halved({"weights": w}, x)["weights"] is w
