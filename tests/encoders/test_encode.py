"""Kept vectors: by content, never by name; resumed inside a task; cut and rounded without encoding again.

Texts that are encoded by several processes: the same vectors, whoever makes them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from nearfield import files
from nearfield.conformance.tiny_models import WORDS
from nearfield.encoders.encode import BLOCK, BLOCK_SECONDS, FIRST_BLOCK, Encoder, KeptVectors, Workers, next_block
from nearfield.training.launch import Launch
from tests.data.making import build_rows

pytestmark = pytest.mark.filterwarnings("ignore")


def rows(count: int, seed: int = 0) -> list[tuple[str, np.ndarray]]:
    vectors = np.random.default_rng(seed).normal(size=(count, 8)).astype(np.float32)
    return [(f"text {i}", vector) for i, vector in enumerate(vectors)]


def test_vectors_come_back_bit_for_bit_and_only_for_the_same_model_role_and_prompt(tmp_path: Path) -> None:
    made = rows(50)
    cache = KeptVectors(tmp_path, "m1", {"name": "m"})
    assert dict(cache.put(made, "q: ", "query")).keys() == dict(made).keys()
    cache.close()
    again = KeptVectors(tmp_path, "m1", {})
    found = again.get([text for text, _ in made] + ["unknown"], "q: ", "query")
    assert len(found) == 50 and all(np.array_equal(found[text], vector) for text, vector in made)
    for other, prompt, role in (
        (again, "", "query"),
        (again, "q: ", None),
        (KeptVectors(tmp_path, "m2", {}), "q: ", "query"),
    ):
        assert other.get(["text 0"], prompt, role) == {}


def test_what_was_encoded_before_an_error_is_kept(tmp_path: Path) -> None:
    def broken() -> Any:
        yield from rows(20)
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError):
        dict(KeptVectors(tmp_path, "m", {}).put(broken(), "", None))
    assert len(KeptVectors(tmp_path, "m", {}).get([f"text {i}" for i in range(20)], "", None)) == 20


@pytest.mark.parametrize("seconds_a_text", [0.01, 2.0, 9.0])
def test_a_kill_loses_seconds_of_encoding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds_a_text: float
) -> None:
    """At every moment, all but the last 30 seconds' work is on the disk: nothing need run when the process dies."""
    now = 0.0
    monkeypatch.setattr("nearfield.encoders.encode.time.monotonic", lambda: now)
    done: list[tuple[float, str]] = []

    def encode() -> Iterator[tuple[str, np.ndarray]]:
        nonlocal now
        for text, vector in rows(40 if seconds_a_text > 1 else 6_000):
            now += seconds_a_text
            done.append((now, text))
            yield text, vector

    for count, _ in enumerate(KeptVectors(tmp_path, "m", {}).put(encode(), "", None)):
        if count % 500 == 0 or seconds_a_text > 1:
            kept = KeptVectors(tmp_path, "m", {}).get([text for _, text in done], "", None)
            lost = [when for when, text in done if text not in kept]
            assert not lost or now - min(lost) + seconds_a_text <= 30


@pytest.mark.parametrize("name", ["keys.npy", "vectors.npy", "checksums.json"])
def test_a_damaged_shard_is_left_out_and_removed(tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str) -> None:
    made = rows(5)
    for place in (0, 70, 130, -1):
        files._checked.clear()
        dict(KeptVectors(tmp_path, "m", {}).put(made, "", None))
        (file,) = tmp_path.rglob(name)
        content = bytearray(file.read_bytes())
        content[place] ^= 16
        file.write_bytes(bytes(content))
        caplog.clear()
        assert KeptVectors(tmp_path, "m", {}).get([text for text, _ in made], "", None) == {}
        assert "encoded again" in caplog.text and not list(tmp_path.rglob(name))
    dict(KeptVectors(tmp_path, "m", {}).put(made, "", None))
    found = KeptVectors(tmp_path, "m", {}).get([text for text, _ in made], "", None)
    assert all(np.array_equal(found[text], vector) for text, vector in made)


def vector(text: str, prompt: str) -> NDArray[np.float32]:
    return np.array([len(text), len(prompt), sum(map(ord, text))], dtype=np.float32)


@dataclass(frozen=True)
class InOneProcess(Launch):
    """The first of several ranks; the others are called in turn, by functions, where they would wait for tasks."""

    others: tuple[Callable[[str], None], ...] = ()

    def divide(self, task: str, own: Callable[[], None]) -> None:
        own()
        for other in self.others:
            other(task)


class Noting(Encoder):
    """Encodes in an order of its own, and notes what it was given."""

    def __init__(self, done: list[str]) -> None:
        self.done = done

    def by_chunks(
        self, texts: Sequence[str], prompt: str = "", role: str | None = None, *, says: str | None = None
    ) -> Iterator[tuple[list[int], NDArray[np.float32]]]:
        assert (prompt, role) == ("query: ", "query")
        self.done.extend(texts)
        for i in reversed(range(len(texts))):
            yield [i], vector(texts[i], prompt)[None]


def workers(folder: Path, done: list[list[str]], *, elsewhere: int | None = None) -> Workers:
    """Of as many processes as there are lists; one may look for the folder at another place."""

    def other(rank: int) -> Callable[[str], None]:
        place = folder / "other machine" if rank == elsewhere else folder / "shared"
        return lambda task: Workers(Launch(rank, len(done)), place).help(task, Noting(done[rank]))

    return Workers(InOneProcess(0, len(done), 0, tuple(map(other, range(1, len(done))))), folder / "shared")


