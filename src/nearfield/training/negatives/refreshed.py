"""Pools of negatives that are mined anew from the weights in training."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from nearfield.batching.rows import Lists, Rows, join_lists
from nearfield.data.vectors import unit
from nearfield.errors import BadInputError
from nearfield.files import atomic_path, hash_file, read_json, write_json
from nearfield.mining.config import MiningConfig, RefreshedNegatives
from nearfield.mining.documents import ArrayDocuments
from nearfield.mining.mine import MinedNegatives
from nearfield.mining.pool import Pool, mine_pool, search_share
from nearfield.mining.search import Neighbours
from nearfield.mining.teachers import DenseScorer, Searching
from nearfield.randomness import generator
from nearfield.training.checkpoint import checkpoint_paths
from nearfield.training.chunks import split_rows
from nearfield.training.communication import Shares, broadcast_json, broadcast_tensors, gather_embeddings
from nearfield.training.engine import Engine
from nearfield.training.evaluating import encode_items, undisturbed
from nearfield.training.negatives.changing import Candidates, NegativeInputs, Replacing

logger = logging.getLogger("nearfield.training")

FOLDER = "negatives"
VERSION = 1


@dataclass(frozen=True)
class Remine:
    """What is mined, and how."""

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

    All ranks encode; each searches for its share of the queries. What comes out does not depend on the number of ranks, as
    far as the embeddings do not.
    """
    launch, device = engine.launch, engine.backend.device
    items, where = np.unique(pool.queries, return_inverse=True)
    queries = unit(encode_items(engine, prompts[0], items, budget, stop), items)[where]
    documents = unit(encode_items(engine, prompts[1], pool.documents, budget, stop), pool.documents)
    searching = Searching(memory=mining.memory_mib << 20, device=str(device))
    scorer = DenseScorer(queries, ArrayDocuments(documents), searching)
    shares = Shares([split_rows(len(queries), launch.world_size, r) for r in range(launch.world_size)], launch.rank)
    own = search_share(pool, scorer, mining, (launch.rank, launch.world_size))
    rows, scores = (
        gather_embeddings(torch.from_numpy(part).to(device), shares).cpu().numpy() for part in (own.rows, own.scores)
    )
    found = Neighbours(rows, scores)
    return mine_pool(pool, scorer, mining, seed=seed, generation=generation, found=found)


class Refreshed(Replacing):
    """Negatives drawn in each step from the pool of the newest generation; generation 0 was mined before the training."""

    def __init__(
        self,
        inputs: NegativeInputs,
        config: RefreshedNegatives,
        known_positives: Callable[[int], Rows],
        seed: int,
        run: Path,
        *,
        epochs: Sequence[int],
        steps: int,
        device: torch.device,
        writes: bool,
    ) -> None:
        """``writes``: whether this rank reads and writes files."""
        if inputs.remine is None:
            raise BadInputError("mining.during is refresh, but nothing was handed in that mines")
        super().__init__(inputs, known_positives, seed)
        self.config, self.remine = config, inputs.remine
        self.folder = run / FOLDER
        self.checkpoints = run / "checkpoints"
        self.writes = writes
        self.device = device
        self.steps = steps
        every = config.every_epochs or 1
        self._ends = set(np.cumsum(epochs)[every - 1 :: every].tolist())
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

    def refresh(self, engine: Engine, done: int, budget: int, stop: Callable[[], bool]) -> None:
        """Mine the next generation with the weights of ``done`` steps; *collective*.

        Raises :class:`nearfield.training.evaluating.InterruptedEvaluationError` on all ranks when ``stop`` is true on any.
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
                lists.append(Lists(mined.offsets, pool.documents[mined.rows]))
                short += len(mined.short)
        rows = np.concatenate(examples)
        order = np.argsort(rows, kind="stable")
        self.candidates = Candidates(rows[order], join_lists(lists).take(order))
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

    def saved(self) -> dict[str, Any]:
        """Which pool is in force."""
        return {"negatives": {"generation": self.generation, "refreshed": self.refreshed, "hash": self.hash}}

    def load(self, saved: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Open the pool that was in force: rank 0 reads it, the others receive it."""
        state = saved["negatives"]
        self.generation, self.refreshed, self.hash = state["generation"], state["refreshed"], state["hash"]
        if not self.generation:
            return
        found: dict[str, Tensor] | None = None
        if self.writes:
            file = self._path(self.generation) / "pool.safetensors"
            if not file.is_file() or hash_file(file) != self.hash:
                raise BadInputError(
                    f"the negatives of generation {self.generation} are missing or were changed",
                    where=str(file),
                    hint="A checkpoint needs the pool that it was trained with. Start anew with --restart.",
                )
            found = load_file(file)
        arrays = {name: tensor.cpu().numpy() for name, tensor in broadcast_tensors(found, self.device)}
        self.candidates = Candidates(arrays["examples"], Lists(arrays["offsets"], arrays["negatives"]))
