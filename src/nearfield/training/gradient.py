"""The gradient of a planned batch."""

from __future__ import annotations

import contextlib
from dataclasses import replace

from nearfield.batching.plan import Batch
from nearfield.training.chunks import split_batch
from nearfield.training.config import TrainingConfig
from nearfield.training.engine import Engine
from nearfield.training.inputs import TrainingInputs
from nearfield.training.memory import Budget, keeps_graph
from nearfield.training.out_of_memory import stops_for_memory
from nearfield.training.step import StepResult, mean_result, run_step
from nearfield.training.stopping import StopRequest


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
    watch: bool = False,
    progress: float = 0.0,
) -> tuple[StepResult, int, int]:
    """Leave the gradient of a planned batch in the backend; the tokens of the batch, real and as encoded.

    With ``watch`` this process looks at how the learning goes: of the last part, where there are several.
    """
    engine.backend.begin()
    parts = split_batch(batch, config.averaged_batches)
    results: list[StepResult] = []
    chunks = tokens = encoded = 0
    for number, part in enumerate(parts):
        work, lengths = engine.work(part, inputs.known_positives, budget.cut, first_number=chunks)
        chunks, tokens, encoded = chunks + len(work.chunks), tokens + int(lengths.sum()), encoded + sum(work.tokens)
        # Where chunks hold no collectives the step itself says that memory ran out, and is repeated.
        in_place = engine.retries_in_place
        with contextlib.nullcontext() if in_place else stops_for_memory(f"step {step + 1}", budget):
            result = run_step(
                engine.backend,
                engine.objective,
                work,
                engine.make_features(work.pool, seed, step),
                dimension=engine.columns,
                seed=seed,
                step=step,
                keep_graph=keeps_graph(config, budget, work, engine.backend),
                weight=1 / len(parts),
                final=number == len(parts) - 1,
                stop=lambda: stop.received is not None,
                catch_out_of_memory=in_place,
                progress=progress,
                watch=watch and number == len(parts) - 1,
            )
        results.append(replace(result, first_query=sum(len(before.query) for before in parts[:number])))
        if result.word.out_of_memory:
            break
    return mean_result(results), tokens, encoded