@pytest.mark.parametrize("count", [192, 1000])
def test_each_text_is_encoded_once_by_one_of_them(tmp_path: Path, count: int) -> None:
    texts = [f"{'word ' * (i * 7 % 50)}{i}" for i in range(count)]
    done: list[list[str]] = [[], [], []]
    found = dict(workers(tmp_path, done).encode(Noting(done[0]), texts, "query: ", "query", ""))
    assert found.keys() == set(texts)
    assert all(np.array_equal(made, vector(text, "query: ")) for text, made in found.items())
    assert sorted(text for part in done for text in part) == sorted(texts)
    characters = [sum(map(len, part)) for part in done]
    assert max(characters) < 1.05 * min(characters), "long and short texts are dealt evenly"
    assert list((tmp_path / "shared").iterdir()) == []


def test_few_texts_stay_with_the_first(tmp_path: Path) -> None:
    done: list[list[str]] = [[], []]
    texts = [str(i) for i in range(127)]
    assert dict(workers(tmp_path, done).encode(Noting(done[0]), texts, "query: ", "query", "")).keys() == set(texts)
    assert (len(done[0]), done[1]) == (127, [])


def test_blocks_come_one_after_the_other(tmp_path: Path) -> None:
    """So that what the cache has got is not lost when the rest fails."""
    done: list[list[str]] = [[], []]
    texts = [str(i) for i in range(2 * BLOCK + 5)]
    pairs = iter(workers(tmp_path, done).encode(Noting(done[0]), texts, "query: ", "query", ""))
    next(pairs)
    assert [len(part) for part in done] == [FIRST_BLOCK, FIRST_BLOCK]
    assert len(dict(pairs)) == 2 * BLOCK + 4


@pytest.mark.parametrize("texts_a_second", [1.5, 20, 300, 100_000])
def test_blocks_take_seconds_whatever_the_speed(texts_a_second: float) -> None:
    size, seconds = FIRST_BLOCK, []
    for _ in range(30):
        seconds.append(size / texts_a_second)
        size = next_block(size, seconds[-1])
    assert max(seconds) <= max(2 * BLOCK_SECONDS, FIRST_BLOCK / texts_a_second) < 30
    assert size == min(BLOCK, int(BLOCK_SECONDS * texts_a_second)) or abs(seconds[-1] - BLOCK_SECONDS) < 1


def test_a_process_that_does_not_see_the_folder_leaves_its_share(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    done: list[list[str]] = [[], [], []]
    texts = [str(i) for i in range(300)]
    found = dict(workers(tmp_path, done, elsewhere=2).encode(Noting(done[0]), texts, "query: ", "query", ""))
    assert found.keys() == set(texts)
    assert [len(part) for part in done] == [200, 100, 0]
    assert "Rank 2 does not share" in caplog.text


def test_two_launches_share_a_folder_and_disturb_each_other_not(tmp_path: Path) -> None:
    """Each has texts and numbers of its own; what a killed launch left is removed by the next."""
    left = tmp_path / "shared" / ".encoding.0123456789abcdef.tmp"
    left.mkdir(parents=True)
    (left / "owner").write_text("")
    (left / "1.json").write_text(json.dumps({"texts": ["old"]}))
    first_done: list[list[str]] = [[], []]
    second_done: list[list[str]] = [[], []]
    first, second = workers(tmp_path, first_done), workers(tmp_path, second_done)
    assert not left.exists() and first.folder != second.folder
    texts, others = [str(i) for i in range(300)], [f"other {i}" for i in range(300)]
    going = iter(first.encode(Noting(first_done[0]), texts, "query: ", "query", ""))
    found = dict([next(going)])
    made = dict(second.encode(Noting(second_done[0]), others, "query: ", "query", ""))
    assert made.keys() == set(others)
    second.close()
    found |= dict(going)
    assert found.keys() == set(texts)
    assert sorted(first_done[0] + first_done[1]) == sorted(texts), "no share was left to the first"
    first.close()
    assert list((tmp_path / "shared").iterdir()) == []


def test_items_that_are_done_change_no_others(tiny_model: Path, tmp_path: Path) -> None:
    """A build of vectors that was stopped goes on with the same bytes, for texts and for a model that encodes by itself."""
    random = np.random.default_rng(0)
    texts = [" ".join(random.choice(WORDS, random.integers(1, 30))) for _ in range(200)]
    rows = [{"query": f"q{i}", "positives": [text], "negatives": []} for i, text in enumerate(texts)]
    store = build_rows(tmp_path, rows)
    for by_tokens in (True, False):
        encoder = Encoder.load(str(tiny_model), device="cpu")
        encoder.by_tokens = by_tokens
        items = np.arange(len(store.items["id"]))
        chunks = list(encoder.items_by_chunks(store, items, "query: "))
        whole = encoder.of_items(store, items, "query: ")
        assert len(chunks) > 3
        done = np.zeros(len(items), dtype=bool)
        for chunk, _ in chunks[::2]:
            done[chunk] = True
        done[chunks[1][0][:1]] = True  # of a chunk that is not whole: it is made again
        left = list(encoder.items_by_chunks(store, items, "query: ", done=done))
        assert [chunk.tolist() for chunk, _ in left] == [chunk.tolist() for chunk, _ in chunks[1::2]]
        for chunk, vectors in left:
            np.testing.assert_array_equal(vectors, whole[chunk])
