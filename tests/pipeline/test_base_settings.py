"""A base folder's statements about its vectors and files hold in training: truncation, similarity, norm, prompts, stored type."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mteb
import numpy as np
import pytest
import torch
import yaml
from mteb.types import PromptType
from torch.nn import functional

from nearfield.batching.plan import Plan
from nearfield.data import Store
from nearfield.encoders import EncoderConfig, load_encoder
from nearfield.encoders.encode import Encoder
from nearfield.encoders.load import build_encoder
from nearfield.encoders.prompts import BasePrompts, base_prompts
from nearfield.encoders.source import stated_similarity, stored_dtype
from nearfield.evaluation.encoder import TaskEncoder
from nearfield.files import read_metrics
from nearfield.objectives import ContrastiveBatch
from nearfield.objectives.config import SIMILARITIES, CoSENTConfig, TripletConfig
from nearfield.pipeline import open_run, run_stages
from nearfield.pipeline.stages import Stages
from tests.conftest import write_toy_recipe

KEPT = 5
TEMPERATURE = 0.1
"""Of the toy recipe."""


def save_base(folder: Path, tiny: Path, *, dtype: str = "float32", normalize: bool = False, **says: Any) -> Path:
    """The tiny model in a folder that says some things of itself."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize

    model = SentenceTransformer(str(tiny), device="cpu", **says).to(getattr(torch, dtype))
    if normalize:
        model.append(Normalize())
    model.save_pretrained(str(folder), create_model_card=False)
    return folder


def train(tmp: Path, base: Path, data: Path, *overrides: str, steps: int = 1, until: str = "train") -> Path:
    recipe = write_toy_recipe(tmp, base, data)
    settings = [f"training.max_steps={steps}", "training.dropout=false", *overrides]
    run_stages(open_run(recipe, settings, tmp / "run"), until)
    return tmp / "run"


def notices(run: Path) -> dict[str, str]:
    return {one["code"]: one["what"] for one in json.loads((run / "manifest.json").read_text()).get("notices", [])}


def first_loss(run: Path, base: Path, similarity: str) -> float:
    """InfoNCE of the first batch by the vectors that plain sentence-transformers gives, in float64."""
    from sentence_transformers import SentenceTransformer

    batch = Plan(min((run / "plan").glob("epoch-*.parquet"))).batch(0)
    store = Store.open(Stages.of(open_run(run, (), run)).data.output)
    model = SentenceTransformer(str(base), device="cpu")

    def vectors(rows: Any) -> torch.Tensor:
        found = torch.from_numpy(model.encode(store.texts(np.asarray(rows)))).double()
        return functional.normalize(found, dim=1) if similarity == "cosine" else found

    positives = np.concatenate(batch.positives)
    documents = vectors([*positives, *np.concatenate(batch.negatives)])
    logits = vectors(batch.query) @ documents.T / TEMPERATURE
    return float(functional.cross_entropy(logits, torch.arange(len(positives))))


@pytest.mark.parametrize(
    ("says", "normalize", "similarity"),
    [
        ({"similarity_fn_name": "dot"}, False, "dot"),
        ({"truncate_dim": KEPT}, False, "cosine"),
        ({"truncate_dim": KEPT, "similarity_fn_name": "dot"}, True, "dot"),
    ],
)
def test_the_loss_is_that_of_the_vectors_that_the_base_gives(
    says: dict[str, Any], normalize: bool, similarity: str, tmp_path: Path, tiny_model: Path, toy_data: Path
) -> None:
    """The base as plain sentence-transformers reads it, and the saved model says what the base says."""
    from sentence_transformers import SentenceTransformer

    base = save_base(tmp_path / "base", tiny_model, normalize=normalize, **says)
    run = train(tmp_path, base, toy_data)
    [line] = read_metrics(run / "metrics.jsonl")
    wanted = first_loss(run, base, similarity)
    other = first_loss(run, tiny_model, "cosine")
    assert line["loss"] == pytest.approx(wanted, rel=1e-4)
    assert abs(wanted - other) > 1e-3, "the plain base gives the same"
    saved = SentenceTransformer(str(run / "model"), device="cpu")
    assert (saved.truncate_dim, saved.similarity_fn_name) == (says.get("truncate_dim"), similarity)
    assert len(saved) == (3 if normalize else 2)
    assert "similarity" not in notices(run)
    assert ("dot-products" in notices(run)) == (similarity == "dot")


