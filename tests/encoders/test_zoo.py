"""Every animal of the zoo: packed = padded = sentence-transformers' vectors; three steps; save; reload."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer

from nearfield.encoders import load_encoder
from nearfield.encoders.encode import Encoder
from nearfield.encoders.load import save_encoder
from nearfield.encoders.packing import Padding, embed, packed_features
from nearfield.encoders.tokenize import token_ids
from nearfield.errors import BadInputError
from tests.encoders.zoo import ANIMALS, RANDOM, TEXTS, save_animal

CPU = torch.device("cpu")
HEALTHY = {name: animal for name, animal in ANIMALS.items() if name not in RANDOM}
KINDS = {
    "bert", "modernbert", "modernbert-decoder", "distilbert", "deberta-v2", "mpnet", "funnel", "nystromformer", "fnet", "roberta",
    "esm", "longformer", "xlm-roberta", "xmod", "xlm", "t5", "longt5", "bart", "xlnet", "eurobert", "llama", "phi3", "stablelm",
    "qwen3", "gemma3_text", "gemma2", "gpt2", "bloom", "mamba", "gptj", "opt", "xglm",
}  # fmt: skip
"""Of each way to read, to pad and to pack one or two; the others are the slow tests."""


def plain_vectors(folder: Path, texts: Sequence[str]) -> Any:
    """Each text alone, by plain sentence-transformers."""
    model = SentenceTransformer(str(folder), device="cpu")
    if model.tokenizer.pad_token is None:
        model.tokenizer.pad_token = model.tokenizer.eos_token
    return np.concatenate([model.encode([text]) for text in texts])


def steps(model: SentenceTransformer, features: Sequence[dict[str, Any]]) -> None:
    """Three steps that draw texts and their neighbours together, in evaluation mode, so that no dropout is drawn."""
    model.eval()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for queries, documents in itertools.pairwise(features):
        vectors = [torch.nn.functional.normalize(embed(model, each), dim=1) for each in (queries, documents)]
        loss = torch.nn.functional.cross_entropy(vectors[0] @ vectors[1].T * 5, torch.arange(len(vectors[0])))
        assert loss.isfinite()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def test_the_zoo_is_large() -> None:
    assert len({animal.architecture for animal in HEALTHY.values()}) >= 60

    def ways(names: Iterable[str]) -> set[tuple[str, str | None, bool]]:
        return {(HEALTHY[name].style, HEALTHY[name].packing, HEALTHY[name].dependent) for name in names}

    assert ways(KINDS) == ways(HEALTHY)


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in KINDS else pytest.mark.slow) for n in HEALTHY])
def test_an_animal(tmp_path: Path, name: str) -> None:
    animal = HEALTHY[name]
    folder = save_animal(tmp_path / "base", animal)
    loaded = load_encoder(str(folder), device="cpu")
    model = loaded.model
    assert ("batch-dependent" in [notice.code for notice in loaded.notices]) is animal.dependent
    pad = model.tokenizer.pad_token
    # The padding word in the middle, at the beginning and at the end of a text; twice in a row.
    texts = [*TEXTS, f"the {pad} fox jumps", f"{pad} dog", f"lazy dog {pad}", f"one {pad} {pad} two three"]
    encoder = Encoder(model)
    assert encoder.packing == animal.packing
    plain = plain_vectors(folder, texts)
    scale = float(np.abs(plain).max())
    mine = np.concatenate([encoder([text]) for text in texts]) if animal.dependent else encoder(texts)
    np.testing.assert_allclose(mine, plain, rtol=0, atol=2e-5 * scale)

    padding, rows = Padding.of(model), token_ids(model, texts, "")
    with torch.no_grad():
        together = [rows] if not animal.dependent else [[row] for row in rows]
        read = torch.cat([embed(model, padding.features(each, CPU, 0)) for each in together]).numpy()
    np.testing.assert_allclose(read, plain, rtol=0, atol=2e-5 * scale)
    lots = [rows[:4], rows[4:8], rows[2:6], rows[6:10]]
    padded = [padding.features(lot, CPU, 0) for lot in lots]
    if animal.packing is not None:
        packed = [packed_features(lot, kind=animal.packing, device=CPU, prompt_length=0) for lot in lots]  # type: ignore[arg-type]
        twin = load_encoder(str(folder), device="cpu").model
        steps(twin, padded)
        steps(model, packed)
        for (key, ours), (_, theirs) in zip(model.named_parameters(), twin.named_parameters(), strict=True):
            torch.testing.assert_close(
                ours, theirs, rtol=0, atol=1e-4 * max(1.0, float(theirs.detach().abs().max())), msg=key
            )
    else:
        steps(model, padded)
    trained = np.concatenate([Encoder(model)([text]) for text in texts])
    assert float(np.abs(trained - plain).max()) > 1e-4 * scale
    save_encoder(model, tmp_path / "saved")
    np.testing.assert_allclose(plain_vectors(tmp_path / "saved", texts), trained, rtol=0, atol=2e-5 * scale)


@pytest.mark.parametrize("name", RANDOM)
def test_what_sentence_transformers_reads_at_random_is_refused(tmp_path: Path, name: str) -> None:
    folder = save_animal(tmp_path, ANIMALS[name])
    with pytest.raises(BadInputError, match="random numbers") as error:
        load_encoder(str(folder), device="cpu")
    assert "'encoder.'" in str(error.value.hint)
