"""How much planted benchmark text `nearfield data decontaminate` finds, how often it cries wolf, and how long it takes.

Real text: the glosses of WordNet that the package ships. The training side has the glosses of the training split, the
benchmark side those of the test split; no gloss and no sibling of one is in both. Plants are benchmark glosses put into
training as they are, lightly edited, or inside longer text. Intervals are Wilson's, 95 %.

With ``--more`` the training side also is the descriptions of Debian's packages and the docstrings of installed packages; with
``--tasks FOLDER`` the benchmark side also is the local tasks in it (docs/evaluation.md), and of their graded pairs and translated
sentences it is measured how many paraphrases and translations are found.

    python scripts/decontamination_figures.py [--more] [--tasks FOLDER] [--json results/decontamination/figures.json]
        [--embed sentence-transformers/all-MiniLM-L6-v2] [--scale 100000] [--libraries]
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import random
import resource
import string
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from nearfield.arrays import Ragged, concatenate
from nearfield.data.containment import ContainmentIndex
from nearfield.data.decontaminate import KINDS, DecontaminationConfig, TrainingIndex
from nearfield.data.near_duplicates import WordHashes, hash_words, words
from nearfield.methods.wordnet import glosses_by_split

Edit = Callable[[str, random.Random], str]
Plant = Callable[[str, str, random.Random], str]
"""text, another text of the training side -> the text that is planted there"""
BLOCK = 8192


@functools.cache
def disjoint_glosses() -> tuple[list[str], list[str]]:
    """The glosses of the training and of the test split of the shipped WordNet recipe."""
    sides = glosses_by_split()
    return sides["train"], sides["test"]


def recased(text: str, pick: random.Random) -> str:
    """The text in upper, lower, title or swapped case, or with the case of each letter drawn."""
    draw: Edit = lambda text, pick: "".join(pick.choice((c.lower(), c.upper())) for c in text)  # noqa: E731
    plain: list[Callable[[str], str]] = [str.upper, str.lower, str.title, str.swapcase]
    way = pick.randrange(5)
    return draw(text, pick) if way == 4 else plain[way](text)


def repunctuated(text: str, pick: random.Random) -> str:
    """The text with its punctuation stripped, replaced by spaces, or with more of it."""
    way = pick.randrange(3)
    if way == 2:
        return " ".join(word + pick.choice(["", "", "", ",", ";", "!"]) for word in text.split()) + "."
    return "".join(" " * way if c in string.punctuation else c for c in text)


def shortened(text: str, pick: random.Random) -> str:
    """The text with each word left out with probability 0.05, at least one word staying."""
    words = text.split()
    return " ".join([word for word in words if pick.random() >= 0.05] or words[:1])


EDITS: dict[str, Edit] = {
    "exact": lambda text, pick: text,
    "case": recased,
    "punctuation": repunctuated,
    "case and punctuation": lambda text, pick: recased(repunctuated(text, pick), pick),
    "5 % of words left out": shortened,
    "all three": lambda text, pick: recased(repunctuated(shortened(text, pick), pick), pick),
}


def in_a_question(text: str, host: str, pick: random.Random) -> str:
    """The text as a question, with another text as its answer."""
    return f"Question: {text} Answer: {host}"


def amid(text: str, host: str, pick: random.Random) -> str:
    """The text between any two words of another one."""
    words = host.split()
    place = pick.randint(0, len(words))
    return " ".join([*words[:place], text, *words[place:]])


def changed(text: str, host: str, pick: random.Random) -> str:
    """The text with one of its words replaced by one of the other text's."""
    words = text.split()
    words[pick.randrange(len(words))] = pick.choice(host.split())
    return " ".join(words)


def without_one(text: str, host: str, pick: random.Random) -> str:
    """The text without one of its words."""
    words = text.split()
    del words[pick.randrange(len(words))]
    return " ".join(words)


def with_one_more(text: str, host: str, pick: random.Random) -> str:
    """The text with one of the other text's words put in."""
    words = text.split()
    words.insert(pick.randrange(1, max(len(words), 2)), pick.choice(host.split()))
    return " ".join(words)


def both(first: Plant, second: Plant) -> Plant:
    """One after the other."""
    return lambda text, host, pick: second(first(text, host, pick), host, pick)


PLANTS: dict[str, Plant] = {
    "in a question": in_a_question,
    "amid another text": amid,
    "one word changed": changed,
    "one word changed, in a question": both(changed, in_a_question),
    "one word left out, in a question": both(without_one, in_a_question),
    "one word put in, in a question": both(with_one_more, in_a_question),
}
OFTEN: tuple[str, Plant, int] = ("in 30 questions", in_a_question, 30)
LENGTHS = ((4, 4), (5, 5), (6, 6), (7, 7), (8, 8), (9, 10), (11, 12), (13, 20), (21, 40))
"""Words of a planted text, from and to."""


