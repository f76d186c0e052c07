"""The stages ``data``, ``decontaminate`` and ``tokens``: the store of items and examples, what of it a suite has, the prompts of
its items, and their tokens."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nearfield.data.decontaminate import VERSION as DECONTAMINATION_VERSION
from nearfield.data.tokens import VERSION as TOKENS_VERSION
from nearfield.encoders.prompts import PromptContract, add_examples
from nearfield.encoders.source import folder_pools_prompt, locate
from nearfield.errors import BadInputError, Notice, say
from nearfield.files import fingerprint
from nearfield.pipeline.run import Job, Stage, StageStatus
from nearfield.pipeline.suites import decontaminate_store, suite_fingerprint

if TYPE_CHECKING:
    from nearfield.arrays import Rows
    from nearfield.batching.streams import PlannedRows
    from nearfield.data.decontaminate import ContaminationReport, DecontaminationStageConfig
    from nearfield.data.in_context import ExampleSet
    from nearfield.data.store import DataSummary, Store
    from nearfield.data.tokens import TokenCache
    from nearfield.pipeline.mining import MineStage
    from nearfield.pipeline.planning import PromptsOfEpoch
    from nearfield.training.chunks import LoadImages

logger = logging.getLogger("nearfield.pipeline")


class DataStage(Stage):
    """Reads the sources into a store of items and examples."""

    name = "data"
    shared = True

    @cached_property
    def fingerprint(self) -> str:
        """That of the data recipe, which other runs share."""
        from nearfield.data.build import data_fingerprint

        return data_fingerprint(self.job.run.checked.data)

    def outputs(self) -> list[Path]:
        """The store."""
        return [self.job.run.cache / "data" / self.fingerprint]

    def run(self) -> dict[str, Any]:
        """Build the store."""
        from nearfield.data.build import prepare_store
        from nearfield.data.store import read_summary
        from nearfield.encoders.encode import text_encoder

        store = prepare_store(self.recipe.data, self.job.run.cache, encoders=text_encoder)
        steps = [dataclasses.asdict(step) for step in read_summary(store.path).steps]
        counts = {"items": store.items.num_rows, "examples": store.examples.num_rows}
        return {**counts, "steps": steps} if steps else counts

    def open(self) -> Store:
        """The store that was built."""
        from nearfield.data.store import Store

        return Store.open(self.output)

    def images(self) -> LoadImages | None:
        """How a training gets the images of items; none where the data has no images."""
        store = self.open()
        return store.images if store.has_images else None


class DecontaminateStage(DataStage):
    """Compares the training texts with a suite; where matches are left out, the store without them is what is trained on."""

    name = "decontaminate"
    shared = False

    def __init__(self, job: Job, data: DataStage) -> None:
        super().__init__(job)
        self.data = data

    @property
    def is_wanted(self) -> bool:
        """Whether the recipe asks for it."""
        return self.recipe.decontaminate is not None

    @property
    def leaves_out(self) -> bool:
        """Whether it makes a store of its own."""
        return self.recipe.decontaminate is not None and self.recipe.decontaminate.matches == "leave_out"

    @property
    def _config(self) -> DecontaminationStageConfig:
        config = self.recipe.decontaminate
        assert config is not None
        return config

    @property
    def _suite(self) -> Path:
        evaluation = self.recipe.evaluation
        suite = self._config.suite or (None if evaluation is None else evaluation.suite)
        assert suite is not None, "a recipe without a suite was checked"
        return suite

    def inputs(self) -> Any:
        """The data, the suite, the rules, and the model of the vectors."""
        config = self._config
        return {
            "version": DECONTAMINATION_VERSION,
            "data": self.data.fingerprint,
            "suite": suite_fingerprint(self._suite, self.job.run.checked.compared_suite),
            "sources": self.job.source_names,
            "split": self.recipe.split,
            "rules": config.rules.model_dump(mode="json"),
            "matches": config.matches,
            "encoder": None if config.encoder is None else locate(config.encoder).content,
        }

    @cached_property
    def fingerprint(self) -> str:
        """Of its own inputs, not of the data alone."""
        return fingerprint(self.inputs())

    @property
    def report(self) -> Path:
        """The report, which is the run's own."""
        return self.job.run.folder / "contamination.json"

    def outputs(self) -> list[Path]:
        """The report, and the store that is left."""
        store = self.job.run.cache / "data" / self.fingerprint
        return [self.report, store] if self.leaves_out else [self.report]

    def sealed(self) -> list[Path]:
        """The store that is left."""
        return self.outputs()[1:]

    def status(self) -> StageStatus:
        """Whether the report and the store are there; the store alone is another run's, which looked at other sources perhaps."""
        known = Stage.status(self)
        if known.state == "done" and not all(path.exists() for path in self.outputs()):
            return StageStatus(self.name, "missing", "", str(self.output))
        return known

    def run(self) -> dict[str, Any]:
        """Compare, say what matches, and build the store without it where it is to be left out."""
        from nearfield.data.build import ensure_store_at
        from nearfield.data.cleaning.steps import RemovalListStep
        from nearfield.encoders.encode import text_encoder

        run, config = self.job.run, self._config
        report = decontaminate_store(
            self.data.open(),
            self._suite,
            run.cache,
            config.rules,
            sources=self.job.source_names,
            split=self.recipe.split,
            encoder=config.encoder,
        ).report
        report = replace(report, left_out=self.leaves_out)
        removals = run.folder / "contamination.removals.jsonl"
        report.save_removals(removals)
        if self.leaves_out:
            step = RemovalListStep(path=removals)
            data = run.checked.data
            store = ensure_store_at(
                data.model_copy(update={"steps": (*data.steps, step)}), self.output, encoders=text_encoder
            )
            logger.info("Training goes without %s examples whose texts the suite has", f"{_taken(store):,}")
        elif report.contaminated:
            say(_contaminated(report))
        report.save(self.report)
        return {"texts": report.texts, "contaminated": report.contaminated, "matches": config.matches}


