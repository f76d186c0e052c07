"""How many batches (or rows) of each source an epoch takes, and in which order."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from nearfield.batching.config import ProportionalSampling, RoundRobinSampling, SamplingConfig, SharesSampling
from nearfield.batching.rows import Rows
from nearfield.errors import BadInputError


def targets(config: SamplingConfig, names: Sequence[str], sizes: Sequence[int]) -> list[int]:
    """How many of each stream's ``sizes`` batches the epoch takes; more than there are means to begin it anew.

    A stream that has none gets none, and does not end the epoch of the others.
    """
    if isinstance(config, SharesSampling):
        _check_names(config.shares, names)
    if isinstance(config, ProportionalSampling) or not any(sizes):
        return list(sizes)
    if isinstance(config, SharesSampling):
        weights = np.asarray([config.shares[name] for name in names], dtype=np.float64)
    elif isinstance(config, RoundRobinSampling):
        weights = np.ones(len(names))
    else:
        weights = np.asarray(sizes, dtype=np.float64) ** config.alpha
    counts = np.asarray(sizes, dtype=np.float64)
    weights = np.where(counts > 0, weights, 0.0)
    weights /= weights.sum()
    if config.exhausted == "repeat":
        return _round(weights * counts.sum())
    with np.errstate(divide="ignore", invalid="ignore"):
        whole = float(np.where(weights > 0, counts / weights, np.inf).min())
    return [min(int(w * whole + 1e-6), size) for w, size in zip(weights, sizes, strict=True)]


def _round(shares: np.ndarray[tuple[int], np.dtype[np.float64]]) -> list[int]:
    """Whole numbers with the same sum: the largest remainders are rounded up."""
    whole = np.floor(shares + 1e-9).astype(np.int64)
    missing = round(float(shares.sum())) - int(whole.sum())
    for index in np.argsort(whole - shares, kind="stable")[:missing]:
        whole[index] += 1
    return [int(value) for value in whole]


def _check_names(shares: dict[str, float], names: Sequence[str]) -> None:
    known = ", ".join(names)
    for name in shares:
        if name not in names:
            raise BadInputError(
                f"a share is given to {name!r}, which is no source or pool that is trained on",
                where="batches.sampling.shares",
                hint=f"Sources: {known}.",
            )
    missing = [name for name in names if name not in shares]
    if missing:
        raise BadInputError(f"{', '.join(missing)} has no share", where="batches.sampling.shares")


def order_batches(config: SamplingConfig, counts: Sequence[int], mixed: int, random: np.random.Generator) -> Rows:
    """The order of an epoch's batches, which are numbered stream after stream, the ``mixed`` ones last.

    All are shuffled. In round robin the streams then take turns, and batches that mix streams stand anywhere between.
    """
    total = sum(counts) + mixed
    order = random.permutation(total)
    if not isinstance(config, RoundRobinSampling):
        return order
    stream = np.repeat(np.arange(len(counts) + 1), [*counts, mixed])
    turn = np.empty(total, dtype=np.int64)
    shuffled = stream[order]
    for number in range(len(counts) + 1):
        mine = np.flatnonzero(shuffled == number)
        turn[mine] = np.arange(len(mine))
    separate = shuffled < len(counts)
    cycled = order[separate][np.lexsort((shuffled[separate], turn[separate]))]
    result = order.copy()
    result[separate] = cycled
    return result