def test_a_truncated_model_gives_truncated_vectors_everywhere(tmp_path: Path, tiny_model: Path) -> None:
    from sentence_transformers import SentenceTransformer

    base = save_base(tmp_path / "base", tiny_model, truncate_dim=KEPT)
    texts = ["word1 word2", "word3"]
    wanted = SentenceTransformer(str(base), device="cpu").encode(texts)
    assert wanted.shape == (2, KEPT)
    np.testing.assert_allclose(Encoder(load_encoder(str(base)).model)(texts), wanted, rtol=0, atol=1e-5)
    # A projection takes all dimensions, and keeps all of its own.
    built = build_encoder(EncoderConfig.model_validate({"model": str(base), "projection": {"dimensions": 8}}), "cpu")
    assert built.model.encode(texts).shape == (2, 8)
    assert [one.code for one in built.notices] == ["truncation"]


def test_what_a_recipe_says_of_similarity_overrules_the_base(tmp_path: Path, tiny_model: Path, toy_data: Path) -> None:
    from sentence_transformers import SentenceTransformer

    base = save_base(tmp_path / "base", tiny_model, similarity_fn_name="dot")
    run = train(tmp_path, base, toy_data, "objective.similarity=cosine")
    [line] = read_metrics(run / "metrics.jsonl")
    assert line["loss"] == pytest.approx(first_loss(run, base, "cosine"), rel=1e-4)
    assert SentenceTransformer(str(run / "model"), device="cpu").similarity_fn_name == "cosine"
    assert "by dot, and the objective by cosine: the trained model says cosine" in notices(run)["similarity"]


def test_a_similarity_that_the_objective_does_not_know_is_said(
    tmp_path: Path, tiny_model: Path, toy_data: Path
) -> None:
    from sentence_transformers import SentenceTransformer

    base = save_base(tmp_path / "base", tiny_model, similarity_fn_name="euclidean")
    run = train(tmp_path, base, toy_data)
    assert SentenceTransformer(str(run / "model"), device="cpu").similarity_fn_name == "cosine"
    assert "by euclidean, and the objective by cosine" in notices(run)["similarity"]


def test_what_is_taken_from_the_base_is_in_the_recipe_of_the_run(
    tmp_path: Path, tiny_model: Path, toy_data: Path
) -> None:
    """So that the run's own copy, read again, is the same training."""
    base = save_base(tmp_path / "base", tiny_model, similarity_fn_name="dot")
    run = train(tmp_path, base, toy_data, until="data")
    assert yaml.safe_load((run / "recipe.yaml").read_text())["objective"]["similarity"] == "dot"
    first = Stages.of(open_run(tmp_path / "toy.yaml", ["training.max_steps=1", "training.dropout=false"], run))
    (tmp_path / "toy.yaml").unlink()
    again = Stages.of(open_run(run, (), run))
    assert again.train.fingerprint == first.train.fingerprint


def test_stages_take_what_the_first_base_says(tmp_path: Path, tiny_model: Path, toy_data: Path) -> None:
    """A stage that names its objective's temperature alone, and one that sets a similarity for itself and those behind it."""
    base = save_base(tmp_path / "base", tiny_model, similarity_fn_name="dot")
    recipe = write_toy_recipe(tmp_path, base, toy_data)
    stages = [
        {"name": "one", "objective": {"kind": "infonce", "temperature": 0.5}},
        {"name": "two", "objective": {"kind": "infonce", "similarity": "cosine"}},
        {"name": "three", "objective": {"kind": "infonce", "temperature": 0.2}},
    ]
    recipe.write_text(recipe.read_text() + f"stages: {json.dumps(stages)}\n")
    run = open_run(recipe, (), tmp_path / "run")
    found: list[Any] = [one.recipe.objective for one in (*run.before, run)]
    assert [(one.similarity, one.temperature) for one in found] == [("dot", 0.5), ("cosine", 0.1), ("cosine", 0.2)]


def test_every_objective_says_how_it_compares() -> None:
    from pydantic import TypeAdapter

    from nearfield.objectives import ObjectiveConfig
    from tests.objectives.test_losses import SETTINGS

    for name, values in SETTINGS.items():
        settings: Any = TypeAdapter(ObjectiveConfig).validate_python(values)
        assert settings.comparisons <= set(SIMILARITIES), name
        for similarity in SIMILARITIES:
            adapted = settings.for_model(similarity)
            assert adapted.kind == settings.kind
            assert adapted.comparisons <= settings.comparisons | {similarity}, name
            assert adapted.for_model("cosine").model_dump() == adapted.model_dump(), "what was taken once is kept"


