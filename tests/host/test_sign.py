"""Signing with real keys: RFC 8032's vectors, what openssl makes of our keys, and what is never overwritten."""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
import stat
import subprocess

import pytest

from edgesolve.device.bundle import open_bundle
from edgesolve.device.errors import BundleError, SignatureError, UsageError
from edgesolve.device.signature import NAME, PRIVATE, check, key_id, pem_keys, trusted_keys
from edgesolve.host.sign import keygen, sign

pytest.importorskip("nacl", reason="PyNaCl is not installed")


@pytest.fixture
def keys(tmp_path):
    keygen(tmp_path / "vendor.key", tmp_path / "vendor.pub")
    return tmp_path / "vendor.key", tmp_path / "vendor.pub"


@pytest.fixture
def copy(bundle_dir, tmp_path):
    return shutil.copytree(bundle_dir, tmp_path / "copy")


def test_what_is_signed_is_valid_and_nothing_else_changes(copy, keys):
    before = {p.name: p.read_bytes() for p in copy.iterdir()}
    record = sign(copy, keys[0])
    after = {p.name: p.read_bytes() for p in copy.iterdir()}
    assert json.loads(after.pop(NAME)) == record and after == before
    assert check(open_bundle(copy), trusted_keys(keys[1]), required=True) == "valid"


def test_rfc_8032_vector_2(copy, tmp_path):
    """Key and public key from the RFC, section 7.1, TEST 2: our files give the same key, and the same key id."""
    secret = bytes.fromhex("4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb")
    public = bytes.fromhex("3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c")
    body = base64.b64encode(PRIVATE + secret).decode()
    (tmp_path / "rfc.key").write_text(
        f"-----BEGIN PRIVATE KEY-----\n{body}\n-----END PRIVATE KEY-----\n"
    )
    assert sign(copy, tmp_path / "rfc.key")["key_id"] == hashlib.sha256(public).hexdigest()[:16]
    assert check(open_bundle(copy), [public], required=True) == "valid"


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")
def test_openssl_verifies_our_signature_and_makes_keys_for_us(copy, keys, tmp_path):
    record = sign(copy, keys[0])
    (tmp_path / "raw").write_bytes(base64.b64decode(record["signature"]))
    command = ["openssl", "pkeyutl", "-verify", "-pubin", "-inkey", keys[1], "-rawin"]
    command += ["-in", copy / "manifest.json", "-sigfile", tmp_path / "raw"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert "Verified Successfully" in done.stdout, done.stderr
    private, public = tmp_path / "o.key", tmp_path / "o.pub"
    subprocess.run(["openssl", "genpkey", "-algorithm", "ed25519", "-out", private], check=True)
    subprocess.run(["openssl", "pkey", "-in", private, "-pubout", "-out", public], check=True)
    sign(copy, private)
    assert check(open_bundle(copy), trusted_keys(public), required=True) == "valid"


def test_a_signature_replaces_an_older_one(copy, keys, tmp_path):
    sign(copy, keys[0])
    keygen(tmp_path / "b.key", tmp_path / "b.pub")
    sign(copy, tmp_path / "b.key")
    assert check(open_bundle(copy), trusted_keys(tmp_path / "b.pub"), required=True) == "valid"
    with pytest.raises(SignatureError, match="signed by key"):
        check(open_bundle(copy), trusted_keys(keys[1]), required=False)


def test_the_private_key_is_its_owners(keys):
    assert stat.S_IMODE(keys[0].stat().st_mode) == 0o600
    public = trusted_keys(keys[1])[0]
    assert len(public) == 32 and len(key_id(public)) == 16
    assert pem_keys(keys[0].read_bytes(), "PRIVATE", "key") != [public]


@pytest.mark.parametrize("there", [0, 1])
def test_a_key_is_never_overwritten(tmp_path, there):
    paths = [tmp_path / "a.key", tmp_path / "a.pub"]
    paths[there].write_text("mine")
    with pytest.raises(UsageError, match="never overwritten"):
        keygen(*paths)
    assert paths[there].read_text() == "mine" and not paths[1 - there].exists()


def test_a_damaged_bundle_gets_no_signature(copy, keys):
    head = copy / "head.safetensors"
    head.write_bytes(head.read_bytes()[:-1] + b"x")
    with pytest.raises(BundleError, match="sha256 is"):
        sign(copy, keys[0])
    assert not (copy / NAME).exists()


@pytest.mark.parametrize("which", ["public", "none", "nothing"])
def test_what_is_no_private_key(copy, keys, tmp_path, which):
    (tmp_path / "none").write_text("-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n")
    path = {"public": keys[1], "none": tmp_path / "none", "nothing": tmp_path / "absent"}[which]
    with pytest.raises(UsageError, match=str(path.name)):
        sign(copy, path)
