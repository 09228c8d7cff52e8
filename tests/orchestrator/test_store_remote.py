"""A store of objects, against a real S3 server: marker last, a cache that is checked, no half truths."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
import uuid

import pytest
import torch
from object_server import BUCKET, Wire, naming, never, object_server
from test_checkpoints import Killed, trained

from orchestrator.attempt_log import COPY_SECONDS, log_tail, logged_to, read_log
from orchestrator.store import CorruptArtefact, StoreUnreachable, open_store
from orchestrator.store.objects import Objects
from workers.checkpoints import Checkpoints
from workers.errors import InvalidInput


@pytest.fixture(scope="module")
def server():
    with object_server() as endpoint:
        yield endpoint


@pytest.fixture
def wire(server):
    wire = Wire(server)
    yield wire
    wire.close()


@pytest.fixture
def node(monkeypatch, wire, tmp_path):
    """Makes this process stand on a node: its disk is empty at first."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "someone")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s3cret-value")
    monkeypatch.setenv("AWS_ENDPOINT_URL", wire.endpoint)
    monkeypatch.delenv("AWS_ENDPOINT_URL_S3", raising=False)

    def stand_on(name):
        monkeypatch.setenv("LAYERSWEEP_CACHE", str(tmp_path / name))

    stand_on("node-1")
    return stand_on


@pytest.fixture
def url(node):
    del node
    return f"s3://{BUCKET}/{uuid.uuid4().hex[:8]}/store"


@pytest.fixture
def objects(url):
    return Objects(url, pauses=())


def put(store, key="k1", text="weights", kind="heal"):
    temporary = store.begin(kind, key)
    (temporary / "sub").mkdir()
    (temporary / "sub" / "data.json").write_text(text)
    return store.commit(temporary, kind, key, {"summary": {"loss": 1.5}})


def text_of(store, key="k1"):
    return (store.path("heal", key) / "sub" / "data.json").read_text()


def place_of(objects, key="k1"):
    return json.loads(objects.read(f".complete/heal/{key}.json"))["place"]


def test_what_one_node_commits_another_has(url, node):
    put(open_store(url))
    node("node-2")
    store = open_store(url)
    assert store.has("heal", "k1")
    assert list(store.keys("heal")) == ["k1"]
    assert store.stage("heal", "k1")["summary"] == {"loss": 1.5}
    store.verify("heal", "k1")
    assert text_of(store) == "weights"
    assert not store.has("heal", "k2")
    with pytest.raises(FileNotFoundError):
        store.path("heal", "k2")


def test_an_artefact_is_there_as_soon_as_another_node_commits_it(url, node):
    here = open_store(url)
    assert not here.has("heal", "k1")
    node("node-2")
    put(open_store(url))
    assert here.has("heal", "k1")


def test_what_another_node_discards_is_gone_after_a_refresh(url, node):
    here = open_store(url)
    put(here)
    node("node-2")
    open_store(url).discard("heal", "k1")
    here.refresh()
    assert not here.has("heal", "k1")
    assert not here.snapshot().has("heal", "k1")


def test_a_thousand_artefacts_are_looked_at_by_one_listing(url, wire):
    store = open_store(url)
    for number in range(3):
        put(store, f"k{number}")
    store.refresh()
    wire.seen.clear()
    known = store.snapshot()
    assert [known.has("heal", f"k{number}") for number in range(1000)] == [True] * 3 + [False] * 997
    assert [method for method, _ in wire.seen] == ["GET"]


KILLED = """
import sys
from orchestrator.store import open_store
store = open_store(sys.argv[1])
temporary = store.begin("heal", "k1")
for number in range(4):
    (temporary / f"part-{number}").write_text("weights")
store.commit(temporary, "heal", "k1", {})
"""


@pytest.mark.parametrize("until", ["part-2", ".complete"])
def test_an_upload_that_is_killed_leaves_nothing_that_exists(url, wire, until):
    store = open_store(url)
    reached, released = threading.Event(), threading.Event()

    def hold(method, path):
        if method == "PUT" and until in path:
            reached.set()
            released.wait(60)
            return True
        return False

    wire.refuse = hold
    process = subprocess.Popen([sys.executable, "-c", KILLED, url])
    assert reached.wait(60)
    process.send_signal(signal.SIGKILL)
    process.wait()
    released.set()
    uploaded = [path for method, path in wire.seen if method == "PUT" and "part-0" in path]
    assert uploaded, "the kill came between uploads"
    wire.refuse = never
    assert not store.has("heal", "k1")
    assert list(store.keys("heal")) == []
    put(store)
    assert text_of(store) == "weights"


