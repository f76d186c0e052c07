"""The token cache: each (item, prompt) of a run tokenised once, on disk, memory-mapped.

One table a prompt: the item rows it holds (sorted), where each item's tokens start, and all token ids end to end. The
tokenizer is handed in, so that this module needs no model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from nearfield.arrays import ListsByKey, Ragged, Rows, Tokens, starts
from nearfield.console import track
from nearfield.errors import BadInputError, CutTexts
from nearfield.files import Sealed, atomic_path, read_json, seal, write_json

if TYPE_CHECKING:
    from nearfield.data.store import Store


IMAGE = -1
"""Stands in the place of each token that an image counts as, where images have an encoder of their own."""

VERSION = 3
"""Raised when the same items give another cache."""
_BATCH = 1024


class ItemTokenizer(Protocol):
    """Turns items into tokens, and says what it leaves out."""

    @property
    def max_length(self) -> int | None:
        """The tokens that longer texts are cut to; None where nothing is cut."""

    @property
    def pools_prompt(self) -> bool:
        """Whether the tokens of a prompt are pooled with those of the text."""

    def __call__(self, texts: Sequence[str], prompt: str) -> list[Tokens]:
        """The token ids of each text with the prompt before it, special tokens included."""
        ...

    def of_items(self, store: Store, rows: Rows, prompt: str) -> list[Tokens]:
        """The same of items with images: for an image :data:`IMAGE` as often as it counts."""
        ...

    def prompt_length(self, prompt: str) -> int:
        """Tokens that the prompt and the special tokens before it take."""
        ...

    def lost_tokens(self, store: Store, rows: Rows, prompt: str, kept: Sequence[Tokens]) -> Sequence[int]:
        """The number of tokens that each item lost; ``kept`` is what is left of it."""
        ...


@dataclass(frozen=True, kw_only=True)
class TokenTable(ListsByKey):
    """The token ids of the items that one prompt was put before."""

    prompt: str
    prompt_length: int
    """Tokens that the prompt and the special tokens before it take."""
    cut: CutTexts = field(default_factory=CutTexts)
    """Counts of what the longest input cut off its texts."""


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
        prompt = str(entry["prompt"])
        absent = f"items that were not tokenised with the prompt {prompt!r}"
        length = int(entry["prompt_length"])
        return TokenTable(rows, Ragged(offsets, ids), absent, check, prompt=prompt, prompt_length=length, cut=cut)

    def without_tokens(self, table: TokenTable) -> Rows:
        """The item rows with this prompt that have not one token that is pooled: their vectors are zero."""
        if self.pools_prompt or not table.prompt_length:
            return np.empty(0, dtype=np.int64)
        return np.asarray(table.rows[table.lists.lengths <= table.prompt_length])

    @property
    def cut(self) -> CutTexts:
        """Counts of what the longest input cut off the texts of all prompts."""
        return sum((table.cut for table in self.tables), CutTexts())

    def number(self, prompt: str) -> int:
        """The number of the table of a prompt."""
        return next(number for number, table in enumerate(self.tables) if table.prompt == prompt)


def build_tokens(
    store: Store, wanted: Mapping[str, Rows], tokenizer: ItemTokenizer, out: Path, fingerprint: str
) -> TokenCache:
    """Tokenise the wanted item rows of each prompt into the folder ``out``, written aside and renamed."""
    with atomic_path(out) as aside:
        aside.mkdir()
        prompts = []
        for number, (prompt, asked) in enumerate(sorted(wanted.items())):
            unique = np.unique(np.asarray(asked, dtype=np.int64))
            stem = aside / f"prompt-{number}"
            lengths = np.zeros(len(unique), dtype=np.int64)
            cut = CutTexts()
            with stem.with_suffix(".ids.bin").open("wb") as file:
                for start in track(range(0, len(unique), _BATCH), "Tokenising"):
                    rows = unique[start : start + _BATCH]
                    if store.has_images:
                        part = tokenizer.of_items(store, rows, prompt)
                    else:
                        part = tokenizer(store.texts(rows), prompt)
                    lengths[start : start + len(part)] = [len(ids) for ids in part]
                    lost = tokenizer.lost_tokens(store, rows, prompt, part)
                    whole = sum(map(len, part)) + sum(lost)
                    cut += CutTexts(len(part), sum(count > 0 for count in lost), whole, sum(lost))
                    file.write(np.concatenate(part).astype(np.int32).tobytes())
            np.save(stem.with_suffix(".rows.npy"), unique)
            np.save(stem.with_suffix(".offsets.npy"), starts(lengths))
            prompts.append({"prompt": prompt, "prompt_length": tokenizer.prompt_length(prompt), "cut": cut.to_json()})
        meta = {
            "version": VERSION,
            "fingerprint": fingerprint,
            "max_length": tokenizer.max_length,
            "pools_prompt": tokenizer.pools_prompt,
            "prompts": prompts,
        }
        write_json(aside / "tokens.json", meta)
        seal(aside)
    return TokenCache(out)
