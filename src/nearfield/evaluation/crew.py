"""The processes of one launch, which encode their shares of a task's texts while the first of them scores.

Texts and vectors are exchanged as files in a folder. A process that does not see it, as on a machine without the shared file
system, leaves its share to the first.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from nearfield.files import atomic_path, read_json, scratch_folder, write_json

if TYPE_CHECKING:
    from nearfield.training.launch import Launch

logger = logging.getLogger("nearfield.evaluation")

Pairs = Iterable[tuple[str, NDArray[np.float32]]]
FIRST_BLOCK, BLOCK = 32, 16_384
"""Texts of a process that are encoded before vectors are gathered: few at first, then as many as take about
:data:`BLOCK_SECONDS`, so that little is lost when a run ends, and at most so many."""
BLOCK_SECONDS = 10.0
LEAST = 64
"""Texts a process below which it is not worth it."""


@dataclass(frozen=True)
class Wording:
    """How mteb would have some texts encoded."""

    role: str | None
    """``query``, ``document`` or none."""
    prompt: str | None
    """What mteb found for the task; none leaves it to the model."""
    before: str
    """What is put before each text in the end."""


Embed = Callable[[Sequence[str], Wording, str], Pairs]
"""(texts, wording, what to say meanwhile) -> each text with its embedding, in any order."""


def next_block(size: int, seconds: float) -> int:
    """Texts of a process in the next block, when the last one of ``size`` took so long: at most twice as many."""
    wanted = int(size * min(2.0, BLOCK_SECONDS / max(seconds, 1e-3)))
    return min(BLOCK, max(1, wanted))


class Crew:
    """What the first process calls to have texts encoded by all, and what the others do (:meth:`help`)."""

    def __init__(self, launch: Launch, shared: Path) -> None:
        """Texts and vectors lie in a folder of this launch's own below ``shared``, where other launches may have theirs."""
        self.launch, self.shared = launch, shared
        self._number = 0
        self._held = contextlib.ExitStack()
        self.folder: Path | None = None
        if launch.is_main:
            self.folder = self._held.enter_context(scratch_folder(shared, "encoding"))

    def close(self) -> None:
        """Remove the folder."""
        self._held.close()

    def embed(
        self, texts: Sequence[str], wording: Wording, says: str, own: Embed
    ) -> Iterator[tuple[str, NDArray[np.float32]]]:
        """As ``own`` does, but by all processes; long and short texts are dealt evenly."""
        ranks = self.launch.world_size
        if len(texts) < LEAST * ranks:
            yield from own(texts, wording, says)
            return
        start, size = 0, FIRST_BLOCK
        while start < len(texts):
            block, began = sorted(texts[start : start + size * ranks], key=len), time.monotonic()
            start += size * ranks
            self._number += 1
            task = {"texts": block, "role": wording.role, "prompt": wording.prompt, "before": wording.before}
            folder = self.folder
            assert folder is not None
            write_json(_texts(folder, self._number), task)
            found: list[tuple[str, NDArray[np.float32]]] = []
            named = f"encode {self._number} {folder.name}"
            self.launch.divide(named, lambda: found.extend(own(block[::ranks], wording, says)))  # noqa: B023
            yield from found
            for rank in range(1, ranks):
                file, share = _vectors(folder, self._number, rank), block[rank::ranks]
                if file.is_file():
                    yield from zip(share, np.load(file, allow_pickle=False), strict=True)
                    file.unlink()
                else:
                    logger.warning("Rank %d does not share %s: its texts are encoded here", rank, folder)
                    yield from own(share, wording, says)
            _texts(folder, self._number).unlink()
            size = next_block(size, time.monotonic() - began)

    def help(self, task: str, own: Embed) -> None:
        """Do this process's share of a task of :meth:`embed`."""
        number, name = int(task.split()[1]), task.split()[2]
        folder = self.shared / name
        if not _texts(folder, number).is_file():
            return
        told = read_json(_texts(folder, number))
        share = told["texts"][self.launch.rank :: self.launch.world_size]
        vectors = dict(own(share, Wording(told["role"], told["prompt"], told["before"]), ""))
        with atomic_path(_vectors(folder, number, self.launch.rank)) as aside, aside.open("wb") as stream:
            np.save(stream, np.stack([vectors[text] for text in share]))


def _texts(folder: Path, number: int) -> Path:
    return folder / f"{number}.json"


def _vectors(folder: Path, number: int, rank: int) -> Path:
    return folder / f"{number}-{rank}.npy"
