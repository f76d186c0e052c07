"""Sets of in-context examples, and the texts that prompts are made of with them.

The pitfalls that LG-ANNA names are met so: examples come from the split that is trained on, a row never sees its own query
or positives in them, some rows get none, and documents get none.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from nearfield.arrays import Ragged, Rows
from nearfield.data.config import InContextConfig
from nearfield.data.store import Store
from nearfield.errors import BadInputError
from nearfield.provenance import generator


@dataclass(frozen=True)
class ExampleSet:
    """Examples in words, and the items that they are made of."""

    text: str
    """The text that goes before the prompt."""
    items: tuple[int, ...]
    """Rows of the store's items: the queries and documents of the examples."""


def draw_example_sets(store: Store, source: str, split: str, config: InContextConfig, seed: int) -> list[ExampleSet]:
    """The sets of a source: a function of the store, the settings and the seed.

    An example shows the query and the first positive, of labelled examples the item and its label. Raises BadInputError
    where the split has too few examples that a row could be left without its own.
    """
    rows = store.select(source, split)
    if len(rows) < 2:
        raise BadInputError(
            f"the source {source!r} has {len(rows)} examples in the split {split!r}; examples before a query need two",
            hint="Leave it out of prompts.in_context.sources.",
        )
    if store.has_images and _with_images(store, rows):
        raise BadInputError(
            f"the source {source!r} has images, and examples before a query are texts",
            hint="Leave it out of prompts.in_context.sources.",
        )
    random = generator(seed, "in-context", source)
    sets = []
    for _ in range(config.draws):
        count = min(int(random.integers(1, config.most + 1)), len(rows) - 1)
        examples = store.examples.take(random.choice(rows, count, replace=False)).to_pylist()
        parts, items = [config.head], []
        for example in examples:
            firsts = example["positives"][:1]
            query, *documents = (_cut(text, config.max_words) for text in store.texts([example["query"], *firsts]))
            document = documents[0] if documents else _cut(example["label"] or "", config.max_words)
            parts.append(fill(config.example, query, document))
            items += [example["query"], *firsts]
        sets.append(ExampleSet("".join(parts), tuple(items)))
    return sets


def _with_images(store: Store, examples: Rows) -> bool:
    part = store.examples.take(examples)
    items = [part["query"].to_numpy(), part["positives"].combine_chunks().flatten().to_numpy(zero_copy_only=False)]
    return bool((store.image_rows(np.concatenate(items)) >= 0).any())


def fill(template: str, query: str, document: str) -> str:
    """The template with its two fields; braces in the texts are braces."""
    values = {"{query}": query, "{document}": document}
    return re.sub(r"\{query\}|\{document\}", lambda match: values[match.group()], template)


def _cut(text: str, most: int) -> str:
    """White space as single spaces, and at most so many words."""
    return " ".join(text.split()[:most])


def forbidden_queries(examples: ExampleSet, known: Ragged) -> Rows:
    """The query items that must not get this set: those in it, and those with a positive in it; sorted."""
    items = np.unique(np.asarray(examples.items, dtype=np.int64))
    return np.unique(np.concatenate([items, known.owners()[np.isin(known.values, items)]]))


def check_room(prompts: Sequence[str], length: Callable[[str], int], limit: int, room: int, source: str) -> None:
    """Refuse prompts with examples that would push the query out of the encoder's maximum length.

    ``length`` counts the tokens of a prompt, special tokens before it included.
    """
    longest = max((length(prompt) for prompt in prompts), default=0)
    if longest + room > limit:
        raise BadInputError(
            f"the examples before queries of {source!r} take up to {longest} tokens; with {room} for the query that is more "
            f"than the encoder's {limit}",
            where="prompts.in_context",
            hint="Lower prompts.in_context.most or max_words, or raise training.max_length.",
        )