def test_the_marker_is_written_after_everything_else(url, wire):
    put(open_store(url))
    written = [path for method, path in wire.seen if method == "PUT" and ".store" not in path]
    assert len(written) == 3
    assert ".complete/heal/k1.json" in written[-1]


def test_the_first_of_two_commits_stands(url, node):
    put(open_store(url), text="first")
    node("node-2")
    store = open_store(url)
    put(store, text="again")
    assert text_of(store) == "first"


def test_two_workers_that_upload_at_once_do_not_mix_their_files(url, node, wire):
    """The slower one finds the marker of the other when its own files are up, and takes them back."""
    one = open_store(url)
    node("node-2")
    two = open_store(url)
    done = []

    def second_first(method, path):
        if method == "PUT" and "data.json" in path and not done:
            done.append(True)
            put(two, text="second")
        return False

    wire.refuse = second_first
    put(one, text="first")
    assert text_of(one) == text_of(two) == "second"
    deleted = [path for method, path in wire.seen if method in ("DELETE", "POST")]
    assert deleted


def test_discarding_removes_the_marker_first_and_the_cached_copy_too(url, objects, wire):
    store = open_store(url)
    folder = put(store)
    place = place_of(objects)
    wire.seen.clear()
    store.discard("heal", "k1")
    assert next(path for method, path in wire.seen if method == "DELETE").endswith("k1.json")
    assert not folder.exists()
    assert not objects.exists(f"heal/k1/{place}/sub/data.json")
    assert not store.has("heal", "k1")
    put(store, text="made anew")
    assert text_of(store) == "made anew"


@pytest.mark.parametrize("content", [b"wei", b"weightz", None])
def test_an_object_that_is_not_what_was_written_is_found_and_discarded(url, node, objects, content):
    put(open_store(url))
    name = f"heal/k1/{place_of(objects)}/sub/data.json"
    if content is None:
        objects.delete(name)
    else:
        objects.write(name, content)
    node("node-2")
    store = open_store(url)
    assert store.has("heal", "k1")
    with pytest.raises(CorruptArtefact, match=r"sub/data\.json"):
        store.path("heal", "k1")
    assert not store.has("heal", "k1")
    assert not (store.folder / "heal" / "k1").exists()
    put(store, text="made anew")
    assert text_of(store) == "made anew"


@pytest.mark.parametrize("marker", [b"", b"[]", b'{"files": 3, "place": "x"}', b'{"files": {}}'])
def test_a_broken_marker_is_found_when_the_artefact_is_read(url, node, objects, marker):
    put(open_store(url))
    objects.write(".complete/heal/k1.json", marker)
    node("node-2")
    store = open_store(url)
    with pytest.raises(CorruptArtefact, match=r"no valid complete\.json"):
        store.verify("heal", "k1")
    assert not store.has("heal", "k1")


def test_a_marker_cannot_write_outside_its_folder(url, node, objects, tmp_path):
    put(open_store(url))
    marker = json.loads(objects.read(".complete/heal/k1.json"))
    marker["files"] = {"../../../escaped": {"sha256": "0", "size": 1}}
    objects.write(".complete/heal/k1.json", json.dumps(marker).encode())
    node("node-2")
    with pytest.raises(CorruptArtefact, match="outside"):
        open_store(url).path("heal", "k1")
    assert not list(tmp_path.rglob("escaped"))


# --- the cache -----------------------------------------------------------------------------


def test_what_is_cached_is_read_without_a_request(url, wire):
    store = open_store(url)
    put(store)
    wire.seen.clear()
    assert text_of(store) == "weights"
    assert store.stage("heal", "k1")["summary"] == {"loss": 1.5}
    assert wire.seen == []


READ = """
import sys
from orchestrator.store import open_store
print((open_store(sys.argv[1]).path("heal", "k1") / "sub" / "data.json").read_text()[:7])
"""


