"""Files are written aside; hashes follow the content; paths stay inside."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from nearfield import files
from nearfield.errors import BadInputError, NearfieldError
from nearfield.files import (
    atomic_path,
    fingerprint,
    hash_file,
    hash_folder,
    inside,
    read_json,
    remove_leftovers,
    write_json,
    write_text,
)
from nearfield.provenance import derive_seed, generator


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_text(path, "old")
    with pytest.raises(RuntimeError), atomic_path(path) as aside:
        aside.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    for content in ("one", "two"):
        with atomic_path(path) as aside:
            aside.mkdir()
            (aside / content).write_text(content)
    assert [file.name for file in path.iterdir()] == ["two"]
    with pytest.raises(RuntimeError), atomic_path(path) as aside:
        aside.mkdir()
        raise RuntimeError
    assert [file.name for file in path.iterdir()] == ["two"]
    assert list(tmp_path.iterdir()) == [path]


WRITER = """
import sys, time
from pathlib import Path
from nearfield.files import atomic_path
with atomic_path(Path(sys.argv[1])) as aside:
    aside.mkdir()
    (aside / "half").write_text("half")
    print("writing", flush=True)
    time.sleep(600)
"""


def start_writer(path: Path) -> subprocess.Popen[str]:
    """A process in the middle of a write."""
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "writing\n"
    return process


@pytest.mark.parametrize("by", ["start", "write"])
def test_what_a_killed_process_wrote_is_removed_and_what_a_living_one_writes_is_not(tmp_path: Path, by: str) -> None:
    killed, living = start_writer(tmp_path / "out"), start_writer(tmp_path / "out")
    try:
        killed.send_signal(signal.SIGKILL)
        killed.wait()
        assert len(list(tmp_path.glob(".*.tmp"))) == 2
        if by == "start":
            assert remove_leftovers(tmp_path.parent, depth=1) >= 1
        else:
            write_text(tmp_path / "out", "new")
        (left,) = tmp_path.glob(".*.tmp")
        assert (left / "content" / "half").is_file()
        assert remove_leftovers(tmp_path) == 0
    finally:
        for process in (killed, living):
            process.kill()
            process.wait()
    assert remove_leftovers(tmp_path) == 1
    assert not list(tmp_path.glob(".*.tmp"))


def test_what_another_machine_writes_is_left_alone_for_a_day(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_machine", lambda: "another")
    process = os.fork()
    if process == 0:  # killed in the middle of a write, on a machine whose locks are not seen here
        with atomic_path(tmp_path / "out") as aside:
            aside.write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(process, 0)
    monkeypatch.undo()
    assert remove_leftovers(tmp_path) == 0
    (left,) = tmp_path.glob(".*.tmp")
    for path in [*left.iterdir(), left]:
        os.utime(path, (0, 0))
    assert remove_leftovers(tmp_path) == 1


def test_a_folder_moved_aside_for_a_successor_that_never_came_is_put_back(tmp_path: Path) -> None:
    with atomic_path(tmp_path / "out") as aside:
        aside.mkdir()
        (aside / "old").write_text("old")
    process = os.fork()
    if process == 0:

        def die(*_: Any) -> None:
            os.kill(os.getpid(), signal.SIGKILL)

        rename, calls = Path.rename, []

        def second_dies(self: Path, target: Path) -> Path:
            calls.append(self)
            return die() if len(calls) == 2 else rename(self, target)  # type: ignore[return-value]

        Path.rename = second_dies  # type: ignore[method-assign,assignment]
        with atomic_path(tmp_path / "out") as aside:
            aside.mkdir()
    os.waitpid(process, 0)
    assert not (tmp_path / "out").exists()
    remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "old").read_text() == "old"


def test_what_earlier_versions_left_is_removed_once_their_process_is_gone(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    (tmp_path / f".tokens.{dead.pid}.0123abcd.tmp").mkdir()
    (tmp_path / f".file.json.{dead.pid}.0123abcd.tmp").write_text("half")
    (tmp_path / f".tokens.{os.getpid()}.0123abcd.tmp").mkdir()
    assert remove_leftovers(tmp_path) == 2
    assert [path.name for path in tmp_path.iterdir()] == [f".tokens.{os.getpid()}.0123abcd.tmp"]


def _write_often(path: Path) -> None:
    for number in range(40):
        write_text(path / f"{number % 3}", str(number))


def test_cleaning_never_takes_a_file_from_under_its_writer(tmp_path: Path) -> None:
    stop = threading.Event()

    errors: list[Exception] = []

    def clean() -> None:
        while not stop.is_set():
            try:
                remove_leftovers(tmp_path)
            except Exception as error:
                errors.append(error)

    thread = threading.Thread(target=clean)
    thread.start()
    try:
        writers = [multiprocessing.get_context("fork").Process(target=_write_often, args=(tmp_path,)) for _ in range(3)]
        for writer in writers:
            writer.start()
        for writer in writers:
            writer.join()
    finally:
        stop.set()
        thread.join()
    assert [writer.exitcode for writer in writers] == [0, 0, 0] and errors == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1", "2"]


def test_links_are_followed_in_the_hash_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "a" / "below").mkdir(parents=True)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "file").write_text("1")
    (tmp_path / "a" / "below" / "link").symlink_to(tmp_path / "b")
    (tmp_path / "a" / "below" / "circle").symlink_to(tmp_path / "a")
    (tmp_path / "a" / "broken").symlink_to(tmp_path / "nowhere")
    before = hash_folder(tmp_path / "a")
    (tmp_path / "b" / "file").write_text("2")
    assert hash_folder(tmp_path / "a") != before


def test_fingerprints(tmp_path: Path) -> None:
    assert fingerprint({"a": 1, "b": [1, 2]}) == fingerprint({"b": [1, 2], "a": 1})
    assert fingerprint({"a": 1}) != fingerprint({"a": "1"})
    assert len(fingerprint(None)) == 32
    file = tmp_path / "file"
    file.write_bytes(b"abc")
    assert hash_file(file, "sha256") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert len(hash_file(file)) == 32


def test_json_and_paths(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"x": "é"})
    assert read_json(tmp_path / "a.json") == {"x": "é"}
    with pytest.raises(BadInputError, match="this thing does not exist"):
        read_json(tmp_path / "b.json", "thing")
    assert inside(tmp_path, "a/../b") == tmp_path.resolve() / "b"
    for path in ("../x", "/etc/passwd", "a/../../x"):
        with pytest.raises(BadInputError, match="leaves its folder"):
            inside(tmp_path, path)


def test_messages_have_three_parts() -> None:
    error = NearfieldError("it is broken", where="file:3", hint="Mend it.")
    assert str(error) == "file:3: it is broken\n  -> Mend it."
    assert str(NearfieldError("it is broken")) == "it is broken"


def test_seeds_depend_on_every_name() -> None:
    seeds = {
        derive_seed(0),
        derive_seed(1),
        derive_seed(0, "a"),
        derive_seed(0, "b"),
        derive_seed(0, "a", 1),
        derive_seed(0, "a", "1"),
        derive_seed(0, "a1"),
    }
    assert len(seeds) == 7
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert generator(0, "a").random() == generator(0, "a").random() != generator(0, "b").random()
