"""Run by torchrun: the command line again and again in the same ranks, each time with settings and faults of its own.

``ranks_launched.py SCENARIOS OUT``: SCENARIOS is a JSON list of objects with ``name`` and ``arguments`` and, if wanted,
``environment`` (for all ranks), ``faults`` (by rank, see ``FAULTS``) and ``more`` (arguments by rank). Each rank writes
``OUT/NAME-RANK.json``: exit code, seconds, standard error, and the types of what it computed with.

A start of a process costs ten seconds of imports, so that one launch is shared by many tests.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from nearfield.cli import main
from nearfield.encoders.encode import Encoder
from nearfield.errors import BadInputError
from nearfield.pipeline.data import TokensStage
from nearfield.pipeline.planning import PlanStage
from nearfield.pipeline.training import TrainStage
from nearfield.training import launch, trainer
from nearfield.training import step as step_module
from tests.training.faulty_rank import short_of_memory


def slow_tokens(seconds: float) -> Any:
    """The stage ``tokens`` takes longer."""
    tokens = TokensStage.run

    def slow(self: TokensStage) -> dict[str, Any]:
        time.sleep(seconds)
        return tokens(self)

    return mock.patch.object(TokensStage, "run", slow)


def broken_plan() -> Any:
    """The stage ``plan`` fails."""

    def broken(self: PlanStage) -> dict[str, Any]:
        raise BadInputError("the disk is on fire", where="somewhere", hint="Put it out.")

    return mock.patch.object(PlanStage, "run", broken)


def unready() -> Any:
    """This rank cannot build the model, which is found out after the data stages and before the process group is made."""

    def fail(self: TrainStage, device: torch.device) -> Any:
        raise OSError("no model on this machine")

    return mock.patch.object(TrainStage, "encoder", fail)


def terminated(step: int) -> Any:
    """This rank gets SIGTERM twice in a step, as from Slurm and then from the launcher."""
    run_step = step_module.run_step

    def run(*args: Any, **kwargs: Any) -> Any:
        if kwargs["step"] == step - 1:
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGTERM)
        return run_step(*args, **kwargs)

    return mock.patch.object(step_module, "run_step", run)


FAULTS: dict[str, Callable[..., Any]] = {
    "slow": slow_tokens,
    "broken": broken_plan,
    "unready": unready,
    "terminated": terminated,
    "short of memory": short_of_memory,
}


@contextlib.contextmanager
def types_seen() -> Iterator[dict[str, list[str]]]:
    """The types of gathered embeddings and the loss, of parameters in training, and the class that forwards go through."""
    seen: dict[str, set[str]] = {"embeddings": set(), "loss": set(), "parameters": set(), "module": set()}
    found: dict[str, list[str]] = {}
    gather, build = step_module.gather_embeddings, trainer.build_engine

    def gathered(own: torch.Tensor, shares: Any) -> torch.Tensor:
        everyone = gather(own, shares)
        seen["embeddings"] |= {str(own.dtype), str(everyone.dtype)}
        return everyone

    def built(*args: Any, **named: Any) -> Any:
        engine = build(*args, **named)
        objective = engine.objective.forward

        def forward(batch: Any) -> Any:
            loss = objective(batch)
            seen["loss"].add(str(loss.total.dtype))
            return loss

        engine.objective.forward = forward
        module = engine.backend.module
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                kind = "adapter" if "lora_" in name else "base"
                seen["parameters"].add(f"{kind} {parameter.dtype} {type(parameter).__name__}")
        seen["module"].add(type(module).__name__)
        return engine

    with (
        mock.patch.object(step_module, "gather_embeddings", gathered),
        mock.patch.object(trainer, "build_engine", built),
    ):
        yield found
    found.update({name: sorted(values) for name, values in seen.items()})


@contextlib.contextmanager
def texts_encoded() -> Iterator[list[int]]:
    """How many texts this rank encodes for an evaluation, call by call."""
    embed, counts = Encoder.pairs, []

    def counted(self: Encoder, texts: Any, *args: Any, **kwargs: Any) -> Any:
        counts.append(len(texts))
        return embed(self, texts, *args, **kwargs)

    with mock.patch.object(Encoder, "pairs", counted):
        yield counts


def run(number: int, scenario: dict[str, Any], out: Path) -> None:
    """One call of the command line."""
    rank = int(os.environ["RANK"])
    # The launcher's store keeps the words of the last call; those of another attempt have another prefix.
    environment = {"TORCHELASTIC_RESTART_COUNT": str(number), **scenario.get("environment", {})}
    errors = io.StringIO()
    began = time.monotonic()
    arguments = [*scenario["arguments"], *scenario.get("more", {}).get(str(rank), [])]
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.dict(os.environ, environment))
        for name, values in scenario.get("faults", {}).get(str(rank), {}).items():
            stack.enter_context(FAULTS[name](*values))
        seen = stack.enter_context(types_seen())
        counts = stack.enter_context(texts_encoded())
        stack.enter_context(contextlib.redirect_stderr(errors))
        stack.enter_context(contextlib.redirect_stdout(errors))
        try:
            main(arguments)
            code: Any = 0
        except SystemExit as error:
            code = error.code or 0
        except Exception as error:
            code = f"{type(error).__name__}: {error}"
    told = {"code": code, "seconds": time.monotonic() - began, "stderr": errors.getvalue(), "seen": seen}
    told["encoded"] = sum(counts)
    (out / f"{scenario['name']}-{rank}.json").write_text(json.dumps(told))
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


if __name__ == "__main__":
    launch._SPEAK_SECONDS = 0.1
    launch._SAY_SECONDS = 1.0
    for number, scenario in enumerate(json.loads(Path(sys.argv[1]).read_text())):
        run(number, scenario, Path(sys.argv[2]))
