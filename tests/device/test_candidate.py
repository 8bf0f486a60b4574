"""A head that waits for approval: never loaded, replaced whole, approved once and only in time."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest

from edgesolve.device import generation
from edgesolve.device.errors import StateError
from edgesolve.device.store import Store

BASE, OTHER = "a" * 64, "b" * 64


def head(k):
    return {"weights": np.full((3, 2), k, np.float32), "order": np.arange(6).reshape(2, 3).T}


def provenance(k, parent, base=BASE):
    return {"bundle_sha256": base, "parent": parent, "k": k}


def commit(store, k, base=BASE):
    parent = store.current(base)
    number = parent.number if parent else 0
    return store.commit(head(k), {"mean": np.float64([k])}, provenance(k, number, base))


def propose(store, k, parent, base=BASE):
    window = {"sxx": np.arange(3.0) + k}
    store.propose(head(k), {"mean": np.float64([k])}, provenance(k, parent, base), window)


def waiting(store, base=BASE):
    found = store.candidate(base)
    return None if found is None else found.provenance["k"]


def in_use(store):
    found = Store(store.path).current(BASE)
    return 0 if found is None else found.provenance["k"]


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "state")


def test_no_candidate_is_nothing_and_creates_nothing(store):
    assert store.candidate() is None and store.notes == []
    assert not store.path.exists()
    with pytest.raises(StateError, match="no candidate waits"):
        store.approve(BASE)
    store.reject()


def test_a_candidate_comes_back_whole_and_is_not_in_use(store):
    commit(store, 1)
    propose(store, 2, parent=1)
    found = Store(store.path).candidate(BASE)
    assert (found.number, found.parent, found.sealed) == (0, 1, True)
    assert found.provenance == provenance(2, 1)
    np.testing.assert_array_equal(found.arrays["order"], head(2)["order"])
    assert found.statistics["mean"] == [2]
    np.testing.assert_array_equal(found.window["sxx"], np.arange(3.0) + 2)
    assert in_use(store) == 1 and Store(store.path).start(BASE).provenance["k"] == 1


def test_a_newer_candidate_replaces_the_older(store):
    for k in (1, 2, 3):
        propose(store, k, parent=0)
        assert waiting(store) == k
    assert sorted(p.name for p in store.path.iterdir()) == ["candidate", "key", "lock"]


def test_approved_bytes_are_the_candidates(store):
    commit(store, 1)
    propose(store, 2, parent=1)
    files = {p.name: p.read_bytes() for p in (store.path / "candidate").iterdir()}
    assert store.approve(BASE, committed=False, tries=2) == 2
    stored = {p.name: p.read_bytes() for p in (store.path / "generations" / "0002").iterdir()}
    assert files.pop("seal.json") != stored.pop("seal.json")
    assert stored == files and len(files) == 4
    found = store.current(BASE)
    assert (found.number, found.parent, found.sealed) == (2, 1, True)
    assert store.pointer()["tries_left"] == 2 and not store.pointer()["committed"]
    assert waiting(store) is None and store.notes == []
    assert not (store.path / "candidate").exists()
    assert store.rollback(BASE) == 1


def test_approved_from_the_factory_head_and_committed_by_default(store):
    propose(store, 1, parent=0)
    assert store.approve(BASE) == 1
    assert in_use(store) == 1 and store.pointer()["committed"]


def test_a_stale_candidate_is_refused(store):
    commit(store, 1)
    propose(store, 2, parent=1)
    commit(store, 3)
    assert waiting(store) is None
    assert "stale, solved from generation 1 while generation 2 is in use" in store.notes[0]
    with pytest.raises(StateError, match=r"can't be approved: it is stale"):
        store.approve(BASE)
    assert in_use(store) == 3 and (store.path / "candidate").exists()
    store.rollback(BASE)
    assert waiting(store) == 2, "its parent is in use again"


def test_a_candidate_solved_from_what_was_rolled_back_is_stale(store):
    commit(store, 1)
    commit(store, 2)
    propose(store, 3, parent=2)
    store.rollback(BASE)
    assert waiting(store) is None and "stale" in store.notes[0]


def test_rejected_it_is_gone(store):
    propose(store, 1, parent=0)
    store.reject()
    store.reject()
    assert waiting(store) is None and store.notes == []
    assert sorted(p.name for p in store.path.iterdir()) == ["key", "lock"]


def test_killed_before_its_removal_it_is_not_offered_again(store, monkeypatch):
    """Neither while its generation is in use, nor after that was rolled back."""
    commit(store, 1)
    propose(store, 2, parent=1)
    rename = os.rename

    def refuse(source, target):
        if str(source).endswith("candidate"):
            raise OSError(30, "Read-only file system")
        rename(source, target)

    monkeypatch.setattr(os, "rename", refuse)
    assert store.approve(BASE) == 2, "committed, whatever becomes of the candidate"
    monkeypatch.undo()
    assert (store.path / "candidate").exists()
    assert waiting(store) is None and "committed already" in store.notes[0]
    assert store.rollback(BASE) == 1
    assert waiting(store) is None and "committed already" in store.notes[0]
    with pytest.raises(StateError, match="committed already"):
        store.approve(BASE)
    propose(store, 3, parent=1)
    assert waiting(store) == 3


def test_another_bundles_candidate_is_not_offered(store):
    propose(store, 1, parent=0)
    assert waiting(store, OTHER) is None and "belongs to bundle aaaaaaaaaaaa" in store.notes[0]
    with pytest.raises(StateError, match="belongs to bundle"):
        store.approve(OTHER)
    assert waiting(store, None) == 1


def test_a_damaged_candidate_is_a_note_and_can_be_replaced(store):
    propose(store, 1, parent=0)
    rng = np.random.default_rng(0)
    for path in sorted((store.path / "candidate").iterdir()):
        good = path.read_bytes()
        for at in {0, len(good) - 1, *rng.integers(len(good), size=20).tolist()}:
            bad = bytearray(good)
            bad[at] ^= 1 << int(rng.integers(8))
            path.write_bytes(bad)
            assert waiting(store) in (None, 1)
            if waiting(store) is None:
                assert store.notes[0].startswith("The candidate is not offered: ")
            else:
                assert json.loads(bad) == json.loads(good)  # an escape in another case, a blank
        path.write_bytes(good[: len(good) // 2])
        assert waiting(store) is None
        with pytest.raises(StateError, match="can't be approved"):
            store.approve(BASE)
        path.unlink()
        assert waiting(store) is None
        path.write_bytes(good)
    assert waiting(store) == 1
    (store.path / "candidate" / "seal.json").unlink()
    propose(store, 2, parent=0)
    assert waiting(store) == 2


def test_a_file_in_its_place_is_no_obstacle(store):
    commit(store, 1)
    (store.path / "candidate").write_text("fsck was here")
    assert waiting(store) is None
    propose(store, 2, parent=1)
    assert waiting(store) == 2
    (store.path / "candidate.new").write_text("fsck was here too")
    store.reject()
    assert waiting(store) is None


def test_a_newer_releases_candidate_is_a_note(store, monkeypatch):
    commit(store, 1)
    monkeypatch.setattr(generation, "SCHEMA", 2)
    propose(store, 2, parent=1)
    monkeypatch.undo()
    assert waiting(store) is None and "schema is 2" in store.notes[0]
    assert in_use(store) == 1


def test_factory_reset_forgets_the_candidate(store):
    commit(store, 1)
    propose(store, 2, parent=1)
    store.factory_reset()
    assert waiting(store) is None and store.notes == []
    assert in_use(store) == 0
