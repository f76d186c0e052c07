"""The stages before training: the store, its tokens, the batches."""

from __future__ import annotations

import dataclasses
import itertools
from typing import TYPE_CHECKING, Any

import numpy as np

from nearfield.checksums import seal
from nearfield.errors import BadInputError
from nearfield.files import atomic_path
from nearfield.notices import say
from nearfield.pipeline.mining import MiningStages
from nearfield.pipeline.notices import token_notices

if TYPE_CHECKING:
    from nearfield.batching.plan import Lengths
    from nearfield.data.tokens import Rows


class PreparingStages(MiningStages):
    """What rank 0 does before the others are needed."""

    def data(self) -> dict[str, Any]:
        """Read the sources into a store of items and examples."""
        from nearfield.data import prepare_store
        from nearfield.data.summary import read_summary
        from nearfield.encoders.encode import text_encoder

        store = prepare_store(self.recipe.data, self.run.cache, encoders=text_encoder)
        steps = [dataclasses.asdict(step) for step in read_summary(store.path).steps]
        counts = {"items": store.items.num_rows, "examples": store.examples.num_rows}
        return {**counts, "steps": steps} if steps else counts

    def tokens(self) -> dict[str, Any]:
        """Tokenise the items of the training split with their prompts."""
        from nearfield.data.in_context import check_room
        from nearfield.data.tokens import build_tokens
        from nearfield.encoders.tokenize import Tokenizer
        from nearfield.pipeline.prompting import source_prompts

        store = self._store()
        sets = self._example_sets(store)
        wanted: dict[str, list[Rows]] = {}
        for source in self.run.checked.sources:
            rows = store.select(source.name, self.recipe.split)
            if not len(rows):
                splits = sorted({str(s) for s in store.examples["split"].unique().to_pylist()})
                raise BadInputError(
                    f"the source {source.name!r} has no examples in the split {self.recipe.split!r}",
                    where=self.run.loaded.where(("split",)),
                    hint=f"Splits: {', '.join(splits)}.",
                )
            prompts = source_prompts(self.contract, sets, source.name)
            part = store.examples.take(rows)
            for prompt in prompts.queries:
                wanted.setdefault(prompt, []).append(part["query"].to_numpy())
            for column, prompt in itertools.product(("positives", "negatives"), prompts.document):
                wanted.setdefault(prompt, []).append(part[column].combine_chunks().flatten().to_numpy())
            if source.examples.kind == "labelled":
                # The planner takes other items of a label as its positives.
                for prompt in prompts.document:
                    wanted[prompt].append(part["query"].to_numpy())
        for name, items in self.mined_items(store).items():
            for prompt in self.contract.of(name, "document"):
                wanted[prompt].append(items)
        tokenizer = Tokenizer(self.recipe.encoder, self.recipe.training.max_length, self.all_prompts(store))
        in_context, limit = self.recipe.prompts.in_context, tokenizer.max_length
        if in_context is not None and limit is not None:
            for name in sets:
                queries = source_prompts(self.contract, sets, name).queries
                check_room(queries, tokenizer.prompt_length, limit, in_context.query_tokens, name)
        build_tokens(
            store,
            {prompt: np.concatenate(rows) for prompt, rows in wanted.items()},
            tokenizer,
            tokenizer.prompt_length,
            self.tokens_path,
            self.fingerprints["tokens"],
            tokenize_items=tokenizer.of_items if store.has_images else None,
            reader=tokenizer,
        )
        for notice in token_notices(self):
            say(notice)
        return {"tokens": sum(int(table.offsets[-1]) for table in self._tokens().tables)}

    def plan(self) -> dict[str, Any]:
        """Write the batches of all epochs."""
        from nearfield.pipeline.planning import PlanInputs, read_examples, write_plans
        from nearfield.pipeline.prompting import row_prompts

        store, tokens, recipe = self._store(), self._tokens(), self.recipe
        names = [source.name for source in self.run.checked.sources]
        sources, labels = read_examples(
            store, names, recipe.split, self.planned_negatives(store), samples=recipe.batches.needs_samples
        )
        in_context, sets = recipe.prompts.in_context, self._example_sets(store)
        prompts = row_prompts(store, self.contract, sets, tokens.number, in_context, recipe.seed)
        lengths: Lengths = lambda prompt, items: tokens.tables[prompt].lengths(items)  # noqa: E731
        inputs = PlanInputs(sources, labels, prompts, lengths, store, self.planner_vectors())
        with atomic_path(self.run.folder / "plan") as aside:
            aside.mkdir()
            summary = write_plans(
                aside,
                recipe.batches,
                inputs,
                seed=recipe.seed,
                epochs=recipe.training.epochs,
                max_steps=recipe.training.max_steps,
                metadata={
                    name: self.fingerprints[name]
                    for name in ("data", "vectors", "mine", "tokens")
                    if name in self.fingerprints
                },
            )
            if summary["steps"] == 0:
                raise BadInputError(
                    f"not one batch of {recipe.batches.batch_size} can be made: {summary['epochs'][0]['dropped']}",
                    where=self.run.loaded.where(("batches", "batch_size")),
                    hint="Lower batches.batch_size, or set batches.drop_last=false.",
                )
            seal(aside)
        return {"steps": summary["steps"]}
