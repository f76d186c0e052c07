"""Random batches and random settings, for tests that compare implementations."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st

from nearfield.objectives import ContrastiveBatch, InfoNCEConfig
from nearfield.objectives.batch import Queued

DIM = 12
SOURCES = {0: "a", 1: "b", 3: "c"}
QUEUED = 7


def random_batch(
    seed: int,
    queries: int,
    *,
    dim: int = DIM,
    positives: int = 2,
    negatives: int = 2,
    repeats: bool = True,
    rows: tuple[int, int] | None = None,
    dtype: torch.dtype = torch.float64,
) -> ContrastiveBatch:
    """A batch with all that a setting may ask for; with ``repeats`` some texts, vectors and labels occur twice."""
    random = np.random.default_rng(seed)
    owner, is_positive = [], []
    for row in range(queries):
        p, n = int(random.integers(1, positives + 1)), int(random.integers(0, negatives + 1))
        owner += [row] * (p + n)
        is_positive += [True] * p + [False] * n
    if random.random() < 0.5:  # documents in any order
        order = random.permutation(len(owner))
        owner, is_positive = [owner[i] for i in order], [is_positive[i] for i in order]
    count = len(owner)
    items = max(2, count // 2) if repeats else 10**9
    ids = random.integers(0, items, count)
    known = [[int(ids[c]) for c in range(count) if owner[c] == r and is_positive[c]] for r in range(queries)]
    if repeats:
        known = [[*row, int(random.integers(0, items))] for row in known]
    width = max(map(len, known))
    by_item = random.standard_normal((items, dim)) if repeats else None
    documents = by_item[ids] if by_item is not None else random.standard_normal((count, dim))
    q = random.standard_normal((queries, dim))
    for column in range(count):  # queries lie near their positives, as they do in training
        if is_positive[column]:
            q[owner[column]] += 0.5 * documents[column]
    guide = random.standard_normal((queries, 5)), random.standard_normal((count, 5))
    earlier = random.integers(0, items, QUEUED)
    stale = random.standard_normal((QUEUED, dim)) if by_item is None else by_item[earlier]
    stale = stale + 0.1 * random.standard_normal((QUEUED, dim))

    def floats(values: np.ndarray[Any, Any]) -> torch.Tensor:
        return torch.from_numpy(np.asarray(values, dtype=np.float64)).to(dtype)

    return ContrastiveBatch(
        queries=floats(q).requires_grad_(),
        documents=floats(documents).requires_grad_(),
        owner=torch.tensor(owner),
        is_positive=torch.tensor(is_positive),
        document_ids=torch.from_numpy(ids.astype(np.int64)),
        known_positives=torch.tensor([row + [-1] * (width - len(row)) for row in known]),
        rows=None if rows is None else torch.arange(*rows),
        query_ids=torch.from_numpy(random.integers(0, max(2, queries // 2), queries)),
        labels=torch.from_numpy(random.integers(-1, 3, queries)),
        weights=torch.from_numpy(random.uniform(0.1, 2.0, queries)) if random.random() < 0.5 else None,
        sources=torch.from_numpy(random.choice([0, 1, 3], queries)),
        guide_queries=floats(guide[0]),
        guide_documents=floats(guide[1]),
        queue=Queued(
            vectors=floats(stale),
            ids=torch.from_numpy(earlier.astype(np.int64)),
            labels=torch.from_numpy(random.integers(-1, 3, QUEUED)),
            sources=torch.from_numpy(random.choice([0, 1, 3], QUEUED)),
            guide=floats(random.standard_normal((QUEUED, 5))),
        ),
        draw=seed,
    )


def score_masks(least: float, most: float) -> st.SearchStrategy[dict[str, Any] | None]:
    rules = st.sampled_from(["absolute", "relative", "cut"])
    return st.none() | st.fixed_dictionaries({"rule": rules, "margin": st.floats(least, most)})


@st.composite
def configs(draw: st.DrawFn) -> InfoNCEConfig:
    """Any settings that fit together."""
    directions = draw(
        st.lists(st.sampled_from(["query_query", "document_query", "document_document"]), unique=True, max_size=3)
    )
    joint = draw(st.booleans()) or bool(set(directions) - {"document_query"})
    settings: dict[str, Any] = {
        "temperature": draw(st.sampled_from([0.05, 0.1, 0.5, 1.0])),
        "learn_temperature": draw(st.booleans()),
        "similarity": draw(st.sampled_from(["cosine", "cosine", "dot"])),
        "in_batch_negatives": draw(st.sampled_from([True, True, True, False])),
        "shared_negatives": draw(st.booleans()),
        "several_positives": draw(st.sampled_from(["mean_log", "log_sum"])),
        "softmax": "joint" if joint else "per_direction",
        "mask_known_positives": draw(st.booleans()),
        "mask_same_label": draw(st.booleans()),
        "score_mask": draw(score_masks(-0.3, 0.3)),
        "guide_mask": draw(score_masks(-0.3, 0.3)),
        "focal": draw(
            st.none() | st.fixed_dictionaries({"gamma": st.sampled_from([0.0, 0.5, 1.0, 2.0]), "detach": st.booleans()})
        ),
        "label_smoothing": draw(st.sampled_from([0.0, 0.0, 0.1])),
        "source_weights": draw(st.sampled_from([{}, {"a": 0.5}, {"b": 0.0, "c": 3.0}])),
        "matryoshka": draw(
            st.none()
            | st.sampled_from(
                [
                    {"dimensions": [4, DIM]},
                    {"dimensions": [DIM, 8, 3], "weights": [1.0, 0.3, 0.2]},
                    {"dimensions": [6, 6]},
                    {"dimensions": [5]},
                ]
            )
        ),
        "spread": draw(st.none() | st.just({"mean": 1.0, "second_moment": 0.5})),
    }
    with_documents = draw(st.sampled_from([True, True, True, False])) or set(directions) <= {"query_query"}
    if with_documents:
        directions = ["query_document", *directions]
        settings["hardness"] = draw(
            st.none()
            | st.fixed_dictionaries(
                {
                    "alpha": st.sampled_from([0.0, 0.5, 5.0]),
                    "on": st.sampled_from(["in_batch", "explicit", "all"]),
                    "detach": st.booleans(),
                }
            )
        )
        settings["queue"] = draw(st.sampled_from([0, 5])) if settings["in_batch_negatives"] else 0
        settings["mixing"] = draw(
            st.none()
            | st.fixed_dictionaries({"pairs": st.integers(1, 2), "lists": st.booleans()})
            | st.just({"pairs": 0, "lists": True})
        )
    settings["directions"] = directions
    if settings["learn_temperature"]:
        settings["tasks"] = draw(st.sampled_from([{}, {"a": "one", "c": "two"}]))
    return InfoNCEConfig.model_validate(settings)
