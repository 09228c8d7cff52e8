"""The store: what has no valid marker does not exist; same key, same artefact."""

import json
import os

import pytest

from orchestrator.store import MARKER, CorruptArtefact, open_store
from workers.errors import InvalidInput


@pytest.fixture
def store(tmp_path):
    return open_store(tmp_path / "store")


def put(store, key="k1", text="weights"):
    temporary = store.begin("heal", key)
    (temporary / "sub").mkdir()
    (temporary / "sub" / "data.json").write_text(text)
    return store.commit(temporary, "heal", key, {"summary": {"loss": 1.5}})


def test_a_committed_artefact_is_there_and_intact(store):
    put(store)
    assert store.has("heal", "k1")
    assert store.stage("heal", "k1")["summary"] == {"loss": 1.5}
    store.verify("heal", "k1")
    assert list(store.keys("heal")) == ["k1"]


def test_an_artefact_without_its_marker_does_not_exist(store):
    (put(store) / MARKER).unlink()
    assert not store.has("heal", "k1")
    assert list(store.keys("heal")) == []


@pytest.mark.parametrize(
    "marker", ["", "{}", "[]", '{"files": 3}', '{"files": {"gone.bin": {"size": 1}}}']
)
def test_a_broken_marker_is_no_marker(store, marker):
    (put(store) / MARKER).write_text(marker)
    assert not store.has("heal", "k1")


def test_a_truncated_file_makes_the_artefact_missing(store):
    path = put(store) / "sub" / "data.json"
    path.write_text("wei")
    assert not store.has("heal", "k1")


def test_a_flipped_bit_is_found_by_verify(store):
    (put(store) / "sub" / "data.json").write_text("weightz")
    with pytest.raises(CorruptArtefact, match=r"sub/data\.json"):
        store.verify("heal", "k1")


def test_unfinished_work_is_not_an_artefact(store):
    temporary = store.begin("heal", "k2")
    (temporary / "data").write_text("half")
    assert not store.has("heal", "k2")
    assert list(store.keys("heal")) == []


def test_the_first_of_two_commits_stands(store):
    first = put(store, text="first")
    put(store, text="again")
    assert (first / "sub" / "data.json").read_text() == "first"
    assert [p for p in first.parent.iterdir() if p.name.endswith(".tmp")] == []


def test_a_broken_artefact_is_replaced_by_a_commit(store):
    (put(store) / MARKER).write_text("{")
    put(store, text="new")
    assert (store.path("heal", "k1") / "sub" / "data.json").read_text() == "new"


def test_every_file_has_its_digest(store):
    files = json.loads((put(store) / MARKER).read_text())["files"]
    assert set(files) == {"sub/data.json", "stage.json"}


def test_a_snapshot_says_what_the_store_says(store):
    for key in ("whole", "truncated", "unmarked"):
        put(store, key)
    (store.path("heal", "truncated") / "sub" / "data.json").write_text("wei")
    (store.path("heal", "unmarked") / MARKER).unlink()
    known = store.snapshot()
    keys = ("whole", "truncated", "unmarked", "never")
    assert [key for key in keys if known.has("heal", key)] == ["whole"]
    assert not known.has("nosuchkind", "whole")
    put(store, "later")
    assert not known.has("heal", "later"), "it is how things were"
    assert store.has("heal", "later")


def test_notes_are_kept_and_replaced_and_are_no_artefacts(store):
    assert store.read_note("runs/smoke") is None
    store.write_note("runs/smoke", {"fence": 1})
    store.write_note("runs/smoke", {"fence": 2})
    assert open_store(store.location).read_note("runs/smoke") == {"fence": 2}
    assert list(store.keys(".notes")) == []
    assert len(list((store.folder / ".notes").rglob("*.json"))) == 1


def test_a_store_that_cannot_be_made_is_refused_with_a_remedy(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidInput, match="--store"):
        open_store(tmp_path / "file" / "store")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_store_is_refused(tmp_path):
    (tmp_path / "store").mkdir(mode=0o500)
    with pytest.raises(InvalidInput, match="cannot be written"):
        open_store(tmp_path / "store")
