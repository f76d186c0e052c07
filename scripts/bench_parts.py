"""The common parts of the benchmarks of training: texts, the model, and the machine's peak at the model's own shapes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

MODEL = "sentence-transformers/all-MiniLM-L6-v2"
PACKAGES = ("transformers", "torch", "scipy", "pandas", "scikit-learn")
MAX_LENGTH = 256


def make_texts(folder: Path, count: int) -> list[tuple[str, str]]:
    """Pairs from the functions of installed packages: docstring and first half of the code, second half of the code."""
    from nearfield.methods.docstrings import DocstringsReader

    pairs = []
    for row in DocstringsReader(packages=PACKAGES, cache=folder).rows(["docstring", "code"]):
        assert row.values is not None
        lines = str(row.values["code"]).split("\n")
        if len(lines) >= 8:
            half = len(lines) // 2
            pairs.append((f"{row.values['docstring']}\n" + "\n".join(lines[:half]), "\n".join(lines[half:])))
    texts = {text for pair in pairs for text in pair}
    order = np.random.default_rng(0).permutation(len(pairs))
    chosen = []
    for index in order:
        # A text twice in a batch would be masked on one side only.
        if pairs[index][0] in texts and pairs[index][1] in texts and pairs[index][0] != pairs[index][1]:
            chosen.append(pairs[index])
            texts -= set(pairs[index])
        if len(chosen) == count:
            return chosen
    raise SystemExit(f"only {len(chosen)} pairs of distinct texts were found, {count} are needed")


def load_model() -> Any:
    from nearfield.encoders.load import load_encoder

    model = load_encoder(MODEL, device="cpu").model
    model.max_seq_length = MAX_LENGTH
    return model


def tokenise(model: Any, batch: Sequence[tuple[str, str]]) -> list[Any]:
    texts = [query for query, _ in batch] + [document for _, document in batch]
    ids = model.tokenizer(texts, truncation=True, max_length=MAX_LENGTH)["input_ids"]
    return [np.asarray(row, dtype=np.int32) for row in ids]


def measure_peak(config: Any, rows: int) -> float:
    """FLOP a CPU second of the matrix products of one layer's forward and backward, each shape by its median of five."""
    hidden, wide = config.hidden_size, config.intermediate_size
    total = seconds = 0.0
    for inner, outer, times in ((hidden, hidden, 4), (hidden, wide, 1), (wide, hidden, 1)):
        values, weight, gradient = torch.randn(rows, inner), torch.randn(outer, inner), torch.randn(rows, outer)
        for product in (
            lambda v=values, w=weight: v @ w.T,
            lambda g=gradient, w=weight: g @ w,
            lambda g=gradient, v=values: g.T @ v,
        ):
            product()
            samples = []
            for _ in range(5):
                start = time.process_time()
                product()
                samples.append(time.process_time() - start)
            seconds += times * statistics.median(samples)
            total += times * 2 * rows * inner * outer
    return total / seconds


def model_flop(config: Any, lengths: Sequence[int]) -> float:
    """Forward and backward of all layers on texts of these lengths, without padding and without anything done twice."""
    hidden, wide = config.hidden_size, config.intermediate_size
    size = np.asarray(lengths, dtype=np.float64)
    forward = (8 * hidden * hidden + 4 * hidden * wide) * size + 4 * hidden * size**2
    return float(3 * config.num_hidden_layers * forward.sum())
