"""`edgesolve build` from the command line to a bundle, and what is left when it fails or is killed."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from edgesolve.device import cli
from edgesolve.device.bundle import open_bundle
from edgesolve.device.errors import BundleError, ParityError, StateError, UsageError
from edgesolve.device.runtime import open_runtime
from edgesolve.device.verify import verify
from edgesolve.host import bundle_writer, place, recipe
from edgesolve.host.cli import parser
from edgesolve.host.distill import HeadOptions
from edgesolve.host.errors import ModelError

TESTS = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def calibration(tmp_path_factory):
    """An .npz of 160 noisy gratings with labels that nothing was trained on."""
    folder = tmp_path_factory.mktemp("calibration")
    rng = np.random.default_rng(0)
    wave = np.sin(np.arange(16) * rng.uniform(0.2, 1.5, (160, 1)) + rng.uniform(0, 6, (160, 1)))
    x = 127 + 60 * wave[:, :, None, None] + rng.normal(0, 40, (160, 16, 16, 3))
    path = folder / "x.npz"
    np.savez(path, x=np.clip(x, 0, 255).astype(np.uint8), y=rng.integers(0, 4, 160))
    return path


@pytest.fixture(scope="module")
def arguments(calibration):
    model = f"{TESTS / 'tiny_model.py'}:tiny"
    return [model, "--data", str(calibration), "--split", "4", "--backends", "onnx"]


@pytest.fixture(scope="module")
def bundle(arguments, tmp_path_factory):
    """(folder, what the command printed), built once in a process of its own."""
    folder = tmp_path_factory.mktemp("built")
    command = [sys.executable, "-P", "-m", "edgesolve.device.cli", "build", *arguments]
    extra = ["--out", str(folder / "b"), "--original", str(folder / "whole.onnx"), "--json"]
    done = subprocess.run([*command, *extra], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "distil the head behind 4" in done.stderr, "progress is shown"
    return folder / "b", json.loads(done.stdout)


@pytest.fixture(scope="module")
def built(arguments):
    """(Built, options) in memory, to write again and again."""
    from edgesolve.host.cli import _options
    from edgesolve.host.load import load_calibration, load_model

    p = parser()
    args = p.parse_args([*arguments, "--out", "unused"])
    options = _options(args, p)
    log = recipe.Log(lambda *a, **k: None)
    torch.manual_seed(args.seed)
    made = recipe.build(load_model(args.model), load_calibration(args.data), options, log)
    return made, options


def write(built, folder):
    made, options = built
    return recipe.write(made, folder, options, recipe.Log(lambda *a, **k: None), {"seed": 0})


def tree(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_the_report(bundle):
    folder, printed = bundle
    report = json.loads((folder / "report.json").read_text())
    assert report == printed
    for key in ("params", "macs", "bytes", "accuracy", "agreement"):
        assert set(report[key]) == {"before", "after"}
    assert report["params"]["before"] == 13_180
    assert report["params"]["after"] < report["params"]["before"]
    assert report["agreement"]["before"] == 1.0 and 0 < report["agreement"]["after"] <= 1.0
    assert report["head"]["relative_gap"] <= 1e-6
    replaced = [e for e in report["layers"] if e["decision"] == "replaced"]
    kept = [e for e in report["layers"] if e["decision"] == "kept"]
    assert sum(e["params"] for e in replaced) == report["head"]["replaced_params"]
    assert sum(e["params"] for e in kept) + report["head"]["params"] == report["params"]["after"]
    assert sum(e["macs"] for e in kept) + report["head"]["macs"] == report["macs"]["after"]
    assert report["seconds"]["total"] > 0 and len(report["seconds"]) >= 6
    page = (folder / "report.html").read_text()
    assert "<svg" in page
    assert not re.search(r"<script|<link|@import|url\((?!#)|(src|href)=.http", page), (
        "self-contained"
    )
    assert "report.html" in open_bundle(folder).manifest["files"]


def test_the_bundle_stands_on_its_own(bundle, calibration):
    folder, _ = bundle
    found = verify(open_bundle(folder))
    assert set(found["files"]) >= {"backbone.onnx", "teacher.onnx", "report.json", "parity.npz"}
    assert found["backends"]["onnx"]["top1"] == 1.0
    assert sorted(p.name for p in folder.iterdir()) == sorted([*found["files"], "manifest.json"])
    assert not any(p.suffix in (".pt", ".pth", ".pkl") for p in folder.iterdir())
    manifest = open_bundle(folder).manifest
    assert manifest["schema_version"] == 1 and manifest["name"] == "b"
    assert manifest["input"]["scale"] == pytest.approx(1 / 255)
    assert len(manifest["provenance"]["calibration_sha256"]) == 64
    assert str(calibration.parent) not in json.dumps(manifest), "no path of this machine is shipped"
    with np.load(calibration) as data:
        x = data["x"][:50]
    runtime = open_runtime(folder)
    solver = runtime.rows(x).astype(np.float64) @ runtime.head.weights + runtime.head.intercept
    np.testing.assert_allclose(runtime.logits(x), solver, rtol=1e-5, atol=1e-5)


def test_the_original_is_written_beside(bundle, calibration):
    from edgesolve.device.graph import open_graph

    folder, _ = bundle
    parity = open_bundle(folder).parity()
    found = open_graph(folder.parent / "whole.onnx")(parity["frames"])[0]
    np.testing.assert_allclose(found, parity["teacher_logits"], atol=1e-4)


def test_building_again_gives_the_same_head(bundle, built, tmp_path):
    write(built, tmp_path / "b")
    for name in ("head.safetensors", "statistics.safetensors"):
        assert (tmp_path / "b" / name).read_bytes() == (bundle[0] / name).read_bytes(), name


# -- half-built never looks whole --------------------------------------------------------------------


@pytest.mark.parametrize("existing", [False, True])
def test_a_disk_that_fills_up_leaves_what_was_there(bundle, built, tmp_path, monkeypatch, existing):
    folder = tmp_path / "b"
    if existing:
        shutil.copytree(bundle[0], folder)
    before = tree(tmp_path)
    real, left = bundle_writer._write, [0]

    def failing(path, data):
        left[0] -= 1
        if left[0] == 0:
            path.write_bytes(data[: len(data) // 2])
            raise OSError(28, os.strerror(28), str(path))
        real(path, data)

    monkeypatch.setattr(bundle_writer, "_write", failing)
    monkeypatch.setattr(bundle_writer, "_verify", lambda folder: {})
    for k in (1, 3, 7, 8, 14, 16):
        left[0] = k
        with pytest.raises(StateError, match="cannot be written \\(No space left on device"):
            write(built, folder)
        assert tree(tmp_path) == before and folder.exists() == existing, k
    left[0] = 0
    write(built, folder)
    verify(open_bundle(folder))
    assert [p.name for p in tmp_path.iterdir()] == ["b"]


def test_an_old_bundle_stands_until_its_successor_does(bundle, built, tmp_path, monkeypatch):
    folder = shutil.copytree(bundle[0], tmp_path / "b")
    before = tree(tmp_path)
    real = os.rename

    def failing(source, target):
        if str(source).endswith(".partial"):
            raise OSError(5, os.strerror(5), str(target))
        real(source, target)

    monkeypatch.setattr(bundle_writer, "_verify", lambda folder: {})
    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(StateError, match="Input/output error"):
        write(built, folder)
    assert tree(tmp_path) == before
    monkeypatch.setattr(os, "rename", real)
    (tmp_path / "b.replaced").mkdir()  # what a kill between the two renames may leave
    write(built, folder)
    assert [p.name for p in tmp_path.iterdir()] == ["b"]
    verify(open_bundle(folder))


@pytest.mark.parametrize("inside", ["photo.png", "manifest.json"])
def test_a_folder_that_is_no_bundle_is_never_replaced(arguments, built, capsys, tmp_path, inside):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / inside).write_text('{"name": "a web page"}')
    sentence = "mine: exists and is no bundle. Remove it, or name another --out."
    assert sentence in refuse(2, capsys, *arguments, "--out", tmp_path / "mine")
    with pytest.raises(UsageError, match="exists and is no bundle"):
        write(built, tmp_path / "mine")
    assert [p.name for p in (tmp_path / "mine").iterdir()] == [inside]


@pytest.mark.parametrize("where", ["/proc/b", "file/b"])
def test_a_place_that_cannot_be_written(built, tmp_path, where):
    (tmp_path / "file").write_text("")
    with pytest.raises(StateError, match="cannot be written"):
        write(built, Path(where) if where.startswith("/") else tmp_path / where)


@pytest.mark.parametrize("tampered", ["logits", "adapted_rows", "adapted_logits", "window_var"])
def test_a_backend_that_disagrees_is_no_bundle(bundle, built, tmp_path, tampered):
    import dataclasses

    made, options = built
    parity = {**made.parity, tampered: 1.01 * made.parity[tampered]}
    folder = shutil.copytree(bundle[0], tmp_path / "b")
    before = tree(tmp_path)
    with pytest.raises(ParityError, match=r"fails its own check: .*differ from torch by"):
        write((dataclasses.replace(made, parity=parity), options), folder)
    assert tree(tmp_path) == before


KILL = """
import os, signal, sys
from edgesolve.device import cli
from edgesolve.host import bundle_writer
bundle_writer.{place} = lambda *args: os.kill(os.getpid(), signal.SIGKILL)
cli.main(sys.argv[1:])
"""


@pytest.mark.parametrize("place", ["_verify"])
def test_a_killed_build_is_no_bundle(bundle, arguments, tmp_path, place):
    folder = tmp_path / "b"
    command = [sys.executable, "-c", KILL.format(place=place), "build", *arguments]
    done = subprocess.run([*command, "--out", str(folder)], capture_output=True)
    assert done.returncode == -signal.SIGKILL
    assert not folder.exists()
    with pytest.raises(BundleError, match="no such bundle folder"):
        open_bundle(folder)
    left = [p.name for p in tmp_path.iterdir()]
    assert left == ["b.partial"], "its files lie under a name that nobody deploys"


def test_the_next_build_clears_what_a_kill_left(built, tmp_path):
    (tmp_path / "b.partial").mkdir()
    (tmp_path / "b.partial" / "junk").write_text("x")
    write(built, tmp_path / "b")
    assert [p.name for p in tmp_path.iterdir()] == ["b"]
    assert not (tmp_path / "b" / "junk").exists()


# -- options -----------------------------------------------------------------------------------------


def refuse(code, capsys, *arguments):
    try:
        found = cli.main(["build", *map(str, arguments)])
    except SystemExit as end:
        found = end.code
    said = capsys.readouterr().err
    assert found == code, said
    return said


@pytest.mark.parametrize(
    "options, sentence",
    [
        (
            ["--target", "drop"],
            "expected drop=1.0, params=0.5, macs=0.5, bytes=0.25, latency=0.5 or latency-ms=2.5",
        ),
        (["--target", "drop=-1"], "expected drop=1.0"),
        (["--target", "speed=2"], "expected drop=1.0"),
        (["--target", "latency-ms=5"], "needs --decompose"),
        (["--backends", "onnx,tensorrt"], "expected onnx, litert or both"),
        (["--backends", ""], "expected onnx, litert or both"),
        (["--n-gates", "0"], "must be at least 1"),
        (["--rank", "-2"], "must be at least 1"),
        (["--gates", "magic"], "invalid choice"),
        (["--mean", "a,b"], "invalid"),
        (["--recipe", "nowhere.toml"], "not a readable TOML file"),
    ],
)
def test_wrong_options(arguments, capsys, tmp_path, options, sentence):
    assert sentence in refuse(2, capsys, *arguments, "--out", tmp_path / "b", *options)


@pytest.mark.parametrize(
    "options, sentence",
    [
        (["--split", "nowhere"], "--split nowhere: no such place. The network splits at: "),
        (["--mean", ".5,.5", "--std", "1,1"], "frames have 3 channels"),
        (["--std", "0,1,1"], "std > 0"),
    ],
)
def test_options_that_do_not_fit_the_model(arguments, capsys, tmp_path, options, sentence):
    assert sentence in refuse(7, capsys, *arguments, "--out", tmp_path / "b", *options)
    assert list(tmp_path.iterdir()) == []


def test_a_recipe_gives_defaults_and_the_command_line_wins(tmp_path, arguments):
    from edgesolve.host.cli import _options, _recipe

    path = tmp_path / "r.toml"
    path.write_text(
        'split = "3"\nmean = [0.1, 0.2, 0.3]\nn_gates = 8\nflip = true\ngates = "seeded3"\n'
    )
    p = parser()
    p.set_defaults(**_recipe(str(path), p))
    options = _options(p.parse_args([*arguments, "--out", "b"]), p)
    assert options.split == "4", "the command line names it"
    assert options.mean == (0.1, 0.2, 0.3)
    assert (options.head.gates, options.head.n_gates, options.head.flip) == ("seeded3", 8, True)
    path.write_text("colour = 3\n")
    with pytest.raises(UsageError, match="unknown colour"):
        _recipe(str(path), p)
    path.write_text('gates = "magic"\n')
    with pytest.raises(
        UsageError, match=r"gates = 'magic', expected one of auto, teacher, seeded,"
    ):
        _recipe(str(path), p)


def test_every_head_option_reaches_the_head(arguments):
    from edgesolve.host.cli import _options

    p = parser()
    more = "--gates seeded3 --n-gates 9 --rank 3 --ramps 3 --penalty group --lam .5 --flip --seed 4"
    found = _options(p.parse_args([*arguments, "--out", "b", *more.split()]), p).head
    assert found == HeadOptions("seeded3", 9, 3, 3, "group", 0.5, True, 4)
    whole = _options(p.parse_args([*arguments, "--out", "b", "--fixed-backbone"]), p)
    assert whole.fixed_backbone and whole.backends == ("onnx",) and whole.split == "4"


# -- which split ---------------------------------------------------------------------------------------


def test_a_target_picks_the_split(built, calibration):
    from dataclasses import replace

    from edgesolve.host.load import load_calibration

    made, options = built
    data = load_calibration(str(calibration))
    held_out = np.arange(len(data)) % 6 == 0
    log = recipe.Log(lambda *a, **k: None)
    log.step("choose")
    total = 13_180

    def choose(target):
        changed = replace(options, split=None, target=target)
        trial = place.Trial(made.network, made.preprocess, data.x, held_out, log)
        return place.choose_cut(trial, changed)

    cut, table = choose(("params", 0.9))
    assert 1 - cut.params_after / total <= 0.9 and table == []
    with pytest.raises(
        ModelError, match=r"--target params=0\.001: the smallest backbone here keeps"
    ):
        choose(("params", 0.001))


@pytest.mark.parametrize("drop, expected", [(0.5, 0), (1.0, 1), (3.0, 2), (9.0, 3), (50.0, 3)])
def test_the_drop_search_finds_the_cheapest_within_the_target(built, monkeypatch, drop, expected):
    """Bisection over four splits whose losses are given; every split but the last few is tried at most once."""
    made, options = built
    losses = [0.4, 0.9, 2.0, 5.0][::-1]  # the more is replaced, the more is lost
    candidates = [
        SimpleNamespace(name=f"s{i}", params_after=i, loss=v) for i, v in enumerate(losses)
    ]
    tried = []

    def distill(network, cut, *rest):
        tried.append(cut.name)
        return SimpleNamespace(agreement=1 - cut.loss / 100)

    monkeypatch.setattr(place, "distill", distill)
    log = recipe.Log(lambda *a, **k: None)
    log.step("choose")
    trial = place.Trial(None, None, made.data.x, np.arange(160) % 6 == 0, log)
    cut, table = place._search_drop(trial, candidates, drop, options.head)
    assert cut.name == f"s{3 - expected}" and len(tried) == len(set(tried)) <= 3
    assert {e["split"]: e["agreement_loss"] for e in table} == {
        c.name: pytest.approx(c.loss) for c in candidates if c.name in tried
    }
    with pytest.raises(ModelError, match=r"--target drop=0\.1: .* loses 0\.40 .* --split s3\."):
        place._search_drop(trial, candidates, 0.1, options.head)
