"""All randomness comes from one seed through named generators, never from global state."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np


def derive_seed(seed: int, *names: str | int) -> int:
    """A 63-bit seed that depends on the run's seed and on the names, e.g. ``derive_seed(0, "plan", epoch)``."""
    text = "\0".join([str(seed), *(f"{type(name).__name__}:{name}" for name in names)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) >> 1


def generator(seed: int, *names: str | int) -> np.random.Generator:
    """A NumPy generator for one named use of the run's seed."""
    import numpy as np

    return np.random.Generator(np.random.PCG64(derive_seed(seed, *names)))