def wilson(hits: int, count: int) -> tuple[float, float]:
    """95 % interval of a share."""
    z = 1.959964
    centre = (hits + z * z / 2) / (count + z * z)
    half = z * np.sqrt(hits * (count - hits) / count + z * z / 4) / (count + z * z)
    return max(float(centre - half), 0.0), min(float(centre + half), 1.0)


def share(hits: int, count: int) -> dict[str, Any]:
    """A share with its interval."""
    return {"hits": hits, "n": count, "share": hits / count, "interval": wilson(hits, count)}


def recall(
    benchmark: Sequence[str], edit: Edit, seed: int, encode: Any = None, config: DecontaminationConfig | None = None
) -> dict[str, Any]:
    """The share of planted texts that are found as matches of the very text they were made from, and by which kind."""
    pick = random.Random(seed)
    planted = [edit(text, pick) for text in benchmark]
    index = TrainingIndex([planted], config or DecontaminationConfig(), encode)
    found, _ = index.matches(benchmark)
    kinds: dict[str, int] = {}
    seen = np.zeros(len(planted), dtype=np.bool_)
    for kind in KINDS:
        if kind in found:
            pairs = found[kind].pairs
            own = pairs[pairs[:, 0] == pairs[:, 1], 0]
            kinds[kind] = int(np.count_nonzero(~seen[own]))
            seen[own] = True
    long = seen[[len(text.split()) >= 8 for text in benchmark]]
    return {
        **share(int(np.count_nonzero(seen)), len(planted)),
        "by_kind": kinds,
        "of_8_words": share(int(np.count_nonzero(long)), len(long)),
    }


class Planted(NamedTuple):
    """A benchmark text, what was made of it for the training side, and how often that stands there."""

    text: str
    made: Sequence[str]


def found_inside(training: Sequence[str], planted: Sequence[Planted]) -> npt.NDArray[np.bool_]:
    """(n,) whether each text is found where it was planted, among all of ``training``, by the kind ``contained`` alone."""
    known = WordHashes()
    texts = [*training, *(made for one in planted for made in one.made)]
    hosts = Ragged.from_lengths([len(one.made) for one in planted], np.arange(len(training), len(texts)))
    owner = np.full(len(texts), -1)
    owner[hosts.values] = hosts.owners()
    hashed = concatenate([hash_words(texts[i : i + BLOCK], known) for i in range(0, len(texts), BLOCK)])
    index = ContainmentIndex(hashed, DecontaminationConfig())
    seen = np.zeros(len(planted), dtype=np.bool_)
    for start in range(0, len(planted), BLOCK):
        pairs, _ = index.matches(hash_words([one.text for one in planted[start : start + BLOCK]], known))
        at = pairs[:, 1] + start
        seen[at[owner[pairs[:, 0]] == at]] = True
    return seen


def plants_inside(training: Sequence[str], benchmark: Sequence[str], plant: Plant, seed: int) -> dict[str, Any]:
    """The share of benchmark texts that are found where they were planted among all of ``training``."""
    pick = random.Random(seed)
    seen = found_inside(training, [Planted(text, [plant(text, pick.choice(training), pick)]) for text in benchmark])
    return share(int(np.count_nonzero(seen)), len(seen))


