"""Negatives that change while a model trains: by a schedule, by what it finds hard, or mined anew from its weights."""

from __future__ import annotations

import dataclasses
import logging
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nearfield.arrays import Ragged, Rows, concatenate
from nearfield.batching.plan import Batch
from nearfield.data.vectors import unit
from nearfield.errors import BadInputError
from nearfield.files import atomic_path, hash_file, read_json, write_json
from nearfield.mining.negatives import Pool, mine_pool, search_share
from nearfield.mining.rules import MinedNegatives
from nearfield.mining.search import ArrayDocuments, Neighbours
from nearfield.mining.teachers import DenseScorer, Searching
from nearfield.provenance import generator
from nearfield.training.checkpoint import checkpoint_paths
from nearfield.training.chunks import Shares, split_rows
from nearfield.training.engine import Engine
from nearfield.training.evaluation import encode_items, undisturbed
from nearfield.training.launch import broadcast_json, broadcast_tensors
from nearfield.training.step import Part, StepMade, StepResult, gather_embeddings

if TYPE_CHECKING:
    from nearfield.mining.config import MiningConfig, NegativesSettings
    from nearfield.training.config import DynamicNegatives, RefreshedNegatives, ScheduledNegatives
    from nearfield.training.trainer import Trainer


@dataclass(frozen=True)
class MinedCandidates:
    """The mined candidates of examples: item rows, the hardest first."""

    examples: Rows
    """(n,) example rows, rising."""
    lists: Ragged

    def places(self, examples: Rows) -> Rows:
        """Where these examples stand; -1 for those that were not mined for."""
        if not len(self.examples):
            return np.full(len(examples), -1, dtype=np.int64)
        places = np.minimum(np.searchsorted(self.examples, examples), len(self.examples) - 1)
        return np.where(self.examples[places] == examples, places, -1).astype(np.int64)

    def of(self, examples: Rows) -> list[Rows]:
        """The candidates of each of these examples; none for one that was not mined for."""
        none = np.empty(0, dtype=np.int64)
        return [self.lists[place] if place >= 0 else none for place in self.places(examples).tolist()]


@dataclass(frozen=True)
class NegativeInputs:
    """The inputs of changing negatives."""

    config: NegativesSettings
    candidates: MinedCandidates
    """Those mined before the training."""
    wanted: int
    """Negatives an example in a step."""
    distinct: bool = True
    """Whether an item may stand only once among a batch's documents."""
    avoid_positives: bool = True
    """Whether a known positive of any query of the batch is no negative in it."""
    remine: Remine | None = None
    """The function that mines anew from the weights; only ``refresh`` needs it."""


class ChangingNegatives(Part):
    """MinedCandidates in an order of preference go into the batch, as far as they fit. Ranks do the same."""

    def __init__(self, inputs: NegativeInputs, known_positives: Callable[[int], Rows], seed: int) -> None:
        self.inputs = inputs
        self.seed = seed
        self.known_positives = known_positives

    def orders(self, examples: Rows, step: int) -> list[Rows]:
        """For each example the items that its negatives are taken from, in the order of preference."""
        raise NotImplementedError

    def batch(self, batch: Batch, step: int) -> tuple[Batch, dict[str, int]]:
        """The batch with the first candidates of each example that clash with nothing in it."""
        negatives, clashes = fit(
            batch, self.orders(batch.example, step), self.inputs, self.known_positives, self.inputs.wanted
        )
        missing = sum(self.inputs.wanted - len(rows) for rows in negatives)
        figures = {"negatives_clashing": clashes, "negatives_missing": missing}
        return dataclasses.replace(batch, negatives=negatives), figures


def fit(
    batch: Batch,
    orders: Sequence[Rows],
    inputs: NegativeInputs,
    known_positives: Callable[[int], Rows],
    wanted: int,
) -> tuple[list[Rows], int]:
    """The first ``wanted`` items of each order that clash with nothing in the batch, and how many were passed over.

    An item clashes if it stands in the batch already, or if the data calls it a positive of any of the batch's queries: the
    planner saw to neither for negatives that came later. Examples choose in the order of the batch.
    """
    taken: set[int] = set()
    if inputs.distinct:
        taken.update(batch.query.tolist())
        for positives in batch.positives:
            taken.update(positives.tolist())
    if inputs.avoid_positives:
        for query in batch.query.tolist():
            taken.update(known_positives(query).tolist())
    chosen, clashes = [], 0
    for query, order in zip(batch.query.tolist(), orders, strict=True):
        fitting: list[int] = []
        for item in order.tolist():
            if len(fitting) == wanted:
                break
            if item in taken or item in fitting or item == query:
                clashes += 1
                continue
            fitting.append(item)
        if inputs.distinct:
            taken.update(fitting)
        chosen.append(np.asarray(fitting, dtype=np.int64))
    return chosen, clashes


