"""Downloads from a server on this machine: whole, verified, once, and clear about what went wrong."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from registry.digest import digest_of
from scripts.data import DATA_SETS, DataSet, DownloadError, Source, data_dir, download, main

BYTES = b'{"domain": ["intent"]}'


class Handler(SimpleHTTPRequestHandler):
    """Counts requests instead of logging them."""

    asked: list[str]

    def log_message(self, *_: object) -> None:
        self.asked.append(self.path)


@pytest.fixture
def asked() -> list[str]:
    return []


@pytest.fixture
def source(tmp_path: Path, asked: list[str]) -> Iterator[Source]:
    served = tmp_path / "served"
    served.mkdir()
    (served / "domains.json").write_bytes(BYTES)
    handler = type("Asked", (Handler,), {"asked": asked})
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(served))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        url = f"http://127.0.0.1:{server.server_port}/domains.json"
        yield Source(name="ours.json", url=url, nbytes=len(BYTES), digest=digest_of(BYTES))
        server.shutdown()
        thread.join()


def test_a_file_arrives_once(source: Source, asked: list[str], tmp_path: Path) -> None:
    directory = tmp_path / "new" / "data"
    assert download(source, directory)
    assert (directory / "ours.json").read_bytes() == BYTES
    assert not download(source, directory)
    assert len(asked) == 1
    assert [file.name for file in directory.iterdir()] == ["ours.json"]


def test_a_damaged_file_is_replaced(source: Source, tmp_path: Path) -> None:
    (tmp_path / "ours.json").write_bytes(BYTES[:-3])
    assert download(source, tmp_path)
    assert (tmp_path / "ours.json").read_bytes() == BYTES


@pytest.mark.parametrize("expected", [b"something else", BYTES[:-1]])
def test_other_bytes_than_expected_are_refused(source: Source, tmp_path: Path, expected: bytes) -> None:
    other = replace(source, nbytes=len(expected), digest=digest_of(expected))
    with pytest.raises(DownloadError, match=r"expected \d+ bytes of blake3:"):
        download(other, tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_a_missing_file_and_a_dead_server_are_told(source: Source, tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match="404") as refused:
        download(replace(source, url=source.url + "x"), tmp_path)
    assert refused.value.hint
    with pytest.raises(DownloadError, match="expected the file"):
        download(replace(source, url="http://127.0.0.1:9/x"), tmp_path)


def test_the_command_names_files_and_licences(
    source: Source, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data_sets = [DataSet(name="OURS", licence="CC BY 4.0, us", sources=(source,))]
    assert main([str(tmp_path)], data_sets=data_sets) == 0
    assert main([str(tmp_path)], data_sets=data_sets) == 0
    said = capsys.readouterr().out
    assert said.count("OURS: CC BY 4.0, us") == 2
    assert said.count(": downloaded") == said.count(": already there") == 1


def test_the_command_fails_without_a_trace(source: Source, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gone = replace(source, url="http://127.0.0.1:9/x")
    assert main([str(tmp_path)], data_sets=[DataSet(name="OURS", licence="", sources=(gone,))]) == 1
    said = capsys.readouterr().err
    assert "error: http://127.0.0.1:9/x" in said
    assert "hint: " in said


def test_the_directory_is_the_environments(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ARROWMOE_DATA", str(tmp_path))
    assert data_dir() == tmp_path
    monkeypatch.delenv("ARROWMOE_DATA")
    assert data_dir().parts[-2:] == ("shared", "data")


def test_the_data_at_hand_is_what_the_command_would_fetch() -> None:
    if not data_dir().exists():
        pytest.skip("the data sets are not here; python -m scripts.data fetches them")
    for source in (source for data_set in DATA_SETS for source in data_set.sources):
        data = (data_dir() / source.name).read_bytes()
        assert (len(data), digest_of(data)) == (source.nbytes, source.digest)
