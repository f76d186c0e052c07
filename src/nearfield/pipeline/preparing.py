"""The stages before training: the store, its tokens, the batches."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import numpy as np

from nearfield.errors import BadInputError
from nearfield.files import atomic_path, write_json
from nearfield.pipeline.artifacts import Artifacts

if TYPE_CHECKING:
    from nearfield.data.tokens import Rows


class PreparingStages(Artifacts):
    """What rank 0 does before the others are needed."""

    def data(self) -> dict[str, Any]:
        """Read the sources into a store of items and examples."""
        from nearfield.data import prepare_store

        store = prepare_store(self.recipe.data, self.run.cache)
        return {"items": store.items.num_rows, "examples": store.examples.num_rows}

    def tokens(self) -> dict[str, Any]:
        """Tokenise the items of the training split with their prompts."""
        from nearfield.data.tokens import build_tokens
        from nearfield.encoders.tokenize import Tokenizer

        store = self._store()
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
            prompts = self.contract.sources[source.name]
            part = store.examples.take(rows)
            wanted.setdefault(prompts["query"], []).append(part["query"].to_numpy())
            for column in ("positives", "negatives"):
                wanted.setdefault(prompts["document"], []).append(part[column].combine_chunks().flatten().to_numpy())
        tokenizer = Tokenizer(self.recipe.encoder)
        cache = build_tokens(
            store,
            {prompt: np.concatenate(rows) for prompt, rows in wanted.items()},
            tokenizer,
            tokenizer.prompt_length,
            self.tokens_path,
            self.fingerprints["tokens"],
        )
        return {"tokens": sum(int(table.offsets[-1]) for table in cache.tables)}

    def plan(self) -> dict[str, Any]:
        """Write the batches of all epochs."""
        from nearfield.batching.plan import Lengths, write_plan
        from nearfield.batching.planner import SourceExamples

        store, tokens, recipe = self._store(), self._tokens(), self.recipe
        sources, prompts = [], {}
        for source in self.run.checked.sources:
            rows = store.select(source.name, recipe.split)
            part, number = store.examples.take(rows), store.source_number(source.name)
            sources.append(
                SourceExamples(
                    number,
                    source.name,
                    rows,
                    part["query"].to_numpy(),
                    _lists(part["positives"]),
                    _lists(part["negatives"]),
                )
            )
            texts = self.contract.sources[source.name]
            prompts[number] = (tokens.number(texts["query"]), tokens.number(texts["document"]))
        lengths: Lengths = lambda prompt, items: tokens.tables[prompt].lengths(items)  # noqa: E731
        planner, steps, summaries = recipe.batches.build(), 0, []
        names = {str(source.source): source.name for source in sources}
        with atomic_path(self.run.folder / "plan") as aside:
            aside.mkdir()
            for epoch in range(recipe.training.epochs):
                if recipe.training.max_steps is not None and steps >= recipe.training.max_steps:
                    break
                batches = planner.plan(sources, recipe.seed, epoch)
                metadata = {
                    "seed": recipe.seed,
                    "epoch": epoch,
                    "data": self.fingerprints["data"],
                    "tokens": self.fingerprints["tokens"],
                    "batches": recipe.batches.model_dump(mode="json"),
                    "sources": names,
                }
                summary = write_plan(aside / f"epoch-{epoch:03d}.parquet", batches, prompts, lengths, metadata)
                summary["batches_by_source"] = {names[k]: n for k, n in summary["batches_by_source"].items()}
                summaries.append(summary)
                steps += summary["batches"]
            if steps == 0:
                raise BadInputError(
                    f"not one batch of {recipe.batches.batch_size} can be made: {summaries[0]['dropped']}",
                    where=self.run.loaded.where(("batches", "batch_size")),
                    hint="Lower batches.batch_size, or set batches.drop_last=false.",
                )
            whole = {
                "kind": recipe.batches.kind,
                "batch_size": recipe.batches.batch_size,
                "steps": steps,
                "epochs": summaries,
            }
            write_json(aside / "summary.json", whole)
        return {"steps": steps}


def _lists(column: Any) -> list[Rows]:
    """An Arrow column of integer lists as arrays, views of one."""
    array = column.combine_chunks()
    offsets = array.offsets.to_numpy()
    values = array.values.to_numpy(zero_copy_only=False)
    return [values[start:stop] for start, stop in itertools.pairwise(offsets)]
