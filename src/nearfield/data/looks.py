"""How pictures look, in few bytes: enough to find copies that were scaled, packed anew or brightened a little."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from nearfield.data.pictures import pillow

if TYPE_CHECKING:
    from PIL.Image import Image

Rows = npt.NDArray[np.int64]
_SIDE = 8


@dataclass(frozen=True)
class Looks:
    """The looks of n pictures."""

    bits: npt.NDArray[np.uint64]
    """[n]: where brightness rises from left to right, on a grid of 8 x 8 (a difference hash)."""
    small: npt.NDArray[np.uint8]
    """[n, 8, 8, 3]: the pictures at 8 x 8 pixels; the hash is blind to colour and to flat pictures."""

    @classmethod
    def join(cls, parts: Sequence[Looks]) -> Looks:
        """Those of several groups, one after the other."""
        return cls(np.concatenate([part.bits for part in parts]), np.concatenate([part.small for part in parts]))


def looks_of(images: Sequence[Image]) -> Looks:
    """The looks of RGB pictures."""
    box = pillow().Resampling.BOX
    bits = np.zeros(len(images), dtype=np.uint64)
    small = np.zeros((len(images), _SIDE, _SIDE, 3), dtype=np.uint8)
    for number, image in enumerate(images):
        grey = np.asarray(image.convert("L").resize((_SIDE + 1, _SIDE), box)).astype(np.int64)
        rises = (grey[:, 1:] > grey[:, :-1]).ravel()
        bits[number] = np.packbits(rises).view(">u8")[0]
        small[number] = np.asarray(image.resize((_SIDE, _SIDE), box))
    return Looks(bits, small)


def alike(looks: Looks, one: int, others: Rows, bits: int, tolerance: float) -> npt.NDArray[np.bool_]:
    """Whether one picture looks like each of others: at most ``bits`` differ, and colours by at most ``tolerance``."""
    near: npt.NDArray[np.bool_] = np.bitwise_count(looks.bits[others] ^ looks.bits[one]) <= bits
    found = np.flatnonzero(near)
    apart = looks.small[others[found]].astype(np.int16) - looks.small[one].astype(np.int16)
    near[found] = np.abs(apart).mean(axis=(1, 2, 3)) <= tolerance
    return near


def first_of_each_look(looks: Looks, bits: int, tolerance: float) -> Rows:
    """For each picture the first before it that it looks like and that looks like none before itself; else itself, [n].

    Hashes that differ in at most k bits agree in one of k + 1 bands, so that only those are compared.
    """
    count = len(looks.bits)
    edges = np.linspace(0, 64, bits + 2).astype(np.int64)
    bands = [
        (looks.bits >> np.uint64(low)) & np.uint64((1 << (high - low)) - 1) for low, high in pairwise(edges.tolist())
    ]
    buckets: list[dict[int, list[int]]] = [defaultdict(list) for _ in bands]
    first = np.arange(count, dtype=np.int64)
    for one in range(count):
        keys = [int(band[one]) for band in bands]
        others = np.unique(np.asarray([o for b, k in zip(buckets, keys, strict=True) for o in b[k]], dtype=np.int64))
        like = others[alike(looks, one, others, bits, tolerance)]
        if len(like):
            first[one] = like[0]
            continue
        for bucket, key in zip(buckets, keys, strict=True):
            bucket[key].append(one)
    return first
