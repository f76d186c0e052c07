"""Several objectives at once, each on the examples of its sources, with weights that may change over the run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from nearfield.errors import BadInputError
from nearfield.objectives.batch import ContrastiveBatch, LossSum, Objective
from nearfield.objectives.config import Surroundings

if TYPE_CHECKING:
    from nearfield.objectives.config import CombinedConfig, PartConfig


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
        from nearfield.objectives.diagnostics import watched_rows

        figures: dict[str, float] = {}
        for objective, name, weight, some, _ in self._batches(replace(batch, rows=None)):
            # Of the watched rows alone: all would be the work of the step once more.
            rows = objective.forward(replace(some, rows=watched_rows(some))).rows
            figures |= {f"loss/{name}": float(rows.mean()), f"weight/{name}": weight}
            for figure, value in objective.watch(some).items():
                figures[figure if figure not in figures else f"{figure}/{name}"] = value
        return figures
