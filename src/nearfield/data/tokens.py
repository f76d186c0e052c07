"""The token cache: each (item, prompt) of a run tokenised once, on disk, memory-mapped.

One table a prompt: the item rows it holds (sorted), where each item's tokens start, and all token ids end to end. The
tokenizer is a callable handed in, so that this module needs no model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from nearfield.checksums import Sealed, seal
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

VERSION = 3
_BATCH = 1024


@dataclass(frozen=True)
class CutTexts:
    """Counts of texts and tokens that a longest input cuts off."""

    texts: int = 0
    cut: int = 0
    """Texts that lost tokens."""
    tokens: int = 0
    """Of all texts, uncut."""
    lost: int = 0
    """Tokens that are not read."""

    def __add__(self, other: CutTexts) -> CutTexts:
        return CutTexts(
            self.texts + other.texts, self.cut + other.cut, self.tokens + other.tokens, self.lost + other.lost
        )

    def say(self, length: int) -> str:
        """The share of texts and of tokens, in words."""
        return (
            f"{self.cut:,} of {self.texts:,} texts ({self.cut / max(1, self.texts):.1%}) are cut at {length:,} tokens and lose "
            f"{self.lost:,} of all {self.tokens:,} tokens ({self.lost / max(1, self.tokens):.1%})"
        )

    def to_json(self) -> dict[str, int]:
        """The entry of a file."""
        return asdict(self)


class Reader(Protocol):
    """How texts are read beside their tokens: to which length they are cut, and which tokens count."""

    @property
    def max_length(self) -> int | None:
        """In tokens; None where nothing is cut."""

    @property
    def pools_prompt(self) -> bool:
        """Whether the tokens of a prompt are pooled with those of the text."""

    def lost_tokens(self, store: Store, rows: Rows, prompt: str, kept: Sequence[Ids]) -> Sequence[int]:
        """How many tokens each item lost, by what is left of it."""
        ...


@dataclass(frozen=True)
class TokenTable:
    """The tokens of the items that one prompt was put before."""

    prompt: str
    prompt_length: int
    """Tokens that the prompt and the special tokens before it take."""
    rows: Rows
    offsets: Rows
    ids: Ids
    cut: CutTexts = field(default_factory=CutTexts)
    """Counts of what the longest input cut off its texts."""
    check: Callable[[int, int], None] = lambda start, stop: None
    """Called with the bytes of ``ids`` that are about to be read."""

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
        start, stop = int(self.offsets[position]), int(self.offsets[position + 1])
        self.check(start * self.ids.itemsize, stop * self.ids.itemsize)
        return np.asarray(self.ids[start:stop])


class TokenCache:
    """An opened token cache."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._sealed = Sealed(path, "Run the same command again: it tokenises anew what is damaged.")
        self._sealed.file("tokens.json", whole=True)
        meta = read_json(path / "tokens.json", "token cache")
        if meta.get("version") != VERSION:
            raise BadInputError(
                f"this token cache has version {meta.get('version')}; {VERSION} is wanted",
                where=str(path),
                hint="Delete the folder.",
            )
        self.fingerprint: str = meta["fingerprint"]
        self.max_length: int | None = meta["max_length"]
        """The longest input that texts were cut to; None where none was cut."""
        self.pools_prompt: bool = meta["pools_prompt"]
        """Whether the tokens of a prompt are pooled with those of the text."""
        self.tables = [self._open(number, entry) for number, entry in enumerate(meta["prompts"])]

    def _open(self, number: int, entry: Mapping[str, Any]) -> TokenTable:
        stem = self.path / f"prompt-{number}"
        for name in ("rows.npy", "offsets.npy"):
            self._sealed.file(f"{stem.name}.{name}", whole=True)
        rows = np.load(stem.with_suffix(".rows.npy"), mmap_mode="r", allow_pickle=False)
        offsets = np.load(stem.with_suffix(".offsets.npy"), mmap_mode="r", allow_pickle=False)
        count = int(offsets[-1])
        ids = (
            np.memmap(stem.with_suffix(".ids.bin"), dtype=np.int32, mode="r", shape=(count,))
            if count
            else np.empty(0, np.int32)
        )
        cut = CutTexts(**entry["cut"])
        check = self._sealed.file(f"{stem.name}.ids.bin").check
        return TokenTable(str(entry["prompt"]), int(entry["prompt_length"]), rows, offsets, ids, cut, check)

    def without_tokens(self, table: TokenTable) -> Rows:
        """The item rows with this prompt that have not one token that is pooled: their vectors are zero."""
        if self.pools_prompt or not table.prompt_length:
            return np.empty(0, dtype=np.int64)
        return np.asarray(table.rows[np.diff(table.offsets) <= table.prompt_length])

    @property
    def cut(self) -> CutTexts:
        """Counts of what the longest input cut off the texts of all prompts."""
        return sum((table.cut for table in self.tables), CutTexts())

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
    reader: Reader | None = None,
) -> TokenCache:
    """Tokenise the wanted item rows of each prompt into the folder ``out``, written aside and renamed.

    ``tokenize_items`` takes the place of ``tokenize`` in a store with pictures. ``reader`` says what items lose; without it
    nothing is cut.
    """
    with atomic_path(out) as aside:
        aside.mkdir()
        prompts = []
        for number, (prompt, asked) in enumerate(sorted(wanted.items())):
            unique = np.unique(np.asarray(asked, dtype=np.int64))
            stem = aside / f"prompt-{number}"
            offsets = np.zeros(len(unique) + 1, dtype=np.int64)
            taken = CutTexts()
            with stem.with_suffix(".ids.bin").open("wb") as file:
                for start in track(range(0, len(unique), _BATCH), "Tokenising"):
                    rows = unique[start : start + _BATCH]
                    part = (
                        tokenize(store.texts(rows), prompt)
                        if tokenize_items is None
                        else tokenize_items(store, rows, prompt)
                    )
                    offsets[start + 1 : start + 1 + len(part)] = [len(ids) for ids in part]
                    lost = [0] if reader is None else reader.lost_tokens(store, rows, prompt, part)
                    whole = sum(map(len, part)) + sum(lost)
                    taken += CutTexts(len(part), sum(count > 0 for count in lost), whole, sum(lost))
                    file.write(np.concatenate(part).astype(np.int32).tobytes())
            np.save(stem.with_suffix(".rows.npy"), unique)
            np.save(stem.with_suffix(".offsets.npy"), np.cumsum(offsets))
            prompts.append({"prompt": prompt, "prompt_length": prompt_length(prompt), "cut": taken.to_json()})
        meta = {
            "version": VERSION,
            "fingerprint": fingerprint,
            "max_length": None if reader is None else reader.max_length,
            "pools_prompt": reader is None or reader.pools_prompt,
            "prompts": prompts,
        }
        write_json(aside / "tokens.json", meta)
        seal(aside)
    return TokenCache(out)
