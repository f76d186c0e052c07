"""What a step runs on: the model and its objective on the devices at hand, and how items become what it takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from nearfield.batching.plan import Batch
from nearfield.batching.planner import Rows
from nearfield.data.tokens import IMAGE
from nearfield.encoders.one_tower import family_of, picture_token
from nearfield.encoders.packing import Features, PackingKind, Padding, embed, packed_features
from nearfield.encoders.token_task import TARGETS, TokenTask
from nearfield.encoders.towers import pictured_features
from nearfield.errors import BadInputError
from nearfield.objectives.objective import Objective
from nearfield.objectives.queue import MemoryQueue
from nearfield.training.backends.base import Backend
from nearfield.training.chunks import Bools, Cut, Pool
from nearfield.training.feed import Feed
from nearfield.training.launch import Launch
from nearfield.training.step import MakeFeatures, Work, cut_work

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

Tokens = np.ndarray[tuple[int], np.dtype[np.int32]]


class EmbeddingModule(nn.Module):
    """The encoder and what the objective learns, in one module, so that all parameters are treated alike."""

    def __init__(self, encoder: SentenceTransformer, objective: nn.Module, token_task: TokenTask | None = None) -> None:
        super().__init__()
        self.encoder = encoder
        self.objective = objective
        self.token_task = token_task

    def forward(self, features: Features) -> Tensor:
        """Features of n texts, padded or packed -> (n, d) embeddings, and losses of tokens where features have targets."""
        if self.token_task is not None and TARGETS in features:
            rows: Tensor = self.token_task.forward(self.encoder, features)
            return rows
        embeddings: Tensor = embed(self.encoder, features)
        return embeddings


@dataclass
class Engine:
    """A backend with what it takes to feed it."""

    backend: Backend
    encoder: SentenceTransformer
    objective: Objective
    launch: Launch
    feed: Feed
    packing: PackingKind | None
    """How texts are packed, none where they are padded."""
    by_prompt: bool
    """Whether a chunk must have one prompt, since the pooling leaves it out."""
    dimension: int
    queue: MemoryQueue | None = None
    """Positives of earlier steps, where the objective asks for them."""
    ring: bool = False
    """Whether ranks pass their parts round instead of gathering them."""

    @property
    def columns(self) -> int:
        """The width of what the module gives for each text in a step: its embedding, and losses of its tokens."""
        return self.dimension + (0 if self.feed.token_task is None else self.feed.token_task.columns)

    @property
    def retries_in_place(self) -> bool:
        """Whether a step that ran out of memory can be told to the other ranks and repeated: not where its parts wait for each
        other."""
        return self.backend.retries_in_place and not self.ring

    @property
    def padded(self) -> bool:
        """Whether chunks are padded rectangles."""
        return self.packing is None

    @cached_property
    def padding(self) -> Padding:
        """How texts are padded."""
        return Padding.of(self.encoder)

    def backend_parameters(self) -> list[nn.Parameter]:
        """The parameters that are trained, whole or in the shards that this rank holds."""
        return [p for p in self.backend.module.parameters() if p.requires_grad]

    def lengths(self, pool: Pool) -> Rows:
        """(n,) tokens of the pool's texts; where all are padded to one width, that."""
        lengths = np.zeros(len(pool.items), dtype=np.int64)
        for prompt in np.unique(pool.prompts):
            mine = pool.prompts == prompt
            lengths[mine] = self.feed.tokens.tables[int(prompt)].lengths(pool.items[mine])
        width = self.padding.width if self.padded else None
        if width is not None:
            images = self.images(pool)
            lengths = np.where(np.False_ if images is None else images, lengths, np.maximum(lengths, width))
        return lengths

    def images(self, pool: Pool, *, apart: bool = False) -> Bools | None:
        """(n,) which items of the pool go through layers that texts do not; none where a chunk may hold both.

        ``apart`` keeps them apart where one transformer reads both, too.
        """
        if self.feed.pictures is None:
            return None
        found = np.zeros(len(pool.items), dtype=bool)
        for prompt in np.unique(pool.prompts):
            mine, table = np.flatnonzero(pool.prompts == prompt), self.feed.tokens.tables[int(prompt)]
            found[mine] = self.go_apart([table.tokens(int(item)) for item in pool.items[mine]], apart=apart)
        return found

    def go_apart(self, rows: Sequence[Tokens], *, apart: bool = False) -> Bools:
        """(n,) which items, by their tokens, go through layers that others do not and may share no chunk with them."""
        apart = self.feed.pictures is not None and (apart or self.towers or self.level)
        return np.asarray([apart and self._has_picture(row) for row in rows], dtype=bool)

    @property
    def towers(self) -> bool:
        """Whether pictures go through a tower of their own, where there are some."""
        return family_of(self.encoder) is None

    @property
    def level(self) -> bool:
        """Whether all ranks must go through the same layers at once."""
        return self.backend.same_chunk_count

    def work(
        self, batch: Batch, known_positives: Callable[[int], Rows], cut: Cut, *, first_number: int = 0
    ) -> tuple[Work, Rows]:
        """A planned batch cut into chunks and dealt to ranks, and the tokens of its texts."""
        pool = self.pool(batch)
        lengths = self.lengths(pool)
        known = [known_positives(int(query)) for query in batch.query]
        work = cut_work(
            pool,
            lengths,
            known,
            cut=cut,
            padded=self.padded,
            by_prompt=self.by_prompt,
            images=self.images(pool, apart=cut.apart),
            level=self.level,
            rank=self.launch.rank,
            world_size=self.launch.world_size,
            first_number=first_number,
            guide=self.feed.guide,
            queue=None if self.queue is None else self.queue.queued(),
            ring=self.ring,
        )
        return work, lengths

    def pool(self, batch: Batch) -> Pool:
        """The texts of a planned batch, with what its examples count."""
        pool = self.feed.pool(batch)
        if not self.objective.wants_tokens:
            return pool
        if any(map(self._has_picture, self.feed.tokens_of(pool, pool.queries))):
            raise BadInputError("this objective decodes texts, and some queries are pictures", where="objective")
        return self.feed.with_query_tokens(pool)

    def make_features(self, pool: Pool, seed: int = 0, step: int = 0) -> MakeFeatures:
        """The function that turns a chunk of a pool into features; which tokens are hidden depends on seed, step and text."""
        queries = np.zeros(len(pool.items), dtype=bool)
        queries[pool.queries] = True

        def features(chunk: Rows) -> Features:
            rows = [self.feed.tokens.tables[int(pool.prompts[i])].tokens(int(pool.items[i])) for i in chunk]
            prompt_length = self.feed.tokens.tables[int(pool.prompts[chunk[0]])].prompt_length
            if pool.deleted is not None:
                rows = [
                    row if self._has_picture(row) else delete_tokens(row, share, prompt_length)
                    for row, share in zip(rows, pool.deleted[chunk].tolist(), strict=True)
                ]
            if self.feed.token_task is None:
                return self.item_features(pool.items[chunk], rows, prompt_length)
            keys = [(seed, step, int(pool.items[i]), int(pool.prompts[i])) for i in chunk]
            side = self.encoder.tokenizer.padding_side if self.padded else "right"
            device, chosen = self.backend.device, queries[chunk].tolist()
            read, targets = self.feed.token_task.hide(rows, keys, chosen, prompt_length, side, device)
            return {**self.features(read, prompt_length), TARGETS: targets}

        return features

    def _has_picture(self, row: Tokens) -> bool:
        """Whether this is the entry of a picture in the token cache, or of a text with one."""
        if self.feed.pictures is None:
            return False
        if self.towers:
            return bool(row[0] == IMAGE)
        return bool((row == picture_token(self.encoder)).any())

    def item_features(self, items: Rows, rows: list[Tokens], prompt_length: int) -> Features:
        """Items of a chunk with what the token cache says of them -> what the encoder takes."""
        pictures = self.feed.pictures
        if pictures is not None:
            found = pictured_features(self.encoder, rows, lambda: pictures(items), self.backend.device)
            if found is not None:
                return found
        return self.features(rows, prompt_length)

    def features(self, rows: list[Tokens], prompt_length: int) -> Features:
        """Token ids of texts -> what the encoder takes."""
        device = self.backend.device
        if self.packing is not None and any(map(len, rows)):
            return packed_features(rows, kind=self.packing, device=device, prompt_length=prompt_length)
        return self.padding.features(rows, device, prompt_length)


def delete_tokens(row: Tokens, share: float, prompt_length: int) -> Tokens:
    """A text without some of its tokens, each deleted with the chance ``share``; its prompt, its first and its last token stay.

    What is drawn follows from torch's global generator, which a step seeds for each chunk: a second encoding draws the same.
    """
    kept = torch.rand(len(row)).numpy() >= share
    kept[: max(1, prompt_length)] = True
    kept[-1:] = True
    return row[kept]
