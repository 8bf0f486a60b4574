"""The audit replays every head, and sees each way in which a state can lie."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from safetensors.numpy import load, save

from edgesolve.device import adapt, audit, device_key, generation
from edgesolve.device.bundle import Bundle, open_bundle
from edgesolve.device.runtime import Head, factory_head
from edgesolve.device.solve import solve, source_moments
from edgesolve.device.store import Store
from edgesolve.kernels.moments import Moments

MASS, DECAY = 3.0, 0.5


@pytest.fixture(scope="module")
def bundle(bundle_dir):
    return open_bundle(bundle_dir)


@pytest.fixture(scope="module")
def rows(bundle):
    """Two windows: rows (n, D) and targets (n, c)."""
    known = bundle.parity()
    x = np.concatenate([known["rows"], known["adapted_rows"]])
    t = np.concatenate([known["adapted_logits"], known["logits"]])
    return [(x[i::2], 1.2 * t[i::2]) for i in range(2)]


@pytest.fixture(scope="module")
def learnt(bundle, rows, tmp_path_factory):
    """A state with two generations, the second solved on both windows."""
    store = Store(tmp_path_factory.mktemp("learnt") / "state")
    reference, earlier = bundle.reference("onnx"), []
    for x, t in rows:
        own = Moments.from_arrays(Moments.of(x, t).to_arrays())
        seen, parts = own, [{"generation": None, "weight": 1.0}]
        for number, window in earlier:
            seen = seen + window.scaled(DECAY)
            parts.append({"generation": number, "weight": DECAY})
        solved = solve(bundle, "onnx", source_moments(reference), seen, MASS)
        head = Head(solved.weights.astype(np.float32), solved.intercept.astype(np.float32))
        figures = audit.anchor_figures(head, factory_head(bundle, "onnx"), reference, 0.0)
        provenance = {
            "bundle_sha256": bundle.sha256,
            "backend": "onnx",
            "mass": MASS,
            "parts": parts,
            "gate": figures,
            "features_sha256": adapt.features_sha256(bundle, "onnx", None),
            "parent": len(earlier),
            "n": 42,  # of which 32 were learnt from, the rest judged
            "reason": "gate_passed",
        }
        number = store.commit(head.to_arrays(), None, provenance, window=own.to_arrays())
        earlier.append((number, own))
    return store.path


@pytest.fixture
def state(learnt, tmp_path):
    return shutil.copytree(learnt, tmp_path / "state")


def rewrite(state, number, change):
    """Change a generation and seal it again, with the device's key: whoever holds the state folder can."""
    folder = state / "generations" / f"{number:04d}"
    key = device_key.read(state)
    files = generation.read_files(folder, number, key=key)
    found = generation.opened(files, key)
    arrays = {k: dict(v) for k, v in (("head", found.arrays), ("window", found.window))}
    provenance = dict(found.provenance)
    change(arrays["head"], arrays["window"], provenance)
    shutil.rmtree(folder)
    packed = generation.packed(arrays["head"], None, provenance, arrays["window"] or None)
    generation.write_generation(folder, number, found.parent, packed, key)


def one(bundle, state, number=2):
    found = audit.audit(bundle, Store(state))
    return next(e for e in found["generations"] if e["generation"] == number)


def test_every_generation_is_reproduced_bit_for_bit(bundle, learnt):
    found = audit.audit(bundle, Store(learnt))
    assert [e["verdict"] for e in found["generations"]] == ["reproduced"] * 2
    assert found["verdict"] == "reproduced"
    assert all(e["max_abs"] == 0 and e["sealed"] for e in found["generations"])
    text = audit.audit_text(found)
    assert text.count("reproduced") == 3 and "1 earlier" in text


def test_what_recalibrate_stores_is_reproduced(bundle, adapted, backend):
    for mode in ("backbone", "head"):
        state, _ = adapted(backend, mode)
        found = audit.audit(bundle, Store(state))
        assert found["generations"] and found["verdict"] == "reproduced", audit.audit_text(found)


def test_nothing_learnt(bundle, tmp_path):
    found = audit.audit(bundle, Store(tmp_path / "nowhere"))
    assert found["generations"] == [] and "factory head" in audit.audit_text(found)
    assert not (tmp_path / "nowhere").exists(), "an audit writes nothing"