def in_another_process(url, *arguments):
    command = [sys.executable, "-c", READ, url, *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_a_cached_file_that_was_changed_is_noticed_and_fetched_anew(url):
    folder = put(open_store(url))
    (folder / "sub" / "data.json").write_text("spoiled")
    answer, _ = in_another_process(url).communicate(timeout=60)
    assert answer.strip() == "weights"
    assert (folder / "sub" / "data.json").read_text() == "weights"


def test_verify_reads_the_cached_files_again(url):
    store = open_store(url)
    folder = put(store)
    (folder / "sub" / "data.json").write_text("spoiled")
    store.verify("heal", "k1")
    assert text_of(store) == "weights"


def test_a_damaged_download_is_worth_another_try_and_leaves_nothing(url, node, wire):
    put(open_store(url))
    node("node-2")
    store = open_store(url)
    spoiled = []

    def spoil(method, path):
        hit = method == "GET" and "data.json" in path and not spoiled
        spoiled.extend([path] if hit else [])
        return hit

    wire.spoil = spoil
    assert text_of(store) == "weights"
    assert spoiled
    wire.spoil = never
    node("node-3")
    store = open_store(url)
    wire.refuse = naming("data.json")
    store._objects.pauses = ()
    with pytest.raises(OSError, match="does not answer"):
        store.path("heal", "k1")
    assert [p.name for p in (store.folder / "heal").iterdir()] == []
    wire.refuse = never
    assert text_of(store) == "weights"


def test_processes_of_a_node_that_fetch_at_once_end_with_one_whole_copy(url, node):
    put(open_store(url), text="weights" * 400_000)
    node("node-2")
    readers = [in_another_process(url) for _ in range(2)]
    for reader in readers:
        answer, _ = reader.communicate(timeout=60)
        assert answer.strip() == "weights"
    kind = open_store(url).folder / "heal"
    assert [p.name for p in kind.iterdir()] == ["k1"]


def test_many_are_fetched_at_once_and_the_damaged_are_left_out(url, node, objects):
    store = open_store(url)
    for number in range(20):
        put(store, f"k{number}", text=f"weights {number}")
    objects.write(f"heal/k7/{place_of(objects, 'k7')}/sub/data.json", b"spoiled")
    node("node-2")
    store = open_store(url)
    store.fetch(("heal", f"k{number}") for number in range(21))
    known = store.snapshot()
    assert [n for n in range(21) if not known.has("heal", f"k{n}")] == [7, 20]
    assert text_of(store, "k19") == "weights 19"


HOLD = """
import sys
from orchestrator.store import open_store
open_store(sys.argv[1]).path("heal", "held")
print("holding", flush=True)
sys.stdin.read()
"""


def test_the_longest_unused_go_first_but_none_that_a_living_process_reads(url, node, monkeypatch):
    store = open_store(url)
    for key in ("held", "old", "used", "new"):
        put(store, key, text="w" * 1000)
    monkeypatch.setenv("LAYERSWEEP_CACHE_GB", "0.0000035")  # room for three
    node("node-2")
    command = [sys.executable, "-c", HOLD, url]
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline().strip() == "holding"
    script = READ.replace('"k1"', "sys.argv[2]")
    for key in ("old", "used", "new"):
        subprocess.run([sys.executable, "-c", script, url, key], check=True, capture_output=True)
    holder.communicate("")
    there = {p.name for p in (open_store(url).folder / "heal").iterdir()}
    assert there == {"held", "used", "new"}


# --- beside the artefacts ------------------------------------------------------------------


def test_notes_are_kept_and_replaced(url, node):
    store = open_store(url)
    assert store.read_note("runs/smoke") is None
    store.write_note("runs/smoke", {"fence": 1})
    store.write_note("runs/smoke", {"fence": 2})
    node("node-2")
    assert open_store(url).read_note("runs/smoke") == {"fence": 2}


def checkpoints(url):
    store = open_store(url)
    folder, mirror = store.checkpoint_folder("heal", "k1"), store.checkpoint_mirror("heal", "k1")
    return Checkpoints(folder, 0, mirror)


def test_a_checkpoint_outlives_its_node(url, node, objects):
    first = checkpoints(url)
    first.write(3, {"a": torch.zeros(2)}, {"device": "cpu"})
    first.write(5, {"a": torch.ones(2)}, {"device": "cpu"})
    assert len(objects.names(".checkpoints/heal/k1")) == 1, "one is kept"
    node("node-2")
    second = checkpoints(url)
    found = second.newest(device="cpu")
    assert found.step == 5
    assert torch.equal(found.tensors["a"], torch.ones(2))
    second.write(8, {"a": torch.ones(2)}, {"device": "cpu"})
    node("node-1")
    assert checkpoints(url).newest(device="cpu").step == 8, (
        "the newer of the node's and the store's"
    )
    second.clear()
    assert objects.names(".checkpoints/heal/k1") == []
    node("node-3")
    assert checkpoints(url).newest() is None


def test_a_heal_whose_node_is_lost_goes_on_elsewhere_and_ends_with_the_same_weights(url, node):
    unbroken, _ = trained()
    with pytest.raises(Killed):
        trained(checkpoints(url), until=5)
    node("node-2")
    assert checkpoints(url).newest().step >= 4
    model, _ = trained(checkpoints(url))
    expected = unbroken.trained_state()
    assert all(torch.equal(v, expected[name]) for name, v in model.trained_state().items())


def test_a_damaged_copy_of_a_checkpoint_is_passed_over(url, node, objects):
    checkpoints(url).write(3, {"a": torch.zeros(2)}, {})
    (name,) = objects.names(".checkpoints/heal/k1")
    objects.write(f".checkpoints/heal/k1/{name}", b"half")
    node("node-2")
    assert checkpoints(url).newest() is None


def test_training_goes_on_when_its_checkpoint_cannot_be_copied(url, wire, capsys):
    kept = checkpoints(url)
    kept.mirror._objects.pauses = ()
    wire.refuse = naming(".checkpoints")
    kept.write(3, {"a": torch.zeros(2)}, {})
    assert "on this node alone" in capsys.readouterr().out
    wire.refuse = never
    assert kept.newest().step == 3


# --- logs ----------------------------------------------------------------------------------


def test_a_log_is_at_its_url_when_the_attempt_ends_and_while_it_runs(url, monkeypatch):
    assert COPY_SECONDS <= 10
    monkeypatch.setattr("orchestrator.attempt_log.COPY_SECONDS", 0.1)
    place = open_store(url).log("smoke", "heal.x.1.log")
    assert read_log(place) is None
    with logged_to(place):
        print("step 1 of 2", flush=True)
        for _ in range(100):
            if read_log(place):
                break
            time.sleep(0.05)
        assert read_log(place) == "step 1 of 2\n"
        print("step 2 of 2", flush=True)
    assert read_log(place).splitlines() == ["step 1 of 2", "step 2 of 2"]
    assert log_tail(place).splitlines()[-1] == "step 2 of 2"


def test_a_log_that_cannot_be_copied_does_not_fail_the_attempt(url, wire):
    place = open_store(url).log("smoke", "heal.x.1.log")
    wire.refuse = naming(".logs")
    with logged_to(place):
        print("done")
    assert log_tail(place) == ""


# --- what cannot be opened -----------------------------------------------------------------


def test_an_endpoint_that_does_not_answer_is_not_a_failed_store(url, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(
        StoreUnreachable, match=r"does not answer at 127.0.0.1:9 \(AWS_ENDPOINT_URL"
    ):
        open_store(url)


def test_a_request_nobody_answered_is_made_again(url, wire):
    store = open_store(url)
    put(store)
    store.refresh()
    store._objects.pauses = (0.01, 0.01)
    refused = []

    def refuse(method, path):
        del path
        if method == "HEAD" and len(refused) < 5:  # the client itself tries three times
            refused.append(method)
            return True
        return False

    wire.refuse = refuse
    assert store.has("heal", "k1")
    assert len(refused) == 5


def test_a_bucket_that_does_not_exist_is_named_with_the_remedy(node):
    del node
    with pytest.raises(InvalidInput, match=r"bucket that does not exist \(make the bucket"):
        open_store("s3://nobucket/store")


@pytest.mark.parametrize(
    ("location", "message"),
    [
        ("s3://someone:s3cret@bucket/store", "holds a user or password"),
        ("s3://bucket/store?secret_key=s3cret", "has a query"),
        ("memory://store", "seen by one process alone"),
        ("https://example.org/store", "no store can be kept there"),
        ("nosuch://bucket/store", "no store can be kept there"),
        ("s3:///store", "no store can be kept there"),
        ("gs://bucket/store", "gcsfs"),
    ],
)
def test_locations_that_cannot_hold_a_store_are_refused_without_their_secrets(location, message):
    with pytest.raises(InvalidInput, match=message) as refused:
        open_store(location)
    assert "s3cret" not in str(refused.value)


def test_a_file_url_is_a_folder(tmp_path):
    assert open_store(f"file://{tmp_path}/store").location == str(tmp_path / "store")


def test_wrong_credentials_are_told_and_not_repeated(monkeypatch, tmp_path):
    monkeypatch.setenv("INITIAL_NO_AUTH_ACTION_COUNT", "1")  # the bucket; then the server checks
    monkeypatch.setenv("LAYERSWEEP_CACHE", str(tmp_path))
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s3cret-value")
    with object_server() as endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        with pytest.raises(InvalidInput, match=r"refuses us.*AWS_ACCESS_KEY_ID") as refused:
            open_store(f"s3://{BUCKET}/store")
    assert "s3cret-value" not in str(refused.value)
    assert os.environ["AWS_ACCESS_KEY_ID"] not in str(refused.value)


def test_a_store_of_another_layout_is_left_alone(url, objects):
    objects.write(".store.json", b'{"layout": 99}')
    with pytest.raises(InvalidInput, match="layout 99"):
        open_store(url)
