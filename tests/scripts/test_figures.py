"""The figures of README.md, docs/ and results/ agree with the files that they come from."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "figures.py"


@pytest.fixture()
def figures(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    spec = importlib.util.spec_from_file_location("figures", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_page_agrees_with_its_files() -> None:
    done = subprocess.run([sys.executable, str(SCRIPT), "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    "page",
    [
        "README.md",
        "docs/mining.md",
        "docs/speed.md",
        "docs/scale.md",
        "docs/training.md",
        "results/quickstart/README.md",
    ],
)
def test_pages_with_measurements_have_marks(figures: ModuleType, page: str) -> None:
    assert figures.MARK.search((ROOT / page).read_text())


def test_a_changed_figure_is_put_right(figures: ModuleType) -> None:
    page = "The ratio is <!-- figure mining products -->9.99<!-- / --> s.\n"
    products = figures.read("mining/mining.json")["gemm_floor_seconds"]
    assert figures.filled(page) == f"The ratio is <!-- figure mining products -->{products:.1f}<!-- / --> s.\n"


def test_a_changed_file_changes_the_page(figures: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (ROOT / "docs" / "batches.md").read_text()
    assert figures.filled(page) == page
    made = figures.read("plan/plan.json")
    sizes = [{**one, "ours": 2 * one["ours"]} for one in made["sizes"]]
    figures.texts_of.cache_clear()
    monkeypatch.setattr(figures, "read", lambda name: {**made, "sizes": sizes})
    monkeypatch.setitem(figures.STUDIES, "ablations", lambda: dict.fromkeys(_names(page, "ablations"), "0"))
    changed = figures.filled(page)
    assert f"| {sizes[0]['ours']:.2f} |" in changed and changed != page


def _names(page: str, study: str) -> list[str]:
    marks = page.split(f"<!-- figure {study} ")[1:]
    return [mark.partition(" -->")[0] for mark in marks]


@pytest.mark.parametrize("name", ["nothing of the kind", "mining nothing of the kind"])
def test_an_unknown_name_is_refused(figures: ModuleType, name: str) -> None:
    with pytest.raises(SystemExit, match="nothing"):
        figures.filled(f"a <!-- figure {name} -->1<!-- / -->")


@pytest.mark.parametrize(
    "page",
    [
        "A paragraph that goes on\n<!-- figure mining products -->47.3<!-- / --> here.\n",
        "A mark that is <!-- figure mining products -->47.3 not closed.\n",
        "An end <!-- / --> without a beginning.\n",
    ],
)
def test_a_misplaced_mark_is_refused(figures: ModuleType, page: str) -> None:
    assert figures.misplaced(page)
    assert not figures.misplaced("In a sentence: <!-- figure mining products -->47.3<!-- / --> s.\n")