def test_the_stored_head_is_the_optimum_of_the_rows_themselves(bundle, rows, learnt, accepts_only):
    """Without moments or our solver: weighted rows, least squares with a ridge, by numpy."""
    reference = bundle.reference("onnx")
    S = np.zeros(2 * [reference["moments.mean_x"].size])
    S[np.tril_indices(len(S))] = reference["moments.s"]
    values, vectors = np.linalg.eigh(S + np.tril(S, -1).T)
    keep = values > 0
    known = Moments.from_arrays({k[8:]: v for k, v in reference.items() if k[:8] == "moments."})
    mu_x, mu_t = known.means()
    A0 = np.sqrt(values[keep])[:, None] * vectors[:, keep].T  # A0'A0 = S: rows with these moments
    C = known.centred()[1]
    T0 = (C @ vectors[:, keep] / np.sqrt(values[keep])).T
    n = 32 + DECAY * 32
    mass = MASS * n / (n + 48.0)
    x, t = (np.concatenate([rows[1][i], rows[0][i]]).astype(np.float64) for i in (0, 1))
    w = np.r_[np.ones(32), np.full(32, DECAY)] / n
    share = mass / (1 + mass)
    m_x, m_t = ((1 - share) * a + share * w @ b for a, b in ((mu_x, x), (mu_t, t)))
    design = [np.sqrt(1 - share) * A0, np.sqrt(1 - share) * (mu_x - m_x)[None]]
    target = [np.sqrt(1 - share) * T0, np.sqrt(1 - share) * (mu_t - m_t)[None]]
    design.append(np.sqrt(share * w)[:, None] * (x - m_x))
    target.append(np.sqrt(share * w)[:, None] * (t - m_t))
    A, T = np.concatenate(design), np.concatenate(target)
    ridge = bundle.manifest["solve"]["ridge"] * (A**2).sum(0).mean()
    A = np.concatenate([A, np.sqrt(ridge) * np.eye(A.shape[1])])
    T = np.concatenate([T, np.zeros((A.shape[1], T.shape[1]))])
    expected = np.linalg.lstsq(A, T, rcond=None)[0]

    def close(weights):
        assert np.abs(weights - expected).max() <= 1e-3 * np.abs(expected).max()

    accepts_only(close, Store(learnt).current().arrays["weights"])


def test_rounding_of_another_build_is_within_the_gap(bundle, state):
    def nudge(head, window, provenance):
        head["weights"] = np.nextafter(head["weights"], np.float32(np.inf))

    rewrite(state, 2, nudge)
    entry = one(bundle, state)
    assert entry["verdict"] == "within_gap" and 0 < entry["max_abs"] < 1e-6
    assert entry["relative_gap"] <= 1e-6


def scaled(name, factor):
    def change(head, window, provenance):
        head[name] = (head[name] * np.float32(factor)).astype(np.float32)

    return change


def change_head(change):
    return lambda head, window, provenance: change(head)


def change_window(change):
    return lambda head, window, provenance: change(window)


def record(**changed):
    return lambda head, window, provenance: provenance.update(changed)


def spoil(window):
    window["s"] = window["s"].copy()
    window["s"][0] = -1.0


@pytest.mark.parametrize(
    "change, sentence",
    [
        (scaled("weights", 1.01), "above the optimum of its own moments"),
        (scaled("weights", 0.0), "above the optimum of its own moments"),
        (scaled("intercept", 1.1), "above the optimum of its own moments"),
        (change_head(lambda h: h.update(weights=h["weights"][::-1].copy())), "above the optimum"),
        (change_head(lambda h: h.update(weights=h["weights"][:-1].copy())), "its weights are"),
        (change_head(lambda h: h["weights"].fill(np.nan)), "NaN"),
        (record(mass=1.0), "above the optimum of its own moments"),
        (record(parts=[{"generation": None, "weight": 1.0}]), "above the optimum"),
        (record(parts=[{"generation": None, "weight": 1.0}, {"generation": 1, "weight": 0.4}]),
         "above the optimum"),
        (record(parts=[{"generation": None, "weight": -1.0}]), "got -1.0"),
        (record(parts=[{"generation": None, "weight": 2.0}]), "weight 2.0"),
        (record(parts="x"), "not what edgesolve writes"),
        (record(gate={}), "not what edgesolve writes"),
        (record(gate={"anchor_agreement_old": 1.0, "anchor_agreement_new": 0.0}), "anchor_agreement"),
        (record(n=64), "counts 32 rows"),
        (record(parent=7), "as parent"),
        (record(features_sha256="0"), "features_sha256"),
        (record(reason="returned"), "it says that it is the factory head"),
        (change_window(lambda w: w.update(n=np.array(-32.0))), "they count -32 rows"),
        (change_window(lambda w: w.update(mean_x=w["mean_x"] * np.nan)), "NaN or inf"),
        (change_window(spoil), "smallest eigenvalue"),
        (change_window(lambda w: w.update(c=100 * w["c"])), "explain more of the targets"),
        (change_window(lambda w: w.update(v=np.array(-1.0))), "variance is negative"),
        (change_window(lambda w: w.update(mean_x=w["mean_x"] + 1)), "above the optimum"),
    ],
)  # fmt: skip
def test_each_lie_is_seen(bundle, state, change, sentence):
    rewrite(state, 2, change)
    entry = one(bundle, state)
    assert entry["verdict"] == "differs" and sentence.lower() in entry["sentence"].lower(), entry
    assert audit.audit(bundle, Store(state))["verdict"] == "differs"
    assert one(bundle, state, 1)["verdict"] == "reproduced"


