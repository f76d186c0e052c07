"""How much planted benchmark text `nearfield data decontaminate` finds, how often it cries wolf, and how long it takes.

Real text: the glosses of WordNet that the package ships. The training side has the glosses of the training split, the
benchmark side those of the test split; no gloss and no sibling of one is in both. Plants are benchmark glosses put into
training as they are or lightly edited. Intervals are Wilson's, 95 %.

    python scripts/decontamination_figures.py [--embed sentence-transformers/all-MiniLM-L6-v2] [--scale 100000] [--libraries]
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
from typing import Any

import numpy as np

from nearfield.data.decontaminate import KINDS, DecontaminationConfig, TrainingIndex
from nearfield.methods.wordnet import glosses_by_split

Edit = Callable[[str, random.Random], str]


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
    return {**share(int(np.count_nonzero(seen)), len(planted)), "by_kind": kinds}


def false_alarms(
    training: Sequence[str], benchmark: Sequence[str], encode: Any = None, config: DecontaminationConfig | None = None
) -> dict[str, Any]:
    """The share of training texts that match a benchmark text although the two are disjoint, in all and by kind."""
    index = TrainingIndex([training], config or DecontaminationConfig(), encode)
    found, _ = index.matches(benchmark)
    hit = {kind: set(found[kind].pairs[:, 0].tolist()) for kind in KINDS if kind in found}
    either = set().union(*hit.values())
    of_benchmark = {place for kind in hit for place in found[kind].pairs[:, 1].tolist()}
    return {
        **share(len(either), len(training)),
        "by_kind": {kind: len(places) for kind, places in hit.items()},
        "of_benchmark": share(len(of_benchmark), len(benchmark)),
    }


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


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--embed", help="a model whose embeddings are compared, too, on a sample")
    parser.add_argument("--embed-sample", type=int, default=3000, help="texts a side for that")
    parser.add_argument("--cosine", type=float, default=0.95)
    parser.add_argument("--scale", type=int, default=100_000, help="texts a side of the timing; 0 leaves it out")
    parser.add_argument("--libraries", action="store_true", help="time the MinHash libraries that are installed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    training, benchmark = disjoint_glosses()
    result: dict[str, Any] = {"training": len(training), "benchmark": len(benchmark), "seed": arguments.seed}
    print(f"{len(training):,} training glosses, {len(benchmark):,} benchmark glosses, seed {arguments.seed}")
    result["recall"] = {name: recall(benchmark, edit, arguments.seed) for name, edit in EDITS.items()}
    long = [text for text in benchmark if len(text.split()) >= 8]
    result["recall_8_words"] = {name: recall(long, edit, arguments.seed) for name, edit in EDITS.items()}
    for title, key in (("plants found", "recall"), ("plants of 8 words and more found", "recall_8_words")):
        for name, found in result[key].items():
            print(f"{title}, {name}: {_words(found)} {found['by_kind']}")
    result["false_alarms"] = false_alarms(training, benchmark)
    print(f"training texts that match: {_words(result['false_alarms'])} {result['false_alarms']['by_kind']}")
    print(f"benchmark texts that match: {_words(result['false_alarms']['of_benchmark'])}")
    if arguments.scale:
        result["speed"] = speed(arguments.scale)
        print(f"speed: {json.dumps(result['speed'])}")
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
            "false_alarms": false_alarms(*sample, encode, config),
        }
        for name, found in result["embedding"]["recall"].items():
            print(f"with embeddings, plants found, {name}: {_words(found)} {found['by_kind']}")
        alarms = result["embedding"]["false_alarms"]
        print(f"with embeddings, training texts that match: {_words(alarms)} {alarms['by_kind']}")
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


def _words(found: dict[str, Any]) -> str:
    low, high = found["interval"]
    return f"{found['share']:.4%} [{low:.4%}, {high:.4%}] ({found['hits']:,} of {found['n']:,})"


if __name__ == "__main__":
    main()
