"""LIMIT (Weller et al., 2025): documents of which every pair must be found by some query, which few dimensions cannot do."""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import Field

from nearfield.evaluation.config import OpenStore, TaskName, TaskSettings
from nearfield.files import fingerprint
from nearfield.methods.wordnet import FOLDER, read_synsets
from nearfield.provenance import generator

if TYPE_CHECKING:
    from nearfield.evaluation.tasks import SuiteTask

LIKES = 45
"""Things that each person likes."""
_FIRST_NAMES = (
    "Ada Bela Cora Dario Edda Farid Greta Hugo Ines Jonas Kira Lars Mina Nils Olga Pavel Quinn Rosa Sven Tilda Umar Vera "
    "Wanda Xavi Yara Zeno Amir Britt Carlo Dunja Elif Fynn Gina Henk Ilse Jovan Kaya Lino Marta Noor"
)
_LAST_NAMES = (
    "Abbot Becker Castro Dahl Egger Fontana Garrick Holm Ibsen Jansen Keller Lindqvist Moreau Novak Okafor Petrov Quist "
    "Rossi Schmitt Tanaka Urban Vasquez Weber Xenakis Yilmaz Zeman Arnaud Bianchi Clarke Duarte Eriksen Fischer Gomez "
    "Hansen Ivanov Jovanovic Kowalski Larsen Marino Nielsen Olsen Pereira Ramirez Santos Thomsen Usman Virtanen Walsh "
    "Yamada Zhou"
)
_FIRST, _LAST = _FIRST_NAMES.split(), _LAST_NAMES.split()


class LimitTask(TaskSettings):
    """LIMIT, made here: every pair of some documents is asked for. Its limits are those of the number of dimensions."""

    kind: Literal["limit"] = "limit"
    name: TaskName = "LIMITGenerated"
    """The task's name in results; change it where a suite has several of the kind."""
    documents: Annotated[int, Field(ge=4, le=500)] = 46
    """Documents that are relevant to some query; 46 is the least whose pairs are at least 1,000."""
    queries: Annotated[int, Field(ge=2, le=5_000)] = 1_000
    """Queries, each for a pair of documents; there are at most as many as the pattern has pairs."""
    distractors: Annotated[int, Field(ge=0, le=50_000)] = 0
    """Documents that nobody asks for: 0 is the small set, 49,954 the full one."""
    pattern: Literal["dense", "random", "cycle", "disjoint"] = "dense"
    """The pairs that are asked for: the benchmark's, random ones, neighbours on a ring, pairs that share no document."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Picks the names and things that the documents are made of."""

    def build(self, where: str, open_store: OpenStore) -> list[SuiteTask]:
        """The task; its data are made when it runs."""
        return [limit_task(self)]


@dataclass(frozen=True)
class Limit:
    """Person -> text, query -> text, query -> its two persons."""

    corpus: dict[str, str]
    queries: dict[str, str]
    relevant: dict[str, tuple[str, str]]


def items() -> list[str]:
    """Nouns that no two of begin with the same five letters: none is part of another, and no stemmer joins two."""
    lemmas: dict[str, str] = {}
    for synset in read_synsets(FOLDER / "synsets.jsonl.xz"):
        for lemma in synset.lemmas:
            if re.fullmatch(r"[a-z]{5,12}", lemma):
                lemmas.setdefault(lemma[:5], lemma)
    names = {name.lower() for name in (*_FIRST, *_LAST)}
    return sorted(lemma for lemma in lemmas.values() if lemma not in names)


