"""Build the embedded WordNet data sets from the dictionary files of WordNet 3.0 (Debian's package wordnet-base).

    python scripts/build_wordnet.py                      # fetches the package with apt-get; root is not needed
    python scripts/build_wordnet.py --deb FILE.deb
    python scripts/build_wordnet.py --dict /usr/share/wordnet

Writes synsets.jsonl.xz, pairs.jsonl.xz, LICENSE and SHA256SUMS. The same dictionary gives the same bytes.

Rules: nouns with a first hypernym; no instances (people, places); the gloss without its example sentences and with at
least four words; a gloss that several synsets have stays with the first; no lemma of which a word (other than words like
"of") occurs in the gloss. The score of a pair is the
Wu-Palmer similarity of the two senses along first hypernyms: it says how near they are in the hierarchy. It is not the
judgement of a human.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from nearfield.methods.wordnet import FOLDER, fold_of, pack

PACKAGE = "wordnet-base"
MIN_WORDS = 4
PAIRS_A_FOLD = 11
MEMBERS_A_FOLD = 40
BANDS = 10
STOP_WORDS = frozenset(
    [
        "a",
        "an",
        "and",
        "as",
        "at",
        "be",
        "by",
        "for",
        "from",
        "in",
        "into",
        "is",
        "it",
        "its",
        "no",
        "not",
        "of",
        "on",
        "one",
        "or",
        "that",
        "the",
        "to",
        "which",
        "who",
        "with",
    ]
)


@dataclass(frozen=True)
class Noun:
    """A line of data.noun."""

    id: str
    lemmas: tuple[str, ...]
    hypernym: str | None
    """The first one, of a class or, where there is none, of an instance."""
    instance: bool
    gloss: str


def read_nouns(path: Path) -> Iterator[Noun]:
    """Parse data.noun (see wndb(5WN)); the lines of the licence begin with two blanks."""
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("  "):
            continue
        head, _, gloss = line.partition(" | ")
        fields = head.split(" ")
        words = int(fields[3], 16)
        pointers = fields[4 + 2 * words + 1 :]
        places = range(0, len(pointers) - 3, 4)
        classes = [f"n{pointers[i + 1]}" for i in places if pointers[i] == "@"]
        instances = [f"n{pointers[i + 1]}" for i in places if pointers[i] == "@i"]
        lemmas = tuple(word.replace("_", " ") for word in fields[4 : 4 + 2 * words : 2])
        hypernym = next(iter(classes + instances), None)
        yield Noun(f"n{fields[0]}", lemmas, hypernym, bool(instances), definition(gloss))


def definition(gloss: str) -> str:
    """The gloss up to its first example sentence, which stands in quotes."""
    return re.split(r'\s*[;:,]?\s*"', gloss.strip(), maxsplit=1)[0].strip(" ;")


def words_of(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.lower()))


def kept_lemmas(noun: Noun) -> list[str]:
    """The lemmas of which no content word occurs in the gloss, each once."""
    given = words_of(noun.gloss)
    kept = [lemma for lemma in noun.lemmas if not ((words_of(lemma) - STOP_WORDS) & given)]
    return list(dict.fromkeys(kept))


def synset_rows(nouns: list[Noun]) -> list[dict[str, object]]:
    """The rows of synsets.jsonl.xz, in the order of ids."""
    rows: list[dict[str, object]] = []
    seen: set[str] = set()
    for noun in sorted(nouns, key=lambda noun: noun.id):
        if noun.instance or noun.hypernym is None or len(noun.gloss.split()) < MIN_WORDS:
            continue
        lemmas = kept_lemmas(noun)
        if lemmas and noun.gloss not in seen:
            seen.add(noun.gloss)
            rows.append({"id": noun.id, "hypernym": noun.hypernym, "lemmas": lemmas, "gloss": noun.gloss})
    return rows


def pair_rows(nouns: list[Noun], rows: list[dict[str, object]]) -> list[dict[str, object]]:
    """Up to eleven pairs a fold, each synset once, spread over the bands of the score, in the order of ids."""
    parents = {noun.id: noun.hypernym for noun in nouns if noun.hypernym is not None}
    paths: dict[str, tuple[str, ...]] = {}

    def path(synset: str) -> tuple[str, ...]:
        if synset not in paths:
            paths[synset] = (*path(parents[synset]), synset) if synset in parents else (synset,)
        return paths[synset]

    folds: dict[int, list[str]] = defaultdict(list)
    for row in rows:
        folds[fold_of(str(row["hypernym"]))].append(str(row["id"]))
    pairs: list[dict[str, object]] = []
    for _, members in sorted(folds.items()):
        bands: list[list[tuple[bytes, str, str, float]]] = [[] for _ in range(BANDS)]
        drawn = sorted(sorted(members, key=_order)[:MEMBERS_A_FOLD])
        for first, second in combinations(drawn, 2):
            score = wu_palmer(path(first), path(second))
            order = _order(f"{first} {second}")
            bands[min(int(score * BANDS), BANDS - 1)].append((order, first, second, score))
        pairs.extend(_spread(bands))
    return sorted(pairs, key=lambda pair: (str(pair["first"]), str(pair["second"])))


def _order(text: str) -> bytes:
    """A fixed shuffle: things are taken in the order of this hash."""
    return hashlib.blake2b(text.encode(), digest_size=8).digest()


def _spread(bands: list[list[tuple[bytes, str, str, float]]]) -> Iterator[dict[str, object]]:
    """Take from the bands in turn until there are enough pairs; a synset is used once."""
    queues = [iter(sorted(band)) for band in bands]
    used: set[str] = set()
    taken = 0
    while queues and taken < PAIRS_A_FOLD:
        for queue in list(queues):
            for _, first, second, score in queue:
                if first not in used and second not in used:
                    used |= {first, second}
                    taken += 1
                    yield {"first": first, "second": second, "score": round(score, 4)}
                    break
            else:
                queues.remove(queue)
            if taken == PAIRS_A_FOLD:
                break


def wu_palmer(first: tuple[str, ...], second: tuple[str, ...]) -> float:
    """Twice the depth of the lowest common ancestor over the sum of the depths; the root has depth 1."""
    common = 0
    for a, b in zip(first, second, strict=False):
        if a != b:
            break
        common += 1
    return 2 * common / (len(first) + len(second))


def licence(path: Path) -> str:
    """The notice at the head of data.noun, without its line numbers."""
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("  ")]
    return "\n".join(re.sub(r"^ +\d+ ?", "", line).rstrip() for line in lines).strip() + "\n"


def fetch(folder: Path) -> Path:
    """Download the Debian package into a folder with apt-get."""
    command = ["apt-get", "download", "-q", PACKAGE]
    try:
        subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
    except FileNotFoundError:
        sys.exit("build_wordnet: there is no apt-get here; give --dict or --deb")
    except subprocess.CalledProcessError as error:
        sys.exit(f"build_wordnet: {' '.join(command)} failed: {error.stderr.strip()[-300:]}")
    return next(folder.glob(f"{PACKAGE}*.deb"))


def build(dictionary: Path, out: Path) -> dict[str, str]:
    """Write the files; return the SHA-256 of each data file."""
    nouns = list(read_nouns(dictionary / "data.noun"))
    synsets = synset_rows(nouns)
    out.mkdir(parents=True, exist_ok=True)
    sums: dict[str, str] = {}
    for name, rows in (("synsets.jsonl.xz", synsets), ("pairs.jsonl.xz", pair_rows(nouns, synsets))):
        lines = "".join(json.dumps(row, ensure_ascii=False, separators=(",", ":")) + "\n" for row in rows)
        data = pack(lines)
        (out / name).write_bytes(data)
        sums[name] = hashlib.sha256(data).hexdigest()
        print(f"{name}: {len(rows):,} rows, {len(data):,} bytes")
    print(f"lemmas with a gloss: {sum(len(row['lemmas']) for row in synsets if isinstance(row['lemmas'], list)):,}")
    (out / "LICENSE").write_text(licence(dictionary / "data.noun"), encoding="utf-8")
    (out / "SHA256SUMS").write_text("".join(f"{value}  {name}\n" for name, value in sums.items()), encoding="utf-8")
    return sums


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dict", type=Path, help="a folder with data.noun")
    parser.add_argument("--deb", type=Path, help="the package, fetched before")
    parser.add_argument("--out", type=Path, default=FOLDER)
    arguments = parser.parse_args()
    if arguments.dict:
        build(arguments.dict, arguments.out)
        return
    with tempfile.TemporaryDirectory() as folder:
        package = arguments.deb or fetch(Path(folder))
        subprocess.run(["dpkg", "-x", str(package), f"{folder}/unpacked"], check=True)
        build(Path(folder) / "unpacked/usr/share/wordnet", arguments.out)


if __name__ == "__main__":
    main()
