"""MCSE (arXiv 2204.10931): SimCSE of texts, with captions grounded in the given features of their images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from nearfield.config import NotNegative, Positive
from nearfield.errors import BadInputError
from nearfield.objectives.batch import ContrastiveBatch, LossSum, Objective, accumulation_dtype, in_tiles
from nearfield.objectives.config import ANY_EXAMPLES, InfoNCEConfig, Names, ObjectiveSettings, Surroundings, by_number
from nearfield.objectives.diagnostics import watched_rows
from nearfield.provenance import derive_seed


class MCSEConfig(ObjectiveSettings):
    """SimCSE with captions that are grounded in the given features of their images (MCSE, arXiv 2204.10931)."""

    example_kinds: ClassVar[tuple[str, ...]] = ANY_EXAMPLES

    views: ClassVar[int] = 2
    kind: Literal["mcse"] = "mcse"
    temperature: Positive = 0.05
    """Cosines between texts are divided by it."""
    image_temperature: Positive = 0.05
    """Cosines of captions with images are divided by it."""
    weight: NotNegative = 0.01
    """The weight of grounding."""
    projection: Annotated[int, Field(gt=0)] = 256
    """Width of the heads of texts, captions and images; none is part of the saved model."""
    captions: tuple[str, ...] | None = None
    """Sources whose queries are captions; null takes every text with features that are not all 0."""

    @property
    def needs_guide(self) -> bool:
        return True

    @property
    def names_sources(self) -> bool:
        return self.captions is not None

    def build(self, sources: Names = (), around: Surroundings | None = None) -> MCSE:
        around = around or Surroundings()
        if around.width is None or around.guide_width is None:
            raise BadInputError("grounding wants the widths of embeddings and of images' features", where="objective")
        return MCSE(self, by_number(sources), around.width, around.guide_width)


class MCSE(Objective):
    """SimCSE of tanh(W embedding), plus weight x grounding: -log softmax of a caption's image among the batch's images,
    the mean over both passes of the text, captions and images each with a head of their own.

    Images with the same features are one image, and no negative of its captions. No gradient reaches the features. The heads
    are no part of the saved model.
    """

    def __init__(self, config: MCSEConfig, sources: Mapping[int, str], width: int, image_width: int) -> None:
        super().__init__()
        self.config = config
        missing = sorted(set(config.captions or ()) - set(sources.values()))
        if missing:
            known = ", ".join(sources.values()) or "none was given to the objective"
            raise BadInputError(
                f"there is no source {missing[0]!r}", where="objective.captions", hint=f"Sources: {known}."
            )
        self.captions = [number for number, name in sources.items() if name in (config.captions or ())]
        self.between_texts = InfoNCEConfig(temperature=config.temperature).build()
        with torch.random.fork_rng(devices=[]):
            # The same on all ranks, and when it is built again for a checkpoint.
            torch.manual_seed(derive_seed(0, "grounding"))
            self.text = nn.Linear(width, config.projection)
            self.caption = nn.Linear(width, config.projection)
            self.image = nn.Linear(image_width, config.projection)

    def forward(self, batch: ContrastiveBatch) -> LossSum:
        """The sum over this process's rows."""
        # Not by calling modules: ZeRO 3 would take their parameters away again behind the call.
        queries, documents = (self.text.forward(_sums(side)).tanh() for side in (batch.queries, batch.documents))
        between = self.between_texts.forward(replace(batch, queries=queries, documents=documents))
        grounded = self.grounding(batch)
        losses = self.config.weight * batch.weighed(grounded)
        return LossSum(between.total + losses.sum() + self.zero(), between.denominator, between.rows + losses.detach())

    def grounding(self, batch: ContrastiveBatch) -> Tensor:
        """(R,) of this process's rows; 0 for a row without an image."""
        rows = batch.local_rows()
        if batch.guide_queries is None:
            raise BadInputError(
                "grounding wants the features of each caption's image, and there are none",
                where="objective",
                hint="Name a 'guide' of kind vectors whose vectors of queries are those of their images.",
            )
        images = batch.guide_queries.detach().to(accumulation_dtype(batch.queries.dtype))
        has = images.isfinite().all(dim=1) & (images != 0).any(dim=1)
        if self.config.captions is not None:
            if batch.sources is None:
                raise BadInputError("captions want the source of each example", where="objective.captions")
            has &= torch.isin(batch.sources, torch.tensor(self.captions, device=has.device))
        captions = has.nonzero().squeeze(1)
        losses = images.new_zeros(len(rows))
        if not len(captions):
            return losses
        distinct, which = torch.unique(images[captions], dim=0, return_inverse=True)
        number = torch.full((len(has),), -1, dtype=torch.int64, device=has.device)
        number[captions] = which
        points = functional.normalize(self.image.forward(distinct).tanh(), dim=1)
        place = batch.row_places()
        mine = captions[place[captions] >= 0]
        seconds = (batch.is_positive & (place[batch.owner] >= 0) & has[batch.owner]).nonzero().squeeze(1)
        # Of a text that somehow stands with several, each pass counts its share.
        each = torch.bincount(batch.owner[seconds], minlength=len(has)).clamp_min(1)
        for vectors, owner, share in (
            (batch.queries[mine], mine, torch.full((len(mine),), 0.5, device=has.device)),
            (batch.documents[seconds], batch.owner[seconds], 0.5 / each[batch.owner[seconds]]),
        ):
            unit = functional.normalize(self.caption.forward(_sums(vectors)).tanh(), dim=1)
            of_pairs = self._softmax(unit, points, number[owner]) * share.to(unit.dtype)
            losses = losses.index_add(0, place[owner], of_pairs)
        # The mean over the captions of the batch, whatever else is in it.
        return losses * (len(batch.queries) / len(captions))

    def _softmax(self, unit: Tensor, points: Tensor, target: Tensor) -> Tensor:
        def part(some: Tensor) -> Tensor:
            logits = unit[some] @ points.T / self.config.image_temperature
            return functional.cross_entropy(logits, target[some], reduction="none")

        return in_tiles(part, torch.arange(len(unit), device=unit.device), len(points), unit)

    @torch.no_grad()
    def watch(self, batch: ContrastiveBatch) -> dict[str, float]:
        """Those of the softmax between texts, and ``grounding``, the mean loss of captions against images."""
        some = replace(batch, rows=watched_rows(batch))
        queries, documents = (self.text.forward(_sums(side)).tanh() for side in (batch.queries, batch.documents))
        figures = self.between_texts.watch(replace(batch, queries=queries, documents=documents))
        return {**figures, "grounding": float(self.grounding(some).mean())}


def _sums(vectors: Tensor) -> Tensor:
    return vectors.to(accumulation_dtype(vectors.dtype))
