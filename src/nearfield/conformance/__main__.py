"""One rank of a conformance run: ``torchrun --nproc-per-node 2 -m nearfield.conformance BACKEND --out FILE``."""

from __future__ import annotations

import argparse
import json
import warnings
from pathlib import Path

import torch


def main() -> None:
    """Run all checks of one backend; rank 0 writes a JSON line a check."""
    parser = argparse.ArgumentParser()
    parser.add_argument("backend")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    from nearfield.conformance.cases import CPU, Case
    from nearfield.conformance.equalities import Suite
    from nearfield.objectives.config import ObjectiveSettings
    from nearfield.training.launch import Launch

    launch = Launch.from_environment()
    dtype = torch.float32 if arguments.backend.startswith("zero") else torch.float64

    def make(objective: ObjectiveSettings, queries: int) -> Case:
        return Case.make(objective, queries, arguments.model, dtype)

    launch.prepare(lambda tell: "ready", lambda word: None)
    with launch.process_group(CPU, 60), arguments.out.open("a", encoding="utf-8") as out:
        for line in Suite(arguments.backend, launch, make).run():
            if launch.is_main:
                out.write(json.dumps(line.to_json()) + "\n")
                out.flush()


if __name__ == "__main__":
    main()
