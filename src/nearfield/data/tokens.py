"""The token cache: each (item, prompt) of a run tokenised once, on disk, memory-mapped.

One table a prompt: the item rows it holds (sorted), where each item's tokens start, and all token ids end to end. The
tokenizer is a callable handed in, so that this module needs no model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from nearfield.console import track
from nearfield.errors import BadInputError
from nearfield.files import atomic_path, read_json, write_json

if TYPE_CHECKING:
    from nearfield.data.store import Store

Rows = npt.NDArray[np.int64]
Ids = npt.NDArray[np.int32]
Tokenize = Callable[[Sequence[str], str], list[Ids]]
"""(texts, prompt) -> the token ids of each text with the prompt before it, special tokens included."""
TokenizeItems = Callable[["Store", Rows, str], list[Ids]]
"""(store, item rows, prompt) -> what each item takes: token ids, or for a picture :data:`IMAGE` as often as it counts."""

IMAGE = -1
"""Stands in the place of each token that a picture counts as, where pictures have an encoder of their own."""

VERSION = 1
_BATCH = 1024


@dataclass(frozen=True)
class TokenTable:
    """The tokens of the items that one prompt was put before."""

    prompt: str
    prompt_length: int
    """Tokens that the prompt and the special tokens before it take."""
    rows: Rows
    offsets: Rows
    ids: Ids

    def positions(self, rows: Rows) -> Rows:
        """Where the items stand in this table; an item that is not there is an error of the caller."""
        positions = np.searchsorted(self.rows, rows)
        if len(rows) and (positions.max(initial=0) >= len(self.rows) or not np.array_equal(self.rows[positions], rows)):
            raise KeyError(f"items that were not tokenised with the prompt {self.prompt!r}")
        return positions

    def lengths(self, rows: Rows) -> Rows:
        """The number of tokens of each item, int64 of the shape of ``rows``."""
        positions = self.positions(rows)
        return self.offsets[positions + 1] - self.offsets[positions]

    def tokens(self, row: int) -> Ids:
        """The token ids of one item."""
        position = int(self.positions(np.asarray([row], dtype=np.int64))[0])
        return np.asarray(self.ids[self.offsets[position] : self.offsets[position + 1]])


class TokenCache:
    """An opened token cache."""

    def __init__(self, path: Path) -> None:
        self.path = path
        meta = read_json(path / "tokens.json", "token cache")
        if meta.get("version") != VERSION:
            raise BadInputError(
                f"this token cache has version {meta.get('version')}; {VERSION} is wanted",
                where=str(path),
                hint="Delete the folder.",
            )
        self.fingerprint: str = meta["fingerprint"]
        self.tables = [self._open(number, entry) for number, entry in enumerate(meta["prompts"])]

    def _open(self, number: int, entry: dict[str, object]) -> TokenTable:
        stem = self.path / f"prompt-{number}"
        rows = np.load(stem.with_suffix(".rows.npy"), mmap_mode="r", allow_pickle=False)
        offsets = np.load(stem.with_suffix(".offsets.npy"), mmap_mode="r", allow_pickle=False)
        count = int(offsets[-1])
        ids = (
            np.memmap(stem.with_suffix(".ids.bin"), dtype=np.int32, mode="r", shape=(count,))
            if count
            else np.empty(0, np.int32)
        )
        return TokenTable(str(entry["prompt"]), int(str(entry["prompt_length"])), rows, offsets, ids)

    def number(self, prompt: str) -> int:
        """The number of the table of a prompt."""
        return next(number for number, table in enumerate(self.tables) if table.prompt == prompt)


def build_tokens(
    store: Store,
    wanted: Mapping[str, Rows],
    tokenize: Tokenize,
    prompt_length: Callable[[str], int],
    out: Path,
    fingerprint: str,
    *,
    tokenize_items: TokenizeItems | None = None,
) -> TokenCache:
    """Tokenise the wanted item rows of each prompt into the folder ``out``, written aside and renamed.

    ``tokenize_items`` takes the place of ``tokenize`` in a store with pictures.
    """
    with atomic_path(out) as aside:
        aside.mkdir()
        prompts = []
        for number, (prompt, asked) in enumerate(sorted(wanted.items())):
            unique = np.unique(np.asarray(asked, dtype=np.int64))
            stem = aside / f"prompt-{number}"
            offsets = np.zeros(len(unique) + 1, dtype=np.int64)
            with stem.with_suffix(".ids.bin").open("wb") as file:
                for start in track(range(0, len(unique), _BATCH), "Tokenising"):
                    rows = unique[start : start + _BATCH]
                    part = (
                        tokenize(store.texts(rows), prompt)
                        if tokenize_items is None
                        else tokenize_items(store, rows, prompt)
                    )
                    offsets[start + 1 : start + 1 + len(part)] = [len(ids) for ids in part]
                    file.write(np.concatenate(part).astype(np.int32).tobytes())
            np.save(stem.with_suffix(".rows.npy"), unique)
            np.save(stem.with_suffix(".offsets.npy"), np.cumsum(offsets))
            prompts.append({"prompt": prompt, "prompt_length": prompt_length(prompt)})
        write_json(aside / "tokens.json", {"version": VERSION, "fingerprint": fingerprint, "prompts": prompts})
    return TokenCache(out)
