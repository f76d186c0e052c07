"""The losses for sentence-transformers, with its real trainer and beside its own losses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import (
    CachedMultipleNegativesRankingLoss,
    GISTEmbedLoss,
    MultipleNegativesRankingLoss,
)

from nearfield.conformance.tiny_models import WORDS
from nearfield.errors import BadInputError
from nearfield.objectives import CachedInfoNCELoss, InfoNCEConfig, InfoNCELoss
from nearfield.objectives.sentence_transformers import text_ids

SENTENCES = [" ".join(WORDS[(i + k * (i % 3 + 1)) % len(WORDS)] for k in range(2 + i % 5)) for i in range(24)]
PAIRS = {"anchor": SENTENCES[:8], "positive": SENTENCES[8:16]}
TRIPLES = {**PAIRS, "negative": SENTENCES[16:24]}


@pytest.fixture
def model(tiny_model: Path) -> SentenceTransformer:
    return SentenceTransformer(str(tiny_model), device="cpu").eval()


def features(model: SentenceTransformer, columns: dict[str, list[str]]) -> list[dict[str, Any]]:
    return [dict(model.preprocess(texts)) for texts in columns.values()]


def gradient(
    loss: torch.nn.Module, model: SentenceTransformer, columns: dict[str, list[str]]
) -> tuple[float, list[torch.Tensor]]:
    model.zero_grad()
    value = loss(features(model, columns), torch.zeros(8))
    value.backward()
    return float(value.detach()), [p.grad.clone() for p in model.parameters() if p.grad is not None]


def same(ours: Any, theirs: Any) -> None:
    assert ours[0] == pytest.approx(theirs[0], rel=1e-5)
    assert len(ours[1]) == len(theirs[1]) > 5
    for a, b in zip(ours[1], theirs[1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)


GTE = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
CASES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {}),
    ({"both_directions": True}, {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"}),
    (
        {"directions": ("query_document", "query_query", "document_document")},
        {"directions": ("query_to_doc", "query_to_query", "doc_to_doc")},
    ),
    *(
        ({"hardness": {"alpha": 5.0, "on": ours}}, {"hardness_mode": theirs, "hardness_strength": 5.0})
        for ours, theirs in (
            ("in_batch", "in_batch_negatives"),
            ("explicit", "hard_negatives"),
            ("all", "all_negatives"),
        )
    ),
]


@pytest.mark.parametrize("implementation", ["dense", "blockwise"])
@pytest.mark.parametrize(("ours", "theirs"), CASES, ids=str)
def test_equals_theirs(model: SentenceTransformer, ours: Any, theirs: Any, implementation: str) -> None:
    """Where both have a setting they mean the same; sentence-transformers' scale is one over the temperature."""
    config = InfoNCEConfig.model_validate({**ours, "implementation": implementation})
    for columns in (PAIRS, TRIPLES):
        expected = gradient(MultipleNegativesRankingLoss(model, **theirs), model, columns)
        same(gradient(InfoNCELoss(model, config), model, columns), expected)
        same(gradient(CachedInfoNCELoss(model, config, mini_batch_size=3), model, columns), expected)


def test_all_four_directions_count_the_positive_once(model: SentenceTransformer) -> None:
    """Theirs, as the formula of GTE, has the positive pair in the sum from both sides: log(1 + exp(ours)) a row."""
    config = InfoNCEConfig(directions=("query_document", "query_query", "document_query", "document_document"))
    ours, rows = InfoNCELoss(model, config), []
    ours.objective.register_forward_hook(lambda module, inputs, result: rows.append(result.rows))
    for columns in (PAIRS, TRIPLES):
        ours(features(model, columns))
        expected = MultipleNegativesRankingLoss(model, directions=GTE)(features(model, columns), torch.zeros(8))
        assert float(torch.nn.functional.softplus(rows[-1]).mean()) == pytest.approx(float(expected.detach()), rel=1e-5)


def test_cached_equals_theirs(model: SentenceTransformer) -> None:
    expected = gradient(CachedMultipleNegativesRankingLoss(model, mini_batch_size=3), model, TRIPLES)
    same(gradient(CachedInfoNCELoss(model, mini_batch_size=5), model, TRIPLES), expected)


def test_guide_mask_equals_gistembed(model: SentenceTransformer) -> None:
    """Their candidates are those of all four directions but document to query; the guide decides."""
    guide = SentenceTransformer(modules=list(model.children()), device="cpu").eval()
    config = InfoNCEConfig.model_validate(
        {
            "temperature": 0.01,
            "directions": ("query_document", "query_query", "document_document"),
            "guide_mask": {},
            "mask_known_positives": False,
        }
    )
    expected = gradient(GISTEmbedLoss(model, guide, temperature=0.01), model, PAIRS)
    same(gradient(InfoNCELoss(model, config, guide=guide), model, PAIRS), expected)
    same(gradient(CachedInfoNCELoss(model, config, guide=guide, mini_batch_size=3), model, PAIRS), expected)


