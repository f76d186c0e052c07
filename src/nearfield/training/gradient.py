"""The gradient of a planned batch, and what its embeddings look like."""

from __future__ import annotations

import contextlib
from dataclasses import replace

import torch
from torch import Tensor, nn

from nearfield.batching.plan import Batch
from nearfield.objectives.infonce import ContrastiveBatch
from nearfield.training.chunks import split_batch
from nearfield.training.config import TrainingConfig
from nearfield.training.engine import Engine
from nearfield.training.inputs import TrainingInputs
from nearfield.training.memory import Budget, keeps_graph
from nearfield.training.out_of_memory import stops_for_memory
from nearfield.training.step import StepResult, mean_result, run_step
from nearfield.training.stopping import StopRequest

_WATCHED_QUERIES = 512


def batch_gradient(
    engine: Engine,
    config: TrainingConfig,
    budget: Budget,
    batch: Batch,
    inputs: TrainingInputs,
    *,
    seed: int,
    step: int,
    stop: StopRequest,
) -> tuple[StepResult, int, int]:
    """Leave the gradient of a planned batch in the backend; the tokens of the batch, real and as encoded."""
    engine.backend.begin()
    parts = split_batch(batch, config.averaged_batches)
    results: list[StepResult] = []
    chunks = tokens = encoded = 0
    for number, part in enumerate(parts):
        work, lengths = engine.work(part, inputs.known_positives, budget.micro_batch_tokens, first_number=chunks)
        chunks, tokens, encoded = chunks + len(work.chunks), tokens + int(lengths.sum()), encoded + sum(work.tokens)
        # Where chunks hold no collectives the step itself says that memory ran out, and is repeated.
        in_place = engine.backend.retries_in_place
        with contextlib.nullcontext() if in_place else stops_for_memory(f"step {step + 1}", budget):
            result = run_step(
                engine.backend,
                engine.objective,
                work,
                engine.make_features(work.pool),
                dimension=engine.dimension,
                seed=seed,
                step=step,
                keep_graph=keeps_graph(config, budget, work),
                weight=1 / len(parts),
                final=number == len(parts) - 1,
                stop=lambda: stop.received is not None,
                catch_out_of_memory=in_place,
            )
        results.append(replace(result, first_query=sum(len(before.query) for before in parts[:number])))
        if result.word.out_of_memory:
            break
    return mean_result(results), tokens, encoded


def watch(batch: ContrastiveBatch | None) -> dict[str, float]:
    """Mean cosine of queries with their positives, and with the hardest other document; of at most 512 queries."""
    assert batch is not None
    rows = torch.linspace(0, len(batch.queries) - 1, min(_WATCHED_QUERIES, len(batch.queries))).round().long()
    rows = rows.to(batch.queries.device)
    queries = nn.functional.normalize(batch.queries[rows], dim=-1)
    documents = nn.functional.normalize(batch.documents, dim=-1)
    similarity = queries @ documents.T
    positive = (batch.owner[None, :] == rows[:, None]) & batch.is_positive[None, :]
    hardest: Tensor = similarity.masked_fill(positive, -1.0).max(dim=1).values
    return {
        "positive_similarity": float(similarity[positive].mean()),
        "hardest_negative_similarity": float(hardest.mean()),
    }
