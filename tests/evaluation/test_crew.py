"""Texts that are encoded by several processes: the same vectors, whoever makes them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from nearfield.evaluation.crew import BLOCK, BLOCK_SECONDS, FIRST_BLOCK, Crew, Wording, next_block
from nearfield.training.launch import Launch

WORDING = Wording("query", None, "query: ")


def vector(text: str, before: str) -> NDArray[np.float32]:
    return np.array([len(text), len(before), sum(map(ord, text))], dtype=np.float32)


@dataclass(frozen=True)
class InOneProcess(Launch):
    """The first of several ranks; the others are called in turn, by functions, where they would wait for tasks."""

    others: tuple[Callable[[str], None], ...] = ()

    def divide(self, task: str, own: Callable[[], None]) -> None:
        own()
        for other in self.others:
            other(task)


def embedder(done: list[str]) -> Callable[[Sequence[str], Wording, str], Iterator[tuple[str, NDArray[np.float32]]]]:
    """Encodes in an order of its own, and notes what it was given."""

    def embed(texts: Sequence[str], wording: Wording, says: str) -> Iterator[tuple[str, NDArray[np.float32]]]:
        assert wording == WORDING
        done.extend(texts)
        for text in reversed(texts):
            yield text, vector(text, wording.before)

    return embed


def crew(folder: Path, done: list[list[str]], *, elsewhere: int | None = None) -> Crew:
    """Of as many processes as there are lists; one may look for the folder at another place."""

    def other(rank: int) -> Callable[[str], None]:
        place = folder / "other machine" if rank == elsewhere else folder / "shared"
        return lambda task: Crew(Launch(rank, len(done)), place).help(task, embedder(done[rank]))

    return Crew(InOneProcess(0, len(done), 0, tuple(map(other, range(1, len(done))))), folder / "shared")


@pytest.mark.parametrize("count", [192, 1000])
def test_each_text_is_encoded_once_by_one_of_them(tmp_path: Path, count: int) -> None:
    texts = [f"{'word ' * (i * 7 % 50)}{i}" for i in range(count)]
    done: list[list[str]] = [[], [], []]
    found = dict(crew(tmp_path, done).embed(texts, WORDING, "", embedder(done[0])))
    assert found.keys() == set(texts)
    assert all(np.array_equal(made, vector(text, "query: ")) for text, made in found.items())
    assert sorted(text for part in done for text in part) == sorted(texts)
    characters = [sum(map(len, part)) for part in done]
    assert max(characters) < 1.05 * min(characters), "long and short texts are dealt evenly"
    assert list((tmp_path / "shared").iterdir()) == []


def test_few_texts_stay_with_the_first(tmp_path: Path) -> None:
    done: list[list[str]] = [[], []]
    texts = [str(i) for i in range(127)]
    assert dict(crew(tmp_path, done).embed(texts, WORDING, "", embedder(done[0]))).keys() == set(texts)
    assert (len(done[0]), done[1]) == (127, [])


def test_blocks_come_one_after_the_other(tmp_path: Path) -> None:
    """So that what the cache has got is not lost when the rest fails."""
    done: list[list[str]] = [[], []]
    texts = [str(i) for i in range(2 * BLOCK + 5)]
    pairs = iter(crew(tmp_path, done).embed(texts, WORDING, "", embedder(done[0])))
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
    found = dict(crew(tmp_path, done, elsewhere=2).embed(texts, WORDING, "", embedder(done[0])))
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
    first, second = crew(tmp_path, first_done), crew(tmp_path, second_done)
    assert not left.exists() and first.folder != second.folder
    texts, others = [str(i) for i in range(300)], [f"other {i}" for i in range(300)]
    going = iter(first.embed(texts, WORDING, "", embedder(first_done[0])))
    found = dict([next(going)])
    assert dict(second.embed(others, WORDING, "", embedder(second_done[0]))).keys() == set(others)
    second.close()
    found |= dict(going)
    assert found.keys() == set(texts)
    assert sorted(first_done[0] + first_done[1]) == sorted(texts), "no share was left to the first"
    first.close()
    assert list((tmp_path / "shared").iterdir()) == []
