"""Vectors on disk: by role and item row, length 1, resumable by shard."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nearfield.data import vectors as vectors_module
from nearfield.data.vectors import ItemVectors, VectorJob, VectorStore, VectorTable
from nearfield.errors import BadInputError


def encode(role: str, rows: Any) -> Any:
    base = np.random.default_rng(0).standard_normal((500, 6)) * 3
    return base[rows] + (1 if role == "query" else 0)


def true(role: str, rows: Any) -> Any:
    vectors = encode(role, np.asarray(rows))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


WANTED = {"query": np.array([7, 3, 3, 100]), "document": np.arange(2, 60)}


def test_vectors_are_found_by_role_and_row(tmp_path: Path) -> None:
    vectors = VectorJob(WANTED, encode, tmp_path / "v", "print", shard=10).run({"teacher": "t"})
    assert (vectors.fingerprint, vectors.dimension, vectors.about) == ("print", 6, {"teacher": "t"})
    np.testing.assert_array_equal(vectors.of("query", np.array([100, 3, 100])), true("query", [100, 3, 100]))
    np.testing.assert_array_equal(vectors.of("document", np.arange(5, 20)), true("document", range(5, 20)))
    assert isinstance(vectors.of("document", np.arange(5, 20)), np.memmap)
    assert vectors.of("document", np.empty(0, np.int64)).shape == (0, 6)
    np.testing.assert_allclose(np.linalg.norm(vectors.table("query").vectors, axis=1), 1, atol=1e-6)
    with pytest.raises(KeyError):
        vectors.of("query", np.array([5]))
    assert not (tmp_path / "v.parts").exists()


def test_roles_share_a_table_where_the_teacher_has_no_prompts(tmp_path: Path) -> None:
    asked: list[int] = []

    def counting(role: str, rows: Any) -> Any:
        asked.extend(rows.tolist())
        return encode("document", rows)

    vectors = VectorJob(WANTED, counting, tmp_path / "v", "p", shared=True).run()
    assert sorted(asked) == sorted({100, *range(2, 60)})
    np.testing.assert_array_equal(vectors.of("query", np.array([3])), vectors.of("document", np.array([3])))


def test_a_build_that_was_stopped_goes_on(tmp_path: Path) -> None:
    asked: list[int] = []

    def failing(role: str, rows: Any) -> Any:
        if len(asked) == 3:
            raise KeyboardInterrupt
        asked.append(len(rows))
        return encode(role, rows)

    with pytest.raises(KeyboardInterrupt):
        VectorJob(WANTED, failing, tmp_path / "v", "p", shard=10).run()
    assert not (tmp_path / "v").exists()
    asked = []
    later = VectorJob(WANTED, lambda r, i: asked.append(len(i)) or encode(r, i), tmp_path / "v", "p", shard=10).run()  # type: ignore[func-returns-value]
    assert len(asked) == 4  # of 6 shards of documents and one of queries, 3 were there
    once = VectorJob(WANTED, encode, tmp_path / "w", "p", shard=10).run()
    for role in WANTED:
        np.testing.assert_array_equal(later.table(role).vectors, once.table(role).vectors)


def test_shards_of_another_build_are_not_used(tmp_path: Path) -> None:
    def stopped(role: str, rows: Any) -> Any:
        if role == "query":
            raise KeyboardInterrupt
        return encode(role, rows) + 5

    with pytest.raises(KeyboardInterrupt):
        VectorJob(WANTED, stopped, tmp_path / "v", "old").run()
    vectors = VectorJob(WANTED, encode, tmp_path / "v", "new").run()
    np.testing.assert_array_equal(vectors.of("document", np.array([9])), true("document", [9]))


@pytest.mark.parametrize(
    ("encoder", "words"),
    [
        (lambda role, rows: np.zeros((len(rows), 3)), "item 2 is zero or not finite"),
        (lambda role, rows: np.full((len(rows), 3), np.nan), "not finite"),
        (lambda role, rows: np.ones((1, 3)), r"shape \(1, 3\) for 58 items"),
        (lambda role, rows: np.ones((len(rows), len(role))), "dimensions"),
    ],
)
def test_bad_teachers(encoder: Any, words: str, tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match=words):
        VectorJob(WANTED, encoder, tmp_path / "v", "p").run()


def test_a_folder_that_is_no_vectors(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="does not exist"):
        ItemVectors.open(tmp_path)
    VectorJob(WANTED, encode, tmp_path / "v", "p").run()
    (tmp_path / "v" / "document" / "vectors.npy").write_bytes(b"x")
    with pytest.raises(BadInputError, match="is damaged"):
        ItemVectors.open(tmp_path / "v")
    (tmp_path / "v" / "checksums.json").unlink()  # as earlier versions left it
    with pytest.raises(BadInputError, match="cannot be read"):
        ItemVectors.open(tmp_path / "v")
    (tmp_path / "v" / "about.json").write_text('{"version": 0}')
    with pytest.raises(BadInputError, match="version 0"):
        ItemVectors.open(tmp_path / "v")


def test_zeros_stay_zeros_where_they_may_be(tmp_path: Path) -> None:
    def some(role: str, rows: Any) -> Any:
        return np.where((rows % 2 == 0)[:, None], 0.0, encode(role, rows))

    vectors = VectorJob(WANTED, some, tmp_path / "v", "p", zeros=True).run().of("document", np.arange(2, 60))
    assert not vectors[::2].any()
    np.testing.assert_array_equal(vectors[1::2], true("document", range(3, 60, 2)))
    with pytest.raises(BadInputError, match="not finite"):
        VectorJob(WANTED, lambda role, rows: np.full((len(rows), 3), np.nan), tmp_path / "n", "p", zeros=True).run()


@pytest.fixture()
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of a quarter of a megabyte."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_an_error_and_not_the_end_of_the_process(full_disk: Path) -> None:
    code = (
        "import sys, numpy as np; from pathlib import Path; from nearfield.data.vectors import VectorTable\n"
        "VectorTable.write(Path(sys.argv[1]) / 'v', np.arange(5000), [np.ones((5000, 32), dtype=np.float32)])"
    )
    done = subprocess.run([sys.executable, "-c", code, str(full_disk)], capture_output=True, text=True)
    assert done.returncode == 1 and "No space left on device" in done.stderr


def test_parts_are_written_one_behind_the_other(tmp_path: Path) -> None:
    """As numpy saves the whole."""
    whole = np.random.default_rng(0).standard_normal((7, 3)).astype(np.float32)
    for name, parts in (
        ("one", [whole]),
        ("many", [whole[:2], whole[2:2], whole[2:].astype(np.float64)]),
        ("none", []),
    ):
        VectorTable.write(tmp_path / name, np.arange(7 if parts else 0), parts)
        np.save(tmp_path / "wanted.npy", whole if parts else np.empty((0, 0), dtype=np.float32))
        assert (tmp_path / name / "vectors.npy").read_bytes() == (tmp_path / "wanted.npy").read_bytes()


class InChunks:
    """A teacher whose vectors come in chunks of 3 that take 8 s each, until it is killed after so many."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, stops: int | None = None) -> None:
        self.now, self.made, self.stops = 0.0, [], stops
        monkeypatch.setattr(vectors_module.time, "monotonic", lambda: self.now)

    def by_chunks(self, role: str, rows: Any, done: Any) -> Any:
        order = np.argsort(-rows % 7, kind="stable")
        for places in (order[start : start + 3] for start in range(0, len(rows), 3)):
            if done[places].all():
                continue
            if len(self.made) == self.stops:
                raise KeyboardInterrupt
            self.now += 8
            self.made.append([role, *rows[places].tolist()])
            # An item's vector depends on its chunk.
            yield places, encode(role, rows[places]) + rows[places].sum() / 1e3


