"""Triton's kernels give what torch's operations give, in Triton's interpreter: on the CPU, very slowly, at small sizes."""

from __future__ import annotations

import importlib.util
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from nearfield.errors import BadInputError
from nearfield.objectives import InfoNCEConfig
from nearfield.objectives.infonce import InfoNCE
from tests.objectives.options import SOURCES, configs, random_batch
from tests.objectives.test_statistics import RICH, evaluate

installed = importlib.util.find_spec("triton") is not None
interpreted = pytest.mark.skipif(not installed, reason="triton is not installed: `pip install triton` (Linux)")


def build(config: InfoNCEConfig, tiles: str, tile: int, dtype: torch.dtype = torch.float64) -> InfoNCE:
    implementation = "dense" if tiles == "dense" else "blockwise"
    update = {"implementation": implementation, "tiles": "torch" if tiles == "dense" else tiles}
    objective = config.model_copy(update=update).build(SOURCES).to(dtype)
    objective.tile = tile
    return objective


def compare(config: InfoNCEConfig, seed: int, size: int, tile: int, negatives: int = 1) -> None:
    batch = random_batch(seed, size, negatives=negatives)
    dense, ours = evaluate(build(config, "dense", tile), batch), evaluate(build(config, "triton", tile), batch)
    torch.testing.assert_close(ours[0], dense[0], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(ours[1], dense[1], rtol=1e-9, atol=1e-9)
    for a, b in zip(ours[2], dense[2], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@interpreted
@given(config=configs(), seed=st.integers(0, 2**32), size=st.integers(1, 9), tile=st.sampled_from([2, 5, 64]))
@settings(max_examples=6, deadline=None, suppress_health_check=list(HealthCheck), phases=[Phase.generate])
def test_kernels_equal_the_whole_matrix(config: InfoNCEConfig, seed: int, size: int, tile: int) -> None:
    compare(config, seed, size, tile)


@interpreted
@pytest.mark.parametrize("matryoshka", [True, False])
def test_kernels_equal_the_whole_matrix_over_several_programs(matryoshka: bool) -> None:
    """Tiles that a kernel cuts into ragged parts of rows and columns, with all masks and sums."""
    from nearfield.objectives.kernels import COLUMNS, ROWS

    more = {"label_smoothing": 0.1, "guide_mask": RICH.score_mask, "mask_same_label": True, "queue": 5}
    config = RICH.model_copy(update={**more, "matryoshka": RICH.matryoshka if matryoshka else None})
    if matryoshka and config.matryoshka is not None:
        config = config.model_copy(update={"matryoshka": config.matryoshka.model_copy(update={"dimensions": (4, 12)})})
    assert len(random_batch(3, 24, negatives=10).documents) > 131 > COLUMNS and 24 % ROWS
    compare(config, 3, 24, 131, negatives=10)


@interpreted
def test_single_precision_and_half_precision_inputs() -> None:
    """Sums are in float32: the error against float64 is at most twice that of the whole matrix."""
    config, exact = InfoNCEConfig(temperature=0.05, score_mask=RICH.score_mask), random_batch(5, 40, repeats=False)
    exact = replace(exact, queue=None)
    reference = evaluate(build(config, "dense", 16), exact)
    for dtype in (torch.float32, torch.bfloat16):
        sides = {"queries": exact.queries, "documents": exact.documents}
        batch = replace(exact, **{name: side.detach().to(dtype).requires_grad_() for name, side in sides.items()})
        ours, dense = (evaluate(build(config, name, 16, torch.float32), batch) for name in ("triton", "dense"))
        assert ours[0].dtype == torch.float32
        for a, b, c in zip([ours[0], *ours[2]], [dense[0], *dense[2]], [reference[0], *reference[2]], strict=True):
            off = float((b.double() - c).abs().max())
            assert float((a.double() - c).abs().max()) <= 2 * off + 1e-6


def test_kernels_are_for_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert not InfoNCEConfig().build().uses_triton(cpu)
    assert InfoNCEConfig().build().uses_triton(cuda)
    assert not InfoNCEConfig(tiles="torch").build().uses_triton(cuda)
    with pytest.raises(BadInputError, match="CUDA"):
        InfoNCEConfig(tiles="triton").build().uses_triton(cpu)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert not InfoNCEConfig().build().uses_triton(cuda)
    with pytest.raises(BadInputError, match="Triton"):
        InfoNCEConfig(tiles="triton").build().uses_triton(cuda)
