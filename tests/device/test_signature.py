"""Whose bundle is it? Signatures, keys that are trusted, and manifests that must not be believed."""

from __future__ import annotations

import base64
import json
import os
import shutil
import sys
import time

import numpy as np
import pytest

from edgesolve.device import manifest
from edgesolve.device.bundle import open_bundle
from edgesolve.device.errors import BundleError, SignatureError, UsageError
from edgesolve.device.signature import NAME, PUBLIC, check, key_id, trusted_keys
from edgesolve.device.verify import verify


@pytest.fixture
def copy(bundle_dir, tmp_path):
    return shutil.copytree(bundle_dir, tmp_path / "copy")


@pytest.fixture
def signing():
    return pytest.importorskip("nacl.signing", reason="PyNaCl is not installed")


@pytest.fixture
def signed(copy, signing):
    """(bundle folder, public key, signing key)."""
    key = signing.SigningKey.generate()
    sign(copy, key)
    return copy, key.verify_key.encode(), key


def sign(folder, key, **changed):
    signature = key.sign((folder / "manifest.json").read_bytes()).signature
    record = {
        "schema": 1,
        "algorithm": "ed25519",
        "key_id": key_id(key.verify_key.encode()),
        "signature": base64.b64encode(signature).decode(),
        **changed,
    }
    (folder / NAME).write_text(json.dumps(record))


def pem(public: bytes) -> str:
    body = base64.b64encode(PUBLIC + public).decode()
    return f"-----BEGIN PUBLIC KEY-----\n{body}\n-----END PUBLIC KEY-----\n"


def test_valid(signed):
    folder, public, _ = signed
    assert check(open_bundle(folder), [b"x" * 32, public], required=True) == "valid"


def test_unsigned_unless_required(copy):
    assert check(open_bundle(copy), [b"x" * 32], required=False) == "unsigned"
    with pytest.raises(SignatureError, match="not signed, and a signature is required") as caught:
        check(open_bundle(copy), [b"x" * 32], required=True)
    assert caught.value.exit_code == 4


def test_without_a_key_it_is_unchecked_unless_required(copy):
    (copy / NAME).write_text("{}")
    assert check(open_bundle(copy), [], required=False) == "unchecked"
    with pytest.raises(SignatureError, match="no public key is known"):
        check(open_bundle(copy), [], required=True)


def test_without_the_library_it_is_unchecked_unless_required(signed, monkeypatch):
    folder, public, _ = signed
    for name in ("nacl", "nacl.signing", "nacl.exceptions"):
        monkeypatch.setitem(sys.modules, name, None)
    assert check(open_bundle(folder), [public], required=False) == "unchecked"
    with pytest.raises(SignatureError, match="PyNaCl is not installed"):
        check(open_bundle(folder), [public], required=True)


@pytest.mark.parametrize("bit", [0, 7, 255, 256, 300, 511])
def test_any_bit_of_the_signature_counts(signed, bit):
    folder, public, _ = signed
    record = json.loads((folder / NAME).read_text())
    raw = bytearray(base64.b64decode(record["signature"]))
    raw[bit // 8] ^= 1 << bit % 8
    record["signature"] = base64.b64encode(raw).decode()
    (folder / NAME).write_text(json.dumps(record))
    with pytest.raises(SignatureError, match="changed after signing"):
        check(open_bundle(folder), [public], required=False)


def test_one_space_more_in_the_manifest_is_another_manifest(signed):
    folder, public, _ = signed
    path = folder / "manifest.json"
    path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(SignatureError, match="changed after signing"):
        check(open_bundle(folder), [public], required=False)


def test_what_was_opened_is_what_is_checked(signed):
    """The manifest is exchanged for another that is signed as well, between opening and checking."""
    folder, public, key = signed
    bundle = open_bundle(folder)
    path = folder / "manifest.json"
    path.write_bytes(path.read_bytes() + b" ")
    sign(folder, key)
    with pytest.raises(SignatureError, match="changed since it was opened"):
        check(bundle, [public], required=False)


def test_a_key_that_only_claims_the_id_of_a_trusted_one(signed, signing):
    folder, public, _ = signed
    sign(folder, signing.SigningKey.generate(), key_id=key_id(public))
    with pytest.raises(SignatureError, match="changed after signing"):
        check(open_bundle(folder), [public], required=False)


def test_of_an_unknown_key(signed):
    folder, _, _ = signed
    with pytest.raises(
        SignatureError, match=f"signed by key .*, trusted here: {key_id(b'x' * 32)}"
    ):
        check(open_bundle(folder), [b"x" * 32], required=False)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "null", '{"schema": 1}', "[" * 50_000, '{"schema": 1, "algorithm": "ed25519", "key_id": [], '
     '"signature": 7}', '{"schema": 2, "algorithm": "ed25519", "key_id": "", "signature": ""}', "\udcff"],
)  # fmt: skip
def test_what_is_no_signature(copy, text):
    (copy / NAME).write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(SignatureError, match=NAME):
        check(open_bundle(copy), [b"x" * 32], required=False)