class Scheduled(ChangingNegatives):
    """A window over the candidates that moves from easy to hard; a function of the step alone."""

    def __init__(
        self,
        inputs: NegativeInputs,
        config: ScheduledNegatives,
        known_positives: Callable[[int], Rows],
        seed: int,
        steps: int,
    ) -> None:
        super().__init__(inputs, known_positives, seed)
        self.config = config
        self.steps = steps

    def first_rank(self, step: int) -> int:
        """The rank that the window begins at."""
        share = min(1.0, step / max(1.0, self.config.over * (self.steps - 1)))
        return round(self.config.start + (self.config.end - self.config.start) * share)

    def orders(self, examples: Rows, step: int) -> list[Rows]:
        """The candidates from the window's rank on; of a list that is too short, its last ones and then harder ones."""
        rank, wanted = self.first_rank(step), self.inputs.wanted
        orders = []
        for candidates in self.inputs.candidates.of(examples):
            begin = max(0, min(rank, len(candidates) - wanted))
            # A candidate that clashes is replaced by the next easier one, and at the list's end by the next harder one.
            orders.append(candidates[[*range(begin, len(candidates)), *range(begin - 1, -1, -1)]])
        return orders


class Dynamic(ChangingNegatives):
    """The common part of both rules: the scores of a step's negatives, and a place for each example."""

    def __init__(
        self, inputs: NegativeInputs, config: DynamicNegatives, known_positives: Callable[[int], Rows], seed: int
    ) -> None:
        super().__init__(inputs, known_positives, seed)
        self.config = config
        self.count = len(inputs.candidates.examples)
        self.lengths = inputs.candidates.lists.lengths

    def after_step(self, made: StepMade) -> None:
        """Note the scores of the step's negatives, and replace what is due."""
        batch, scores = made.batch, negative_scores(made.result)
        places = self.inputs.candidates.places(batch.example)
        start = 0
        for place, negatives in zip(places.tolist(), batch.negatives, strict=True):
            if place >= 0 and len(negatives):
                self.note(place, negatives, scores[start : start + len(negatives)])
            start += len(negatives)
        self.replace(made.done)

    def note(self, place: int, negatives: Rows, scores: np.ndarray[Any, Any]) -> None:
        """Take in the scores of an example's negatives in a step."""
        raise NotImplementedError

    def replace(self, done: int) -> None:
        """Replace what is due after ``done`` steps."""


def negative_scores(result: StepResult) -> np.ndarray[Any, Any]:
    """The cosine of each explicit negative of a step with its query, in the batch's order; *collective*.

    Every rank holds all embeddings; those of rank 0 decide, since ranks on unlike machines may differ in a last bit, and all
    must choose alike.
    """
    seen = result.batch
    assert seen is not None
    explicit = ~seen.is_positive
    queries = nn.functional.normalize(seen.queries[seen.owner[explicit]].float(), dim=-1)
    documents = nn.functional.normalize(seen.documents[explicit].float(), dim=-1)
    scores = (queries * documents).sum(-1)
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.broadcast(scores, 0)
    values: np.ndarray[Any, Any] = scores.cpu().numpy()
    return values


class BlockAtATime(Dynamic):
    """Version 1: all negatives of an example are replaced together, at checks (arXiv 2408.15710)."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.block = np.zeros(self.count, dtype=np.int32)
        """Replacements so far."""
        self.initial = np.full(self.count, np.nan, dtype=np.float32)
        """The mean score of the block when it was first used."""
        self.now = np.full(self.count, np.nan, dtype=np.float32)
        """The mean score of the block when it was last used."""

    def first_rank(self, block: int) -> int:
        """The rank that a block begins at."""
        return 0 if block == 0 else self.config.skip + (block - 1) * self.inputs.wanted

    def orders(self, examples: Rows, step: int) -> list[Rows]:
        """The candidates from the example's block on."""
        places = self.inputs.candidates.places(examples)
        return [
            candidates if place < 0 else candidates[self.first_rank(int(self.block[place])) :]
            for place, candidates in zip(places.tolist(), self.inputs.candidates.of(examples), strict=True)
        ]

    def note(self, place: int, negatives: Rows, scores: np.ndarray[Any, Any]) -> None:
        """The mean of the block's scores."""
        mean = scores.mean()
        if np.isnan(self.initial[place]):
            self.initial[place] = mean
        self.now[place] = mean

    def replace(self, done: int) -> None:
        """At a check, move on the examples whose negatives lost their hardness and that have a whole block left."""
        if done % self.config.check_every:
            return
        easy = (self.config.ratio * self.now < self.initial) & (np.abs(self.now) < self.config.ceiling)
        following = self.config.skip + (self.block.astype(np.int64) + 1) * self.inputs.wanted
        moved = easy & (following <= self.lengths)
        self.block[moved] += 1
        self.initial[moved] = np.nan
        self.now[moved] = np.nan

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Three numbers an example."""
        for name in ("block", "initial", "now"):
            yield name, torch.from_numpy(getattr(self, name))

    def load(self, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Put the numbers back."""
        for name in ("block", "initial", "now"):
            getattr(self, name)[:] = tensors[name].cpu().numpy()


