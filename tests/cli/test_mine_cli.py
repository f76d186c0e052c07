"""``nearfield mine`` and ``nearfield mine audit`` as a user sees them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.command import run

MINING = "mining={negatives: 3, depth: 12, rules: [{kind: percent_of_positive, share: 0.9}]}"


def test_mine_and_audit(
    toy_recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    toy_recipe.write_text(toy_recipe.read_text() + "mining: {negatives: 3, depth: 12, rules: [{kind: naive}]}\n")
    assert run("mine", str(toy_recipe)) == 0
    printed = capsys.readouterr()
    assert "naive" in printed.out and "negatives for" in printed.out
    assert "mine: running" in printed.err and "plan" not in printed.err
    assert run("mine", "run", str(toy_recipe)) == 0
    assert "mine: up to date" in capsys.readouterr().err
    assert run("mine", "audit", "runs/toy", "--shown", "2", "--judged", "50") == 0
    words = capsys.readouterr().out
    assert "false negatives by BM25" in words and "50 judged" in words and "rank" in words
    page = (tmp_path / "runs" / "toy" / "mining.html").read_text()
    assert page.count("<svg") == 2


def test_short_queries_are_said(toy_recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    strict = "mining={negatives: 3, rules: [{kind: absolute, below: -0.99}]}"
    assert run("mine", str(toy_recipe), strict) == 0
    words = " ".join(capsys.readouterr().out.split())
    assert "0 negatives for" in words and "have fewer negatives than wanted" in words


def test_bad_input(toy_recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert run("mine", str(toy_recipe)) == 2
    assert "mines no negatives" in capsys.readouterr().err
    assert run("plan", str(toy_recipe)) == 0
    assert run("mine", "audit", "runs/toy") == 2
    assert run("mine", "audit", "nowhere") == 2
    capsys.readouterr()
    assert run("mine", str(toy_recipe), MINING, "mining.rules.0.kind=percent") == 2
    assert "unknown kind 'percent'" in capsys.readouterr().err


def test_help_names_both(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("mine", "--help") == 0
    words = capsys.readouterr().out
    assert "audit" in words and "run" in words
