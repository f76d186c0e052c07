"""Ten linguistic probes (Conneau et al., 2018) on sentences of a small grammar, so that every label is known.

A linear classifier on frozen vectors. The sentences are generated, and few: scores are not comparable with those that
SentEval publishes on books.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import Field

from nearfield.evaluation.config import OpenStore, TaskSettings
from nearfield.files import fingerprint
from nearfield.provenance import generator

if TYPE_CHECKING:
    from nearfield.evaluation.tasks import SuiteTask

Probe = Literal[
    "Length", "WordContent", "Depth", "TopConstituents", "BigramShift", "Tense", "SubjNumber", "ObjNumber", "OddManOut",
    "CoordinationInversion",
]  # fmt: skip


class ProbingTasks(TaskSettings):
    """SentEval's ten probes on sentences that are made here: what a linear classifier reads off a frozen vector."""

    kind: Literal["probing"] = "probing"
    only: list[Probe] | None = None
    """Some of the probes; null takes all ten."""
    sentences: Annotated[int, Field(ge=60, le=20_000)] = 1_200
    """For training, and as many for testing, in equal classes."""
    samples: Annotated[int, Field(ge=2)] = 100
    """Training sentences a class in each of mteb's ten draws."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Picks the sentences that the grammar makes."""

    def build(self, where: str, open_store: OpenStore) -> list[SuiteTask]:
        """A task for each probe; sentences are made when it runs."""
        return probing_tasks(self)


EATERS = ("child", "farmer", "doctor", "soldier", "teacher", "singer", "neighbor", "sailor", "king", "student")
FOODS = ("apple", "cake", "pear", "egg", "potato", "carrot", "biscuit", "plum", "pie", "melon")
TOOLS = ("hammer", "ladder", "engine", "pencil", "button", "candle", "bucket", "mirror", "lamp", "basket")
PLACES = ("garden", "castle", "harbor", "kitchen", "forest", "station", "market", "island", "tower", "barn")
ADJECTIVES = ("old", "green", "quiet", "heavy", "young", "tall", "bright", "small", "cold", "proud", "brown", "round")
ADVERBS = ("yesterday", "quietly", "slowly", "often", "suddenly", "gladly", "today", "twice")
EAT = ("taste", "bake", "serve", "boil", "chew", "peel")
HANDLE = ("repair", "carry", "clean", "lift", "paint", "move")
PREPOSITIONS = ("near", "behind", "beside", "under", "from", "with")
EVENTS = (
    ("opened the door", "entered the room"), ("bought the seeds", "planted the field"), ("lit the fire", "boiled the water"),
    ("packed the bags", "left the house"), ("found the key", "unlocked the box"), ("wrote the letter", "posted it at once"),
    ("climbed the ladder", "reached the roof"), ("learned the song", "sang it for the crowd"), ("fell ill", "called the doctor"),
    ("caught the fish", "fried it for supper"), ("cut the wood", "built a small boat"), ("heard the alarm", "ran into the street"),
    ("lost the map", "asked a stranger"), ("woke up early", "made the breakfast"), ("sold the farm", "moved to the city"),
    ("picked the grapes", "pressed the wine"), ("broke the vase", "swept the floor"), ("met the captain", "joined the crew"),
    ("dug a deep hole", "buried the chest"), ("saw the storm", "tied down the boat"),
)  # fmt: skip
LENGTHS = ((5, 8), (9, 12), (13, 16), (17, 20), (21, 25), (26, 28))
OPENINGS = ("statement", "place first", "adverb first", "two clauses", "question")


@dataclass(frozen=True)
class Noun:
    """A noun phrase: its noun, its number, adjectives, and phrases behind it, each inside the one before or all side by side."""

    noun: str
    plural: bool = False
    adjectives: tuple[str, ...] = ()
    behind: tuple[str, ...] = ()

    @property
    def words(self) -> list[str]:
        """In order."""
        return ["the", *self.adjectives, plural_of(self.noun) if self.plural else self.noun, *self.behind]


@dataclass(frozen=True)
class Clause:
    """Subject, verb, object."""

    subject: Noun
    verb: str
    past: bool
    object: Noun

    @property
    def words(self) -> list[str]:
        """In order."""
        verb = past_of(self.verb) if self.past else self.verb if self.subject.plural else third_of(self.verb)
        return [*self.subject.words, verb, *self.object.words]