def pairs_of(pattern: str, documents: int, queries: int, rng: np.random.Generator) -> list[tuple[int, int]]:
    """The two documents that each query is after.

    ``dense``: the first combinations of all documents, the pattern of the benchmark; ``random``: random combinations;
    ``cycle``: neighbours on a ring; ``disjoint``: pairs that share no document.
    """
    if pattern == "dense":
        return list(itertools.islice(itertools.combinations(range(documents), 2), queries))
    if pattern == "random":
        every = list(itertools.combinations(range(documents), 2))
        return [every[i] for i in rng.choice(len(every), size=min(queries, len(every)), replace=False)]
    if pattern == "cycle":
        return [(i, (i + 1) % documents) for i in range(min(queries, documents))]
    return [(2 * i, 2 * i + 1) for i in range(min(queries, documents // 2))]


def make_limit(config: LimitTask) -> Limit:
    """The data: each query has a thing of its own, which its two persons like and nobody else does.

    Every person is given other things, which no query asks for, up to the same number.
    """
    rng = generator(config.seed, "limit")
    things = [str(thing) for thing in rng.permutation(items())]
    pairs = pairs_of(config.pattern, config.documents, config.queries, rng)
    asked, rest = things[: len(pairs)], things[len(pairs) : len(pairs) + 850]
    likes: list[list[str]] = [[] for _ in range(config.documents + config.distractors)]
    for thing, pair in zip(asked, pairs, strict=True):
        for person in pair:
            likes[person].append(thing)
    size = max(LIKES, max(map(len, likes)))
    for liked in likes:
        liked += [rest[i] for i in rng.choice(len(rest), size=size - len(liked), replace=False)]
        rng.shuffle(liked)
    initials = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    chosen = rng.choice(len(_FIRST) * len(initials) * len(_LAST), size=len(likes), replace=False)
    people = []
    for number in chosen.tolist():
        first, number = number % len(_FIRST), number // len(_FIRST)
        people.append(f"{_FIRST[first]} {initials[number % 26]}. {_LAST[number // 26]}")
    corpus = {
        person: f"{person} likes {', '.join(liked[:-1])} and {liked[-1]}."
        for person, liked in zip(people, likes, strict=True)
    }
    queries = {f"q{i}": f"Who likes {thing}?" for i, thing in enumerate(asked)}
    return Limit(corpus, queries, {f"q{i}": (people[a], people[b]) for i, (a, b) in enumerate(pairs)})


def graph_density(relevant: dict[str, tuple[str, str]]) -> float:
    """2 |E| / (|V| (|V| - 1)) of the graph whose nodes are queries, joined where they share a document."""
    sets = [set(documents) for documents in relevant.values()]
    edges = sum(bool(a & b) for a, b in itertools.combinations(sets, 2))
    return 2 * edges / (len(sets) * (len(sets) - 1))


def query_strength(relevant: dict[str, tuple[str, str]]) -> float:
    """The mean over queries of the sum of the Jaccard indices with all other queries."""
    sets = [set(documents) for documents in relevant.values()]
    total = sum(len(a & b) / len(a | b) for a, b in itertools.combinations(sets, 2))
    return 2 * total / len(sets)


def limit_task(config: LimitTask) -> SuiteTask:
    """The task; its main score is mteb's for LIMIT, recall at 2."""
    import mteb

    from nearfield.evaluation.tasks import SuiteTask, describe_task, items_table, make_task, retrieval_split

    official = mteb.get_task("LIMITSmallRetrieval")
    result = SuiteTask(None, details={"pattern": config.pattern, "documents": config.documents})

    def table(texts: dict[str, str]) -> Any:
        return items_table(list(texts), "t", lambda: list(texts.values()), list)

    def load() -> dict[str, Any]:
        data = make_limit(config)
        result.details |= {"queries": len(data.queries), "corpus": len(data.corpus)}
        relevant = {query: dict.fromkeys(pair, 1) for query, pair in data.relevant.items()}
        return {"default": {"test": retrieval_split(table(data.queries), table(data.corpus), relevant)}}

    about, content = "LIMIT: every pair of a few documents is asked for", fingerprint(config.model_dump(mode="json"))
    metadata = describe_task(config.name, "Retrieval", about, content, main_score=official.metadata.main_score)
    result.task = make_task(type(official), metadata, load)
    return result
