"""Rows of a plan -> the distinct texts of a global batch -> length-sorted chunks of nearly equal cost, dealt to ranks; and the
texts' embeddings as the objective sees them.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from nearfield.arrays import Floats, Mask, Ragged, Rows, Tokens
from nearfield.batching.plan import SEVERAL_SOURCES, Batch
from nearfield.batching.planner import VectorsOf
from nearfield.data.tokens import TokenCache
from nearfield.encoders.packing import TokenTask
from nearfield.objectives.batch import ContrastiveBatch, Queued
from nearfield.objectives.config import Reading

if TYPE_CHECKING:
    from PIL.Image import Image

    from nearfield.training.launch import Launch


@dataclass(frozen=True)
class TextPool:
    """The distinct (item, prompt) pairs of a batch: each is encoded once, however many roles it plays, but for second views."""

    items: Rows
    """(n,) item rows."""
    prompts: Rows
    """(n,) prompt numbers."""
    queries: Rows
    """(Q,) where in the pool each query is."""
    documents: Rows
    """(D,) where in the pool each document is."""
    owner: Rows
    """(D,) the query that brought each document."""
    is_positive: npt.NDArray[np.bool_]
    """(D,) whether the document is a positive of its owner, rather than an explicit negative."""
    labels: Rows | None = None
    """(Q,) label of each example, -1 for none; none where the plan has none."""
    source: int | None = None
    """The source of all examples; none where they have several."""
    sources: Rows | None = None
    """(Q,) the source of each example, where they have several."""
    weights: npt.NDArray[np.float64] | None = None
    """(Q,) what each example counts; none where all count alike."""
    scores: npt.NDArray[np.float64] | None = None
    """(Q,) of graded pairs; not a number where an example has none."""
    teacher_scores: npt.NDArray[np.float64] | None = None
    """(D,) a teacher's score of each document for its owner; not a number where there is none."""
    token_columns: int = 0
    """How many numbers behind each embedding are losses of tokens."""
    query_tokens: Rows | None = None
    """(Q, T) the tokens of each query's whole text, padded with -1, where the objective asks for them."""
    deleted: npt.NDArray[np.float64] | None = None
    """(n,) the share of each text's tokens that are left out when it is encoded; none where all are read whole."""


def pool_batch(batch: Batch, readings: Sequence[Reading] | None = None) -> TextPool:
    """The pool of a planned batch; ``readings`` are those of its examples, plain ones where there are none.

    Documents are in the order of their owners, positives before negatives; those of an example with views are its last view.
    """
    size = len(batch.query)
    ways = [Reading()] * size if readings is None else readings
    documents = [
        batch.query[row : row + 1] if way.views else np.concatenate([positives, negatives])
        for row, (way, positives, negatives) in enumerate(zip(ways, batch.positives, batch.negatives, strict=True))
    ]
    counts = [len(part) for part in documents]
    owner = np.repeat(np.arange(size), counts)
    is_positive = np.concatenate([np.arange(n) < len(p) for n, p in zip(counts, batch.positives, strict=True)])
    views = np.asarray([way.views or 0 for way in ways])
    is_positive |= views[owner] > 0
    # A text is encoded apart for each view, and for each share of its tokens that is deleted.
    shares, share = np.unique([way.deleted for way in ways], return_inverse=True)
    key = np.stack(
        [
            np.concatenate([np.zeros(size, dtype=np.int64), np.maximum(views - 1, 0)[owner]]),
            np.concatenate([share, share[owner]]),
            np.concatenate([batch.query, *documents]),
            np.concatenate([batch.query_prompt, np.where(views > 0, batch.query_prompt, batch.document_prompt)[owner]]),
        ]
    )
    pairs, where = np.unique(key, axis=1, return_inverse=True)
    where = where.reshape(-1)
    return TextPool(
        pairs[2],
        pairs[3],
        where[:size],
        where[size:],
        owner,
        is_positive,
        batch.label,
        None if batch.source == SEVERAL_SOURCES else batch.source,
        batch.sources,
        scores=batch.score,
        deleted=shares[pairs[1]] if shares.any() else None,
    )


