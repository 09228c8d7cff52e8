"""A report that comes as text arrives whole or is refused."""

import pytest

from orchestrator.parcel import Unreadable, pack, unpack


@pytest.fixture
def report(tmp_path):
    folder = tmp_path / "there"
    folder.mkdir()
    (folder / "index.html").write_text("<html>é" + "x" * 50_000)
    (folder / "results.parquet").write_bytes(bytes(range(256)) * 300)
    return folder


def test_files_arrive_as_they_were_among_other_lines(report, tmp_path):
    text = f"a warning\n{pack(report, {'verdicts': {'m': 'fine'}})}\nbye\n"
    here = tmp_path / "here"
    here.mkdir()
    (here / "index.html").write_text("an older one")
    arrived = unpack(text, here)
    assert (arrived.files, arrived.about) == (2, {"verdicts": {"m": "fine"}})
    assert arrived.size == sum(path.stat().st_size for path in report.iterdir())
    assert sorted(path.name for path in here.iterdir()) == ["index.html", "results.parquet"]
    for path in report.iterdir():
        assert (here / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda text: text[: len(text) // 2], "no end of it"),
        (lambda text: text.replace("\nH4s", "\nH5s", 1), "its digest is wrong"),
        (lambda text: text.replace("\nH4s", "\nRunning H4s", 1), "it is garbled"),
        (lambda text: text[50_000:], "no parcel"),
    ],
)
def test_a_damaged_parcel_changes_nothing(report, tmp_path, harm, said):
    here = tmp_path / "here"
    with pytest.raises(Unreadable, match=said):
        unpack(harm(pack(report, {})), here)
    assert not here.exists()