def _taken(summary: DataSummary) -> int:
    """The examples that the last cleaning step took out."""
    step = summary.steps[-1]
    return sum(step.before.values()) - sum(step.after.values())


def _contaminated(report: ContaminationReport) -> Notice:
    """The notice of training texts that match; a minor one where the words only nearly agree, or in a part of a text."""
    copies = sum(removal.kind in ("exact", "normalised", "ngram") for removal in report.removals)
    return Notice(
        "benchmark-texts",
        f"{report.contaminated:,} of {report.texts:,} training texts match texts of the suite {report.suite}, {copies:,} of "
        "them word for word",
        "Look at contamination.removals.jsonl in the run; decontaminate.matches=leave_out trains without them.",
        minor=not copies,
    )


@dataclass(frozen=True)
class SourcePrompts:
    """The prompts of a source."""

    query: list[list[str]]
    """[phrasings][1 + sets of examples]: the phrasing alone, then with each set before it."""
    document: list[str]

    @property
    def queries(self) -> list[str]:
        """All of its query prompts."""
        return [prompt for phrasing in self.query for prompt in phrasing]


class ItemPrompts:
    """The prompts that a run's items are tokenised with, and those that each row of a plan gets."""

    def __init__(self, job: Job, data: DataStage) -> None:
        self.job = job
        self.data = data
        self.in_context = job.recipe.prompts.in_context

    @cached_property
    def example_sets(self) -> dict[str, list[ExampleSet]]:
        """The in-context examples of each source that gets some: a function of the store, the recipe and its seed."""
        from nearfield.data.in_context import draw_example_sets

        if self.in_context is None:
            return {}
        recipe, chosen = self.job.recipe, self.in_context.sources
        names = [name for name in self.job.source_names if chosen is None or name in chosen]
        store = self.data.open()
        return {name: draw_example_sets(store, name, recipe.split, self.in_context, recipe.seed) for name in names}

    @cached_property
    def trained_contract(self) -> PromptContract:
        """The contract with the in-context examples in it; without such the run's own. Needs the store."""
        if self.in_context is None:
            return self.job.contract
        sets = {name: [one.text for one in examples] for name, examples in self.example_sets.items()}
        return add_examples(self.job.contract, sets, self.in_context.evaluated == "examples")

    def of_source(self, name: str) -> SourcePrompts:
        """The prompts of a source: its phrasings, for queries with each set of examples before them, too."""
        contract = self.job.contract
        before = ["", *(examples.text for examples in self.example_sets.get(name, ()))]
        query = [[text + phrasing for text in before] for phrasing in contract.of(name, "query")]
        return SourcePrompts(query, list(contract.of(name, "document")))

    def all(self) -> list[str]:
        """Every text that stands before items, in training or in the model that is saved."""
        texts = {*self.trained_contract.model_prompts.values()}
        for name in self.job.source_names:
            prompts = self.of_source(name)
            texts |= {*prompts.queries, *prompts.document}
        return sorted(texts)

    def of_rows(self, number: Callable[[str], int]) -> PromptsOfEpoch:
        """A function from the rows of an epoch's plan to their (query, document) prompt numbers, [n] each.

        ``number`` gives the number of a prompt. A row's prompt depends on the seed, the epoch, its source and its example
        alone, not on its batch.
        """
        from nearfield.batching.streams import PromptDraw
        from nearfield.data.in_context import forbidden_queries

        store, seed, draws = self.data.open(), self.job.recipe.seed, {}
        for name in self.job.contract.sources:
            prompts = self.of_source(name)
            draws[store.source_number(name)] = PromptDraw(
                name,
                [[number(text) for text in phrasing] for phrasing in prompts.query],
                [number(text) for text in prompts.document],
                [forbidden_queries(examples, store.known_positives()) for examples in self.example_sets.get(name, ())],
                0.0 if self.in_context is None else self.in_context.none,
            )

        def of_rows(rows: PlannedRows, epoch: int) -> tuple[Rows, Rows]:
            query = np.full(len(rows), -1, dtype=np.int64)
            document = query.copy()
            for source in np.unique(rows.source).tolist():
                mine = np.flatnonzero(rows.source == source)
                query[mine], document[mine] = draws[source].draw(rows.example[mine], rows.query[mine], seed, epoch)
            return query, document

        return of_rows