def plural_of(noun: str) -> str:
    """The plural of a noun of this grammar."""
    if noun == "child":
        return "children"
    return noun + ("es" if noun.endswith(("o", "s", "x", "ch", "sh")) else "s")


def past_of(verb: str) -> str:
    """The past of a regular verb."""
    return verb + ("d" if verb.endswith("e") else "ed") if not verb.endswith("y") else verb[:-1] + "ied"


def third_of(verb: str) -> str:
    """The third person singular."""
    return verb[:-1] + "ies" if verb.endswith("y") else verb + "s"


class Maker:
    """Draws clauses; ``part`` is 0 for training and 1 for testing, which do not share the words that carry a label."""

    def __init__(self, rng: np.random.Generator, part: int) -> None:
        self.rng, self.part = rng, part

    def one(self, words: tuple[Any, ...]) -> Any:
        """One of some."""
        return words[int(self.rng.integers(len(words)))]

    def half(self, words: tuple[str, ...]) -> tuple[str, ...]:
        """The words of this part: every other one."""
        return words[self.part :: 2]

    def clause(self, *, split: str = "") -> Clause:
        """A sensible clause; ``split`` names what this part has words of its own of: verb, subject or object."""
        eating = bool(self.rng.integers(2))
        verbs: tuple[str, ...] = EAT if eating else HANDLE
        things: tuple[str, ...] = FOODS if eating else TOOLS
        verbs = self.half(verbs) if split == "verb" else verbs
        eaters: tuple[str, ...] = self.half(EATERS) if split == "subject" else EATERS
        things = self.half(things) if split == "object" else things
        subject, thing = (
            Noun(self.one(words), bool(self.rng.integers(2)), (self.one(ADJECTIVES),) if self.rng.integers(2) else ())
            for words in (eaters, things)
        )
        return Clause(subject, self.one(verbs), bool(self.rng.integers(2)), thing)

    def place(self) -> list[str]:
        """A phrase of three words."""
        return [self.one(PREPOSITIONS), "the", self.one(PLACES)]

    def filled(self, clause: Clause, length: int) -> list[str]:
        """The clause with places and adjectives behind it, until it has so many words."""
        words = clause.words
        while length - len(words) >= 4:
            words += [*self.place()[:2], self.one(ADJECTIVES), self.one(PLACES)]
        while len(words) < length:
            words.append(self.one(ADVERBS))
        return words


Made = tuple[list[str], int]


def _length(maker: Maker, label: int) -> Made:
    low, high = LENGTHS[label]
    wanted = int(maker.rng.integers(low, high + 1))
    plain = Clause(Noun(maker.one(EATERS)), maker.one(EAT), bool(maker.rng.integers(2)), Noun(maker.one(FOODS)))
    return maker.filled(plain, wanted), label


def _content(maker: Maker, label: int) -> Made:
    clause = maker.clause()
    return maker.filled(replace(clause, subject=replace(clause.subject, noun=EATERS[label])), 11), label


def _depth(maker: Maker, label: int) -> Made:
    """The same number of phrases, in each other or side by side: ``of`` goes down, ``and`` does not."""
    clause, links = maker.clause(), ["of"] * (label + 1) + ["and"] * (4 - label)
    chain = [word for link in maker.rng.permutation(links).tolist() for word in (link, "the", maker.one(PLACES))]
    return replace(clause, object=replace(clause.object, behind=tuple(chain))).words, label


def _top(maker: Maker, label: int) -> Made:
    clause, kind = maker.clause(), OPENINGS[label]
    if kind == "place first":
        return [*maker.place(), ",", *clause.words], label
    if kind == "adverb first":
        return [maker.one(ADVERBS), ",", *clause.words], label
    if kind == "two clauses":
        return [*clause.words, "and", *maker.clause().words], label
    if kind == "question":
        auxiliary = "did" if clause.past else "do" if clause.subject.plural else "does"
        return [auxiliary, *clause.subject.words, clause.verb, *clause.object.words, "?"], label
    return clause.words + maker.place(), label


def _shift(maker: Maker, label: int) -> Made:
    words = maker.filled(maker.clause(), int(maker.rng.integers(8, 14)))
    if label:
        places = [i for i in range(len(words) - 1) if words[i] != words[i + 1]]
        at = places[int(maker.rng.integers(len(places)))]
        words[at], words[at + 1] = words[at + 1], words[at]
    return words, label