def part_of(pool: TextPool, rows: Rows) -> tuple[TextPool, Rows]:
    """Some queries of a pool with their documents as a pool of their own, and which texts of the pool that has."""
    mine = np.isin(pool.owner, rows)
    queries, documents = pool.queries[rows], pool.documents[mine]
    wanted, where = np.unique(np.concatenate([queries, documents]), return_inverse=True)
    part = TextPool(
        pool.items[wanted],
        pool.prompts[wanted],
        where[: len(rows)],
        where[len(rows) :],
        np.searchsorted(rows, pool.owner[mine]),
        pool.is_positive[mine],
        None if pool.labels is None else pool.labels[rows],
        pool.source,
        None if pool.sources is None else pool.sources[rows],
        None if pool.weights is None else pool.weights[rows],
    )
    return part, wanted


def contrastive_batch(
    pool: TextPool,
    embeddings: Tensor,
    known_positives: Sequence[Rows],
    rows: Rows | None = None,
    draw: int | None = None,
    guide: VectorsOf | None = None,
    queue: Queued | None = None,
    device: torch.device | None = None,
) -> ContrastiveBatch:
    """The objective's view of a pool's (n, d) embeddings; ``known_positives`` are item rows, one array a query.

    ``draw`` is the seed of what the objective draws, ``guide`` gives a guide's vectors of items, ``queue`` is what was seen
    before. ``device`` is where all but the embeddings are; by default where these are.
    """
    place, device = embeddings.device, device or embeddings.device
    token_losses = None
    if pool.token_columns:
        width = embeddings.shape[1] - pool.token_columns
        token_losses = embeddings[torch.from_numpy(pool.queries).to(place), width:]
        embeddings = embeddings[:, :width]

    def guided(role: str, places: Rows) -> Tensor | None:
        # A copy: torch takes no memory that is mapped for reading only.
        return None if guide is None else torch.from_numpy(np.array(guide(role, pool.items[places]))).to(device)

    sources = pool.sources
    if sources is None and pool.source is not None:
        sources = np.full(len(pool.queries), pool.source, dtype=np.int64)
    most = max((len(known) for known in known_positives), default=0)
    known = np.full((len(known_positives), max(1, most)), -1, dtype=np.int64)
    for line, items in enumerate(known_positives):
        known[line, : len(items)] = items
    return ContrastiveBatch(
        queries=embeddings[torch.from_numpy(pool.queries).to(place)],
        documents=embeddings[torch.from_numpy(pool.documents).to(place)],
        owner=torch.from_numpy(pool.owner).to(device),
        is_positive=torch.from_numpy(pool.is_positive).to(device),
        document_ids=torch.from_numpy(pool.items[pool.documents]).to(device),
        known_positives=torch.from_numpy(known).to(device),
        rows=None if rows is None else torch.from_numpy(rows).to(device),
        query_ids=torch.from_numpy(pool.items[pool.queries]).to(device),
        labels=None if pool.labels is None else torch.from_numpy(pool.labels).to(device),
        weights=None if pool.weights is None else torch.from_numpy(pool.weights).to(device),
        sources=None if sources is None else torch.from_numpy(sources).to(device),
        guide_queries=guided("query", pool.queries),
        guide_documents=guided("document", pool.documents),
        queue=queue,
        scores=None if pool.scores is None else torch.from_numpy(pool.scores).to(device),
        teacher_scores=None if pool.teacher_scores is None else torch.from_numpy(pool.teacher_scores).to(device),
        token_losses=token_losses,
        query_tokens=None if pool.query_tokens is None else torch.from_numpy(pool.query_tokens).to(device),
        draw=draw,
    )


