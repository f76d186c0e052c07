"""WordNet's nouns, shipped in the package: lemmas and their glosses, and pairs of glosses with a score.

``scripts/build_wordnet.py`` makes the two files: one line a synset, and one line a pair of synsets. Rows are put together
here, so that a gloss is stored once.
"""

from __future__ import annotations

import hashlib
import lzma
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from nearfield.data.config import hash_split
from nearfield.data.readers import ReaderBase, Row, check_header, hash_files, read_jsonl
from nearfield.errors import BadInputError

FOLDER = Path(__file__).parent / "embedded" / "wordnet"
FOLDS = 1024
MAX_SIBLINGS = 3

_COLUMNS = {
    "wordnet/lemma_gloss": ("lemma", "gloss", "siblings", "synset", "hypernym", "fold"),
    "wordnet/gloss_similarity": ("first", "second", "score", "first_synset", "second_synset", "fold"),
}


@dataclass(frozen=True, slots=True)
class Synset:
    """A noun sense: the lemmas that do not give their gloss away, the gloss, and the first hypernym."""

    id: str
    hypernym: str
    lemmas: tuple[str, ...]
    gloss: str


class EmbeddedReader(ReaderBase):
    """A data set that is shipped in the package."""

    kind: Literal["embedded"] = "embedded"
    name: Literal["wordnet/lemma_gloss", "wordnet/gloss_similarity"]
    """Lemmas and their glosses, or pairs of glosses with a score."""

    def inputs(self) -> dict[str, str]:
        names = ["synsets.jsonl.xz"] + ["pairs.jsonl.xz"] * (self.name == "wordnet/gloss_similarity")
        return hash_files([FOLDER / name for name in names])

    def rows(self, columns: Sequence[str]) -> Iterator[Row]:
        check_header(_COLUMNS[self.name], columns, self.name)
        synsets = read_synsets(FOLDER / "synsets.jsonl.xz")
        if self.name == "wordnet/lemma_gloss":
            values = lemma_rows(synsets)
        else:
            values = _pair_rows(synsets, FOLDER / "pairs.jsonl.xz")
        for number, row in enumerate(values, start=1):
            yield Row(self.name, number, row)


def fold_of(hypernym: str) -> int:
    """The fold, 0 to 1023, of a synset with this first hypernym. Both data sets are split by it."""
    return int.from_bytes(hashlib.blake2b(hypernym.encode(), digest_size=8).digest(), "big") % FOLDS


def read_synsets(path: Path) -> list[Synset]:
    """All shipped synsets, in the order of their ids."""
    return [
        Synset(str(v["id"]), str(v["hypernym"]), tuple(_strings(v["lemmas"])), str(v["gloss"])) for v in _values(path)
    ]


def glosses_by_split() -> dict[str, list[str]]:
    """The shipped glosses by the splits of the shipped data recipes: no gloss, and no sibling of one, is in two of them."""
    fractions = {"train": 0.85, "validation": 0.05, "test": 0.10}
    sides: dict[str, list[str]] = {split: [] for split in fractions}
    for synset in read_synsets(FOLDER / "synsets.jsonl.xz"):
        sides[hash_split(str(fold_of(synset.hypernym)), fractions, 0)].append(synset.gloss)
    return sides


def lemma_rows(synsets: Sequence[Synset]) -> Iterator[dict[str, object]]:
    """One row a lemma and sense, with up to three glosses of siblings (same first hypernym) as hard negatives.

    The siblings are those that the hash of the two ids brings first: fixed, and spread over the family. A sibling whose
    gloss is also a gloss of the lemma is left out.
    """
    families: dict[str, list[Synset]] = defaultdict(list)
    glosses: dict[str, set[str]] = defaultdict(set)
    for synset in synsets:
        families[synset.hypernym].append(synset)
        for lemma in synset.lemmas:
            glosses[lemma].add(synset.gloss)
    for synset in synsets:
        family = sorted(families[synset.hypernym], key=lambda other: _pair_hash(synset.id, other.id))
        for lemma in synset.lemmas:
            siblings: list[str] = []
            for other in family:
                if len(siblings) == MAX_SIBLINGS:
                    break
                if other.gloss not in glosses[lemma] and other.gloss not in siblings:
                    siblings.append(other.gloss)
            yield {
                "lemma": lemma,
                "gloss": synset.gloss,
                "siblings": siblings,
                "synset": synset.id,
                "hypernym": synset.hypernym,
                "fold": fold_of(synset.hypernym),
            }


def _pair_hash(first: str, second: str) -> bytes:
    return hashlib.blake2b(f"{first} {second}".encode(), digest_size=8).digest()


def _pair_rows(synsets: Sequence[Synset], path: Path) -> Iterator[dict[str, object]]:
    known = {synset.id: synset for synset in synsets}
    for values in _values(path):
        first, second = known[str(values["first"])], known[str(values["second"])]
        yield {
            "first": first.gloss,
            "second": second.gloss,
            "score": values["score"],
            "first_synset": first.id,
            "second_synset": second.id,
            "fold": fold_of(first.hypernym),
        }


def _values(path: Path) -> Iterator[dict[str, object]]:
    for row in read_jsonl(path):
        if row.values is None:
            raise BadInputError(
                f"a shipped file is broken ({row.reason})", where=f"{path}:{row.line}", hint="Install again."
            )
        yield dict(row.values)


def _strings(value: object) -> list[str]:
    assert isinstance(value, list)
    return [str(member) for member in value]


def pack(text: str) -> bytes:
    """The bytes of a shipped file: xz with a fixed preset and check, so that the same rows give the same bytes."""
    return lzma.compress(text.encode(), format=lzma.FORMAT_XZ, check=lzma.CHECK_CRC64, preset=9)