class OneAtATime(Dynamic):
    """Version 2: each negative by itself, when its example comes next."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        wanted = self.inputs.wanted
        self.ranks = np.tile(np.arange(wanted, dtype=np.int32), (self.count, 1))
        """(examples, wanted) the ranks in use."""
        self.next = np.full(self.count, wanted, dtype=np.int32)
        """The first rank that was not used yet."""

    def orders(self, examples: Rows, step: int) -> list[Rows]:
        """The candidates in use, then those not used yet."""
        orders = []
        for place, candidates in zip(
            self.inputs.candidates.places(examples).tolist(), self.inputs.candidates.of(examples), strict=True
        ):
            if place >= 0:
                used = self.ranks[place][self.ranks[place] < len(candidates)]
                candidates = np.concatenate([candidates[used], candidates[self.next[place] :]])
            orders.append(candidates)
        return orders

    def note(self, place: int, negatives: Rows, scores: np.ndarray[Any, Any]) -> None:
        """Exchange those that are too easy, as long as there are candidates."""
        candidates = self.inputs.candidates.lists[place]
        easy = {
            item for item, score in zip(negatives.tolist(), scores.tolist(), strict=True) if score < self.config.below
        }
        for slot, rank in enumerate(self.ranks[place].tolist()):
            if rank < len(candidates) and int(candidates[rank]) in easy and self.next[place] < len(candidates):
                self.ranks[place, slot] = self.next[place]
                self.next[place] += 1

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The ranks in use and the next one, an example."""
        yield "ranks", torch.from_numpy(self.ranks)
        yield "next", torch.from_numpy(self.next)

    def load(self, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Put them back."""
        self.ranks[:] = tensors["ranks"].cpu().numpy()
        self.next[:] = tensors["next"].cpu().numpy()


logger = logging.getLogger("nearfield.training")

FOLDER = "negatives"
VERSION = 1


@dataclass(frozen=True)
class Remine:
    """The settings of mining."""

    pools: Sequence[Pool]
    """One a source."""
    prompts: Mapping[int, tuple[int, int]]
    """Each source's (query, document) prompt numbers in the token cache."""
    mining: MiningConfig


def mine_by_weights(
    engine: Engine,
    pool: Pool,
    prompts: tuple[int, int],
    mining: MiningConfig,
    *,
    seed: int,
    generation: int,
    budget: int,
    stop: Callable[[], bool],
) -> MinedNegatives:
    """The negatives of a pool's examples by the weights in training, in the mode they are in; *collective*.

    All ranks encode; each searches for its share of the queries. The result does not depend on the number of ranks, as
    far as the embeddings do not.
    """
    launch, device = engine.launch, engine.backend.device
    items, where = np.unique(pool.queries, return_inverse=True)
    queries = unit(encode_items(engine, prompts[0], items, budget, stop), items)[where]
    documents = unit(encode_items(engine, prompts[1], pool.documents, budget, stop), pool.documents)
    searching = Searching(memory=mining.memory_mib << 20, device=str(device))
    scorer = DenseScorer(queries, ArrayDocuments(documents), searching)
    shares = Shares([split_rows(len(queries), launch.world_size, r) for r in range(launch.world_size)], launch.rank)
    share_of_rank = search_share(pool, scorer, mining, (launch.rank, launch.world_size))
    rows, scores = (
        gather_embeddings(torch.from_numpy(part).to(device), shares).cpu().numpy()
        for part in (share_of_rank.rows, share_of_rank.scores)
    )
    neighbours = Neighbours(rows, scores)
    return mine_pool(pool, scorer, mining, seed=seed, generation=generation, found=neighbours)


class Refreshed(ChangingNegatives):
    """Negatives drawn in each step from the pool of the newest generation; generation 0 was mined before the training."""

    def __init__(self, inputs: NegativeInputs, config: RefreshedNegatives, trainer: Trainer) -> None:
        if inputs.remine is None:
            raise BadInputError("mining.during is refresh, but nothing was handed in that mines")
        super().__init__(inputs, trainer.inputs.data.known_positives, trainer.seed)
        self.config, self.remine = config, inputs.remine
        self.folder, self.checkpoints = trainer.run / FOLDER, trainer.run / "checkpoints"
        self.writes, self.device, self.steps = trainer.launch.is_main, trainer.device, trainer.steps
        every = config.every_epochs or 1
        self._ends = set(np.cumsum(trainer.inputs.epochs)[every - 1 :: every].tolist())
        self.candidates = inputs.candidates
        self.generation = 0
        self.refreshed = 0
        """The step of the last refresh."""
        self.hash: str | None = None

    def orders(self, examples: Rows, step: int) -> list[Rows]:
        """Each example's candidates, shuffled by the step."""
        random = generator(self.seed, "negatives", step)
        return [candidates[random.permutation(len(candidates))] for candidates in self.candidates.of(examples)]

    def due(self, done: int) -> bool:
        """Whether the pool is to be mined anew now."""
        if done <= self.refreshed or done >= self.steps:
            return False
        if self.config.every_steps is not None:
            return done % self.config.every_steps == 0
        return done in self._ends

    def pause(self, done: int) -> None:
        """Mine anew where that is due; a stop leaves it to the resumed run."""
        if self.due(done):
            trainer = self.trainer
            with trainer.stops_for_memory(f"mining after step {done}"):
                self.refresh(trainer.engine, done, trainer.budget.micro_batch_tokens, trainer.stopped)

    def refresh(self, engine: Engine, done: int, budget: int, stop: Callable[[], bool]) -> None:
        """Mine the next generation with the weights of ``done`` steps; *collective*.

        Raises :class:`nearfield.training.evaluation.InterruptedEvaluationError` on all ranks when ``stop`` is true on any.
        """
        began = time.monotonic()
        generation = self.generation + 1
        examples, lists, short = [], [], 0
        with undisturbed(engine.backend.module, engine.backend.device):
            for pool in self.remine.pools:
                mined = mine_by_weights(
                    engine,
                    pool,
                    self.remine.prompts[pool.source],
                    self.remine.mining,
                    seed=self.seed,
                    generation=generation,
                    budget=budget,
                    stop=stop,
                )
                examples.append(pool.examples)
                lists.append(Ragged(mined.lists.offsets, pool.documents[mined.lists.values]))
                short += len(mined.short)
        rows = np.concatenate(examples)
        order = np.argsort(rows, kind="stable")
        self.candidates = MinedCandidates(rows[order], concatenate(lists).take(order))
        self.generation, self.refreshed = generation, done
        if self.writes:
            self._write(done, short)
        self.hash = broadcast_json(self.hash, engine.backend.device)
        self.seconds += time.monotonic() - began
        logger.info(
            "Negatives of generation %d, mined after step %d in %.1f s; %d of %d examples have fewer than %d",
            generation,
            done,
            time.monotonic() - began,
            short,
            len(rows),
            self.remine.mining.negatives,
        )

    def _path(self, generation: int) -> Path:
        return self.folder / f"generation-{generation:05d}"

    def _write(self, done: int, short: int) -> None:
        """Keep the pool, and drop those that no checkpoint needs any more."""
        path = self._path(self.generation)
        with atomic_path(path) as aside:
            aside.mkdir(parents=True)
            tensors = {
                "examples": self.candidates.examples,
                "offsets": self.candidates.lists.offsets,
                "negatives": self.candidates.lists.values,
            }
            save_file(
                {name: torch.from_numpy(values.copy()) for name, values in tensors.items()}, aside / "pool.safetensors"
            )
            about = {"version": VERSION, "generation": self.generation, "weights_of_step": done, "short": short}
            write_json(aside / "pool.json", about)
        self.hash = hash_file(path / "pool.safetensors")
        needed = {self.generation}
        for checkpoint in checkpoint_paths(self.checkpoints):
            state = read_json(checkpoint / "state.json", "checkpoint state")
            needed.add(int(state.get("negatives", {}).get("generation", 0)))
        for old in self.folder.glob("generation-*"):
            if int(old.name.removeprefix("generation-")) < min(needed):
                shutil.rmtree(old)

    def state(self) -> dict[str, Any]:
        """The number of the pool in force."""
        return {"negatives": {"generation": self.generation, "refreshed": self.refreshed, "hash": self.hash}}

    def load(self, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Open the pool that was in force: rank 0 reads it, the others receive it."""
        pool = state["negatives"]
        self.generation, self.refreshed, self.hash = pool["generation"], pool["refreshed"], pool["hash"]
        if not self.generation:
            return
        tensors_of_pool: dict[str, Tensor] | None = None
        if self.writes:
            file = self._path(self.generation) / "pool.safetensors"
            if not file.is_file() or hash_file(file) != self.hash:
                raise BadInputError(
                    f"the negatives of generation {self.generation} are missing or were changed",
                    where=str(file),
                    hint="A checkpoint needs the pool that it was trained with. Start anew with --restart.",
                )
            tensors_of_pool = load_file(file)
        arrays = {name: tensor.cpu().numpy() for name, tensor in broadcast_tensors(tensors_of_pool, self.device)}
        self.candidates = MinedCandidates(arrays["examples"], Ragged(arrays["offsets"], arrays["negatives"]))
