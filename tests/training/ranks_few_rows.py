"""Run as a script: every objective on several ranks whose batches have few rows, against one process that has them all.

``ranks_few_rows.py OUT RANKS ROWS`` (numbers, joined by commas): OUT gets a JSON object of objective and exchange -> what went wrong, empty strings where nothing
did. The ranks are forks of one process, since a start costs seconds of imports.
"""

from __future__ import annotations

import json
import math
import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from nearfield.arrays import Rows
from nearfield.conformance.cases import OBJECTIVES
from nearfield.objectives import InfoNCEConfig, ObjectiveSettings
from nearfield.objectives.config import Surroundings
from nearfield.objectives.diagnostics import watch
from nearfield.objectives.infonce import can_ring
from nearfield.training.chunks import Shares, TextPool
from nearfield.training.step import Gathered, Passed

WIDTH, GUIDE, TOKENS = 16, 5, 4
AROUND = Surroundings(
    width=WIDTH, guide_width=GUIDE, labels=3, label_names=[("s", f"{n % 2}/{n}") for n in range(3)], vocabulary=7
)


def make_pool(rows: int, random: np.random.Generator, token_columns: int) -> TextPool:
    """Queries with a positive and two negatives each, and all that an objective may ask for."""
    owner = np.repeat(np.arange(rows), 3)
    return TextPool(
        items=np.arange(4 * rows),
        prompts=np.zeros(4 * rows, dtype=np.int64),
        queries=np.arange(rows),
        documents=np.arange(rows, 4 * rows),
        owner=owner,
        is_positive=np.arange(3 * rows) % 3 == 0,
        labels=np.arange(rows) % 3,
        sources=np.arange(rows) % 2,
        weights=None,
        scores=np.arange(rows) / 5,
        teacher_scores=random.random(3 * rows),
        token_columns=token_columns,
        query_tokens=random.integers(0, 7, (rows, 3)),
    )


def cases() -> Iterator[tuple[str, ObjectiveSettings, bool]]:
    """Name, settings and whether parts are passed round."""
    for name, settings in OBJECTIVES.items():
        yield name, settings, False
        if isinstance(settings, InfoNCEConfig) and can_ring(settings) and not settings.queue:
            yield f"{name}, ring", settings, True


def gradients(settings: ObjectiveSettings, exchange: Gathered | Passed, own: torch.Tensor) -> list[torch.Tensor]:
    """The loss and the gradient of this rank's texts, and of what is learnt."""
    torch.manual_seed(0)
    objective = settings.build({0: "a", 1: "b"}, AROUND).double()
    leaf = exchange.bring(own).requires_grad_()
    loss = objective.forward(exchange.batch(leaf, 0))
    gradient, *learnt = loss.gradients([leaf, *objective.parameters()])
    # A gradient of zeros may be one number seen many times, which no collective may write to.
    return [
        loss.total.detach() / loss.denominator,
        exchange.back(gradient),
        *(one.clone().contiguous() for one in learnt),
    ]


def compare(settings: ObjectiveSettings, ring: bool, rows: int, rank: int, ranks: int) -> str:
    """The differences between all ranks and one process, and failures; empty if there are none."""
    random = np.random.default_rng(rows)
    columns = TOKENS if settings.token_task is not None else 0
    pool = make_pool(rows, random, columns)
    texts = torch.from_numpy(random.standard_normal((len(pool.items), WIDTH + columns)))
    texts[:, WIDTH:] = texts[:, WIDTH:].abs()
    known = [pool.items[pool.documents[3 * row : 3 * row + 1]] for row in range(rows)]
    vectors = random.standard_normal((len(pool.items), GUIDE)).astype(np.float32)

    def guide(role: str, items: Rows) -> np.ndarray:
        return vectors[items]

    dealt = [np.arange(other, len(pool.items), ranks) for other in range(ranks)]
    shares = Shares(dealt, rank)
    exchange: Gathered | Passed = Gathered(pool, shares, known, guide, None)
    if ring:
        exchange = Passed(pool, shares, known, guide)
    try:
        loss, own, *learnt = gradients(settings, exchange, texts[dealt[rank]])
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    alone = Gathered(pool, Shares([np.arange(len(pool.items))], 0), known, guide, None)
    expected = gradients(settings, alone, texts)
    found = watch(
        settings.build({0: "a", 1: "b"}, AROUND).double(),
        replace(exchange.batch(exchange.bring(texts[dealt[rank]]), 0), ring=None),
    )
    if not all(math.isfinite(value) for value in found.values()):
        return f"figures that are no numbers: {found}"
    for summed in (loss, *learnt):
        dist.all_reduce(summed)
    for ours, theirs in zip([loss, own, *learnt], [expected[0], expected[1][dealt[rank]], *expected[2:]], strict=True):
        if not torch.allclose(ours, theirs, rtol=1e-9, atol=1e-9):
            return f"off by {float((ours - theirs).abs().max()):.3g}"
    return ""


def run(rank: int, ranks: int, sizes: list[int], folder: Path) -> None:
    """All cases on one rank."""
    dist.init_process_group("gloo", store=dist.FileStore(str(folder / "store"), ranks), rank=rank, world_size=ranks)
    found = {}
    for name, settings, ring in cases():
        wrong = [f"{rows} rows: {what}" for rows in sizes if (what := compare(settings, ring, rows, rank, ranks))]
        found[name] = "; ".join(wrong)
    (folder / f"{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def main(out: Path, numbers: list[int], sizes: list[int]) -> None:
    """Fork the ranks, for each number of them, and gather what they say."""
    torch.set_num_threads(1)
    found: dict[str, str] = {name: "" for name, _, _ in cases()}
    for ranks in numbers:
        with tempfile.TemporaryDirectory() as folder:
            children = []
            for rank in range(ranks):
                child = os.fork()
                if not child:
                    try:
                        run(rank, ranks, sizes, Path(folder))
                    finally:
                        os._exit(0)
                children.append(child)
            for child in children:
                os.waitpid(child, 0)
            for rank in range(ranks):
                said = json.loads((Path(folder) / f"{rank}.json").read_text())
                for name, what in said.items():
                    found[name] += f"[rank {rank} of {ranks}: {what}] " if what else ""
    out.write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *([int(number) for number in word.split(",")] for word in sys.argv[2:4]))