class TokensStage(Stage):
    """Tokenises the items of the training split with their prompts."""

    name = "tokens"
    shared = True
    packages = ("transformers", "sentence-transformers", "tokenizers", "sentencepiece", "tiktoken", "pillow", "numpy")

    def __init__(self, job: Job, data: DataStage, mine: MineStage) -> None:
        super().__init__(job)
        self.data = data
        self.mine = mine
        self.prompts = ItemPrompts(job, data)

    def inputs(self) -> Any:
        """The data, the tokenizer and the prompts; mined documents of other sources, which get prompts that they had not."""
        recipe, base = self.recipe, self.job.base
        encoder = recipe.encoder
        tower = self.job.encoder_inputs["image_tower"] if encoder.image_tower is not None else None
        tokens: dict[str, Any] = {
            "version": TOKENS_VERSION,
            "data": self.data.fingerprint,
            "tokenizer": [
                base.name,
                base.content,
                # The base's own is in its content.
                min(filter(None, [recipe.training.max_length, encoder.max_length]), default=None),
                *(["append_eos"] if encoder.append_eos else []),
                *([] if tower is None else [tower]),
            ],
            "prompts": self.job.contract.inputs(),
            "split": recipe.split,
        }
        if not (folder_pools_prompt(base.path) if encoder.pool_prompt is None else encoder.pool_prompt):
            # The ends of all prompts are borders of tokens then.
            tokens["pooled_without"] = sorted({*self.job.contract.model_prompts.values()})
        if recipe.prompts.in_context is not None:
            tokens["in_context"] = [recipe.prompts.in_context.model_dump(mode="json"), recipe.seed]
        if recipe.mining is not None and recipe.mining.corpus == "sources":
            refreshes = recipe.mining.during is not None and recipe.mining.during.mines_anew
            tokens["mined"] = "all" if refreshes else self.mine.fingerprint
        return tokens

    def outputs(self) -> list[Path]:
        """The token cache."""
        return [self.in_cache("tokens", self.fingerprint)]

    def open(self) -> TokenCache:
        """The tokens that were made."""
        from nearfield.data.tokens import TokenCache

        return TokenCache(self.output)

    def run(self) -> dict[str, Any]:
        """Build the token cache."""
        from nearfield.data.in_context import check_room
        from nearfield.data.tokens import build_tokens
        from nearfield.encoders.load import build_tokenizer

        store, prompts = self.data.open(), self.prompts
        tokenizer = build_tokenizer(self.recipe.encoder, self.recipe.training.max_length, prompts.all())
        in_context, limit = self.recipe.prompts.in_context, tokenizer.max_length
        if in_context is not None and limit is not None:
            for name in prompts.example_sets:
                queries = prompts.of_source(name).queries
                check_room(queries, tokenizer.prompt_length, limit, in_context.query_tokens, name)
        build_tokens(
            store,
            self._items_by_prompt(store),
            tokenizer,
            self.output,
            self.fingerprint,
        )
        for notice in token_notices(self):
            say(notice)
        return {"tokens": sum(len(table.lists.values) for table in self.open().tables)}

    def _items_by_prompt(self, store: Store) -> dict[str, Rows]:
        """Prompt -> the items that it stands before."""
        wanted: dict[str, list[Rows]] = {}
        for source in self.job.run.checked.sources:
            rows = store.select(source.name, self.recipe.split)
            if not len(rows):
                splits = sorted({str(s) for s in store.examples["split"].unique().to_pylist()})
                raise BadInputError(
                    f"the source {source.name!r} has no examples in the split {self.recipe.split!r}",
                    where=self.job.run.loaded.where(("split",)),
                    hint=f"Splits: {', '.join(splits)}.",
                )
            prompts = self.prompts.of_source(source.name)
            part = store.examples.take(rows)
            for prompt in prompts.queries:
                wanted.setdefault(prompt, []).append(part["query"].to_numpy())
            for column, prompt in itertools.product(("positives", "negatives"), prompts.document):
                wanted.setdefault(prompt, []).append(part[column].combine_chunks().flatten().to_numpy())
            if source.examples.form == "labelled":
                # The planner takes other items of a label as its positives.
                for prompt in prompts.document:
                    wanted[prompt].append(part["query"].to_numpy())
        for name, items in self.mine.documents_by_source(store).items():
            for prompt in self.job.contract.of(name, "document"):
                wanted[prompt].append(items)
        return {prompt: np.concatenate(rows) for prompt, rows in wanted.items()}


