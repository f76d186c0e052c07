"""Training puts before texts what mteb puts there, with the saved model and nothing else: for every task of the benchmarks."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path
from typing import Any, get_args

import mteb
import numpy as np
import pytest
import yaml
from datasets import Dataset
from mteb.abstasks import AbsTaskPairClassification
from mteb.abstasks.aggregated_task import AbsTaskAggregate
from mteb.abstasks.task_metadata import TaskType
from mteb.get_tasks import _TASKS_REGISTRY
from mteb.models.abs_encoder import get_prompt
from mteb.models.sentence_transformer_wrapper import SentenceTransformerEncoderWrapper
from mteb.types import PromptType
from sentence_transformers import SentenceTransformer
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from nearfield.batching.plan import Plan
from nearfield.data import Store
from nearfield.data.tokens import TokenCache
from nearfield.encoders.prompts import TYPES_WITH_ROLES, has_roles
from nearfield.errors import BadInputError
from nearfield.evaluation import evaluate, open_model, runner
from nearfield.evaluation.encoder import roles_of
from nearfield.evaluation.tasks import SuiteTask
from nearfield.pipeline import Run, open_run, run_stages
from nearfield.pipeline.dry_run import dry_run

EXAMPLES: dict[str, dict[str, Any]] = {
    "pairs": {"kind": "retrieval", "query": "first", "positives": "second"},
    "graded": {"kind": "graded", "first": "first", "second": "second", "score": "score"},
    "labels": {"kind": "labelled", "item": "first", "label": "label"},
}
OBJECTIVE = {
    "kind": "combined",
    "parts": [{"objective": {"kind": kind}} for kind in ("infonce", "cosent", "supcon")],
}
SOURCES: dict[str, tuple[str, dict[str, Any]]] = {
    "Retrieval": ("pairs", {"template": "e5-instruct", "instruction": "word1 word2"}),
    "Reranking": ("pairs", {"query": "word3 ", "document": "word4 "}),
    "InstructionReranking": ("pairs", {"query": ["word5 ", "word6 "]}),
    "Classification": ("labels", {"query": "word7: "}),
    "MultilabelClassification": ("labels", {"query": "word8: ", "document": "word8: "}),
    "Clustering": ("labels", {"template": "e5-instruct", "instruction": "word9"}),
    "STS": ("graded", {"template": "e5"}),
    "PairClassification": ("pairs", {"query": "word10 "}),
    "BitextMining": ("pairs", {}),
    "Summarization": ("graded", {"document": "word11 "}),
}


BENCHMARKS = ("MTEB(eng, v2)", "MTEB(Multilingual, v2)")


def write(
    folder: Path, model: Path, sources: dict[str, tuple[str, str, dict[str, Any]]], prompts: Any = None, **more: Any
) -> Run:
    """A run on sources: name -> (task type, kind of examples, prompts)."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        {"first": f"word{i} word{i + 1}", "second": f"word{i} word{i + 50}", "score": i % 5 / 4, "label": f"l{i % 4}"}
        for i in range(24)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = [
        {
            "name": name,
            "task_type": task_type,
            "prompts": own,
            "reader": {"kind": "jsonl", "path": "rows.jsonl"},
            "examples": EXAMPLES[kind],
            "split": {"kind": "all"},
        }
        for name, (task_type, kind, own) in sources.items()
    ]
    (folder / "data.yaml").write_text(yaml.safe_dump({"name": "data", "sources": data}))
    recipe = {
        "name": "run",
        "data": "data.yaml",
        "encoder": {"model": str(model)},
        "objective": OBJECTIVE,
        "prompts": prompts or {},
        "batches": {"kind": "single_source", "batch_size": 8, "negatives": 0},
        "training": {"epochs": 1, "max_steps": 1, "trackers": []},
        **more,
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return open_run(folder / "recipe.yaml", (), folder / "runs" / "run")


def trained(run: Run) -> dict[str, tuple[set[str], set[str]]]:
    """Source -> the prompts that the plan puts before its queries, and before its documents."""
    store, tokens = Store.open(run.record("data")["path"]), TokenCache(Path(run.record("tokens")["path"]))
    found: dict[str, tuple[set[str], set[str]]] = {source.name: (set(), set()) for source in store.sources}
    for path in sorted((run.folder / "plan").glob("epoch-*.parquet")):
        plan = Plan(path)
        for source, query, document in zip(
            *(plan.column(name).tolist() for name in ("source", "query_prompt", "document_prompt")), strict=True
        ):
            of = found[store.sources[source].name]
            of[0].add(tokens.tables[query].prompt), of[1].add(tokens.tables[document].prompt)
    return found


@pytest.fixture(scope="module")
def every_type(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Run:
    """A model that was trained with a prompt for each task type of the benchmarks."""
    sources = {name: (name, *of) for name, of in SOURCES.items()}
    fallback = {"query": "Instruct: word1 word2\nQuery: ", "document": ""}
    run = write(
        tmp_path_factory.mktemp("every"),
        tiny_model,
        sources,
        {"types": {"BitextMining": {"text": ""}}, "fallback": {**fallback, "text": ""}},
        training={"epochs": 1, "trackers": []},
    )
    run_stages(run, "train")
    return run


class Read:
    """Every string that a tokenizer gets, by the task that is scored."""

    def __init__(self) -> None:
        self.task, self.strings = "", {"": [""]}

    def begin(self, task: str) -> None:
        self.task, self.strings[task] = task, []


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> Read:
    found, call = Read(), PreTrainedTokenizerBase.__call__

    def spy(self: Any, text: Any = None, *args: Any, **kwargs: Any) -> Any:
        found.strings[found.task] += [text] if isinstance(text, str) else text
        return call(self, text, *args, **kwargs)

    monkeypatch.setattr(PreTrainedTokenizerBase, "__call__", spy)
    return found


def mocks() -> dict[str, type[Any]]:
    """Task type -> mteb's own made-up task of it."""
    found: dict[str, type[Any]] = {}
    names = "bitext_mining classification clustering pair_classification reranking retrieval sts summarization"
    for name in names.split():
        module = importlib.import_module(f"mteb.mocks.mock_tasks.{name}")
        for each, cls in vars(module).items():
            if re.match(r"(Legacy)?Mock(?!Multilingual|Aggregated)", each) and cls.metadata.modalities == ["text"]:
                found.setdefault(cls.metadata.type, cls)
    return found


def stand_ins(benchmarks: tuple[str, ...], read: Read) -> list[Any]:
    """The tasks of benchmarks, each once, on made-up data; ``read`` is told when one begins."""
    made, seen = mocks(), {}
    for official in (task for name in benchmarks for task in mteb.get_benchmark(name).tasks):
        cls, name = made[official.metadata.type], official.metadata.name

        def load_data(self: Any, *_: Any, cls: type[Any] = cls, name: str = name, **__: Any) -> None:
            cls.load_data(self)
            read.begin(name)

        metadata = cls.metadata.model_copy(update={"name": name, "type": official.metadata.type})
        body: dict[str, Any] = {"metadata": metadata, "load_data": load_data, "n_experiments": 1}
        for side in ("input1_prompt_type", "input2_prompt_type"):
            if hasattr(official, side):
                body[side] = getattr(official, side)
        seen[name] = type("StandIn", (cls,), body)()
        assert roles_of(seen[name]) == roles_of(official)
    return list(seen.values())


def questions(task: Any) -> list[str]:
    """The texts of a retrieval task's queries."""
    task = type(task)()
    task.load_data()
    return [str(row["text"]) for of in task.dataset["default"].values() for row in of["queries"]]


def check_what_is_read(run: Run, tasks: list[Any], read: Read, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By plain mteb and by ``nearfield eval`` the tokenizer gets the texts of tasks with the trained prompts before them."""
    before, folder = trained(run), run.folder / "model"
    model = SentenceTransformer(str(folder), device="cpu")
    mteb.evaluate(model, tasks, cache=None, co2_tracker=False, show_progress_bar=False)
    plain, read.strings = read.strings, {"": []}
    for task in tasks:
        texts, task_type = plain[task.metadata.name], task.metadata.type
        query, document = (tuple(sorted(prompts))[:1] for prompts in before[task_type])
        assert texts and all(text.startswith((*query, *document)) for text in texts)
        if has_roles(task_type):
            asked = questions(task)
            assert all(any(text.startswith(query) and one in text for text in texts) for one in asked)
            assert not any(text.startswith(one) for text in texts for one in asked)
    monkeypatch.setattr(runner, "open_suite", lambda *_, **__: [SuiteTask(task) for task in tasks])
    result = evaluate(str(folder), out, out / "results")
    assert not [one for of in result.notices.values() for one in of if one.code == "type-not-trained"]
    for task in tasks:
        name, prompts = task.metadata.name, [text for of in before[task.metadata.type] for text in of]
        more = set(read.strings[name]) - set(plain[name])
        assert set(plain[name]) <= set(read.strings[name]), name
        # Beside them prompts alone, or before a letter, are measured.
        assert all(len(text) <= max(map(len, prompts)) + 1 for text in more), name


def test_tasks_of_every_type_of_the_benchmarks_read_what_was_trained(
    every_type: Run, read: Read, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = trained(every_type)
    assert before["Classification"] == ({"word7: "}, {"word7: "})
    assert before["Clustering"] == ({"Instruct: word9\nQuery: "},) * 2
    assert before["STS"] == ({"query: "}, {"query: "})
    assert before["Summarization"] == ({"word11 "}, {"word11 "})
    assert before["InstructionReranking"] == ({"word5 ", "word6 "}, {""})
    tasks = stand_ins(BENCHMARKS, read)
    assert len(tasks) > 150 and {task.metadata.type for task in tasks} == set(SOURCES)
    kinds = {(task.metadata.type, roles_of(task)): task for task in tasks}
    check_what_is_read(every_type, list(kinds.values()), read, tmp_path, monkeypatch)
    # The others of a type: what mteb's own wrapper looks up.
    model = SentenceTransformer(str(every_type.folder / "model"), device="cpu")
    wrapper = SentenceTransformerEncoderWrapper(model)
    for task in tasks:
        for role in roles_of(task):
            found = get_prompt(wrapper.model_prompts, task.metadata, role)
            side = before[task.metadata.type][0 if role != PromptType.document else 1]
            assert found == min(side), (task.metadata.name, role)


@pytest.mark.slow
def test_every_task_of_the_benchmarks_reads_what_was_trained(
    every_type: Run, read: Read, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_what_is_read(every_type, stand_ins(BENCHMARKS, read), read, tmp_path, monkeypatch)


def test_types_with_roles_are_those_that_mteb_asks_for_queries_and_documents() -> None:
    # Classes are enough, and made at once.
    classes = [cls for cls in _TASKS_REGISTRY.values() if not issubclass(cls, AbsTaskAggregate)]
    tasks = [object.__new__(cls) for cls in classes]
    assert len(tasks) > 1_000
    asked = {task.metadata.type for task in tasks if roles_of(task) == (PromptType.query, PromptType.document)}
    texts = {task.metadata.type for task in tasks if None in roles_of(task)}
    both = {task.metadata.type for task in tasks if isinstance(task, AbsTaskPairClassification)}
    assert asked - both == TYPES_WITH_ROLES
    assert not texts & TYPES_WITH_ROLES and asked | texts | {"VideoMultilabelClassification"} == set(get_args(TaskType))


def snippet(folder: Path) -> dict[str, Any]:
    """The variables that the lines of Python in a model's card leave behind, run as they stand there."""
    code = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    assert code is not None
    found: dict[str, Any] = {}
    exec(code[1].replace('"this-folder"', repr(str(folder))), found)
    return found


def evaluated(folder: Path, task: str, texts: list[str], role: PromptType | None) -> Any:
    """The vectors that an evaluation makes of texts in a task of mteb."""
    scored = open_model(str(folder))
    loader = DataLoader(Dataset.from_dict({"text": texts}), batch_size=8)
    metadata = mteb.get_task(task).metadata
    assert scored.encoder is not None
    return scored.encoder.encode(loader, task_metadata=metadata, hf_split="test", hf_subset="default", prompt_type=role)


OFFICIAL = {
    "Retrieval": "SciFact",
    "Reranking": "AskUbuntuDupQuestions",
    "STS": "STS12",
    "Clustering": "TwentyNewsgroupsClustering.v2",
}


@pytest.mark.parametrize(
    ("sources", "prompts"),
    [
        ({"a": ("Retrieval", "pairs", {"template": "e5-instruct", "instruction": "word1 word2"})}, {}),
        ({"a": ("Retrieval", "pairs", {"query": "word1 "})}, {"fallback": {"query": "", "text": "word2 "}}),
        ({"a": ("STS", "graded", {"query": "word1 "})}, {}),
        (
            {"a": ("Retrieval", "pairs", {"query": "word1 "}), "b": ("Clustering", "labels", {"query": "word2 "})},
            {"in_context": {"draws": 2, "most": 1, "query_tokens": 4, "sources": ["a"], "evaluated": "examples"}},
        ),
    ],
)
def test_the_snippet_of_a_card_gives_the_vectors_that_are_evaluated(
    sources: dict[str, Any], prompts: dict[str, Any], tmp_path: Path, tiny_model: Path
) -> None:
    run = write(tmp_path, tiny_model, sources, prompts)
    run_stages(run, "train")
    folder, found = run.folder / "model", snippet(run.folder / "model")
    for task_type, _, _ in sources.values():
        official = OFFICIAL[task_type]
        if has_roles(task_type):
            queries = evaluated(folder, official, ["a query"], PromptType.query)
            documents = evaluated(folder, official, ["a document"], PromptType.document)
            np.testing.assert_allclose(found["queries"], queries, atol=1e-6)
            np.testing.assert_allclose(found["documents"], documents, atol=1e-6)
            bare = SentenceTransformer(str(folder), device="cpu").encode(["a query"], prompt="")
            assert np.abs(bare - queries).max() > 1e-3
        else:
            texts = evaluated(folder, official, ["a text", "another text"], None)
            np.testing.assert_allclose(found["texts"], texts, atol=1e-6)


def prompted(model: Path, folder: Path, prompts: dict[str, str], default: str | None = None) -> Path:
    """A model with prompts of its own."""
    SentenceTransformer(str(model), device="cpu", prompts=prompts, default_prompt_name=default).save(str(folder))
    return folder


def test_what_cannot_be_is_refused_before_training(tmp_path: Path, tiny_model: Path) -> None:
    """By the check of a recipe, by the dry run and by the training, with the key that mends it."""
    sources = {"a": ("Retrieval", "pairs", {"query": "word1 "}), "b": ("Reranking", "pairs", {"query": "word2 "})}
    with pytest.raises(BadInputError, match=r"prompts\.fallback\.query"):
        write(tmp_path, tiny_model, sources)
    run = write(tmp_path, tiny_model, sources, {"fallback": {"query": "word1 "}})
    run_stages(run, "plan")
    # The base's own prompts are known where it is opened.
    base = prompted(tiny_model, tmp_path / "base", {"Retrieval-query": "word3 "})
    with pytest.raises(BadInputError, match=r"'word2 ', 'word3 '"):
        write(tmp_path, base, {"a": ("Retrieval", "pairs", {}), "b": sources["b"]})


def test_a_base_with_a_default_prompt_loads_after_training(tmp_path: Path, tiny_model: Path) -> None:
    """Its key goes on to exist, with its text, whatever is trained; ``query`` is what was trained."""
    base = prompted(tiny_model, tmp_path / "base", {"query": "word9 ", "mine": "word8 "}, "mine")
    run = write(tmp_path, base, {"a": ("Retrieval", "pairs", {"query": "word1 "})})
    run_stages(run, "train")
    model = SentenceTransformer(str(run.folder / "model"), device="cpu")
    assert model.prompts[str(model.default_prompt_name)] == "word8 " and model.prompts["query"] == "word1 "


def test_a_dry_run_says_which_tasks_are_of_types_that_no_source_has(tmp_path: Path, tiny_model: Path) -> None:
    (tmp_path / "suite.yaml").write_text("name: s\ntasks: [{kind: mteb, names: [STS12, SciFact]}]\n")
    evaluation = {"suite": str(tmp_path / "suite.yaml"), "before": False, "baselines": []}
    run = write(tmp_path, tiny_model, {"a": ("Retrieval", "pairs", {"query": "word1 "})}, evaluation=evaluation)
    result = dry_run(run, trial_seconds=0.1)
    assert result is not None and result.would_start
    said = [notice.what for notice in result.notices if notice.code == "type-not-trained"]
    assert len(said) == 1 and "no source of the training was of type STS; STS12 puts no prompt" in said[0]


def test_evaluation_during_training_takes_the_prompts_that_are_saved(tmp_path: Path, tiny_model: Path) -> None:
    (tmp_path / "suite.yaml").write_text(
        "name: s\ntasks: [{kind: heldout, name: Own, data: data.yaml, source: a, split: train}]\n"
    )
    during = {"suite": str(tmp_path / "suite.yaml"), "every_steps": 1, "metric": "Own"}
    training = {"epochs": 1, "max_steps": 1, "trackers": [], "evaluation": during}
    evaluation = {"suite": str(tmp_path / "suite.yaml"), "before": False, "baselines": []}
    source = {"a": ("STS", "graded", {"query": "word1 word2 word3 "})}
    run = write(tmp_path, tiny_model, source, training=training, evaluation=evaluation)
    run_stages(run)
    last = [line for line in (run.folder / "evaluations.jsonl").read_text().splitlines() if line][-1]
    result = next(run.folder.glob("results/*/*/Own.json"))
    scores = json.loads(result.read_text())["scores"]["train"][0]["main_score"]
    assert json.loads(last)["scores"]["Own"] == pytest.approx(scores, abs=1e-6)
