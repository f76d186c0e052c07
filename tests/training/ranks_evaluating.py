"""Run by torchrun: the same texts encoded on two ranks by DDP and by FSDP2, and a stop that one rank alone is asked for."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch

from nearfield.encoders import load_encoder
from nearfield.objectives import InfoNCEConfig
from nearfield.training import TrainingConfig
from nearfield.training.chunks import TrainingData
from nearfield.training.engine import build_engine
from nearfield.training.evaluation import InterruptedEvaluationError, encode_texts, undisturbed
from nearfield.training.launch import Launch
from nearfield.training.optimizers import make_optimizer
from tests.training.making import make_tokens

CPU = torch.device("cpu")
TEXTS = ["word1", "word2 word3", "", *(" ".join(f"word{n + i}" for i in range(n % 9 + 1)) for n in range(50))]


def main(model: Path, out: Path) -> None:
    """Write what each rank found to ``out``."""
    launch = Launch.from_environment()
    with launch.process_group(CPU, 60):
        for backend in ("ddp", "fsdp2"):
            config = TrainingConfig.model_validate({"device": "cpu", "backend": backend})
            engine = build_engine(
                config,
                load_encoder(str(model), device="cpu").model,
                InfoNCEConfig().build(),
                lambda named, config=config: make_optimizer(named, config, CPU),
                TrainingData(make_tokens()),
                CPU,
                launch,
            )
            told = {}
            for name, texts in (("many", TEXTS), ("one", TEXTS[:1])):
                with undisturbed(engine.backend.module, CPU):
                    found = encode_texts(engine, texts, "word9 ", budget=40)
                np.save(out / f"{backend}-{name}-{launch.rank}.npy", found)
            try:
                encode_texts(engine, TEXTS, "", 40, stop=lambda: launch.rank == 1)
            except InterruptedEvaluationError:
                told["stopped"] = True
            (out / f"{backend}-{launch.rank}.json").write_text(json.dumps(told))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
