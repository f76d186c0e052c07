"""Tiles give what the whole matrix gives: loss and all gradients, for random combinations of all settings."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nearfield.objectives import ContrastiveBatch, InfoNCEConfig
from nearfield.objectives.infonce import InfoNCE
from tests.objectives.options import SOURCES, configs, random_batch


def build(config: InfoNCEConfig, implementation: str, tile: int, dtype: torch.dtype = torch.float64) -> InfoNCE:
    objective = config.model_copy(update={"implementation": implementation}).build(SOURCES).to(dtype)
    objective.tile = tile
    return objective


def evaluate(objective: InfoNCE, batch: ContrastiveBatch) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """Mean loss, losses of the rows, and the gradients of the mean: queries, documents, what is learnt."""
    result = objective(batch)
    assert result.rows.shape == batch.local_rows().shape
    mean = result.total / result.denominator
    gradients = torch.autograd.grad(mean, [batch.queries, batch.documents, *objective.parameters()])
    return mean.detach(), result.rows, list(gradients)


def compare(config: InfoNCEConfig, batch: ContrastiveBatch, tile: int, tolerance: float = 1e-9) -> None:
    dense = evaluate(build(config, "dense", tile), batch)
    tiled = evaluate(build(config, "blockwise", tile), batch)
    assert torch.isfinite(dense[1]).all()
    torch.testing.assert_close(tiled[0], dense[0], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(tiled[1], dense[1], rtol=tolerance, atol=tolerance)
    for ours, reference in zip(tiled[2], dense[2], strict=True):
        assert torch.isfinite(reference).all()
        torch.testing.assert_close(ours, reference, rtol=tolerance, atol=tolerance)


@given(
    config=configs(),
    seed=st.integers(0, 2**32),
    size=st.integers(1, 9),
    tile=st.sampled_from([1, 2, 3, 5, 64]),
    negatives=st.integers(0, 2),
    cut=st.floats(0, 1),
)
@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
def test_equals_the_whole_matrix(
    config: InfoNCEConfig, seed: int, size: int, tile: int, negatives: int, cut: float
) -> None:
    size = min(size, 3 * tile)  # that many tiles of each side tell all there is to tell
    part = (int(cut * size), size) if cut < 0.5 else (0, int(cut * size))
    batch = random_batch(seed, size, negatives=negatives, rows=part if 0.2 < cut < 0.9 else None)
    compare(config, batch, tile)


@given(config=configs(), seed=st.integers(0, 2**32))
@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
def test_equals_the_whole_matrix_with_ragged_tiles(config: InfoNCEConfig, seed: int) -> None:
    compare(config, random_batch(seed, 257, positives=1, negatives=1), tile=64)


PLAIN = InfoNCEConfig(temperature=0.05)
RICH = InfoNCEConfig.model_validate(
    {
        "temperature": 0.05,
        "learn_temperature": True,
        "directions": ["query_document", "query_query", "document_query", "document_document"],
        "score_mask": {"margin": 0.1},
        "hardness": {"alpha": 5.0},
        "focal": {},
        "matryoshka": {"dimensions": [16, 64]},
    }
)


@pytest.mark.parametrize("config", [PLAIN, RICH], ids=["plain", "rich"])
@pytest.mark.parametrize("reach", [20, 100])
def test_error_in_float32_is_that_of_the_whole_matrix(config: InfoNCEConfig, reach: int) -> None:
    """At most twice dense's own error against float64, and 1e-5 of the largest entry for logits within +/-20."""
    config = config.model_copy(update={"temperature": 1 / reach, "temperature_bounds": (0.001, 1.0)})
    exact = replace(random_batch(5, 257, dim=64, positives=1, negatives=1, repeats=False), queue=None)
    batch = replace(
        exact,
        queries=exact.queries.detach().float().requires_grad_(),
        documents=exact.documents.detach().float().requires_grad_(),
    )
    exact = replace(
        exact,
        queries=batch.queries.detach().double().requires_grad_(),
        documents=batch.documents.detach().double().requires_grad_(),
    )
    truth = evaluate(build(config, "dense", 64), exact)
    errors = {}
    for name in ("dense", "blockwise"):
        found = evaluate(build(config, name, 64, torch.float32), batch)
        parts = zip([found[0], *found[2]], [truth[0], *truth[2]], strict=True)
        errors[name] = [float((a.double() - b).abs().max() / b.abs().max()) for a, b in parts]
    for ours, theirs in zip(errors["blockwise"], errors["dense"], strict=True):
        # A part that happens to be right to the last bit sets no bar for the other.
        assert ours <= 2 * max(theirs, 1e-6)
        assert ours <= (1e-5 if reach == 20 else 1e-3)


def test_sums_of_half_precision_inputs_are_in_float32() -> None:
    exact = replace(random_batch(3, 65, dim=64, positives=1, negatives=1, repeats=False), queue=None)
    half = replace(
        exact,
        queries=exact.queries.detach().bfloat16().requires_grad_(),
        documents=exact.documents.detach().bfloat16().requires_grad_(),
    )
    same = replace(
        exact,
        queries=half.queries.detach().double().requires_grad_(),
        documents=half.documents.detach().double().requires_grad_(),
    )
    mean, _, gradients = evaluate(build(PLAIN, "blockwise", 16, torch.float32), half)
    truth, _, expected = evaluate(build(PLAIN, "dense", 16), same)
    assert float(mean) == pytest.approx(float(truth), rel=1e-6)
    for ours, theirs in zip(gradients, expected, strict=True):
        assert ours.dtype == torch.bfloat16
        # The gradient itself is rounded to bfloat16, once.
        torch.testing.assert_close(ours.double(), theirs, rtol=2**-8, atol=1e-7)


def test_no_tensor_of_all_cells_is_made() -> None:
    """The largest tensor that either pass saves or makes is far below B x B."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            for part in out if isinstance(out, tuple | list) else [out]:
                if isinstance(part, torch.Tensor):
                    self.elements = max(self.elements, part.untyped_storage().nbytes())
            return out

    size, dim = 512, 16
    batch = random_batch(1, size, dim=dim, positives=1, negatives=0, repeats=False)
    rich = RICH.model_copy(update={"matryoshka": None, "guide_mask": PLAIN.score_mask})
    for config in (PLAIN, rich):
        largest = {}
        for name in ("dense", "blockwise"):
            with Largest() as seen:
                evaluate(build(config, name, 64), batch)
            largest[name] = seen.elements
        assert largest["dense"] >= size * size * 8
        assert largest["blockwise"] <= size * size * 8 / 16


def test_small_batches_are_dense_and_large_ones_blockwise(monkeypatch: pytest.MonkeyPatch) -> None:
    from nearfield.objectives import infonce

    seen = []
    for name in ("dense_statistics", "blockwise_statistics"):
        original = getattr(infonce, name)

        def spy(*args: object, _name: str = name, _original: object = original) -> object:
            seen.append(_name)
            return _original(*args)  # type: ignore[operator]

        monkeypatch.setattr(infonce, name, spy)
    batch = random_batch(1, 6, positives=1, negatives=0)
    InfoNCEConfig().build()(batch)
    monkeypatch.setitem(infonce.DENSE_CELLS, "cpu", 35)
    InfoNCEConfig().build()(batch)
    InfoNCEConfig(implementation="dense").build()(batch)
    assert seen == ["dense_statistics", "blockwise_statistics", "dense_statistics"]
