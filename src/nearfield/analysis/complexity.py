"""Is a domain's benchmark hard because of the domain, or because its texts are complex? FinMTEB's control (2502.10990)."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

_VOWELS = re.compile(r"[aeiouy]+")


def syllables(word: str) -> int:
    """Syllables of an English word, by its groups of vowels; a silent last e does not count."""
    word = word.lower()
    count = len(_VOWELS.findall(word))
    if word.endswith("e") and not word.endswith(("le", "ee", "ye")) and count > 1:
        count -= 1
    return max(count, 1)


def fog(text: str) -> float:
    """Gunning's fog index of an English text: 0.4 (words / sentences + 100 words of three or more syllables / words)."""
    words = re.findall(r"[A-Za-z']+", text)
    if not words:
        return 0.0
    sentences = max(len([part for part in re.split(r"[.!?]+", text) if re.search(r"[A-Za-z]", part)]), 1)
    long = sum(syllables(word) >= 3 for word in words)
    return 0.4 * (len(words) / sentences + 100 * long / len(words))


def entropy(symbols: Sequence[str]) -> float:
    """Shannon entropy of a stream of symbols (words of a text), in bits. Longer streams have more: cap their length."""
    counts = Counter(symbols)
    total = sum(counts.values())
    return -sum(count / total * math.log2(count / total) for count in counts.values()) if total else 0.0


def dependency_distance(heads: Sequence[int | None]) -> float:
    """Mean distance of words to their heads; ``heads`` are positions from 0, None for the root. Parsing is the caller's."""
    distances = [abs(i - head) for i, head in enumerate(heads) if head is not None]
    return sum(distances) / len(distances) if distances else 0.0


@dataclass(frozen=True)
class Third:
    """Data sets of like complexity: how many of each benchmark, and their mean scores (None where there is none)."""

    name: str
    general: int
    domain: int
    general_score: float | None
    domain_score: float | None

    @property
    def gap(self) -> float | None:
        """Domain minus general; None where one side is empty."""
        if self.general_score is None or self.domain_score is None:
            return None
        return self.domain_score - self.general_score


def by_thirds(
    complexity: Mapping[str, float], scores: Mapping[str, float], domain: Sequence[str]
) -> tuple[Third, Third, Third]:
    """Compare general and domain data sets within thirds of complexity, cut on all data sets together.

    ``complexity`` and ``scores`` are of each data set; ``domain`` names those of the domain's benchmark. A gap in all thirds
    alike is the domain's; one that is gone within thirds was that of the texts.
    """
    names = sorted(complexity, key=lambda name: (complexity[name], name))
    parts = np.array_split(np.array(names, dtype=object), 3)
    special = set(domain)

    def mean(kept: list[str]) -> float | None:
        return float(np.mean([scores[name] for name in kept])) if kept else None

    thirds = []
    for title, part in zip(("low", "medium", "high"), parts, strict=True):
        of_domain = [str(name) for name in part if name in special]
        general = [str(name) for name in part if name not in special]
        thirds.append(Third(title, len(general), len(of_domain), mean(general), mean(of_domain)))
    return thirds[0], thirds[1], thirds[2]
