"""Splits by the hash of a group's key, and groups of examples that share a text."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

Rows = npt.NDArray[np.int64]


def hash_fraction(key: str, seed: int) -> float:
    """A number in [0, 1) that depends on the key and the seed alone, spread evenly over keys."""
    digest = hashlib.blake2b(key.encode(), digest_size=8, key=seed.to_bytes(8, "little"))
    return (int.from_bytes(digest.digest(), "big") >> 11) / (1 << 53)


def split_of(key: str, fractions: Mapping[str, float], seed: int) -> str:
    """The split that a key goes to. The order in which the fractions are written does not matter."""
    place = hash_fraction(key, seed)
    reached = 0.0
    names = sorted(fractions)
    for name in names[:-1]:
        reached += fractions[name]
        if place < reached:
            return name
    return names[-1]


def component_keys(edges: Rows, queries: Rows, ids: npt.NDArray[np.void]) -> dict[int, str]:
    """Group keys of the queries where items that an example ties together are one group.

    ``edges`` is [E, 2] of item rows, ``queries`` the item rows wanted, ``ids`` the ids (16 bytes) of all items. The key of
    a group is the smallest id in it, in hex: it does not depend on the order of rows.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    members, flat = np.unique(np.concatenate([edges.ravel(), queries]), return_inverse=True)
    ends = flat[: edges.size].reshape(-1, 2)
    ones = np.ones(len(ends), dtype=np.int8)
    graph = coo_array((ones, (ends[:, 0], ends[:, 1])), shape=(len(members), len(members)))
    _, component = connected_components(graph, directed=False)
    words = np.frombuffer(ids[members].tobytes(), dtype=">u8").reshape(-1, 2)
    order = np.lexsort((words[:, 1], words[:, 0], component))
    first = order[np.searchsorted(component[order], np.arange(component.max(initial=-1) + 1))]
    names = [bytes(key).hex() for key in ids[members[first]].tolist()]
    groups = component[flat[edges.size :]]
    return {int(query): names[group] for query, group in zip(queries.tolist(), groups.tolist(), strict=True)}
