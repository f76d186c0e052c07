"""Candidates for near-duplicates by MinHash signatures (rensa) and locality-sensitive bands of them.

Signatures are those of rensa (Rust): 0.23 CPU seconds for 20,000 glosses and 128 permutations, where datasketch took 1.61
(``scripts/decontamination_figures.py --libraries``). Bands are joined here with NumPy, since rensa's index hands back one
text's neighbours at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from nearfield.data.shingles import Ragged, Rows, starts

BANDS = 40
ROWS = 5
"""Two sets with a Jaccard similarity of 0.75 share a band with probability 1 - 2e-5, of 0.6 with 0.96, of 0.1 with 4e-4."""
SEED = 0x5EED
_PIECE = 8_000_000
_BLOCK = 50_000

Signatures = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Sketches:
    """MinHash of n sets: the keys of the bands [BANDS, n] and one byte of each of the BANDS * ROWS minima [n, 200]."""

    keys: npt.NDArray[np.uint64]
    bytes: Signatures

    def __len__(self) -> int:
        return int(self.keys.shape[1])


def sketch(sets: Ragged) -> Sketches:
    """The MinHash of each set, whatever the order of its values. The sets must not be empty."""
    from rensa import RMinHash

    keys = np.empty((BANDS, len(sets)), dtype=np.uint64)
    small = np.empty((len(sets), BANDS * ROWS), dtype=np.uint8)
    factors = np.random.default_rng(SEED).integers(1, 2**63, size=ROWS, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
    for start in range(0, len(sets), _BLOCK):
        stop = min(start + _BLOCK, len(sets))
        offsets = sets.offsets[start : stop + 1]
        values = np.ascontiguousarray(sets.values[offsets[0] : offsets[-1]])
        matrix = RMinHash.digest_matrix_from_flat_token_hashes(
            values, (offsets - offsets[0]).tolist(), BANDS * ROWS, SEED
        )
        minima = np.asarray(matrix.to_rows(), dtype=np.uint64).reshape(stop - start, BANDS, ROWS)
        mixed = (minima * factors).sum(axis=2, dtype=np.uint64)
        keys[:, start:stop] = (mixed ^ (mixed >> np.uint64(29))).T
        small[start:stop] = (minima.reshape(stop - start, -1) & np.uint64(255)).astype(np.uint8)
    return Sketches(keys, small)


class BandIndex:
    """Finds the sets that share a band with others."""

    def __init__(self, sketches: Sketches) -> None:
        self.sketches = sketches
        self._order = np.argsort(sketches.keys, axis=1, kind="stable")
        self._sorted = np.take_along_axis(sketches.keys, self._order, axis=1)

    def __len__(self) -> int:
        return len(self.sketches)

    def candidates(self, queries: Sketches, least: float) -> Iterator[Rows]:
        """Pairs (indexed set, query set) that share a band and whose estimated similarity is at least ``least``.

        Yields [p, 2], each pair once, in pieces that keep the memory bounded: a piece is all candidates of some queries.
        """
        if not len(self) or not len(queries):
            return
        low = np.stack([np.searchsorted(s, k, "left") for s, k in zip(self._sorted, queries.keys, strict=True)])
        high = np.stack([np.searchsorted(s, k, "right") for s, k in zip(self._sorted, queries.keys, strict=True)])
        total = np.cumsum((high - low).sum(axis=0))
        begin = 0
        while begin < len(queries):
            reached = total[begin - 1] if begin else 0
            end = max(int(np.searchsorted(total, reached + _PIECE, "right")), begin + 1)
            pairs = self._pairs(low[:, begin:end], high[:, begin:end], begin)
            if len(pairs):
                alike = self._estimates(queries, pairs) >= least
                yield pairs[alike]
            begin = end

    def _pairs(self, low: Rows, high: Rows, begin: int) -> Rows:
        found = [np.empty(0, dtype=np.int64)]
        wide = np.int64(low.shape[1])
        for order, first, last in zip(self._order, low, high, strict=True):
            counts = last - first
            offsets = starts(counts)
            if not offsets[-1]:
                continue
            places = np.arange(offsets[-1]) + np.repeat(first - offsets[:-1], counts)
            found.append(order[places] * wide + np.repeat(np.arange(wide), counts))
        keys = np.unique(np.concatenate(found))
        return np.stack([keys // wide, keys % wide + begin], axis=1)

    def _estimates(self, queries: Sketches, pairs: Rows) -> npt.NDArray[np.float64]:
        """The similarity by the share of equal bytes, of which 1 in 256 is equal by chance."""
        result = np.empty(len(pairs))
        for start in range(0, len(pairs), _BLOCK):
            part = pairs[start : start + _BLOCK]
            equal = (self.sketches.bytes[part[:, 0]] == queries.bytes[part[:, 1]]).mean(axis=1)
            result[start : start + _BLOCK] = (equal - 1 / 256) / (1 - 1 / 256)
        return result
