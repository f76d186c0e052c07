"""Tokens and plans for runs of a few steps."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from nearfield.arrays import Ragged
from nearfield.batching.plan import Plan, write_plan
from nearfield.batching.planner import EpochBatches
from nearfield.batching.streams import PlannedRows
from nearfield.data.tokens import TokenCache, TokenTable

ITEMS = 60
SIZES = np.random.default_rng(0).integers(3, 12, size=ITEMS)


def make_tokens() -> TokenCache:
    """All items with prompt 0, and with a prompt 1 that is one token longer."""
    random = np.random.default_rng(1)
    cache = object.__new__(TokenCache)
    cache.tables = []
    for prompt in (0, 1):
        ids = [np.r_[2, [7] * prompt, random.integers(5, 200, size=size - 2), 3].astype(np.int32) for size in SIZES]
        lists = Ragged.from_lists(ids, np.int32)
        cache.tables.append(TokenTable(np.arange(ITEMS), lists, prompt="p " * prompt, prompt_length=1 + prompt))
    return cache


def make_plan(path: Path, epoch: int, steps: int = 3, size: int = 4) -> Plan:
    """Queries 0 to 19, each with its positive (20 more) and a negative (40 more); queries have prompt 0, documents 1."""
    order = np.random.default_rng(epoch).permutation(20)[: size * steps]
    count = len(order)
    rows = PlannedRows.of([0] * count, order + 100, order, Ragged.single(order + 20), Ragged.single(order + 40))
    offsets = np.minimum(np.arange(steps + 1) * size, count)
    epoch_batches = EpochBatches(rows, offsets)
    write_plan(path, epoch_batches, {0: (0, 1)}, lambda prompt, items: SIZES[items] + prompt, {"epoch": epoch})
    return Plan(path)
