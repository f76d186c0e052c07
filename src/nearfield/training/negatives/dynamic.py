"""Negatives that give way once the model no longer finds them hard (Conan-embedding, versions 1 and 2)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from nearfield.batching.plan import Batch
from nearfield.batching.rows import Rows
from nearfield.mining.config import DynamicNegatives
from nearfield.training.negatives.changing import NegativeInputs, Replacing
from nearfield.training.step import StepResult


def make_dynamic(
    inputs: NegativeInputs, config: DynamicNegatives, known_positives: Callable[[int], Rows], seed: int
) -> Dynamic:
    """The rule that the configuration names."""
    kind = BlockAtATime if config.rule == "conan_v1" else OneAtATime
    return kind(inputs, config, known_positives, seed)


class Dynamic(Replacing):
    """What both rules have in common: the scores of a step's negatives, and a place for each example."""

    looks_at_batches = True

    def __init__(
        self, inputs: NegativeInputs, config: DynamicNegatives, known_positives: Callable[[int], Rows], seed: int
    ) -> None:
        super().__init__(inputs, known_positives, seed)
        self.config = config
        self.count = len(inputs.candidates.examples)
        self.lengths = inputs.candidates.lists.lengths

    def observe(self, batch: Batch, step: int, result: StepResult) -> None:
        """Note the scores of the step's negatives, and replace what is due."""
        scores = negative_scores(result)
        places = self.inputs.candidates.places(batch.example)
        start = 0
        for place, negatives in zip(places.tolist(), batch.negatives, strict=True):
            if place >= 0 and len(negatives):
                self.note(place, negatives, scores[start : start + len(negatives)])
            start += len(negatives)
        self.replace(step + 1)

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
    found: np.ndarray[Any, Any] = scores.cpu().numpy()
    return found


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

    def load(self, saved: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
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

    def load(self, saved: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Put them back."""
        self.ranks[:] = tensors["ranks"].cpu().numpy()
        self.next[:] = tensors["next"].cpu().numpy()