def _tense(maker: Maker, label: int) -> Made:
    return maker.filled(replace(maker.clause(split="verb"), past=bool(label)), int(maker.rng.integers(8, 14))), label


def _subject(maker: Maker, label: int) -> Made:
    """In the past, where the verb does not tell."""
    clause = replace(maker.clause(split="subject"), past=True)
    clause = replace(clause, subject=replace(clause.subject, plural=bool(label)))
    return maker.filled(clause, int(maker.rng.integers(8, 14))), label


def _object(maker: Maker, label: int) -> Made:
    clause = maker.clause(split="object")
    clause = replace(clause, object=replace(clause.object, plural=bool(label)))
    return maker.filled(clause, int(maker.rng.integers(8, 14))), label


def _odd(maker: Maker, label: int) -> Made:
    clause = maker.clause(split="object")
    if label:
        other = TOOLS if clause.object.noun in FOODS else FOODS
        clause = replace(clause, object=replace(clause.object, noun=maker.one(maker.half(other))))
    return maker.filled(clause, int(maker.rng.integers(8, 14))), label


def _inversion(maker: Maker, label: int) -> Made:
    first, second = maker.one(EVENTS[maker.part :: 2])
    if label:
        first, second = second, first
    who = ["the", maker.one(ADJECTIVES), maker.one(EATERS)]
    return [*who, *first.split(), "and", *second.split(), *maker.place()], label


PROBES: dict[str, tuple[int, Callable[[Maker, int], Made]]] = {
    "Length": (len(LENGTHS), _length),
    "WordContent": (len(EATERS), _content),
    "Depth": (5, _depth),
    "TopConstituents": (len(OPENINGS), _top),
    "BigramShift": (2, _shift),
    "Tense": (2, _tense),
    "SubjNumber": (2, _subject),
    "ObjNumber": (2, _object),
    "OddManOut": (2, _odd),
    "CoordinationInversion": (2, _inversion),
}
"""Probe -> its classes and how a sentence of a class is made."""


def make_probe(probe: str, count: int, part: int, seed: int = 0) -> tuple[list[str], list[int]]:
    """Distinct sentences and labels, as many of each class as of another; ``part`` 0 is for training, 1 for testing."""
    classes, make = PROBES[probe]
    maker = Maker(generator(seed, "probing", probe, str(part)), part)
    other = set(make_probe(probe, count, 0, seed)[0]) if part else set()
    label_of: dict[str, int] = {}
    for label in range(classes):
        wanted, tries = len(label_of) + count // classes, 0
        while len(label_of) < wanted and tries < 200 * count:
            words, of = make(maker, label)
            text = " ".join(words).replace(" ,", ",").replace(" ?", "")
            if text not in other:
                label_of.setdefault(text, of)
            tries += 1
    order = maker.rng.permutation(len(label_of))
    texts, labels = list(label_of), list(label_of.values())
    return [texts[i] for i in order], [labels[i] for i in order]


def probing_tasks(config: ProbingTasks) -> list[SuiteTask]:
    """A classification task for each probe, by mteb's protocol: a logistic regression on each of ten draws of the training
    sentences, ``samples`` a class."""
    from nearfield.evaluation.tasks import TYPES, SuiteTask, describe_task, make_task

    tasks = []
    for probe in config.only or PROBES:
        classes = PROBES[probe][0]
        result = SuiteTask(None, details={"classes": classes, "chance": 1 / classes})

        def load(probe: str = probe) -> dict[str, Any]:
            import datasets

            parts = {}
            for part, split in enumerate(("train", "test")):
                texts, labels = make_probe(probe, config.sentences, part, config.seed)
                parts[split] = datasets.Dataset.from_dict({"text": texts, "label": labels})
            return {"default": datasets.DatasetDict(parts)}

        content = fingerprint([probe, config.model_dump(mode="json", exclude={"only"})])
        about = f"{probe}, a linguistic probe on made sentences"
        metadata = describe_task(f"Probe{probe}", "Classification", about, content)
        attributes = {"samples_per_label": config.samples, "train_split": "train"}
        result.task = make_task(TYPES["Classification"].base, metadata, load, attributes)
        tasks.append(result)
    return tasks
