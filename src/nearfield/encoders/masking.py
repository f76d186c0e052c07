"""Which tokens of a text are hidden: a function of the text's numbers alone, whatever chunk or process it is in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from nearfield.encoders.packing import Tokens, rectangle
from nearfield.encoders.token_config import TokenTaskConfig
from nearfield.randomness import generator

NOTHING = -100
"""The label of a token that is not to be told."""

Key = tuple[int, int, int, int]
"""(seed, step, item, prompt)."""


@dataclass(frozen=True)
class Hidden:
    """A text of which some tokens are hidden."""

    tokens: Tokens
    """(t,) what the encoder reads."""
    labels: npt.NDArray[np.int64]
    """(t,) the hidden tokens, ``NOTHING`` elsewhere."""
    words: npt.NDArray[np.bool_]
    """(t,) the tokens that could have been hidden."""


@dataclass(frozen=True)
class Targets:
    """What is to be told of the n texts of a chunk; places are those of its padded rectangle."""

    labels: Tensor
    """(n, longest) int64, ``NOTHING`` where nothing is hidden."""
    ids: Tensor | None = None
    """(n, longest) int64: the tokens themselves, for a decoder."""
    words: Tensor | None = None
    """(n, longest) bool: those that a decoder must tell."""
    seen: Tensor | None = None
    """(n, longest, longest) bool: which tokens each place of a decoder sees."""


def hide(
    tokens: Tokens,
    config: TokenTaskConfig,
    random: np.random.Generator,
    *,
    mask: int,
    vocabulary: int,
    special: npt.NDArray[np.int64],
    prompt_length: int,
) -> Hidden:
    """Hide a share of a text's tokens, each by chance; never ``special`` ones, nor the first ``prompt_length``."""
    words = ~np.isin(tokens, special)
    words[:prompt_length] = False
    if config.predict == "next":
        words[:1] = False  # nothing stands before it
    chosen = words & (random.random(len(tokens)) < config.share)
    how, others = random.random(len(tokens)), random.integers(0, vocabulary, len(tokens))
    swapped = chosen & (how < config.random)
    masked = chosen & (how >= config.random + config.kept)
    read = np.where(masked, mask, np.where(swapped, others, tokens)).astype(np.int32)
    return Hidden(read, np.where(chosen, tokens, NOTHING).astype(np.int64), words)


def seen_by_decoder(count: int, share: float, random: np.random.Generator) -> npt.NDArray[np.bool_]:
    """(count, count) bool: each place sees every other token but for a ``share``, by chance, and never its own."""
    seen = random.random((count, count)) >= share
    np.fill_diagonal(seen, False)
    return seen


def hide_all(
    rows: Sequence[Tokens],
    keys: Sequence[Key],
    config: TokenTaskConfig,
    *,
    mask: int,
    vocabulary: int,
    special: npt.NDArray[np.int64],
    prompt_length: int,
    chosen: Sequence[bool],
    side: str,
    device: torch.device,
) -> tuple[list[Tokens], Targets]:
    """Hide tokens of the ``chosen`` texts of a chunk: what the encoder reads, and what is to be told."""
    read: list[Tokens] = []
    labels: list[npt.NDArray[np.int64]] = []
    words: list[npt.NDArray[np.int64]] = []
    longest = max(map(len, rows))
    seen = np.zeros((len(rows), longest, longest), dtype=bool) if config.decoder is not None else None
    for line, (row, (seed, *which), wanted) in enumerate(zip(rows, keys, chosen, strict=True)):
        if not wanted:
            read.append(row)
            labels.append(np.full(len(row), NOTHING, dtype=np.int64))
            words.append(np.zeros(len(row), dtype=np.int64))
            continue
        random = generator(seed, "masks", *which)
        hidden = hide(
            row, config, random, mask=mask, vocabulary=vocabulary, special=special, prompt_length=prompt_length
        )
        read.append(hidden.tokens)
        labels.append(hidden.labels)
        words.append(hidden.words.astype(np.int64))
        if seen is not None and config.decoder is not None:
            begin = longest - len(row) if side == "left" else 0
            place = slice(begin, begin + len(row))
            seen[line, place, place] = seen_by_decoder(len(row), config.decoder.share, random)

    def laid(values: Sequence[npt.NDArray[np.int64]], fill: int) -> Tensor:
        return torch.from_numpy(rectangle(values, fill, side)[0]).to(device)

    if seen is None:
        return read, Targets(laid(labels, NOTHING))
    ids = laid([row.astype(np.int64) for row in rows], 0)
    return read, Targets(laid(labels, NOTHING), ids, laid(words, 0).bool(), torch.from_numpy(seen).to(device))