def plants_by_length(
    training: Sequence[str], benchmark: Sequence[str], seed: int, most: int = 300
) -> dict[str, dict[str, dict[str, Any]]]:
    """The shares found by what was done to a text and by its words: up to ``most`` texts each, every text planted in one way."""
    pick = random.Random(seed)
    counts = np.asarray([len(words(text)) for text in benchmark])
    ways: list[tuple[str, Plant, int]] = [*((name, plant, 1) for name, plant in PLANTS.items()), OFTEN]
    planted: list[Planted] = []
    labels: list[tuple[str, str]] = []
    for low, high in LENGTHS:
        places = np.flatnonzero((counts >= low) & (counts <= high)).tolist()
        pick.shuffle(places)
        each = min(most, len(places) // len(ways))
        for number, (name, plant, times) in enumerate(ways):
            for place in places[number * each : (number + 1) * each]:
                text = benchmark[place]
                planted.append(Planted(text, [plant(text, pick.choice(training), pick) for _ in range(times)]))
                labels.append((name, str(low) if low == high else f"{low}-{high}"))
    seen = found_inside(training, planted)
    hits: dict[tuple[str, str], list[bool]] = {}
    for label, hit in zip(labels, seen.tolist(), strict=True):
        hits.setdefault(label, []).append(hit)
    shares: dict[str, dict[str, dict[str, Any]]] = {}
    for (name, length), of_label in hits.items():
        shares.setdefault(name, {})[length] = share(sum(of_label), len(of_label))
    return shares


def index_of(training: Sequence[str], encode: Any = None, config: DecontaminationConfig | None = None) -> TrainingIndex:
    """The index of all that texts are compared with."""
    blocks = [training[i : i + BLOCK] for i in range(0, len(training), BLOCK)]
    return TrainingIndex(blocks, config or DecontaminationConfig(), encode)


def matched_pairs(index: TrainingIndex, benchmark: Sequence[str]) -> dict[str, Any]:
    """The pairs (training text, benchmark text) that match, [p, 2], by kind."""
    pairs: dict[str, list[Any]] = {}
    for start in range(0, len(benchmark), BLOCK):
        matches, _ = index.matches(benchmark[start : start + BLOCK])
        for kind, of_kind in matches.items():
            pairs.setdefault(kind, []).append(of_kind.pairs + np.asarray([0, start]))
    return {kind: np.concatenate(parts) for kind, parts in pairs.items()}


def false_alarms(
    training: Sequence[str], benchmark: Sequence[str], index: TrainingIndex | None = None
) -> dict[str, Any]:
    """The share of training texts that match a benchmark text although the two are disjoint, in all and by kind.

    ``index`` is that of the training texts, where it is at hand.
    """
    pairs = matched_pairs(index or index_of(training), benchmark)
    hit = {kind: set(of_kind[:, 0].tolist()) for kind, of_kind in pairs.items()}
    others = set().union(*(places for kind, places in hit.items() if kind != "contained"))
    of_benchmark = {place for of_kind in pairs.values() for place in of_kind[:, 1].tolist()}
    lengths: dict[int, int] = {}
    for first, second in pairs["contained"].tolist():
        shorter = min(len(words(training[first])), len(words(benchmark[second])))
        lengths[shorter] = lengths.get(shorter, 0) + 1
    return {
        **share(len(others | hit["contained"]), len(training)),
        "without_contained": share(len(others), len(training)),
        "by_kind": {kind: len(places) for kind, places in hit.items()},
        "of_benchmark": share(len(of_benchmark), len(benchmark)),
        "contained_by_words": dict(sorted(lengths.items())),
    }


HOLDS_GLOSSES = ("STS12", "STS13", "STS14")
"""Tasks whose OnWN pairs are glosses of WordNet."""
PARAPHRASES = (("MSRP-pairs", "labels", 1), ("STSBenchmark", "score", 4.5), ("STS16", "score", 4.5))
TRANSLATIONS = ("NusaXBitextMining", "Tatoeba")


def more_training_texts() -> list[str]:
    """The short and long descriptions of Debian's packages, and the docstrings of the installed packages; different ones."""
    from nearfield.methods import debian, docstrings

    texts = [text for row in debian.build_rows(50) for text in (row["short"], row["long"])]
    texts += [str(row["docstring"]) for row in docstrings.build_rows(docstrings.installed(None), 60)]
    return list(dict.fromkeys(texts))


def task_texts(folder: Path) -> dict[str, list[str]]:
    """The different texts of each local task in a folder."""
    from nearfield.evaluation.config import open_suite
    from nearfield.evaluation.texts import benchmark_tasks

    texts: dict[str, list[str]] = {}
    for task in benchmark_tasks(open_suite(folder)):
        texts.setdefault(task.name, []).extend(text.text for text in task.texts())
    return {name: list(dict.fromkeys(of_task)) for name, of_task in texts.items() if of_task}


def said_otherwise(folder: Path, training: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The share of sentences that are found where training holds only their paraphrase, or only their translation."""
    import pyarrow.parquet as pq

    pairs: dict[str, list[tuple[str, str]]] = {}
    for name, column, least in [*PARAPHRASES, *((name, None, 0) for name in TRANSLATIONS)]:
        kind = "translations" if column is None else "paraphrases"
        for path in sorted((folder / name).glob("*.parquet")):
            table = pq.read_table(path).to_pydict()
            values = [least] * len(table["sentence1"]) if column is None else table[column]
            rows = zip(table["sentence1"], table["sentence2"], values, strict=True)
            pairs.setdefault(f"{kind}: {name}", []).extend((a, b) for a, b, value in rows if value >= least)
    # One that is the same text but for case and punctuation is no paraphrase.
    differ = [(name, a, b) for name, both_sides in pairs.items() for a, b in both_sides if words(a) != words(b)]
    index = index_of([*training, *(b for _, _, b in differ)])
    seen = np.zeros(len(differ), dtype=np.bool_)
    for matches in matched_pairs(index, [a for _, a, _ in differ]).values():
        seen[matches[matches[:, 0] - len(training) == matches[:, 1], 1]] = True
    names = np.asarray([name for name, _, _ in differ])
    return {name: share(int(np.count_nonzero(seen[names == name])), int(np.sum(names == name))) for name in pairs}


def speed(count: int, seed: int = 0) -> dict[str, Any]:
    """CPU seconds to index ``count`` training texts and to compare as many benchmark texts: one to four glosses each."""
    pick = random.Random(seed)
    sides = [
        ["; ".join(pick.choices(glosses, k=pick.randint(1, 4))) for _ in range(count)] for glosses in disjoint_glosses()
    ]
    began = time.process_time()
    index = TrainingIndex([sides[0][i : i + 8192] for i in range(0, count, 8192)], DecontaminationConfig())
    indexed = time.process_time()
    matched: set[int] = set()
    for start in range(0, count, 8192):
        found, _ = index.matches(sides[1][start : start + 8192])
        matched |= {place for kind in found.values() for place in kind.pairs[:, 0].tolist()}
    return {
        "texts": count,
        "mean_words": [float(np.mean([len(text.split()) for text in side])) for side in sides],
        "index_cpu_seconds": indexed - began,
        "compare_cpu_seconds": time.process_time() - indexed,
        "training_texts_matched": len(matched),
        "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def speed_of_contained(training: int, benchmark: int, seed: int = 0) -> dict[str, Any]:
    """CPU seconds and memory of the kind ``contained`` alone; texts of one to four glosses, whose words are hashed before."""
    pick, known = random.Random(seed), WordHashes()
    sides = disjoint_glosses()

    def block(glosses: Sequence[str]) -> Ragged:
        return hash_words(["; ".join(pick.choices(glosses, k=pick.randint(1, 4))) for _ in range(BLOCK)], known)

    hashed = concatenate([block(sides[0]) for _ in range(training // BLOCK)])
    began = time.process_time()
    index = ContainmentIndex(hashed, DecontaminationConfig())
    indexed, compared = time.process_time() - began, 0.0
    for _ in range(benchmark // BLOCK):
        texts = block(sides[1])
        began = time.process_time()
        index.matches(texts)
        compared += time.process_time() - began
    return {
        "training_texts": training // BLOCK * BLOCK,
        "training_words": index.words,
        "benchmark_texts": benchmark // BLOCK * BLOCK,
        "index_cpu_seconds": round(indexed, 1),
        "compare_cpu_seconds": round(compared, 1),
        "peak_memory_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
    }


def libraries(count: int = 20_000) -> dict[str, float]:
    """CPU seconds of MinHash signatures (128 permutations) of the words of glosses, by library; those that are installed."""
    sets = [text.lower().split() for side in disjoint_glosses() for text in side][:count]
    times: dict[str, float] = {}
    with contextlib.suppress(ImportError):
        import rensa

        began = time.process_time()
        rensa.RMinHash.digest_matrix_from_token_sets(sets, 128, 0).to_rows()
        times["rensa"] = time.process_time() - began
    with contextlib.suppress(ImportError):
        import datasketch

        encoded = [[word.encode() for word in words] for words in sets]
        began = time.process_time()
        datasketch.MinHash.bulk(encoded, num_perm=128, seed=0)
        times["datasketch"] = time.process_time() - began
    return times


def _of_other_origin(wordnet: list[str], folder: Path | None, seed: int, result: dict[str, Any]) -> dict[str, Any]:
    """Plants among, and false alarms of, texts that nobody wrote in the style of the benchmark's."""
    more = more_training_texts()
    tasks = {} if folder is None else task_texts(folder)
    every = list(dict.fromkeys(text for texts in tasks.values() for text in texts))
    apart = list(dict.fromkeys(text for name, texts in tasks.items() if name not in HOLDS_GLOSSES for text in texts))
    holding = list(dict.fromkeys(text for name in HOLDS_GLOSSES for text in tasks.get(name, ())))
    index = index_of(more)
    alarms = {
        **result["false_alarms"],
        "debian and docstrings, wordnet": false_alarms(more, disjoint_glosses()[1], index),
    }
    plants = {**result["plants"]}
    made: dict[str, Any] = {
        "debian_and_docstrings": len(more),
        "task_texts": {name: len(texts) for name, texts in tasks.items()},
    }
    if folder is not None:
        alarms["debian and docstrings, tasks"] = false_alarms(more, every, index)
        plants["tasks among debian and docstrings"] = plants_by_length(more, every, seed)
        index = index_of(wordnet)
        alarms[f"wordnet, tasks but {', '.join(HOLDS_GLOSSES)}"] = false_alarms(wordnet, apart, index)
        made["glosses_in_tasks"] = false_alarms(wordnet, holding, index)
        made["said_otherwise"] = said_otherwise(folder, wordnet)
    return {**made, "plants": plants, "false_alarms": alarms}


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--embed", help="a model whose embeddings are compared, too, on a sample")
    parser.add_argument("--embed-sample", type=int, default=3000, help="texts a side for that")
    parser.add_argument("--cosine", type=float, default=0.95)
    parser.add_argument("--scale", type=int, default=100_000, help="texts a side of the timing; 0 leaves it out")
    parser.add_argument(
        "--scale-contained",
        type=int,
        nargs=2,
        metavar=("TRAINING", "BENCHMARK"),
        help="time the kind contained alone with so many texts a side",
    )
    parser.add_argument("--more", action="store_true", help="also train on Debian's descriptions and on docstrings")
    parser.add_argument("--tasks", type=Path, help="a folder of local tasks, benchmarks for --more")
    parser.add_argument("--libraries", action="store_true", help="time the MinHash libraries that are installed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    training, benchmark = disjoint_glosses()
    result: dict[str, Any] = {"training": len(training), "benchmark": len(benchmark), "seed": arguments.seed}
    print(f"{len(training):,} training glosses, {len(benchmark):,} benchmark glosses, seed {arguments.seed}")
    result["recall"] = {name: recall(benchmark, edit, arguments.seed) for name, edit in EDITS.items()}
    for name, found in result["recall"].items():
        print(
            f"plants found, {name}: {_words(found)} {found['by_kind']}; of 8 words and more {_words(found['of_8_words'])}"
        )
    result["plants"] = {"wordnet among wordnet": plants_by_length(training, benchmark, arguments.seed)}
    result["false_alarms"] = {"wordnet, wordnet": false_alarms(training, benchmark)}
    if arguments.more:
        result |= _of_other_origin(training, arguments.tasks, arguments.seed, result)
    for where, plants in result["plants"].items():
        for name, lengths in plants.items():
            for length, found in lengths.items():
                print(f"{where}, {name}, {length} words: {_words(found)}")
    for where, alarms in result["false_alarms"].items():
        print(f"{where}: training texts that match: {_words(alarms)} {alarms['by_kind']}")
        print(f"{where}: benchmark texts that match: {_words(alarms['of_benchmark'])}")
    for name, found in result.get("said_otherwise", {}).items():
        print(f"{name}: {_words(found)}")
    if arguments.scale:
        result["speed"] = speed(arguments.scale)
        print(f"speed: {json.dumps(result['speed'])}")
    if arguments.scale_contained:
        result["speed_of_contained"] = speed_of_contained(*arguments.scale_contained)
        print(f"speed of contained: {json.dumps(result['speed_of_contained'])}")
    if arguments.libraries:
        result["libraries"] = libraries()
        print(f"CPU seconds of 20,000 signatures: {json.dumps(result['libraries'])}")
    if arguments.embed:
        from nearfield.encoders.encode import text_encoder

        encode = text_encoder(arguments.embed)
        pick = random.Random(arguments.seed)
        sample = [pick.sample(side, min(arguments.embed_sample, len(side))) for side in (training, benchmark)]
        config = DecontaminationConfig(cosine=arguments.cosine)
        result["embedding"] = {
            "model": arguments.embed,
            "cosine": arguments.cosine,
            "recall": {n: recall(sample[1], edit, arguments.seed, encode, config) for n, edit in EDITS.items()},
            "false_alarms": false_alarms(sample[0], sample[1], index_of(sample[0], encode, config)),
        }
        for name, found in result["embedding"]["recall"].items():
            print(f"with embeddings, plants found, {name}: {_words(found)} {found['by_kind']}")
        alarms = result["embedding"]["false_alarms"]
        print(f"with embeddings, training texts that match: {_words(alarms)} {alarms['by_kind']}")
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


def _words(found: dict[str, Any]) -> str:
    low, high = found["interval"]
    return f"{found['share']:.4%} [{low:.4%}, {high:.4%}] ({found['hits']:,} of {found['n']:,})"


if __name__ == "__main__":
    main()
