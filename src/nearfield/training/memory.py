"""How many tokens a step encodes at a time, and up to how many it keeps the graph of."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nearfield.batching.plan import Plan
    from nearfield.batching.planner import Rows
    from nearfield.training.config import TrainingConfig
    from nearfield.training.engine import Engine

logger = logging.getLogger("nearfield.training")

FAST_MICRO_BATCH_TOKENS = {"cpu": 512, "cuda": 16_384}
"""Where encoding is at its fastest: more tokens at a time only take memory."""
SMALLEST_MICRO_BATCH_TOKENS = 16
DEFAULT_GRAPH_TOKENS = 65_536


@dataclass(frozen=True)
class Budget:
    """The token budget in force: it decides how batches are cut, hence it is state."""

    micro_batch_tokens: int
    graph_tokens: int

    def to_json(self) -> dict[str, int]:
        """The entries of a checkpoint's state."""
        return {"micro_batch_tokens": self.micro_batch_tokens, "graph_tokens": self.graph_tokens}

    @classmethod
    def from_json(cls, state: Mapping[str, Any]) -> Budget:
        """The budget that a checkpoint's state holds."""
        return cls(int(state["micro_batch_tokens"]), int(state["graph_tokens"]))

    def halved(self) -> Budget | None:
        """Half of it; none where nothing is left to halve."""
        if self.micro_batch_tokens <= SMALLEST_MICRO_BATCH_TOKENS:
            return None
        return Budget(max(SMALLEST_MICRO_BATCH_TOKENS, self.micro_batch_tokens // 2), self.graph_tokens // 2)


def choose_budget(
    config: TrainingConfig, engine: Engine, plans: Sequence[Plan], known_positives: Callable[[int], Rows]
) -> Budget:
    """The budget to begin with."""
    fast = FAST_MICRO_BATCH_TOKENS[engine.backend.device.type]
    micro = fast if config.micro_batch_tokens == "auto" else config.micro_batch_tokens
    graph = DEFAULT_GRAPH_TOKENS if config.graph_tokens == "auto" else config.graph_tokens
    return Budget(micro, graph)
