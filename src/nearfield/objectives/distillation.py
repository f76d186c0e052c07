"""Learning from a teacher: its scores of documents, or its embeddings."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from nearfield.errors import BadInputError
from nearfield.objectives.batch import ContrastiveBatch, LossSum, Objective, own_documents, own_triples, row_mean
from nearfield.objectives.blocks import accumulation_dtype, in_tiles
from nearfield.objectives.statistics import segment_log_sum

if TYPE_CHECKING:
    from nearfield.objectives.config import ScoreDistillationConfig


def guide_vectors(batch: ContrastiveBatch) -> tuple[Tensor, Tensor]:
    """The teacher's vectors of queries and documents."""
    if batch.guide_queries is None or batch.guide_documents is None:
        raise BadInputError(
            "distillation wants a teacher's vectors of the batch, and there are none",
            where="objective",
            hint="Name a 'guide' in the recipe, or give guide_queries and guide_documents.",
        )
    dtype = accumulation_dtype(batch.queries.dtype)
    return batch.guide_queries.to(dtype), batch.guide_documents.to(dtype)


class ScoreDistillation(Objective):
    """KL(teacher || student) over a query's candidates, or MarginMSE (Hofstaetter et al. 2020, arXiv 2010.02666).

    The gradient of ``kl`` with respect to the student's scores is (P_student - P_teacher) / temperature. As
    sentence-transformers' ``DistillKLDivLoss`` without its factor temperature^2, and its ``MarginMSELoss``. Documents
    without a teacher's score are no candidates; a query with fewer than two has loss 0.
    """

    def __init__(self, config: ScoreDistillationConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self, batch: ContrastiveBatch) -> LossSum:
        """The sum over this process's rows."""
        with torch.autocast(batch.queries.device.type, enabled=False):
            if self.config.loss == "margin_mse":
                losses = self._margins(batch)
            elif self.config.candidates == "own":
                losses = self._own(batch)
            else:
                losses = self._in_batch(batch)
        losses = batch.weighed(losses)
        return LossSum(losses.sum(), batch.denominator(), losses.detach())

    def _unit(self, vectors: Tensor) -> Tensor:
        vectors = vectors.to(accumulation_dtype(vectors.dtype))
        return functional.normalize(vectors, dim=1) if self.config.similarity == "cosine" else vectors

    def _student(self, batch: ContrastiveBatch, queries: Tensor, documents: Tensor) -> Tensor:
        return (self._unit(batch.queries[queries]) * self._unit(batch.documents[documents])).sum(dim=1)

    def _teacher(self, batch: ContrastiveBatch, queries: Tensor, documents: Tensor) -> Tensor:
        """(n,) scores of pairs; a document's own query alone has one with ``scores``."""
        if self.config.teacher == "vectors":
            left, right = guide_vectors(batch)
            return (left[queries] * right[documents]).sum(dim=1)
        if batch.teacher_scores is None:
            raise BadInputError(
                "distillation wants a teacher's scores of the batch, and there are none",
                where="objective",
                hint="Add 'mining' to the recipe, whose teacher scores what it mines, or use teacher: vectors.",
            )
        return batch.teacher_scores[documents].to(accumulation_dtype(batch.queries.dtype))

    def _margins(self, batch: ContrastiveBatch) -> Tensor:
        rows = batch.local_rows()
        positives, negatives, row = own_triples(batch)
        queries = rows[row]
        wanted = self._teacher(batch, queries, positives) - self._teacher(batch, queries, negatives)
        known = wanted.isfinite()
        positives, negatives, row, queries = positives[known], negatives[known], row[known], queries[known]
        margin = self._student(batch, queries, positives) - self._student(batch, queries, negatives)
        return row_mean((margin - wanted[known]).square(), row, len(rows))

    def _own(self, batch: ContrastiveBatch) -> Tensor:
        rows = batch.local_rows()
        documents, row = own_documents(batch)
        scores = self._teacher(batch, rows[row], documents)
        known = scores.isfinite()
        documents, row, scores = documents[known], row[known], scores[known]
        student = self._student(batch, rows[row], documents) / self.config.temperature
        teacher = scores / (self.config.teacher_temperature or self.config.temperature)
        student = student - segment_log_sum(student[None], row, len(rows))[0][row]
        teacher = teacher - segment_log_sum(teacher[None], row, len(rows))[0][row]
        each = teacher.exp() * (teacher - student)
        return each.new_zeros(len(rows)).index_add(0, row, each)

    def _in_batch(self, batch: ContrastiveBatch) -> Tensor:
        rows = batch.local_rows()
        documents = self._unit(batch.documents)
        left, right = guide_vectors(batch)

        def part(some: Tensor) -> Tensor:
            student = (self._unit(batch.queries[some]) @ documents.T / self.config.temperature).log_softmax(dim=1)
            teacher = left[some] @ right.T / (self.config.teacher_temperature or self.config.temperature)
            return functional.kl_div(student, teacher.log_softmax(dim=1), reduction="none", log_target=True).sum(dim=1)

        return in_tiles(part, rows, len(documents), documents)


class EmbeddingDistillation(Objective):
    """The distance of embeddings to the teacher's, the mean over a row's texts, as sentence-transformers' ``EmbedDistillLoss``.

    A text of a row is its query, or one of its documents.
    """

    def __init__(
        self,
        distance: Literal["mse", "l2", "cosine"],
        project: bool,
        width: int | None = None,
        guide_width: int | None = None,
    ) -> None:
        super().__init__()
        self.distance = distance
        if project and (width is None or guide_width is None):
            raise BadInputError("a projection wants to know both widths", where="objective.projection")
        if width is not None and guide_width is not None and (project or width != guide_width):
            with torch.random.fork_rng(devices=[]):
                # The same on all ranks, and when it is built again for a checkpoint.
                torch.manual_seed(0)
                self.projection: nn.Linear | None = nn.Linear(width, guide_width)
        else:
            self.projection = None

    def forward(self, batch: ContrastiveBatch) -> LossSum:
        """The sum over this process's rows."""
        rows = batch.local_rows()
        left, right = guide_vectors(batch)
        documents, row = own_documents(batch)
        with torch.autocast(batch.queries.device.type, enabled=False):
            embeddings = torch.cat([batch.queries[rows], batch.documents[documents]])
            wanted = torch.cat([left[rows], right[documents]])
            row = torch.cat([torch.arange(len(rows), device=row.device), row])
            losses = batch.weighed(row_mean(self._distances(embeddings, wanted), row, len(rows)))
        return LossSum(losses.sum(), batch.denominator(), losses.detach())

    def _distances(self, embeddings: Tensor, wanted: Tensor) -> Tensor:
        if self.projection is not None:
            # Not by calling the module: ZeRO 3 would take its parameters away again behind the call.
            embeddings = self.projection.forward(embeddings)
        if embeddings.shape[1] != wanted.shape[1]:
            raise BadInputError(
                f"embeddings of {embeddings.shape[1]} dimensions cannot be a teacher's of {wanted.shape[1]}",
                where="objective.projection",
            )
        if self.distance == "mse":
            return (embeddings - wanted).square().mean(dim=1)
        if self.distance == "l2":
            # Not by a root of squares, whose slope at 0 is not a number.
            distances: Tensor = torch.linalg.vector_norm(embeddings - wanted, dim=1)
            return distances
        return 1 - functional.cosine_similarity(embeddings, wanted, dim=1)