def split_batch(batch: Batch, parts: int) -> list[Batch]:
    """Cut a batch into ``parts`` smaller ones (fewer where it has fewer examples) of nearly equal size, in its order."""
    size = len(batch.query)
    parts = min(parts, size)
    if parts == 1:
        return [batch]
    edges = [size * part // parts for part in range(parts + 1)]
    return [cut_batch(batch, start, stop) for start, stop in itertools.pairwise(edges)]


def cut_batch(batch: Batch, start: int, stop: int) -> Batch:
    """The examples ``start`` to ``stop`` of a batch."""
    return Batch(
        example=batch.example[start:stop],
        query=batch.query[start:stop],
        positives=batch.positives[start:stop],
        negatives=batch.negatives[start:stop],
        query_prompt=batch.query_prompt[start:stop],
        document_prompt=batch.document_prompt[start:stop],
        source=batch.source,
        sources=None if batch.sources is None else batch.sources[start:stop],
        score=None if batch.score is None else batch.score[start:stop],
        label=None if batch.label is None else batch.label[start:stop],
    )


CUT_RULE = 1
"""The rule of :func:`cut_chunks`: a run that was cut by another one cannot keep its dropout masks."""

BUSY = 0.95
"""The busy share that a cut is to reach: the mean cost of a rank over that of the rank with the most."""

_TRIES = 16


@dataclass(frozen=True)
class Cut:
    """How the batches of a run are cut: dropout is drawn chunk by chunk, hence this is state."""

    tokens: int
    """The most that a chunk takes, where it has more than one text."""
    ranks: int = 1
    """The ranks that the run began with, of which the number of chunks is a multiple."""
    apart: bool = False
    """Whether texts share no chunk with images that go through the same transformer."""


SMALLEST_MICRO_BATCH_TOKENS = 16


@dataclass(frozen=True)
class Budget:
    """The token budget in force: it decides how batches are cut, hence it is state."""

    micro_batch_tokens: int
    graph_tokens: int
    ranks: int = 1
    """The ranks that the run began with: the number of chunks is a multiple of them."""
    apart: bool = False
    """Whether texts share no chunk with images that go through the same transformer."""

    @property
    def cut(self) -> Cut:
        """How batches are cut."""
        return Cut(self.micro_batch_tokens, self.ranks, self.apart)

    def to_json(self) -> dict[str, int | bool]:
        """The entries of a checkpoint's state."""
        return {
            "micro_batch_tokens": self.micro_batch_tokens,
            "graph_tokens": self.graph_tokens,
            "cut_ranks": self.ranks,
            "cut_apart": self.apart,
        }

    @classmethod
    def from_json(cls, state: Mapping[str, Any]) -> Budget:
        """The budget that a checkpoint's state holds."""
        tokens, graph = int(state["micro_batch_tokens"]), int(state["graph_tokens"])
        return cls(tokens, graph, int(state["cut_ranks"]), bool(state["cut_apart"]))

    def halved(self) -> Budget | None:
        """Half of it; none where nothing is left to halve."""
        if self.micro_batch_tokens <= SMALLEST_MICRO_BATCH_TOKENS:
            return None
        tokens = max(SMALLEST_MICRO_BATCH_TOKENS, self.micro_batch_tokens // 2)
        return replace(self, micro_batch_tokens=tokens, graph_tokens=self.graph_tokens // 2)


def cut_chunks(
    lengths: Rows,
    budget: int,
    groups: Rows | None = None,
    *,
    padded: bool = True,
    ranks: int = 1,
    kinds: Rows | None = None,
) -> list[Rows]:
    """Cut texts into chunks of nearly equal cost and at most ``budget`` tokens, longest first.

    ``lengths`` are tokens, shape (n,). Where chunks are ``padded`` a chunk takes longest length x count, else the sum of
    its lengths. A text that is longer than the budget is a chunk of its own. Texts of different ``groups`` (shape (n,))
    do not share a chunk.

    The number of chunks is the smallest multiple of ``ranks`` that the budget allows and that leaves so many ranks busy
    for :data:`BUSY` of the time (where none does, the one whose busiest rank has the least to do); texts of different ``kinds``
    (n,) are each cut so. There are fewer only where the texts are fewer. The result is a partition of 0..n-1 that depends
    on the arguments alone, so that it is the same on every device and for any number of them.
    """
    groups = np.zeros_like(lengths) if groups is None else groups
    kinds = np.zeros_like(lengths) if kinds is None else kinds
    chunks: list[Rows] = []
    for kind in np.unique(kinds).tolist():
        parts = [np.flatnonzero((kinds == kind) & (groups == group)) for group in np.unique(groups[kinds == kind])]
        parts = [part[np.lexsort((part, -lengths[part]))] for part in parts]
        chunks += _cut_kind(lengths, parts, budget, padded=padded, ranks=ranks)
    return chunks


def _cut_kind(lengths: Rows, parts: Sequence[Rows], budget: int, *, padded: bool, ranks: int) -> list[Rows]:
    """Chunks of several groups of texts, each longest first, that are dealt together."""
    sorted_lengths = [_Sorted(lengths[part], padded) for part in parts]
    texts = [len(part) for part in parts]
    fewest = [len(each.edges(budget)) - 1 for each in sorted_lengths]
    wanted = -(-sum(fewest) // ranks) * ranks
    best: tuple[int, list[Rows]] | None = None
    for count in range(wanted, min(sum(texts), wanted + _TRIES * ranks) + 1, ranks) or [sum(texts)]:
        numbers = _apportion(count, [each.tokens for each in sorted_lengths], fewest, texts)
        chunks = [
            part[start:stop]
            for part, each, number in zip(parts, sorted_lengths, numbers, strict=True)
            for start, stop in itertools.pairwise(each.equal_edges(number))
        ]
        costs = [chunk_tokens(lengths, chunk, padded=padded) for chunk in chunks]
        loads = [sum(costs[number] for number in share) for share in deal_chunks(costs, ranks)]
        # No cut does better than leaving the longest text alone.
        if sum(loads) >= BUSY * ranks * max(loads) or max(loads) == max(each.longest for each in sorted_lengths):
            return chunks
        if best is None or max(loads) < best[0]:
            best = max(loads), chunks
    assert best is not None
    return best[1]


def _apportion(count: int, tokens: Sequence[int], fewest: Sequence[int], most: Sequence[int]) -> list[int]:
    """``count`` chunks shared out to groups by their tokens, none fewer than its ``fewest`` or more than its ``most``."""
    numbers = list(fewest)
    heap = [(-tokens[group] / numbers[group], group) for group in range(len(numbers)) if numbers[group] < most[group]]
    heapq.heapify(heap)
    for _ in range(count - sum(numbers)):
        _, group = heapq.heappop(heap)
        numbers[group] += 1
        if numbers[group] < most[group]:
            heapq.heappush(heap, (-tokens[group] / numbers[group], group))
    return numbers


class _Sorted:
    """Texts by their lengths, longest first, and where they can be cut."""

    def __init__(self, lengths: Rows, padded: bool) -> None:
        self.lengths = lengths.tolist()
        self.padded = padded
        self.longest = int(lengths[0])
        self.tokens = int(lengths.sum())
        self._ends = np.cumsum(lengths)

    def edges(self, cap: int) -> list[int]:
        """Where chunks begin and end that take as many texts as fit ``cap`` tokens, at least one each."""
        edges, total = [0], len(self.lengths)
        while edges[-1] < total:
            start = edges[-1]
            if self.padded:
                stop = start + cap // max(1, self.lengths[start])
            else:
                before = int(self._ends[start - 1]) if start else 0
                stop = int(np.searchsorted(self._ends, before + cap, side="right"))
            edges.append(min(total, max(start + 1, stop)))
        return edges

    def equal_edges(self, count: int) -> list[int]:
        """``count`` chunks of which the largest with more than one text is as small as it can be."""
        low, high = 1, max(1, self.longest * len(self.lengths))
        while low < high:
            middle = (low + high) // 2
            if len(self.edges(middle)) - 1 <= count:
                high = middle
            else:
                low = middle + 1
        edges = self.edges(low)
        while len(edges) - 1 < count:
            several = [number for number in range(len(edges) - 1) if edges[number + 1] - edges[number] > 1]
            number = max(several, key=lambda n: self._cost(edges[n], edges[n + 1]))
            edges.insert(number + 1, (edges[number] + edges[number + 1]) // 2)
        return edges

    def _cost(self, start: int, stop: int) -> int:
        if self.padded:
            return int(self.lengths[start] * (stop - start))
        return int(self._ends[stop - 1]) - (int(self._ends[start - 1]) if start else 0)


def chunk_tokens(lengths: Rows, chunk: Rows, *, padded: bool = True) -> int:
    """Tokens that a chunk takes: with padding, or its real ones."""
    return int(lengths[chunk].max()) * len(chunk) if padded else int(lengths[chunk].sum())


def deal_chunks(tokens: Sequence[int], ranks: int, kinds: Sequence[int] | None = None) -> list[list[int]]:
    """Deal chunks (given by their tokens) to ranks: the largest first, each to the rank with the fewest tokens.

    Returns the numbers of each rank's chunks, ascending. A greedy deal is within 4/3 of the best (Graham 1969). Chunks of
    different ``kinds`` are dealt each kind by itself, so that ranks have about as many of each, and stand one kind after the other.
    """
    shares: list[list[int]] = [[] for _ in range(ranks)]
    for mine in _by_kind(range(len(tokens)), kinds):
        dealt: list[list[int]] = [[] for _ in range(ranks)]
        loads = [(0, rank) for rank in range(ranks)]
        for number in sorted(mine, key=lambda n: (-tokens[n], n)):
            load, rank = heapq.heappop(loads)
            dealt[rank].append(number)
            heapq.heappush(loads, (load + tokens[number], rank))
        for share, more in zip(shares, dealt, strict=True):
            share += sorted(more)
    return shares


class ChunkTurn(NamedTuple):
    """One of the chunks that a rank goes through."""

    chunk: int
    own: bool
    """Whether what it gives counts, or it is gone through for the other ranks' sake alone."""


def level_turns(shares: Sequence[Sequence[int]], rank: int, kinds: Sequence[int] | None = None) -> list[ChunkTurn]:
    """A rank's chunks, filled up so that in each turn all ranks go through a chunk of the same of the ``kinds``."""
    turns: list[ChunkTurn] = []
    for mine in _by_kind((number for share in shares for number in share), kinds):
        of_kind = [[number for number in share if number in mine] for share in shares]
        turns += [ChunkTurn(number, True) for number in of_kind[rank]]
        turns += [ChunkTurn(min(mine), False)] * (max(map(len, of_kind)) - len(of_kind[rank]))
    return turns


def turns_of(
    shares: Sequence[Sequence[int]], rank: int, kinds: Sequence[int] | None, *, level: bool
) -> list[ChunkTurn]:
    """A rank's chunks; ``level``, filled up by :func:`level_turns`."""
    return level_turns(shares, rank, kinds) if level else [ChunkTurn(number, True) for number in shares[rank]]


def _by_kind(numbers: Iterable[int], kinds: Sequence[int] | None) -> list[set[int]]:
    by_kind: dict[int, set[int]] = {}
    for number in numbers:
        by_kind.setdefault(0 if kinds is None else kinds[number], set()).add(number)
    return [by_kind[kind] for kind in sorted(by_kind)]


def split_rows(count: int, ranks: int, rank: int) -> Rows:
    """The rows 0..count-1 whose loss a rank computes: an even, contiguous share."""
    return np.arange(count * rank // ranks, count * (rank + 1) // ranks, dtype=np.int64)


@dataclass(frozen=True)
class Shares:
    """The rows of a pool that each rank encodes; every rank knows all of it, so that nothing of it is sent."""

    rows: Sequence[Rows]
    """For each rank, the pool rows that it encodes, in the order of its chunks."""
    rank: int

    @property
    def own(self) -> Rows:
        """The pool rows of this rank."""
        return self.rows[self.rank]

    @property
    def size(self) -> int:
        """Rows of the pool."""
        return sum(len(rows) for rows in self.rows)

    @property
    def longest(self) -> int:
        """The most rows that a rank has: shorter shares are padded to it on the wire."""
        return max(len(rows) for rows in self.rows)

    def slots(self) -> Rows:
        """(n,) for each pool row, where it stands in the ranks' padded shares laid end to end."""
        slots = np.empty(self.size, dtype=np.int64)
        for rank, rows in enumerate(self.rows):
            slots[rows] = rank * self.longest + np.arange(len(rows))
        return slots


@dataclass(frozen=True)
class Work:
    """A global batch cut into chunks and dealt to ranks: the same on every rank but for ``rank``."""

    pool: TextPool
    chunks: list[Rows]
    """TextPool rows of each chunk of the global batch, in the order that numbers them."""
    tokens: list[int]
    """Tokens that each chunk takes."""
    shares: list[list[int]]
    """For each rank, the numbers of its chunks."""
    rank: int
    known_positives: Sequence[Rows] = ()
    """Item rows of all known positives of each query."""
    first_number: int = 0
    """The number of the first chunk, where a step averages several batches."""
    weight: float = 1.0
    """The weight of the batch, where a step averages several."""
    final: bool = True
    """Whether it is the last of its step."""
    guide: VectorsOf | None = None
    """A guide's vectors of the items of the data, where the objective asks for them."""
    queue: Queued | None = None
    """Positives of earlier steps, where the objective asks for them."""
    ring: bool = False
    """Whether the parts of ranks are passed round instead of gathered."""
    kinds: list[int] | None = None
    """Of each chunk, which layers it goes through, where all ranks must go through the same at once and not all are the same."""

    @property
    def own(self) -> list[int]:
        """The numbers of this rank's chunks."""
        return self.shares[self.rank]

    @property
    def rounds(self) -> int:
        """The chunks that a rank goes through where all go through as many."""
        return len(self.turns(level=True))

    def turns(self, *, level: bool) -> list[ChunkTurn]:
        """The chunks that this rank goes through; ``level``, as many chunks as all others, in each turn of the same kind."""
        return turns_of(self.shares, self.rank, self.kinds, level=level)

    @property
    def heaviest(self) -> int:
        """The most tokens that a rank has."""
        return max(sum(self.tokens[number] for number in share) for share in self.shares)

    def pool_shares(self) -> Shares:
        """The pool rows of each rank."""
        none = np.zeros(0, dtype=np.int64)
        return Shares([np.concatenate([none, *(self.chunks[n] for n in share)]) for share in self.shares], self.rank)


def cut_work(
    pool: TextPool,
    lengths: Rows,
    cut: Cut,
    launch: Launch,
    *,
    padded: bool,
    by_prompt: bool,
    images: Mask | None = None,
    level: bool = False,
) -> Work:
    """Cut a batch whose items have ``lengths`` (n,) into chunks and deal these to ranks.

    ``by_prompt``: texts with different prompts share no chunk. ``images`` (n,) tells the items that go through other layers:
    they share no chunk with the rest, and their chunks are a multiple of the cut's ranks as well. ``level`` says that all
    ranks must go through the same layers at once.
    """
    groups = pool.prompts if by_prompt else np.zeros(len(lengths), dtype=np.int64)
    apart = None if images is None else images.astype(np.int64)
    chunks = cut_chunks(lengths, cut.tokens, groups, padded=padded, ranks=cut.ranks, kinds=apart)
    tokens = [chunk_tokens(lengths, chunk, padded=padded) for chunk in chunks]
    kinds = [int(images[chunk[0]]) for chunk in chunks] if level and images is not None else None
    shares = deal_chunks(tokens, launch.world_size, kinds)
    return Work(pool, chunks, tokens, shares, launch.rank, kinds=kinds)


@dataclass(frozen=True)
class Load:
    """The tokens of a batch on the ranks; chunks that only fill up turns do not count."""

    mean: float
    heaviest: int
    long_text: bool
    """Whether one text alone takes more than all others would leave its rank."""
    few_texts: bool
    """Whether there are fewer texts than ranks."""

    @classmethod
    def of(cls, work: Work, lengths: Rows) -> Load:
        """The load of a batch whose texts have ``lengths`` (n,)."""
        ranks = len(work.shares)
        long = BUSY * ranks * int(lengths.max(initial=0)) > int(lengths.sum())
        return cls(sum(work.tokens) / ranks, work.heaviest, long, len(lengths) < ranks)


def busy_share(loads: Sequence[Load]) -> float:
    """The share of the time that a rank is at work on average, where tokens are time."""
    return sum(load.mean for load in loads) / max(1, sum(load.heaviest for load in loads))


def say_busy(loads: Sequence[Load], budget: Budget, ranks: int) -> str:
    """A sentence on the busy share of a run of ``ranks``, with the reasons where it is below :data:`BUSY`."""
    share = busy_share(loads)
    said = f"Ranks are busy {share:.1%} of the time by their tokens"
    if share >= BUSY:
        return said
    idle = [load for load in loads if load.mean < BUSY * load.heaviest]
    reasons = []
    if any(load.long_text for load in idle):
        count = sum(load.long_text for load in idle)
        reasons.append(f"one long text forbids more in {count} of {len(loads)} batches looked at")
    if any(load.few_texts for load in idle):
        reasons.append("there are fewer texts in a batch than ranks")
    if budget.ranks != ranks:
        reasons.append(f"batches stay cut for the {budget.ranks} ranks that the run began with, and there are {ranks}")
    return f"{said}: {'; '.join(reasons) or 'texts cannot be dealt more evenly'}"


@dataclass(frozen=True)
class TeacherScores:
    """Of examples: the teacher's score of each known positive and of each mined negative."""

    examples: Rows
    """(n,) example rows, rising."""
    positives: Ragged
    positive_scores: Floats
    """One of each value of ``positives``."""
    negatives: Ragged
    negative_scores: Floats

    def of(self, batch: Batch) -> Floats:
        """(D,) scores of the batch's documents in the order of its pool; not a number for what was not scored."""
        scores_of_items: list[Floats] = [np.empty(0, dtype=np.float64)]
        places = np.minimum(np.searchsorted(self.examples, batch.example), max(0, len(self.examples) - 1))
        for row, place in enumerate(places.tolist()):
            known: dict[int, float] = {}
            if len(self.examples) and self.examples[place] == batch.example[row]:
                for lists, scores in (
                    (self.negatives, self.negative_scores),
                    (self.positives, self.positive_scores),
                ):
                    low, high = int(lists.offsets[place]), int(lists.offsets[place + 1])
                    known |= dict(zip(lists.values[low:high].tolist(), scores[low:high].tolist(), strict=True))
            documents = [*batch.positives[row].tolist(), *batch.negatives[row].tolist()]
            scores_of_items.append(np.asarray([known.get(item, np.nan) for item in documents], dtype=np.float64))
        return np.concatenate(scores_of_items)


LoadImages = Callable[[Rows], "Sequence[Image | None]"]
"""Item rows -> their images, RGB."""


@dataclass(frozen=True)
class TrainingData:
    """The items and examples of the data, which batches name by their rows."""

    tokens: TokenCache
    known_positives: Callable[[int], Rows] = lambda query: np.zeros(0, dtype=np.int64)
    """Query item row -> its known positive item rows."""
    guide: VectorsOf | None = None
    """A guide's vectors of the items, where the objective asks for them."""
    weights: Floats | None = None
    """The weight of each example, by its row; None where all count alike."""
    teacher_scores: TeacherScores | None = None
    """The scores of the miner's teacher, where the objective learns from it."""
    readings: Mapping[int, Reading] = field(default_factory=dict)
    """The number of a source -> how the texts of its examples are read; those that are not named are read plainly."""
    token_task: TokenTask | None = None
    """The task that hides tokens and gives the losses on them, where the objective asks for one."""
    images: LoadImages | None = None
    """The images of items, where the data has some."""

    def pool(self, batch: Batch) -> TextPool:
        """The texts of a planned batch, with what its examples count."""
        sources = [batch.source] * len(batch.query) if batch.sources is None else batch.sources.tolist()
        pool = pool_batch(batch, [self.readings.get(source, Reading()) for source in sources])
        if self.token_task is not None:
            pool = replace(pool, token_columns=self.token_task.columns)
        if self.weights is not None:
            pool = replace(pool, weights=self.weights[batch.example])
        return pool if self.teacher_scores is None else replace(pool, teacher_scores=self.teacher_scores.of(batch))

    def known(self, batch: Batch) -> list[Rows]:
        """The known positives of each query of a batch."""
        return [self.known_positives(int(query)) for query in batch.query]

    def tokens_of(self, pool: TextPool, places: Rows) -> list[Tokens]:
        """The tokens of some texts of a pool."""
        where = zip(pool.prompts[places].tolist(), pool.items[places].tolist(), strict=True)
        return [self.tokens.tables[prompt].of(item) for prompt, item in where]

    def with_query_tokens(self, pool: TextPool) -> TextPool:
        """The pool with the (Q, T) tokens of its queries' whole texts, padded with -1."""
        rows = self.tokens_of(pool, pool.queries)
        tokens = np.full((len(rows), max(map(len, rows), default=0)), -1, dtype=np.int64)
        for line, row in enumerate(rows):
            tokens[line, : len(row)] = row
        return replace(pool, query_tokens=tokens)