@pytest.mark.parametrize("stops", [0, 1, 2, 3, 4, 7, 12, 19, 20])
@pytest.mark.parametrize("killed", [False, True])
def test_a_kill_loses_seconds_of_a_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stops: int, killed: bool
) -> None:
    """A build that goes on makes the same bits as one in a single go, wherever it ended; a killed one writes nothing more."""
    whole = InChunks(monkeypatch)
    once = VectorJob(WANTED, whole, tmp_path / "once", "p", shard=30).run()
    stopped = InChunks(monkeypatch, stops)
    with monkeypatch.context() as patch:
        if killed:
            append = VectorStore.append
            patch.setattr(
                VectorStore,
                "append",
                lambda self, keys, *more: (more[1:] or len(keys) >= 9) and append(self, keys, *more),
            )
        with pytest.raises(KeyboardInterrupt):
            VectorJob(WANTED, stopped, tmp_path / "v", "p", shard=30).run()
    going = InChunks(monkeypatch)
    later = VectorJob(WANTED, going, tmp_path / "v", "p", shard=30).run()
    for role in WANTED:
        np.testing.assert_array_equal(later.table(role).vectors, once.table(role).vectors)
    lost = len(stopped.made) + len(going.made) - len(whole.made)
    assert lost == 0 if not killed else lost <= 2, "20 s are less than 3 chunks of 8 s"
    assert {path.name for path in tmp_path.iterdir()} == {"once", "v"}


def test_a_damaged_piece_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    once = VectorJob(WANTED, InChunks(monkeypatch), tmp_path / "once", "p").run()
    with pytest.raises(KeyboardInterrupt):
        VectorJob(WANTED, InChunks(monkeypatch, 8), tmp_path / "v", "p").run()
    pieces = sorted((tmp_path / "v.pieces").glob("*/*/vectors.npy"))
    assert len(pieces) == 3
    for piece, change in zip(pieces, (lambda b: b[:-1], lambda b: b[:-9] + b"x" + b[-8:], lambda b: b""), strict=True):
        piece.write_bytes(change(piece.read_bytes()))
    later = VectorJob(WANTED, InChunks(monkeypatch), tmp_path / "v", "p").run()
    np.testing.assert_array_equal(later.table("document").vectors, once.table("document").vectors)
