"""``nearfield`` with memory that runs out on one rank: ``torchrun ... faulty_rank.py RANK STEP train RECIPE ...``.

From step STEP on (counted from 1) that rank fails to encode a chunk of more than 80 tokens, half of the budget that it begins with.
"""

from __future__ import annotations

import sys
from typing import Any
from unittest import mock

import torch

from nearfield.cli import main
from nearfield.training import step as step_module
from nearfield.training.launch import Launch


def short_of_memory(step: int) -> Any:
    """Memory runs out on this rank, from one step on."""
    encode_chunk, seed_chunk = step_module.encode_chunk, step_module.seed_chunk
    now = {"step": 0}

    def seed(seed: int, step: int, chunk: int) -> None:
        now["step"] = step + 1
        seed_chunk(seed, step, chunk)

    def encode(backend, features):  # type: ignore[no-untyped-def]
        if now["step"] >= step and int(features["attention_mask"].sum()) > 80:
            raise torch.OutOfMemoryError("CUDA out of memory (injected)")
        return encode_chunk(backend, features)

    return mock.patch.multiple(step_module, seed_chunk=seed, encode_chunk=encode)


if __name__ == "__main__":
    rank, step = map(int, sys.argv[1:3])
    if Launch.from_environment().rank == rank:
        short_of_memory(step).start()
    main(sys.argv[3:])