def test_a_signature_that_is_a_pipe_or_lies_elsewhere(copy, tmp_path):
    os.mkfifo(copy / NAME)
    with pytest.raises(SignatureError, match="no regular file"):
        check(open_bundle(copy), [b"x" * 32], required=False)
    (copy / NAME).unlink()
    (tmp_path / "elsewhere").write_text("{}")
    (copy / NAME).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(SignatureError, match="points outside"):
        check(open_bundle(copy), [b"x" * 32], required=False)


def test_trusted_keys(tmp_path, monkeypatch):
    monkeypatch.delenv("EDGESOLVE_KEYS", raising=False)
    assert trusted_keys() == []
    a, b, c = (bytes([i]) * 32 for i in (1, 2, 3))
    folder = tmp_path / "keys"
    folder.mkdir()
    with pytest.raises(UsageError, match="holds no public key"):
        trusted_keys(folder)
    (folder / "a.pub").write_text(pem(a))
    (folder / "b.pem").write_text("a note\n" + pem(b) + pem(c))
    (folder / "README").write_text("no key")
    assert trusted_keys(folder) == [a, b, c] and trusted_keys(folder / "a.pub") == [a]
    monkeypatch.setenv("EDGESOLVE_KEYS", str(folder))
    assert trusted_keys() == [a, b, c] and trusted_keys(folder / "a.pub") == [a]


@pytest.mark.parametrize(
    "text, sentence",
    [
        (None, "no readable public key"),
        ("", "holds no public key"),
        (pem(b"short"), "is no Ed25519 key"),
        (pem(b"x" * 32).replace("PUBLIC", "PRIVATE"), "is a private key"),
        (pem(b"x" * 32).replace("PUBLIC", "EC PRIVATE"), "is a private key"),
    ],
)
def test_what_is_no_trusted_key(tmp_path, text, sentence):
    if text is not None:
        (tmp_path / "k").write_text(text)
    with pytest.raises(UsageError, match=sentence):
        trusted_keys(tmp_path / "k")


def test_verify_tells(signed, backend, tmp_path, monkeypatch):
    folder, public, _ = signed
    (tmp_path / "k").write_text(pem(public))
    monkeypatch.setenv("EDGESOLVE_KEYS", str(tmp_path / "k"))
    assert verify(open_bundle(folder), backends=[backend])["signature"] == "valid"


# -- manifests that must not be believed -------------------------------------------------------


def change(folder, act):
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    act(manifest)
    path.write_text(json.dumps(manifest))


def naming(name):
    def act(manifest):
        manifest["files"][name] = manifest["files"]["head.safetensors"]

    return act


@pytest.mark.parametrize(
    "name", ["/etc/passwd", "../head.safetensors", "a/../../b", "a\\b", ".", "a//b", "a/", "./a"]
)
def test_names_that_leave_the_folder(copy, name):
    change(copy, naming(name))
    with pytest.raises(BundleError, match="points outside"):
        open_bundle(copy)


@pytest.mark.parametrize("name", ["", "a\0b", "a\nb", "\x1b[2J", "\ud800", "\u202e", "x" * 300])
def test_names_that_no_file_has(copy, name):
    change(copy, naming(name))
    with pytest.raises(BundleError, match="no name that a file") as caught:
        open_bundle(copy)
    assert str(caught.value).isprintable()


def test_links_may_not_leave_the_folder(copy, tmp_path):
    """The same bytes, so that the hash would fit. A link that stays in the bundle is fine, also one to the bundle."""
    head = copy / "head.safetensors"
    head.rename(tmp_path / "moved")
    head.symlink_to(tmp_path / "moved")
    with pytest.raises(BundleError, match="points outside"):
        open_bundle(copy).read(head.name)
    head.unlink()
    shutil.move(tmp_path / "moved", copy / "real")
    head.symlink_to("real")
    (tmp_path / "current").symlink_to(copy)
    assert open_bundle(tmp_path / "current").read(head.name) == (copy / "real").read_bytes()


def test_a_loop_of_links(copy):
    head = copy / "head.safetensors"
    head.unlink()
    head.symlink_to("head.safetensors")
    with pytest.raises(BundleError, match=r"head.safetensors: cannot be read"):
        open_bundle(copy).read(head.name)


@pytest.mark.parametrize("name", ["head.safetensors", "manifest.json"])
def test_a_pipe_or_a_folder_is_no_file(copy, name):
    """Nobody writes into the pipe: whoever waited for it would wait for ever."""
    (copy / name).unlink()
    for make in (os.mkfifo, os.mkdir):
        make(copy / name)
        with pytest.raises(BundleError, match="no regular file"):
            open_bundle(copy).read(name)
        os.unlink(copy / name) if make is os.mkfifo else os.rmdir(copy / name)


def test_no_more_is_read_than_the_manifest_says(copy):
    """A sparse file of 1 TiB: reading it would take all memory."""
    os.truncate(copy / "head.safetensors", 1 << 40)
    began = time.monotonic()
    with pytest.raises(BundleError, match=r"head.safetensors: is larger than the \d+ bytes"):
        open_bundle(copy).read("head.safetensors")
    os.truncate(copy / "manifest.json", 1 << 40)
    with pytest.raises(BundleError, match=r"manifest.json: is larger than the 8388608 bytes"):
        open_bundle(copy)
    assert time.monotonic() - began < 60