@pytest.mark.parametrize("name", ["head.safetensors", "window.safetensors", "seal.json"])
def test_a_damaged_file(bundle, state, name):
    path = state / "generations" / "0002" / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert one(bundle, state)["verdict"] == "differs"


def test_another_devices_generation(bundle, state):
    device_key.create(state)
    assert "key differs" in one(bundle, state)["sentence"]
    (state / "key").unlink()
    assert one(bundle, state)["sealed"] is None and one(bundle, state)["verdict"] == "reproduced"


@pytest.mark.parametrize(
    "change, sentence",
    [
        (record(bundle_sha256="0" * 64), "bundle 000000000000…"),
        (record(backend="none"), "The bundle has no none"),
        (change_window(lambda w: w.clear()), "generation 2 is not kept"),
    ],
)
def test_what_cannot_be_replayed(bundle, state, change, sentence):
    rewrite(state, 2, change)
    entry = one(bundle, state)
    assert entry["verdict"] == "cannot_replay" and sentence in entry["sentence"], entry


def test_an_earlier_window_that_is_gone(bundle, state):
    shutil.rmtree(state / "generations" / "0001")
    entry = one(bundle, state)
    assert entry["verdict"] == "cannot_replay" and "window of generation 1" in entry["sentence"]


def test_a_rejected_generation_is_audited_too(bundle, state):
    Store(state).rollback(bundle.sha256)
    assert one(bundle, state)["rejected"] and one(bundle, state)["verdict"] == "reproduced"


def test_the_factory_head_that_came_back(bundle, state):
    head = factory_head(bundle, "onnx").to_arrays()
    provenance = {"bundle_sha256": bundle.sha256, "parent": 2, "backend": "onnx"}
    Store(state).commit(head, None, {**provenance, "reason": "returned"})
    assert one(bundle, state, 3)["verdict"] == "reproduced"


def test_another_ridge_in_the_bundle_is_another_program(bundle, state):
    """The audit takes nothing from the state but moments, weights and mass."""
    spec = {**bundle.manifest["solve"], "ridge": 2 * bundle.manifest["solve"]["ridge"]}
    other = Bundle(bundle.path, {**bundle.manifest, "solve": spec}, bundle.sha256)
    assert one(other, state)["verdict"] == "differs"


def test_the_group_penalty_is_replayed_from_the_same_start(bundle, rows, tmp_path):
    spec = {**bundle.manifest["solve"], "penalty": "group"}
    other = Bundle(bundle.path, {**bundle.manifest, "solve": spec}, bundle.sha256)
    own = Moments.from_arrays(Moments.of(*rows[0]).to_arrays())
    reference, factory = other.reference("onnx"), factory_head(other, "onnx")
    solved = solve(
        other, "onnx", source_moments(reference), own, MASS, start=factory.weights
    )  # fmt: skip
    head = Head(solved.weights.astype(np.float32), solved.intercept.astype(np.float32))
    provenance = {
        "bundle_sha256": other.sha256,
        "backend": "onnx",
        "mass": MASS,
        "parts": [{"generation": None, "weight": 1.0}],
        "gate": audit.anchor_figures(head, factory, reference, 0.0),
        "features_sha256": adapt.features_sha256(other, "onnx", None),
        "parent": 0,
        "n": 42,
    }
    store = Store(tmp_path / "state")
    store.commit(head.to_arrays(), None, provenance, window=own.to_arrays())
    entry = one(other, store.path, 1)
    assert entry["verdict"] == "reproduced" and entry["relative_gap"] <= 1e-6


def test_plausible_moments_have_rows(rows):
    """Real rows pass, also as float32 and with fewer rows than features; the report is None."""
    for dtype in (np.float32, np.float64):
        for n in (1, 5, 32):
            moments = Moments.of(rows[0][0][:n], rows[0][1][:n])
            assert audit.implausible(load(save(moments.to_arrays(dtype)))) is None