@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_graded_pairs_and_triplets_compare_as_the_library_does(similarity: str) -> None:
    from sentence_transformers import SimilarityFunction
    from sentence_transformers.sentence_transformer.losses import CoSENTLoss

    draw = torch.Generator().manual_seed(0)
    queries, documents = (torch.randn(6, 4, generator=draw, dtype=torch.float64) for _ in range(2))
    scores = torch.rand(6, generator=draw, dtype=torch.float64)
    rows = torch.arange(6)

    def batch(documents: torch.Tensor, owner: torch.Tensor, positive: torch.Tensor, **more: Any) -> ContrastiveBatch:
        return ContrastiveBatch(
            queries=queries,
            documents=documents,
            owner=owner,
            is_positive=positive,
            document_ids=torch.arange(len(documents)),
            known_positives=rows[:, None],
            rows=rows,
            **more,
        )

    pairwise = SimilarityFunction.to_similarity_pairwise_fn(similarity)
    graded = CoSENTConfig().for_model(similarity).build()
    found = graded(batch(documents, rows, torch.ones(6, dtype=torch.bool), scores=scores))
    model: Any = None
    theirs = CoSENTLoss(model, scale=20.0, similarity_fct=pairwise)
    wanted = theirs.compute_loss_from_embeddings([queries, documents], scores)
    torch.testing.assert_close(found.total / found.denominator, wanted)

    negatives = torch.randn(6, 4, generator=draw, dtype=torch.float64)
    both = torch.cat([documents, negatives])
    triplets = TripletConfig(margin=0.3).for_model(similarity).build()
    found = triplets(batch(both, torch.cat([rows, rows]), torch.arange(12) < 6))
    gap = pairwise(queries, negatives) - pairwise(queries, documents) + 0.3
    torch.testing.assert_close(found.total / found.denominator, gap.relu().mean(), rtol=1e-5, atol=1e-5)


def test_the_stored_type_of_the_base_is_that_of_the_trained_model(
    tmp_path: Path, tiny_model: Path, toy_data: Path
) -> None:
    """Trained in float32, rounded when it is saved; plain sentence-transformers loads it as it loads the base."""
    from safetensors.torch import load_file
    from sentence_transformers import SentenceTransformer

    base = save_base(tmp_path / "base", tiny_model, dtype="bfloat16")
    assert (stored_dtype(base), stored_dtype(tiny_model)) == ("bfloat16", "float32")
    run = train(tmp_path, base, toy_data)
    plain = [SentenceTransformer(str(folder), device="cpu").dtype for folder in (base, run / "model")]
    assert plain == [torch.bfloat16, torch.bfloat16]
    kept = load_file(run / "checkpoints" / "step-00000001" / "model.safetensors")
    saved = load_file(run / "model" / "model.safetensors")
    name = "embeddings.word_embeddings.weight"
    [trained] = [value for key, value in kept.items() if key.endswith(name)]
    assert trained.dtype == torch.float32
    assert torch.equal(saved[name], trained.to(torch.bfloat16))
    assert not torch.equal(saved[name].float(), trained)
    assert "the base is stored in bfloat16" in notices(run)["stored-dtype"]


def test_prompts_of_the_base_are_those_that_sentence_transformers_uses(tmp_path: Path, tiny_model: Path) -> None:
    from sentence_transformers import SentenceTransformer

    cases: list[dict[str, Any]] = [
        {"prompts": {"query": "q: ", "passage": "p: "}},
        {"prompts": {"query": "q: ", "document": "", "passage": "p: "}},
        {"prompts": {"corpus": "c: ", "all": "a: "}, "default_prompt_name": "all"},
        {"prompts": {"all": "a: "}},
        {},
    ]
    for number, says in enumerate([*cases, *cases]):
        base = save_base(tmp_path / str(number), tiny_model, **says)
        if number >= len(cases):
            # As earlier versions wrote it: without the keys of roles that nobody stated.
            (base / "config_sentence_transformers.json").write_text(json.dumps(says))
        model, read = SentenceTransformer(str(base), device="cpu"), []
        encode = model.preprocess
        model.preprocess = lambda *a, e=encode, r=read, **k: (r.append(k.get("prompt") or ""), e(*a, **k))[1]  # type: ignore[method-assign]
        model.encode_query(["word1"])
        model.encode_document(["word1"])
        found = base_prompts(str(base))
        assert [found.side("query"), found.side("document")] == read, says
        task, encoder = mteb.get_task("SciFact").metadata, TaskEncoder(model, name="a/b", revision="r")
        assert [encoder.prompt_for(task, role) for role in (PromptType.query, PromptType.document)] == read, says
    assert base_prompts("nobody/such-a-model") == BasePrompts()
    assert stated_similarity("nobody/such-a-model") == "cosine"
