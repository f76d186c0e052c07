"""``nearfield twins`` on two small suites and made scores."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer

from nearfield.cli import analyse
from nearfield.errors import BadInputError
from tests.evaluation.conftest import Tasks
from tests.evaluation.made import write_result


def test_a_domain_beside_its_twin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("General", "Domain"):
        Tasks(tmp_path / name.lower()).retrieval(name)
    for number in range(3):
        folder = tmp_path / "results" / f"local__m{number}" / "r"
        for name, mean in (("General", 0.7), ("Domain", 0.4)):
            write_result(folder, [mean + number / 10 + i / 100 for i in (-9, -3, 0, 5, 7)], task=name)
    (tmp_path / "measures.json").write_text(json.dumps({"llm errors": {"General": 0.1, "Domain": 0.3}}))
    app = typer.Typer(pretty_exceptions_enable=False)
    analyse.register(app)
    command = ["twins", *(f"results/local__m{i}/r" for i in range(3)), "--general", "general", "--domain", "domain"]
    with pytest.raises(SystemExit) as stop:
        app([*command, "--samples", "200", "--measures", "measures.json", "--json", "twins.json"])
    said = capsys.readouterr().out
    assert stop.value.code == 0 and "Spearman +1.00" in said and "-0.3000" in said
    made = json.loads((tmp_path / "twins.json").read_text())
    assert {gap["type"] for gap in made["gaps"]} == {"Retrieval", "all"} and made["spearman"] == 1.0
    (tmp_path / "measures.json").write_text("[1]")
    with pytest.raises(BadInputError, match="measures are"):
        app([*command, "--measures", "measures.json"])
