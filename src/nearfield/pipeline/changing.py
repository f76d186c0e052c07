"""What changing negatives are made of: the candidates that were mined, and how to mine anew."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from nearfield.batching.rows import join_lists
from nearfield.data.store import Store
from nearfield.mining.config import RefreshedNegatives
from nearfield.pipeline.mining import MiningStages

if TYPE_CHECKING:
    from nearfield.data.tokens import TokenCache
    from nearfield.training.changing_negatives import NegativeInputs


class ChangingStages(MiningStages):
    """Adds what training needs where negatives change."""

    def negative_inputs(self, store: Store, tokens: TokenCache) -> NegativeInputs | None:
        """For the training loop; None where those of the plan stay."""
        from nearfield.training.changing_negatives import Candidates, NegativeInputs, Remine

        recipe = self.recipe
        if recipe.mining is None or recipe.mining.during is None:
            return None
        found = self.planned_negatives(store) or {}
        examples = np.concatenate([store.select(name, recipe.split) for name in found])
        lists = join_lists([negatives.items for negatives in found.values()])
        order = np.argsort(examples, kind="stable")
        remine = None
        if isinstance(recipe.mining.during, RefreshedNegatives):
            prompts = {}
            for name in found:
                texts = self.contract.sources[name]
                prompts[store.source_number(name)] = (tokens.number(texts["query"]), tokens.number(texts["document"]))
            remine = Remine(self._pools(store), prompts, recipe.mining)
        batches = recipe.batches
        return NegativeInputs(
            recipe.mining.during,
            Candidates(examples[order], lists.take(order)),
            wanted=batches.negatives,
            distinct=batches.duplicates == "forbid",
            avoid_positives=batches.known_positives == "forbid",
            remine=remine,
        )