def train(model: SentenceTransformer, loss: torch.nn.Module, folder: Path) -> list[torch.Tensor]:
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(folder),
        max_steps=3,
        per_device_train_batch_size=8,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
    )
    data = Dataset.from_dict(TRIPLES)
    SentenceTransformerTrainer(model=model, args=arguments, train_dataset=data, loss=loss).train()
    return trained_weights(model)


def trained_weights(model: SentenceTransformer) -> list[torch.Tensor]:
    """Without the pooler, which the folder has no weights of: it is drawn anew at each loading, and not used."""
    return [p.detach().clone() for name, p in model.named_parameters() if "pooler" not in name]


def without_dropout(folder: Path) -> SentenceTransformer:
    model = SentenceTransformer(str(folder), device="cpu")
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


@pytest.mark.parametrize("cached", [False, True])
def test_training_by_their_trainer(tiny_model: Path, tmp_path: Path, cached: bool) -> None:
    """One line changes the loss; at neutral settings the trained model is the same."""
    theirs = without_dropout(tiny_model)
    start = trained_weights(theirs)
    expected = train(theirs, MultipleNegativesRankingLoss(theirs), tmp_path / "theirs")
    model = without_dropout(tiny_model)
    loss = CachedInfoNCELoss(model, mini_batch_size=3) if cached else InfoNCELoss(model)
    trained = train(model, loss, tmp_path / "ours")
    assert any((a != b).any() for a, b in zip(trained, start, strict=True))
    for a, b in zip(trained, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_a_learnt_temperature_is_trained_with_the_model(tiny_model: Path, tmp_path: Path) -> None:
    model = without_dropout(tiny_model)
    loss = InfoNCELoss(model, InfoNCEConfig(learn_temperature=True))
    before = loss.objective.log_temperature.detach().clone()
    train(model, loss, tmp_path)
    assert (loss.objective.log_temperature.detach() != before).all()


def test_copies_of_a_positive_are_masked(model: SentenceTransformer) -> None:
    """A text that is the positive of two queries is no negative of either; theirs counts it as one."""
    columns = {"anchor": SENTENCES[:3], "positive": [SENTENCES[8], SENTENCES[8], SENTENCES[9]]}
    value = InfoNCELoss(model)(features(model, columns))
    with torch.no_grad():
        q = torch.nn.functional.normalize(model.encode(columns["anchor"], convert_to_tensor=True), dim=1)
        d = torch.nn.functional.normalize(model.encode(columns["positive"], convert_to_tensor=True), dim=1)
    logits = q @ d.T / 0.05
    logits[0, 1] = logits[1, 0] = -torch.inf
    expected = torch.nn.functional.cross_entropy(logits, torch.arange(3))
    assert float(value.detach()) == pytest.approx(float(expected), rel=1e-5)


def test_ids_do_not_depend_on_padding(model: SentenceTransformer) -> None:
    alone = text_ids(dict(model.preprocess([SENTENCES[0]])))
    padded = text_ids(dict(model.preprocess([SENTENCES[0], " ".join(WORDS[:9]), SENTENCES[0]])))
    assert alone is not None and padded is not None
    assert padded[0] == padded[2] == alone[0] >= 0
    assert padded[1] != padded[0]
    assert text_ids({"pixel_values": torch.zeros(2, 3)}) is None


def test_refusals(model: SentenceTransformer) -> None:
    with pytest.raises(BadInputError, match="guide model"):
        InfoNCELoss(model, InfoNCEConfig.model_validate({"guide_mask": {}}))
    with pytest.raises(BadInputError, match="no sources"):
        InfoNCELoss(model, InfoNCEConfig(source_weights={"a": 2.0}))
    with pytest.raises(BadInputError, match="1 columns"):
        InfoNCELoss(model)(features(model, {"anchor": SENTENCES[:2]}))


def test_a_queue_remembers_what_was_trained_on(model: SentenceTransformer) -> None:
    second = {"anchor": SENTENCES[8:16], "positive": SENTENCES[16:24]}
    plain = [gradient(InfoNCELoss(model), model, columns)[0] for columns in (PAIRS, second)]
    for kind in (InfoNCELoss, CachedInfoNCELoss):
        loss = kind(model, InfoNCEConfig(queue=6))
        with torch.no_grad():
            loss(features(model, second), torch.zeros(8))
        assert len(loss.queue) == 0, "what is only evaluated is not remembered"
        found = [gradient(loss, model, columns)[0] for columns in (PAIRS, second)]
        assert found[0] == pytest.approx(plain[0], rel=1e-6)
        assert found[1] > plain[1] and len(loss.queue) == 6
