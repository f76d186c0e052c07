"""The core losses beside InfoNCE.

Of single pairs and triplets: graded pairs, a margin between two documents, a binary decision for each pair. Of labelled texts:
supervised contrast. Of a teacher: its scores of documents, or its embeddings. And several objectives at once.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from nearfield.errors import BadInputError
from nearfield.objectives.batch import (
    ContrastiveBatch,
    LossSum,
    Objective,
    accumulation_dtype,
    in_tiles,
    own_documents,
    own_triples,
    row_mean,
    segment_log_sum,
)
from nearfield.objectives.diagnostics import watched_rows
from nearfield.objectives.statistics import Join

if TYPE_CHECKING:
    from nearfield.objectives.config import (
        CombinedConfig,
        PartConfig,
        ScoreDistillationConfig,
        SigLIPConfig,
        Surroundings,
    )


def graded_pairs(batch: ContrastiveBatch) -> tuple[Tensor, Tensor, Tensor]:
    """(n,) queries and (n,) documents of the global batch that have a score, and (n,) their scores."""
    if batch.scores is None:
        raise BadInputError(
            "this objective wants a score of each pair, and the batch has none",
            where="objective",
            hint="Give it sources of graded examples.",
        )
    documents = (batch.is_positive & batch.scores.isfinite()[batch.owner]).nonzero().squeeze(1)
    owner = batch.owner[documents]
    return owner, documents, batch.scores[owner]


class Ranking(Objective):
    """CoSENT (sentence-transformers' ``CoSENTLoss``) of one of its similarities, or of AnglE's (``AnglELoss``).

    ``log(1 + sum exp((s_b - s_a) / temperature))`` over pairs a, b of the global batch whose scores say a > b, by sorting: no
    matrix of pairs. It is no sum over rows: each process computes all of it and counts its share of the rows.
    """

    def __init__(
        self, similarity: Literal["cosine", "dot", "euclidean", "manhattan", "angle"], temperature: float
    ) -> None:
        super().__init__()
        from sentence_transformers import SimilarityFunction
        from sentence_transformers.sentence_transformer.losses import AnglELoss, CoSENTLoss

        # The model is the caller's: only the class's function of embeddings is used.
        model: Any = None
        if similarity == "angle":
            self._loss = AnglELoss(model, scale=1 / temperature)
        else:
            pairwise = SimilarityFunction.to_similarity_pairwise_fn(similarity)
            self._loss = CoSENTLoss(model, scale=1 / temperature, similarity_fct=pairwise)

    def forward(self, batch: ContrastiveBatch) -> LossSum:
        """The loss of the global batch times this process's share of its rows."""
        owner, documents, scores = graded_pairs(batch)
        if batch.weights is not None and bool((batch.weights[owner] != 1).any()):
            raise BadInputError(
                "a loss of the order of pairs has no weights of examples",
                where="objective",
                hint="Remove the 'weight' of the graded source; those of other sources may stay.",
            )
        # All rows count alike, whatever the other sources' weights are.
        rows = len(batch.local_rows())
        if not len(owner):
            nothing = batch.queries.sum() * 0
            return LossSum(nothing, float(len(batch.queries)) or 1.0, nothing.detach().expand(rows))
        with torch.autocast(batch.queries.device.type, enabled=False):
            pair = [batch.queries[owner], batch.documents[documents]]
            loss = self._loss.compute_loss_from_embeddings(pair, scores)
        return LossSum(loss * rows, float(len(batch.queries)) or 1.0, loss.detach().expand(rows))


class CosineRegression(Objective):
    """(cosine - score)^2, as sentence-transformers' ``CosineSimilarityLoss``; it rounds scores to float32, this does not."""

    def forward(self, batch: ContrastiveBatch) -> LossSum:
        """The sum over this process's rows."""
        owner, documents, scores = graded_pairs(batch)
        row = batch.row_places()[owner]
        mine = row >= 0
        owner, documents, row = owner[mine], documents[mine], row[mine]
        cosine = functional.cosine_similarity(batch.queries[owner], batch.documents[documents])
        each = (cosine - scores[mine].to(cosine.dtype)).square()
        rows = batch.local_rows()
        losses = batch.weighed(each.new_zeros(len(rows)).index_add(0, row, each))
        return LossSum(losses.sum(), batch.denominator(), losses.detach())


class Triplet(Objective):
    """max(0, d(query, positive) - d(query, negative) + margin), the mean over a row's triplets; 0 for a row of none.

    The distances are those of sentence-transformers' ``TripletLoss``, and the dot product with its sign turned.
    """

    def __init__(self, distance: Literal["cosine", "dot", "euclidean", "manhattan"], margin: float) -> None:
        super().__init__()
        from sentence_transformers.sentence_transformer.losses import TripletDistanceMetric

        self.margin = margin
        named = {
            each.upper(): getattr(TripletDistanceMetric, each.upper()) for each in ("cosine", "euclidean", "manhattan")
        }
        self._distance = _minus_dot if distance == "dot" else named[distance.upper()]

    def forward(self, batch: ContrastiveBatch) -> LossSum:
        """The sum over this process's rows."""
        rows = batch.local_rows()
        positives, negatives, row = own_triples(batch)
        queries = batch.queries[rows[row]]
        with torch.autocast(batch.queries.device.type, enabled=False):
            near = self._distance(queries, batch.documents[positives])
            far = self._distance(queries, batch.documents[negatives])
            losses = batch.weighed(row_mean((near - far + self.margin).relu(), row, len(rows)))
        return LossSum(losses.sum(), batch.denominator(), losses.detach())


def _minus_dot(left: Tensor, right: Tensor) -> Tensor:
    return -(left * right).sum(dim=1)


class SigLIP(Objective):
    """A binary decision for each query and document (Zhai et al. 2023, arXiv 2303.15343).

    Of a query the sum over all documents of -log sigmoid(z (cosine / temperature + bias)), z = 1 for its own positives
    and -1 for all others. No softmax: a document's part does not depend on the others."""

    def __init__(self, config: SigLIPConfig) -> None:
        super().__init__()
        self.config = config
        # Of one dimension: sharding backends do not take a scalar.
        self.log_temperature = nn.Parameter(torch.tensor([math.log(config.temperature)]))
        self.bias = nn.Parameter(torch.tensor([config.bias]))

    def forward(self, batch: ContrastiveBatch) -> LossSum:
        """The sum over this process's rows."""
        rows = batch.local_rows()
        with torch.autocast(batch.queries.device.type, enabled=False):
            dtype = accumulation_dtype(batch.queries.dtype)
            documents = functional.normalize(batch.documents.to(dtype), dim=1)
            losses = in_tiles(lambda some: self._rows(batch, documents, some), rows, len(documents), documents)
            losses = batch.weighed(losses)
        return LossSum(losses.sum(), batch.denominator(), losses.detach())

    def _rows(self, batch: ContrastiveBatch, documents: Tensor, rows: Tensor) -> Tensor:
        unit = functional.normalize(batch.queries[rows].to(documents.dtype), dim=1)
        logits = unit @ documents.T * (-self.log_temperature).exp() + self.bias
        is_own = (batch.owner[None, :] == rows[:, None]) & batch.is_positive[None, :]
        losses = -functional.logsigmoid(torch.where(is_own, logits, -logits))
        if self.config.mask_known_positives:
            known = Join(batch.known_positives[rows], batch.document_ids[:, None], tile=max(1, len(documents)))
            out = torch.zeros_like(is_own)
            out[known.cells(0, len(rows), 0)] = True
            losses = losses.masked_fill(out & ~is_own, 0)
        return losses.sum(dim=1)

    def watch(self, batch: ContrastiveBatch) -> dict[str, float]:
        """The learnt temperature and bias."""
        return {"temperature": float(self.log_temperature.exp()), "bias": float(self.bias)}


class LabelledTextLoss(Objective):
    """A loss of each labelled text; the mean over the texts of the global batch, each row's share in its sum.

    The texts are the queries and the documents that have a label: those of ``document_labels``, or a query's positives, which
    bear its label. A text that stands twice (in a batch of the planner as one's query and another's positive) counts
    once, where it first stands.
    """

    views = False
    """Whether the texts are both views of each query, rather than each distinct text once."""

    def forward(self, batch: ContrastiveBatch) -> LossSum:
        """The sum over this process's rows."""
        texts, labels, owner = labelled_views(batch) if self.views else labelled_texts(batch)
        rows = batch.local_rows()
        place = batch.row_places()
        anchors = (place[owner] >= 0).nonzero().squeeze(1)
        with torch.autocast(batch.queries.device.type, enabled=False):
            vectors = torch.cat([batch.queries, batch.documents])[texts]
            vectors = vectors.to(accumulation_dtype(vectors.dtype))
            each = self.losses(vectors, labels, anchors, batch)
            # Rows have different numbers of texts, and the caller divides by the rows.
            share = len(batch.queries) / max(1, len(texts))
            losses = batch.weighed(each.new_zeros(len(rows)).index_add(0, place[owner[anchors]], each * share))
        return LossSum(losses.sum() + self.zero(vectors), batch.denominator(), losses.detach())

    @abstractmethod
    def losses(self, vectors: Tensor, labels: Tensor, anchors: Tensor, batch: ContrastiveBatch) -> Tensor:
        """(n, d) texts, (n,) their labels, (a,) which of them are this process's -> (a,) losses of these."""


class SupCon(LabelledTextLoss):
    """Supervised contrast (Khosla et al. 2020, arXiv 2004.11362): the mean over the other texts of an anchor's label of -log
    softmax among all other texts. An anchor whose label nobody else has, has loss 0."""

    def __init__(self, temperature: float, inverse: bool = False) -> None:
        super().__init__()
        self.temperature = temperature
        self.inverse = inverse

    def losses(self, vectors: Tensor, labels: Tensor, anchors: Tensor, batch: ContrastiveBatch) -> Tensor:
        unit = functional.normalize(vectors, dim=1)
        each = in_tiles(lambda some: self._anchors(unit, labels, some), anchors, len(unit), unit)
        return each * self._class_weights(labels).to(each.dtype)[anchors] if self.inverse else each

    def _anchors(self, unit: Tensor, labels: Tensor, anchors: Tensor) -> Tensor:
        logits = unit[anchors] @ unit.T / self.temperature
        itself = anchors[:, None] == torch.arange(len(unit), device=anchors.device)
        log = logits.masked_fill(itself, torch.finfo(logits.dtype).min / 2).log_softmax(dim=1)
        positive = (labels[anchors][:, None] == labels[None, :]) & ~itself
        count = positive.sum(dim=1)
        losses: Tensor = -torch.where(positive, log, 0).sum(dim=1) / count.clamp_min(1)
        return losses

    @staticmethod
    def _class_weights(labels: Tensor) -> Tensor:
        """(n,) one over the size of each text's class in the batch, with a mean of 1."""
        weights: Tensor = 1 / torch.bincount(labels)[labels].double()
        return weights / weights.mean()


def labelled_texts(batch: ContrastiveBatch) -> tuple[Tensor, Tensor, Tensor]:
    """Texts with a label, each once: (n,) places among queries and then documents, (n,) labels, (n,) whose row they are of."""
    if batch.labels is None:
        raise BadInputError(
            "this objective wants a label of each example, and the batch has none",
            where="objective",
            hint="Give it sources of labelled examples, and batches of one source.",
        )
    documents = batch.document_labels
    if documents is None:
        documents = torch.where(batch.is_positive, batch.labels[batch.owner], -1)
    labels = torch.cat([batch.labels, documents])
    numbers = torch.arange(len(batch.queries), device=labels.device)
    owner = torch.cat([numbers, batch.owner])
    texts = (labels >= 0).nonzero().squeeze(1)
    if batch.query_ids is not None:
        ids = torch.cat([batch.query_ids, batch.document_ids])[texts]
        order = torch.argsort(ids, stable=True)
        first = torch.ones_like(order, dtype=torch.bool)
        first[order[1:]] = ids[order][1:] != ids[order][:-1]
        texts = texts[first]
    return texts, labels[texts], owner[texts]


def labelled_views(batch: ContrastiveBatch) -> tuple[Tensor, Tensor, Tensor]:
    """Both views of the labelled queries, the query and its first positive, as :func:`labelled_texts` has its texts.

    The first half are the queries; the other view of text t of n is text (t + n / 2) modulo n.
    """
    labelled_texts(batch)  # complains where there are no labels
    assert batch.labels is not None
    size = len(batch.queries)
    positives = batch.is_positive.nonzero().squeeze(1).flip(0)
    first = torch.full((size,), -1, dtype=torch.int64, device=batch.owner.device)
    first = first.scatter_reduce(0, batch.owner[positives], positives, "amin", include_self=False)
    rows = ((batch.labels >= 0) & (first >= 0)).nonzero().squeeze(1)
    labels = batch.labels[rows]
    return torch.cat([rows, size + first[rows]]), torch.cat([labels, labels]), torch.cat([rows, rows])


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


class Combined(Objective):
    """The sum of weight x mean loss over the parts, each of its own sources' examples in the batch.

    An objective for retrieval and one for graded pairs in batches of both is Conan's joint loss (arXiv 2408.15710);
    InfoNCE with and without in-batch negatives for different sources is NV-Embed's switch (arXiv 2405.17428).
    """

    def __init__(self, config: CombinedConfig, sources: Mapping[int, str], around: Surroundings | None) -> None:
        super().__init__()
        self.config = config
        self.names = dict(sources)
        self.parts: list[tuple[PartConfig, str, set[int] | None]] = []
        built: list[Objective] = []
        kinds = around.kinds if around is not None else {}
        for part in config.parts:
            names = part.sources
            if names is None and kinds:
                names = tuple(name for name, kind in kinds.items() if part.takes(name, kind))
            missing = sorted(set(names or ()) - set(sources.values()))
            if missing:
                known = ", ".join(sources.values()) or "none was given to the objective"
                raise BadInputError(f"there is no source {missing[0]!r}", where="objective", hint=f"Sources: {known}.")
            numbers = None if names is None else {number for number, name in sources.items() if name in names}
            self.parts.append((part, self._name(part), numbers))
            built.append(part.objective.build(sources, around))
        self.objectives = nn.ModuleList(built)
        self.wants_tokens = any(objective.wants_tokens for objective in built)

    def _name(self, part: PartConfig) -> str:
        name = part.name or part.objective.kind
        taken = {known for _, known, _ in self.parts}
        return name if name not in taken else next(f"{name}-{n}" for n in range(2, 100) if f"{name}-{n}" not in taken)

    def _batches(
        self, batch: ContrastiveBatch
    ) -> Iterator[tuple[Objective, str, float, ContrastiveBatch, torch.Tensor]]:
        """The parts that count in this batch: objective, name, weight, examples and which they are."""
        for objective, (part, name, numbers) in zip(self.objectives, self.parts, strict=True):
            assert isinstance(objective, Objective)
            weight = part.weight_at(batch.progress)
            if numbers is None and not part.each_source:
                wanted = [(name, torch.ones(len(batch.queries), dtype=torch.bool, device=batch.queries.device))]
            elif batch.sources is None:
                raise BadInputError("parts of an objective want the source of each example", where="objective.parts")
            else:
                mine = sorted(self.names if numbers is None else numbers)
                groups = [(f"{name}/{self.names[n]}", [n]) for n in mine] if part.each_source else [(name, mine)]
                wanted = [
                    (each, torch.isin(batch.sources, torch.tensor(of, device=batch.sources.device)))
                    for each, of in groups
                ]
            for each, keep in wanted:
                if weight and bool(keep.any()):
                    yield objective, each, weight, batch.select(keep), keep

    def forward(self, batch: ContrastiveBatch) -> LossSum:
        """This process's share of the weighted sum; the denominator is that of the whole batch."""
        rows, denominator = batch.local_rows(), batch.denominator()
        total = self.zero(batch.queries, batch.documents)
        losses = batch.queries.new_zeros(len(rows))
        for objective, _, weight, some, keep in self._batches(batch):
            # Not by calling the module: ZeRO 3 would take its parameters away again behind the call.
            loss: LossSum = objective.forward(some)
            factor = weight * denominator / loss.denominator
            total = total + loss.total * factor
            losses = losses.index_add(0, keep[rows].nonzero().squeeze(1), loss.rows.to(losses.dtype) * factor)
        return LossSum(total, denominator, losses.detach())

    def watch(self, batch: ContrastiveBatch) -> dict[str, float]:
        """The parts' figures; ``loss/<part>`` and ``weight/<part>``; a figure that several have is ``<figure>/<part>`` after
        the first."""
        figures: dict[str, float] = {}
        for objective, name, weight, some, _ in self._batches(replace(batch, rows=None)):
            # Of the watched rows alone: all would be the work of the step once more.
            rows = objective.forward(replace(some, rows=watched_rows(some))).rows
            figures |= {f"loss/{name}": float(rows.mean()), f"weight/{name}": weight}
            for figure, value in objective.watch(some).items():
                figures[figure if figure not in figures else f"{figure}/{name}"] = value
        return figures
