"""One training step: encode the batch in chunks, take the loss on all embeddings at once, push its gradient back.

The gradient is that of the whole batch, however it is cut and over however many ranks it is spread: the loss sees
embeddings that are cut from their graph, and its gradient with respect to them is pushed back chunk by chunk (GradCache,
arXiv 2101.06983), either through graphs that were kept or by encoding each chunk a second time. Each chunk draws its
dropout from a generator seeded by (seed, step, chunk), where chunks are numbered over all ranks, so that the second time
needs no saved random state and the masks do not depend on the number of ranks.

Ranks send each other embeddings once a step, their gradient once, and one small control word. A rank encodes the chunks that it
was dealt. The loss then needs one of two things. *Gathered*: all embeddings, for the rows of an even share. *Passed*: the
queries of such a share with their own documents, sent there by the ranks that encoded them; the parts of other ranks come by in
a ring while the loss is computed, so that no rank ever holds the whole batch. Either way the gradient goes back to the ranks that
encoded.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from nearfield.arrays import Rows
from nearfield.batching.plan import Batch
from nearfield.batching.planner import VectorsOf
from nearfield.encoders.packing import Features
from nearfield.errors import OutOfMemoryStopError
from nearfield.objectives.batch import ContrastiveBatch, LossSum, Queued, Ring
from nearfield.objectives.diagnostics import watch as watch_learning
from nearfield.provenance import derive_seed
from nearfield.training.backends.replicated import Backend
from nearfield.training.chunks import (
    Budget,
    ChunkTurn,
    Shares,
    TextPool,
    Work,
    contrastive_batch,
    part_of,
    split_batch,
    split_rows,
)

if TYPE_CHECKING:
    from nearfield.training.engine import Engine
    from nearfield.training.trainer import Trainer


@dataclass(frozen=True)
class ControlWord:
    """The state that all ranks must agree on before parameters change."""

    loss: float
    """The sum of the local losses: not finite if one is not."""
    out_of_memory: bool
    stop: bool
    used: tuple[bool, ...]
    """For each trainable parameter, whether any rank has a gradient for it."""


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


@dataclass(frozen=True)
class StepMade:
    """A step that has changed the weights."""

    done: int
    """Steps done, this one counted."""
    batch: Batch
    result: StepResult
    norm: float
    """Of the gradient, before clipping."""
    line: Mapping[str, Any] | None
    """Its line of metrics, where it gets one."""


class Part:
    """A part of a training. Every rank calls the methods of all parts in one order; by default they do nothing."""

    trainer: Trainer
    seconds: float = 0.0
    """Seconds spent between steps, which do not count as training."""

    def begin(self, trainer: Trainer) -> None:
        """Get to know the trainer, before the first step."""
        self.trainer = trainer

    def batch(self, batch: Batch, step: int) -> tuple[Batch, dict[str, int]]:
        """The batch that the step is made on, and figures for its line of metrics."""
        return batch, {}

    def after_step(self, made: StepMade) -> None:
        """Look at a step; *collective*."""

    def pause(self, done: int) -> None:
        """Work that takes its time after ``done`` steps, also before the first; *collective*."""

    def end(self) -> None:
        """Say what is to be said once all steps are done; *collective*."""

    def state(self) -> dict[str, Any]:
        """Entries of a checkpoint's state."""
        return {}

    def tensors(self) -> Iterable[tuple[str, Tensor]]:
        """Tensors of a checkpoint."""
        return ()

    def load(self, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Put back what a checkpoint's state and tensors hold."""


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
    exchange = exchange_of(work, shares)
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


def exchange_of(work: Work, shares: Shares) -> Gathered | Passed:
    """The way of a batch's embeddings from the ranks that encode them to the loss, and of their gradient back."""
    if work.ring and len(work.shares) > 1:
        return Passed(work.pool, shares, work.known_positives, work.guide)
    return Gathered(work.pool, shares, work.known_positives, work.guide, work.queue)


class Gathered:
    """Every rank gets all embeddings."""

    def __init__(
        self,
        pool: TextPool,
        shares: Shares,
        known_positives: Sequence[Rows],
        guide: VectorsOf | None,
        queue: Queued | None,
    ) -> None:
        self.pool, self.shares, self.known_positives = pool, shares, known_positives
        self.guide, self.queue = guide, queue

    def bring(self, embeddings: Tensor) -> Tensor:
        """(own, d) embeddings of this rank's chunks -> (n, d), detached, those that its part of the loss sees; one collective."""
        return gather_embeddings(embeddings, self.shares)

    def batch(self, embeddings: Tensor, draw: int) -> ContrastiveBatch:
        """The whole batch, and the rows of this rank."""
        ranks = len(self.shares.rows)
        rows = split_rows(len(self.pool.queries), ranks, self.shares.rank) if ranks > 1 else None
        return contrastive_batch(self.pool, embeddings, self.known_positives, rows, draw, self.guide, self.queue)

    def back(self, gradient: Tensor) -> Tensor:
        """(n, d) gradient of what was brought -> (own, d), summed over ranks; one collective."""
        return reduce_gradient(gradient, self.shares)


class Passed:
    """Every rank gets the queries of its share with their documents; the rest comes by in a ring."""

    def __init__(
        self, pool: TextPool, shares: Shares, known_positives: Sequence[Rows], guide: VectorsOf | None
    ) -> None:
        self.shares, self.guide = shares, guide
        ranks = range(len(shares.rows))
        rows = [split_rows(len(pool.queries), len(ranks), rank) for rank in ranks]
        parts = [part_of(pool, part) for part in rows]
        self.pools = [part for part, _ in parts]
        self.wanted = [wanted for _, wanted in parts]
        self.known_positives = [[known_positives[int(row)] for row in part] for part in rows]
        self.weight = (float(len(pool.queries)) if pool.weights is None else float(pool.weights.sum())) or 1.0

    def bring(self, embeddings: Tensor) -> Tensor:
        """As :meth:`Gathered.bring`; each embedding goes where it is needed."""
        return send_rows(embeddings, self.shares, self.wanted)

    def batch(self, embeddings: Tensor, draw: int) -> ContrastiveBatch:
        """This rank's part, and the ring that the others come by on."""
        rank = self.shares.rank

        def part(other: int) -> ContrastiveBatch:
            nothing = torch.empty((len(self.wanted[other]), embeddings.shape[1]), device="meta")
            return contrastive_batch(
                self.pools[other],
                nothing,
                self.known_positives[other],
                guide=self.guide,
                device=embeddings.device,
            )

        ring = Ring(
            rank,
            [len(pool.queries) for pool in self.pools],
            [len(pool.documents) for pool in self.pools],
            self.weight,
            part,
            lambda tensor, rows: rotate(tensor, rows, rank, len(self.pools)),
        )
        here = contrastive_batch(self.pools[rank], embeddings, self.known_positives[rank], draw=draw, guide=self.guide)
        return replace(here, ring=ring)

    def back(self, gradient: Tensor) -> Tensor:
        """(n, d) gradient of what was brought -> (own, d), summed over ranks; one collective."""
        return return_rows(gradient, self.shares, self.wanted)


def gather_embeddings(embeddings: Tensor, shares: Shares) -> Tensor:
    """(own, d) embeddings of this rank -> (n, d) of the whole pool in its order, detached. One collective."""
    slots = torch.from_numpy(shares.slots()).to(embeddings.device)
    if len(shares.rows) == 1:
        return embeddings.detach()[slots]
    padded = embeddings.new_zeros((shares.longest, embeddings.shape[1]))
    padded[: len(embeddings)] = embeddings.detach()
    everyone = embeddings.new_empty((len(shares.rows) * shares.longest, embeddings.shape[1]))
    dist.all_gather_into_tensor(everyone, padded)
    return everyone[slots]


def reduce_gradient(gradient: Tensor, shares: Shares) -> Tensor:
    """(n, d) gradient that this rank's rows of the loss give to all embeddings -> (own, d) summed over ranks.

    One collective: each rank receives the gradient of the rows that it encodes.
    """
    if len(shares.rows) == 1:
        return gradient[torch.from_numpy(shares.own).to(gradient.device)]
    slots = torch.from_numpy(shares.slots()).to(gradient.device)
    laid_out = gradient.new_zeros((len(shares.rows) * shares.longest, gradient.shape[1]))
    laid_out[slots] = gradient
    reduced = gradient.new_empty((shares.longest, gradient.shape[1]))
    dist.reduce_scatter_tensor(reduced, laid_out)
    return reduced[: len(shares.own)]


def send_rows(embeddings: Tensor, shares: Shares, wanted: Sequence[Rows]) -> Tensor:
    """(own, d) embeddings of this rank -> (n, d), detached, of the pool rows that it wants; *collective*.

    ``wanted`` says for each rank which pool rows it wants, each once; a row goes to every rank that does.
    """
    sent, got = _ways(shares, wanted, embeddings.device)
    received = embeddings.new_empty((sum(map(len, got)), embeddings.shape[1]))
    dist.all_to_all_single(
        received, embeddings.detach()[torch.cat(sent)], [len(g) for g in got], [len(s) for s in sent]
    )
    result = torch.empty_like(received)
    result[torch.cat(got)] = received
    return result


def return_rows(gradient: Tensor, shares: Shares, wanted: Sequence[Rows]) -> Tensor:
    """(n, d) gradient of what :func:`send_rows` gave this rank -> (own, d) summed over ranks; *collective*."""
    sent, got = _ways(shares, wanted, gradient.device)
    received = gradient.new_empty((sum(map(len, sent)), gradient.shape[1]))
    dist.all_to_all_single(received, gradient[torch.cat(got)], [len(s) for s in sent], [len(g) for g in got])
    return gradient.new_zeros((len(shares.own), gradient.shape[1])).index_add_(0, torch.cat(sent), received)


def _ways(shares: Shares, wanted: Sequence[Rows], device: torch.device) -> tuple[list[Tensor], list[Tensor]]:
    """The rows of its own that this rank sends to each rank, and the places of those that come from each."""
    home, place = np.empty((2, shares.size), dtype=np.int64)
    for rank, rows in enumerate(shares.rows):
        home[rows], place[rows] = rank, np.arange(len(rows))
    here = shares.rank
    sent = [place[rows[home[rows] == here]] for rows in wanted]
    got = [np.flatnonzero(home[wanted[here]] == rank) for rank in range(len(wanted))]
    return [torch.from_numpy(s).to(device) for s in sent], [torch.from_numpy(g).to(device) for g in got]


def rotate(tensor: Tensor, rows: int, rank: int, ranks: int) -> Tensor:
    """A tensor for the next rank -> the one of ``rows`` rows of the rank before; *collective*."""
    received = tensor.new_empty((rows, *tensor.shape[1:]))
    ways = [
        dist.P2POp(dist.isend, tensor.contiguous(), (rank + 1) % ranks),
        dist.P2POp(dist.irecv, received, (rank - 1) % ranks),
    ]
    for request in dist.batch_isend_irecv(ways):
        request.wait()
    return received


def exchange_control(
    loss: float, out_of_memory: bool, stop: bool, used: Sequence[bool], *, ranks: int, device: torch.device
) -> ControlWord:
    """Sum the words of all ranks. One collective of a few numbers."""
    if ranks == 1:
        return ControlWord(loss, out_of_memory, stop, tuple(used))
    word = torch.tensor([loss, float(out_of_memory), float(stop), *map(float, used)], dtype=torch.float64)
    word = word.to(device)
    dist.all_reduce(word)
    values = word.tolist()
    return ControlWord(values[0], values[1] > 0, values[2] > 0, tuple(value > 0 for value in values[3:]))