def data_notices(stage: DataStage) -> Iterator[Notice]:
    """Notices of the data build, for the sources that are trained on."""
    from nearfield.data.store import read_summary

    summary = read_summary(stage.output)
    names = {source.name for source in stage.job.run.checked.sources}
    for source in summary.sources:
        if source.name not in names:
            continue
        bad = sum(source.quarantined.values())
        if bad:
            reasons = ", ".join(f"{count:,} {reason}" for reason, count in source.quarantined.items())
            yield Notice(
                "rows-unusable", f"{source.name}: {bad:,} of {source.rows:,} rows could not be used ({reasons})"
            )
        if source.duplicates:
            yield Notice(
                "rows-repeated",
                f"{source.name}: {source.duplicates:,} of {source.rows:,} rows repeat another row; left out",
                minor=True,
            )
    conflicts = summary.conflicts
    if conflicts.positive_and_negative:
        yield Notice(
            "positive-and-negative",
            f"{conflicts.positive_and_negative:,} texts were both positive and negative of a query; taken as positives",
        )
    for pair, count in summary.shared_between_splits.items():
        if stage.recipe.split in pair.split("+"):
            yield Notice(
                "texts-in-two-splits",
                f"{count:,} texts are in two splits ({pair}), so scores on one of them are flattered",
                "Split by group: set 'group' in the data recipe.",
            )


