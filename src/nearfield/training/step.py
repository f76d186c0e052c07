"""One training step: encode the batch in chunks, take the loss on all embeddings at once, push its gradient back.

The gradient is that of the whole batch, however it is cut and over however many ranks it is spread: the loss sees
embeddings that are cut from their graph, and its gradient with respect to them is pushed back chunk by chunk (GradCache,
arXiv 2101.06983), either through graphs that were kept or by encoding each chunk a second time. Each chunk draws its
dropout from a generator seeded by (seed, step, chunk), where chunks are numbered over all ranks, so that the second time
needs no saved random state and the masks do not depend on the number of ranks.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from nearfield.arrays import Rows
from nearfield.batching.plan import Batch
from nearfield.batching.planner import VectorsOf
from nearfield.encoders.packing import Features
from nearfield.errors import OutOfMemoryStopError
from nearfield.objectives.batch import ContrastiveBatch, LossSum, Queued
from nearfield.objectives.diagnostics import watch as watch_learning
from nearfield.provenance import derive_seed
from nearfield.training.backends.base import Backend
from nearfield.training.chunks import (
    Bools,
    Budget,
    ChunkTurn,
    Cut,
    TextPool,
    chunk_tokens,
    cut_chunks,
    deal_chunks,
    split_batch,
    turns_of,
)
from nearfield.training.exchange import ControlWord, Exchange, Gathered, Passed, Shares, exchange_control

if TYPE_CHECKING:
    from nearfield.training.engine import Engine
    from nearfield.training.launch import Launch

MakeFeatures = Callable[[Rows], Features]
"""TextPool rows of a chunk of n texts -> what the encoder takes."""


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

    def exchange(self, shares: Shares) -> Exchange:
        """How embeddings get from the ranks that encode them to the loss."""
        if self.ring and len(self.shares) > 1:
            return Passed(self.pool, shares, self.known_positives, self.guide)
        return Gathered(self.pool, shares, self.known_positives, self.guide, self.queue)


def cut_work(
    pool: TextPool,
    lengths: Rows,
    cut: Cut,
    launch: Launch,
    *,
    padded: bool,
    by_prompt: bool,
    images: Bools | None = None,
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
class StepResult:
    """The outcome of a step; the gradient is in the backend, not yet summed over ranks."""

    word: ControlWord
    denominator: float
    batch: ContrastiveBatch | None
    """The detached embeddings that the loss saw, of this rank's part alone where parts are passed round; none where memory ran
    out before."""
    first_query: int = 0
    """Where its queries begin in the planned batch, where a step averages several."""
    figures: Mapping[str, float] = field(default_factory=dict)
    """How the learning goes, where that was asked for; of the last batch, where a step averages several."""

    @property
    def loss(self) -> float:
        """The mean loss of the global batch."""
        return self.word.loss / self.denominator


def mean_result(results: Sequence[StepResult]) -> StepResult:
    """The outcome of a step that averages the losses of several batches; of one, itself."""
    if len(results) == 1:
        return results[0]
    words = [result.word for result in results]
    used = tuple(any(marks) for marks in zip(*(word.used for word in words), strict=True))
    mean = sum(result.loss for result in results) / len(results)
    word = ControlWord(mean, any(w.out_of_memory for w in words), any(w.stop for w in words), used)
    # Of the embeddings those are of use that explain a loss that is not finite.
    shown = next((result for result in results if not math.isfinite(result.loss)), results[-1])
    return StepResult(word, 1.0, shown.batch, shown.first_query, results[-1].figures)


def seed_chunk(seed: int, step: int, chunk: int) -> None:
    """Seed the generators that dropout draws from for one chunk of one step."""
    value = derive_seed(seed, "dropout", step, chunk)
    if torch.cuda.is_initialized() or torch.backends.mps.is_available():  # type: ignore[no-untyped-call]
        torch.manual_seed(value)
    else:
        # ``torch.manual_seed`` writes down the stack for each kind of device that is not in use: milliseconds a chunk.
        torch.default_generator.manual_seed(value)


def encode_chunk(backend: Backend, features: Features) -> Tensor:
    """(n, d) embeddings in float32 at least: the loss and the wire are never in half precision."""
    with backend.autocast():
        embeddings: Tensor = backend.module(features)
    return embeddings.float() if embeddings.dtype in (torch.bfloat16, torch.float16) else embeddings


class _Guard:
    """Runs this rank's own part of a step; once memory ran out, the rest is left out and only told.

    The rank still takes part in every collective, so that all ranks learn of it in the control word and none waits for
    ever.
    """

    def __init__(self, catch: bool) -> None:
        self.catch = catch
        self.out_of_memory = False

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> bool:
        if error is None or not is_out_of_memory(error) or not self.catch:
            return False
        self.out_of_memory = True
        return True


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on a GPU or in torch's CPU allocator."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator: can't allocate memory" in str(error)


def can_keep_graphs(backend: Backend, chunks: int) -> bool:
    """Whether a rank can keep the graphs of so many chunks."""
    return chunks <= 1 or backend.kept_graphs != "one"


def batch_gradient(
    engine: Engine,
    budget: Budget,
    batch: Batch,
    *,
    seed: int,
    step: int,
    stop: Callable[[], bool] = lambda: False,
    watch: bool = False,
    progress: float = 0.0,
) -> tuple[StepResult, int, int]:
    """Leave the gradient of a planned batch in the backend; the tokens of the batch, real and as encoded.

    With ``watch`` this process looks at how the learning goes: of the last part, where there are several.
    """
    engine.backend.begin()
    parts = split_batch(batch, engine.config.averaged_batches)
    results: list[StepResult] = []
    chunks = tokens = encoded = 0
    for number, part in enumerate(parts):
        final = number == len(parts) - 1
        work, lengths = engine.work(part, budget.cut, first_number=chunks, weight=1 / len(parts), final=final)
        chunks, tokens, encoded = chunks + len(work.chunks), tokens + int(lengths.sum()), encoded + sum(work.tokens)
        # Where chunks hold no collectives the step itself says that memory ran out, and is repeated.
        with contextlib.nullcontext() if engine.retries_in_place else stops_for_memory(f"step {step + 1}", budget):
            result = run_step(
                engine,
                work,
                seed=seed,
                step=step,
                keep_graph=engine.keeps_graph(work, budget),
                stop=stop,
                watch=watch and final,
                progress=progress,
            )
        results.append(replace(result, first_query=sum(len(before.query) for before in parts[:number])))
        if result.word.out_of_memory:
            break
    return mean_result(results), tokens, encoded


def run_step(
    engine: Engine,
    work: Work,
    *,
    seed: int,
    step: int,
    keep_graph: bool,
    stop: Callable[[], bool] = lambda: False,
    watch: bool = False,
    progress: float = 0.0,
) -> StepResult:
    """Leave this rank's part of the gradient of the batch's mean loss in the engine's backend.

    With ``keep_graph`` one backward goes through the graphs of all chunks (one a chunk, where the backend else would add
    their gradients in half precision), else each chunk is encoded a second time and only its own graph is in memory, as
    also where a backend keeps the graph of one chunk only. A backend whose forwards are collective has every rank run as
    many chunks as the rank with the most, of each kind; the missing ones are copies whose gradient is zero.

    ``progress`` is the share of the run that is done. With ``watch`` this process looks at how the learning goes.

    The caller must look at the control word before it calls ``update``: the gradient is of use only if memory
    sufficed everywhere and the loss is finite.
    """
    backend, objective = engine.backend, engine.objective
    # Where ranks wait for each other inside a step, memory that runs out on one ends them all.
    guard = _Guard(backend.retries_in_place and not work.ring)
    shares = work.pool_shares()
    turns = work.turns(level=backend.same_chunk_count)
    keep_graph = keep_graph and can_keep_graphs(backend, len(turns))
    make_features = engine.make_features(work.pool, seed, step)
    # Only checks of equalities run in float64.
    double = next(backend.module.parameters()).dtype == torch.float64
    dtype = torch.float64 if double else torch.float32
    joined = torch.zeros((len(shares.own), engine.columns), dtype=dtype, device=backend.device)

    def encode(turn: ChunkTurn) -> Tensor:
        seed_chunk(seed, step, work.first_number + turn.chunk)
        return encode_chunk(backend, make_features(work.chunks[turn.chunk]))

    parts: list[Tensor] = []
    with guard:
        for turn in turns:
            with torch.set_grad_enabled(keep_graph):
                parts.append(encode(turn))
        if work.own:
            joined = torch.cat([part for turn, part in zip(turns, parts, strict=True) if turn.own])
    exchange = work.exchange(shares)
    leaf = exchange.bring(joined).requires_grad_()
    batch = replace(exchange.batch(leaf, derive_seed(seed, "objective", step, work.first_number)), progress=progress)
    learnt = [p for p in objective.parameters() if p.requires_grad]
    total, gradient = math.nan, torch.zeros_like(leaf)
    figures: Mapping[str, float] = {}
    learnt_gradients: Sequence[Tensor] = [torch.zeros_like(parameter) for parameter in learnt]
    with backend.whole(learnt):
        with guard:
            if not guard.out_of_memory:
                # Not by calling the module: ZeRO 3 would take its parameters away again behind the call.
                loss: LossSum = objective.forward(batch)
                gradient, *learnt_gradients = loss.gradients([leaf, *learnt], work.weight)
                total = float(loss.total.detach())
                if watch:
                    figures = watch_learning(objective, replace(batch, ring=None))
        own = exchange.back(gradient)
        with guard:
            if not guard.out_of_memory:
                # The objective's own parameters ride on the first backward, so that every backend sums their gradients like the rest:
                # ZeRO 3 adds to what it finds of the last step where a parameter has no gradient in the first.
                extra = [(p * g).sum() for p, g in zip(learnt, learnt_gradients, strict=True)]
                if keep_graph and (backend.kept_graphs == "joined" or len(turns) <= 1):
                    unused = [part.sum() * 0 for turn, part in zip(turns, parts, strict=True) if not turn.own]
                    pieces = [*extra, *unused] if not work.own else [(joined * own).sum(), *extra, *unused]
                    _push(backend, pieces, last=work.final, settle=work.kinds is not None)
                else:
                    again = (parts[n] if keep_graph else encode(turn) for n, turn in enumerate(turns))
                    _push_by_chunk(backend, work, turns, again, own, extra)
    word = exchange_control(
        total, guard.out_of_memory, stop(), backend.used(), ranks=len(work.shares), device=backend.device
    )
    return StepResult(word, batch.denominator(), None if word.out_of_memory else _detached(batch), figures=figures)


def _push_by_chunk(
    backend: Backend,
    work: Work,
    turns: Sequence[ChunkTurn],
    parts: Iterable[Tensor],
    gradient: Tensor,
    extra: Sequence[Tensor],
) -> None:
    """A backward for each chunk; ``parts`` gives its embeddings when its turn comes, ``gradient`` is theirs."""
    position = 0
    for index, (turn, part) in enumerate(zip(turns, parts, strict=True)):
        piece = part.sum() * 0
        if turn.own:
            piece = (part * gradient[position : position + len(part)]).sum()
            position += len(part)
        ends = index == len(turns) - 1
        settle = work.kinds is not None and (ends or work.kinds[turn.chunk] != work.kinds[turns[index + 1].chunk])
        _push(backend, [piece] if index else [piece, *extra], last=work.final and ends, settle=settle)
    if not turns:
        _push(backend, extra, last=work.final)


def _push(backend: Backend, pieces: Sequence[Tensor], *, last: bool, settle: bool = False) -> None:
    if pieces:
        backend.backward(torch.stack([piece.reshape(()) for piece in pieces]).sum(), last, settle)


def _detached(batch: ContrastiveBatch) -> ContrastiveBatch:
    """The embeddings that the loss saw, free of its graph, of its share of rows, and of the ring."""
    losses = None if batch.token_losses is None else batch.token_losses.detach()
    queries, documents = batch.queries.detach(), batch.documents.detach()
    return replace(batch, queries=queries, documents=documents, rows=None, ring=None, token_losses=losses)


@contextlib.contextmanager
def stops_for_memory(doing: str, budget: Budget) -> Iterator[None]:
    """Where memory runs out in what cannot be repeated, end the run so that it goes on with a smaller budget.

    Ranks may wait in a collective that this one will never join, or parameters may be half updated: only the last
    checkpoint is sound.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemoryStopError(
            f"memory ran out in {doing} with {budget.micro_batch_tokens} tokens at a time",
            hint="`nearfield train --resume` with the same launcher goes on from the last checkpoint with half as many.",
        ) from error
