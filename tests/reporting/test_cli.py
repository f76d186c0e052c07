"""The command ``nearfield report``."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from nearfield.cli import main


def call(*arguments: str | Path) -> int:
    """Run the command line and give its exit code."""
    with pytest.raises(SystemExit) as left:
        main([str(argument) for argument in arguments])
    return int(left.value.code or 0)


def test_report_writes_a_page(whole_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "page.html"
    assert call("report", whole_run, "--out", out) == 0
    assert out.read_text(encoding="utf-8").startswith("<!doctype html>")
    told = capsys.readouterr().out
    assert str(out) in told and "kB" in told
    assert "No " not in told


def test_report_names_missing_parts(whole_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "[red]run"
    run.mkdir()
    shutil.copy(whole_run / "recipe.yaml", run)
    assert call("report", run) == 0
    told = capsys.readouterr().out
    assert "[red]run/report.html" in told.replace("\n", "")
    assert "comparison: No comparison.json" in told


@pytest.mark.parametrize("case", ["absent", "empty", "file", "out"])
def test_bad_input_is_one_message(
    case: str, whole_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 2, the place and what to do; no traceback."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    arguments = [tmp_path / case] if case != "out" else [whole_run, "--out", tmp_path / "empty"]
    assert call("report", *arguments) == 2
    told = capsys.readouterr().err
    assert told.startswith("nearfield: ") and "->" in told and "Traceback" not in told
    assert str(tmp_path) in told


def test_importing_the_report_is_light() -> None:
    """The package alone brings neither Arrow nor the template engine."""
    code = "import sys, nearfield.reporting; print([m for m in ('pyarrow', 'jinja2', 'numpy', 'torch') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_reporting_needs_no_torch(whole_run: Path, tmp_path: Path) -> None:
    """A report is written without the libraries that train and evaluate."""
    code = (
        "import sys, pathlib; from nearfield.reporting import build_report;"
        f"build_report(pathlib.Path({str(whole_run)!r}), pathlib.Path({str(tmp_path / 'page.html')!r}));"
        "print([m for m in ('torch', 'transformers', 'mteb', 'sentence_transformers', 'datasets') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
