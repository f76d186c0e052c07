"""The artifacts of a run, opened."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from nearfield.encoders.prompts import PromptContract, add_examples
from nearfield.files import hash_file
from nearfield.notices import Said
from nearfield.pipeline.freshness import Freshness
from nearfield.pipeline.run import Run
from nearfield.training.launch import Launch

if TYPE_CHECKING:
    from nearfield.batching.plan import Plan
    from nearfield.data.in_context import ExampleSet
    from nearfield.data.store import Store
    from nearfield.data.tokens import TokenCache
    from nearfield.training.chunks import Pictures


class Artifacts(Freshness):
    """What the stages of one run read from each other."""

    def __init__(self, run: Run, launch: Launch) -> None:
        super().__init__(run)
        self.launch = launch
        self.said = Said()
        """What users of the training must know, as far as it was told."""

    def _store(self) -> Store:
        from nearfield.data.store import Store

        return Store.open(self.store_path)

    def pictures(self) -> Pictures | None:
        """How a training gets the pictures of items; none where the data has no pictures."""
        store = self._store()
        return store.images if store.has_images else None

    def _example_sets(self, store: Store) -> dict[str, list[ExampleSet]]:
        """The in-context examples of each source that gets some: a function of the store, the recipe and its seed."""
        from nearfield.pipeline.prompting import example_sets

        recipe = self.recipe
        return example_sets(store, self.source_names, recipe.split, recipe.prompts.in_context, recipe.seed)

    @cached_property
    def trained_contract(self) -> PromptContract:
        """The contract with the in-context examples in it; without such the same as ``contract``. Needs the store."""
        config = self.recipe.prompts.in_context
        if config is None:
            return self.contract
        sets = {name: [one.text for one in found] for name, found in self._example_sets(self._store()).items()}
        return add_examples(self.contract, sets, config.evaluated == "examples")

    def all_prompts(self, store: Store) -> list[str]:
        """Every text that stands before items, in training or in the model that is saved."""
        from nearfield.pipeline.prompting import source_prompts

        sets, found = self._example_sets(store), {*self.trained_contract.model_prompts.values()}
        for name in self.source_names:
            prompts = source_prompts(self.contract, sets, name)
            found |= {*prompts.queries, *prompts.document}
        return sorted(found)

    def _open_store(self, path: Path) -> Store:
        from nearfield.data import prepare_store
        from nearfield.data.store import Store
        from nearfield.encoders.encode import text_encoder

        return Store.open(path) if path.is_dir() else prepare_store(path, self.run.cache, encoders=text_encoder)

    def _tokens(self) -> TokenCache:
        from nearfield.data.tokens import TokenCache

        return TokenCache(self.tokens_path)

    def _plans(self) -> tuple[list[Plan], list[str]]:
        from nearfield.batching.plan import Plan

        paths = sorted((self.run.folder / "plan").glob("epoch-*.parquet"))
        return [Plan(path) for path in paths], [hash_file(path) for path in paths]