def test_a_size_that_no_memory_has(copy):
    change(copy, lambda m: m["files"]["head.safetensors"].update(bytes=1 << 40))
    assert open_bundle(copy).read("head.safetensors")


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "[" * 40 + "]" * 40])
def test_deep_nesting(copy, text):
    (copy / "manifest.json").write_text(text)
    with pytest.raises(BundleError, match=r"nested|not valid JSON"):
        open_bundle(copy)


ODD = [None, True, -1, "\ud800", [[1]], {"a": 1}, "absent"]
READ = [
    "name split input input.shape input.dtype classes rows rows.length rows.basis_sha256 solve solve.penalty solve.lam",
    "solve.ridge drift drift.sizes drift.null drift.content drift.windows_per_false_alarm backends files",
    *(f"backends.onnx.{key}" for key in ("backbone", "teacher", "teacher_batch", "patch")),
]


def put(text, path, value):
    """The manifest `text` with `value` at `path` (its fields, joined by dots)."""
    found = json.loads(text)
    *above, last = path.split(".")
    place = found
    for key in above:
        place = place[key]
    if value == "absent":
        del place[last]
    else:
        place[last] = value
    return json.dumps(found).encode()


@pytest.mark.parametrize("path", " ".join(READ).split())
def test_each_field_that_is_read_has_its_type(bundle_dir, path):
    text = (bundle_dir / "manifest.json").read_text()
    for value in ODD:
        with pytest.raises(BundleError) as caught:
            manifest.parse(put(text, path, value))
        assert path.split(".")[-1] in str(caught.value), "the sentence names the field"
        assert str(caught.value).isprintable() and len(str(caught.value)) < 1000
    assert manifest.parse(text.encode()) == json.loads(text)


@pytest.mark.parametrize(
    "change",
    [
        lambda p: p.update(channels=[3, 1]),
        lambda p: p.update(channels=[0, 10**9]),
        lambda p: p["weight"].update(offset=-4),
        lambda p: p["weight"].update(offset=10**9),
        lambda p: p["weight"].update(shape=[8, 10**6, 3, 3]),
        lambda p: p["weight"].update(axis=4),
        lambda p: p["bias"].update(offset=None),
        lambda p: p.pop("weight"),
    ],
)
def test_a_patch_stays_inside_its_file(bundle_dir, change):
    found = json.loads((bundle_dir / "manifest.json").read_text())
    change(found["backends"]["onnx"]["patch"][0])
    with pytest.raises(BundleError, match=r"backends.onnx.patch .*within \d+ bytes"):
        manifest.parse(json.dumps(found).encode())


@pytest.mark.parametrize(
    "name, change",
    [
        ("reference.safetensors", lambda a: a.pop("prototypes")),
        ("reference.safetensors", lambda a: a.update({"moments.s": a["moments.s"][:-1]})),
        ("reference.safetensors", lambda a: a.update({"moments.n": np.zeros(1)})),
        ("reference.safetensors", lambda a: a.update({"window_var": a["window_var"] * np.nan})),
        ("statistics.safetensors", lambda a: a.update({"var": -1 - a["var"]})),
        ("statistics.safetensors", lambda a: a.update({"mean": a["mean"][1:]})),
        ("head.safetensors", lambda a: a.update({"weights": a["weights"].T.copy()})),
        ("parity.npz", lambda a: a.pop("rows")),
        ("parity.npz", lambda a: a.update({"frames": a["frames"][:, 1:]})),
        ("parity.npz", lambda a: a.update({"logits": np.array([{}])})),
    ],
)
def test_arrays_that_do_not_fit_though_their_hash_does(copy, name, change):
    """Whoever built the bundle made the mistake: its hashes and its signature are right."""
    import hashlib

    from safetensors.numpy import load, save

    path = copy / name
    if name.endswith("npz"):
        with np.load(path) as archive:
            arrays = dict(archive)
        change(arrays)
        np.savez(path, **arrays)
    else:
        arrays = load(path.read_bytes())
        change(arrays)
        path.write_bytes(save(arrays))
    data = path.read_bytes()
    entry = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["files"][name] = entry
    (copy / "manifest.json").write_text(json.dumps(manifest))
    bundle = open_bundle(copy)
    with pytest.raises(BundleError, match=name):
        bundle.arrays(name) if name[0] in "hs" else bundle.reference("onnx")
        bundle.parity("onnx")


def test_a_bomb_is_not_unpacked(copy):
    import hashlib

    path = copy / "parity.npz"
    np.savez_compressed(path, frames=np.zeros(1 << 20, np.uint8))
    data = path.read_bytes()
    change(copy, lambda m: m["files"].update(
        {"parity.npz": {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}}))  # fmt: skip
    with pytest.raises(BundleError, match="compressed"):
        open_bundle(copy).parity()