def score_notices(stage: DataStage) -> Iterator[Notice]:
    """Scores of graded pairs that the objective cannot give, or that are all the same; labels that are."""
    store, recipe = stage.open(), stage.recipe
    for source in stage.job.run.checked.sources:
        if source.examples.form == "labelled":
            labels = store.examples.take(store.select(source.name, recipe.split))["label"].drop_null()
            if len(labels) and len(labels.unique()) == 1:
                yield Notice(
                    "labels-all-equal",
                    f"{source.name}: all {len(labels):,} items have the label {labels[0].as_py()!r}: there are none to tell apart",
                    "Check the column of labels in the data recipe.",
                )
        if source.examples.form != "graded":
            continue
        scores = store.examples.take(store.select(source.name, recipe.split))["score"].drop_null().to_numpy()
        if not len(scores):
            continue
        low, high = float(scores.min()), float(scores.max())
        if low == high:
            yield Notice("scores-all-equal", f"{source.name}: all {len(scores):,} pairs have the score {low:g}")
        for objective in recipe.objective.of_source(source.name, source.examples.form):
            bounds = objective.score_bounds
            if bounds is not None and not (bounds[0] <= low and high <= bounds[1]):
                outside = int(((scores < bounds[0]) | (scores > bounds[1])).sum())
                yield Notice(
                    "scores-out-of-range",
                    f"{source.name}: {outside:,} of {len(scores):,} scores (from {low:g} to {high:g}) are beyond what "
                    f"{getattr(objective, 'kind', 'the objective')} can give ({bounds[0]:g} to {bounds[1]:g})",
                    f"Set scale, such as [{min(low, 0.0):.0f}, {math.ceil(high)}], in the examples of the data recipe.",
                )


def prompt_notices(contract: PromptContract) -> Iterator[Notice]:
    """Notices of the prompts."""
    yield from contract.notices()
    for name, prompts in contract.sources.items():
        for role, text in prompts.items():
            if text and text[-1:].isalnum():
                yield Notice(
                    "prompt-runs-into-text",
                    f"the {role} prompt of {name} runs into the text: {text!r} does not end in a space",
                )


def token_notices(stage: TokensStage) -> Iterator[Notice]:
    """Texts that are cut in training."""
    cache, asked = stage.open(), stage.recipe.training.max_length
    if asked is not None and cache.max_length is not None and cache.max_length < asked:
        yield Notice(
            "training-length",
            f"training.max_length is {asked:,}, and the model reads {cache.max_length:,} tokens: so much of a text is trained on",
            "Raise encoder.max_length too, if the model allows it.",
        )
    if cache.cut.cut and cache.max_length is not None:
        key = "training.max_length" if asked is not None and asked <= cache.max_length else "encoder.max_length"
        yield Notice(
            "texts-cut", f"in training {cache.cut.say(cache.max_length)}", f"Raise {key} if the model allows it."
        )


def unpooled_notices(stage: TokensStage) -> Iterator[Notice]:
    """Texts that are nothing but their prompt, where pooling leaves that out."""
    cache = stage.open()
    for table in cache.tables:
        rows = cache.without_tokens(table)
        if len(rows):
            yield Notice(
                "no-token-pooled",
                f"{len(rows):,} of {len(table.rows):,} texts have no token behind the prompt {table.prompt!r} (such as item "
                f"{int(rows[0])}), which pooling leaves out: their vectors are zero and nothing is learnt from them",
                "Leave out empty texts, raise training.max_length where it ends in the prompt, or set encoder.pool_prompt: true.",
            )
