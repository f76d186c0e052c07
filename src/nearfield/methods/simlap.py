"""SimLAP, first called Hydra (arXiv 2410.18200): texts of different labels as positives, in a learnt subspace of the two labels."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from nearfield.config import NotNegative, Positive
from nearfield.errors import BadInputError
from nearfield.objectives.batch import ContrastiveBatch, in_tiles
from nearfield.objectives.config import Names, ObjectiveSettings, Surroundings
from nearfield.objectives.losses import LabelledTextLoss, labelled_texts
from nearfield.provenance import derive_seed


class SimLAPConfig(ObjectiveSettings):
    """Texts of different labels as positives in a learnt subspace of the two labels (Hydra, SimLAP; arXiv 2410.18200)."""

    example_kinds: ClassVar[tuple[str, ...]] = ("labelled",)

    kind: Literal["simlap"] = "simlap"
    temperature: Positive = 0.1
    """Gated cosines are divided by it."""
    partner: Literal["arbitrary", "identical", "distinct"] = "arbitrary"
    """A text's other label: of a drawn text of the batch, its own, or another one drawn evenly."""
    label_width: Annotated[int, Field(gt=0)] = 512
    """Numbers that each label is learnt as, for the gate."""
    hidden: Annotated[int, Field(gt=0)] = 1024
    """Width of the gate's inner layer."""
    project: Annotated[int, Field(ge=0)] = 256
    """Width of a head between embeddings and loss, which is no part of the saved model; 0 for none."""
    project_hidden: Annotated[int, Field(gt=0)] = 2048
    """Width of that head's inner layer."""
    probe: NotNegative = 1.0
    """The weight of the cross-entropy of a linear map from embeddings to labels."""
    probe_detached: bool = True
    """Whether the embeddings get no gradient from it."""

    def build(self, sources: Names = (), around: Surroundings | None = None) -> SimLAP:
        around = around or Surroundings()
        if not around.labels or around.width is None:
            raise BadInputError("gates want labels, and the width of embeddings", where="objective")
        return SimLAP(self, around.labels, around.width)


class SimLAP(LabelledTextLoss):
    """Text i with label y has a partner label y'; a gate of both weighs the dimensions in which i is compared.

    Positives of i are the texts of y', negatives those of neither label. Every positive has a denominator of its own,
    itself and the negatives; all pairs of the batch count alike. Beside it, the cross-entropy of a linear map from embeddings to
    labels, which embeddings get no gradient from unless asked.
    """

    def __init__(self, config: SimLAPConfig, labels: int, width: int) -> None:
        super().__init__()
        self.config = config
        with torch.random.fork_rng(devices=[]):
            # The same on all ranks, and when it is built again for a checkpoint.
            torch.manual_seed(derive_seed(0, "gates"))
            self.table = nn.Parameter(torch.randn(labels, config.label_width))
            self.first = nn.Linear(config.label_width, config.hidden)
            self.second = nn.Linear(config.hidden, config.project or width)
            self.probe = nn.Linear(width, labels)
            if config.project:
                self.project = nn.ModuleList([nn.Linear(width, config.project_hidden), nn.Linear(config.project_hidden, config.project), nn.LayerNorm(config.project)])  # fmt: skip

    def losses(self, vectors: Tensor, labels: Tensor, anchors: Tensor, batch: ContrastiveBatch) -> Tensor:
        config = self.config
        partners = self.partners(labels, batch.draw)
        gate = self.gates(labels, partners).square()
        points = self.projected(vectors)
        # Each pair counts alike, whichever row it is of: all processes know all labels.
        size = torch.bincount(labels, minlength=len(self.table))
        pairs = int((size[partners] - (labels == partners).long()).sum())
        numbers = torch.arange(len(points), device=points.device)

        def part(some: Tensor) -> Tensor:
            logits = gated_cosine(points[some], points, gate[some]) / config.temperature
            mine, other = labels[some][:, None], partners[some][:, None]
            positive = (labels[None, :] == other) & (some[:, None] != numbers[None, :])
            negative = (labels[None, :] != mine) & (labels[None, :] != other)
            lowest = torch.finfo(logits.dtype).min / 2
            summed = logits.masked_fill(~negative, lowest).logsumexp(dim=1)
            return torch.where(positive, functional.softplus(summed[:, None] - logits), 0).sum(dim=1)

        each = in_tiles(part, anchors, len(points), points) * (len(points) / max(1, pairs))
        if config.probe:
            seen = vectors.detach() if config.probe_detached else vectors
            # Not by calling modules: ZeRO 3 would take their parameters away again behind the call.
            logits = self.probe.forward(seen[anchors])
            each = each + config.probe * functional.cross_entropy(logits, labels[anchors], reduction="none")
        return each

    def partners(self, labels: Tensor, seed: int | None) -> Tensor:
        """(n,) the other label of each text: of a drawn text, its own, or a drawn other one; the same on all processes."""
        if self.config.partner == "identical":
            return labels
        generator = torch.Generator().manual_seed(derive_seed(seed or 0, "partners"))
        if self.config.partner == "arbitrary":
            return labels[torch.randperm(len(labels), generator=generator).to(labels.device)]
        step = torch.randint(1, max(2, len(self.table)), (len(labels),), generator=generator).to(labels.device)
        return (labels + step) % len(self.table)

    def gates(self, labels: Tensor, partners: Tensor) -> Tensor:
        """(n, w) in (0, 1), the same for both orders of two labels. Normalised over the texts of the global batch."""
        hidden = (self.table[labels] + self.table[partners]) / 2
        hidden = self.first.forward(_normal(hidden.relu()))
        return self.second.forward(_normal(hidden.relu())).sigmoid()

    def projected(self, vectors: Tensor) -> Tensor:
        """The space of the loss: a head that is no part of the model, where there is one."""
        if not self.config.project:
            return vectors
        first, second, norm = self.project
        assert isinstance(first, nn.Linear) and isinstance(second, nn.Linear) and isinstance(norm, nn.LayerNorm)
        return norm.forward(second.forward(first.forward(vectors).relu()))

    @torch.no_grad()
    def watch(self, batch: ContrastiveBatch) -> dict[str, float]:
        """``probe_accuracy`` of the linear map, on the texts before they are learnt from; ``gate``, the mean of gates."""
        texts, labels, _ = labelled_texts(batch)
        vectors = torch.cat([batch.queries, batch.documents])[texts]
        right = self.probe.forward(vectors).argmax(dim=1) == labels
        gates = self.gates(labels, self.partners(labels, batch.draw))
        return {"probe_accuracy": float(right.double().mean()), "gate": float(gates.mean())} if len(labels) else {}


def gated_cosine(rows: Tensor, columns: Tensor, squared: Tensor) -> Tensor:
    """(a, w), (n, w) vectors and (a, w) squared gates of the rows -> (a, n) cosines of gated vectors, by two products."""
    left = rows * squared
    row_norm = (left * rows).sum(dim=1).clamp_min(1e-24)
    other = (squared @ columns.square().T).clamp_min(1e-24)
    return left @ columns.T / (row_norm[:, None] * other).sqrt()


def _normal(values: Tensor) -> Tensor:
    """Batch normalisation by the batch's own moments; of one line, itself less its mean."""
    centred = values - values.mean(dim=0)
    return centred / (centred.square().mean(dim=0) + 1e-5).sqrt()
