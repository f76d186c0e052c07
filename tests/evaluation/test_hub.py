"""A push to the hub, with an API that only remembers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from nearfield.errors import BadInputError
from nearfield.evaluation.hub import push, update_card, with_index
from nearfield.evaluation.results import read_scores
from tests.evaluation.made import write_result


class Remembers:
    """The requests that were made."""

    def __init__(self) -> None:
        self.made: list[tuple[str, bool]] = []
        self.files: dict[str, str] = {}

    def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> None:
        assert exist_ok
        self.made.append((repo_id, private))

    def create_commit(self, repo_id: str, *, operations: Any, commit_message: str) -> Any:
        assert self.made[-1][0] == repo_id and "nearfield" in commit_message
        self.files = {one.path_in_repo: Path(one.path_or_fileobj).read_text() for one in operations}
        return type("Commit", (), {"oid": "c" * 40})()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    (folder / "1_Pooling").mkdir(parents=True)
    (folder / "modules.json").write_text("[]")
    (folder / "1_Pooling" / "config.json").write_text("{}")
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "state.json").write_text("{}")
    front = "---\nlibrary_name: sentence-transformers\ntags: [nearfield]\n---\n"
    (folder / "README.md").write_text(f"{front}\n# Mine\n\n## Benchmark texts in the training data\n\nNone.\n")
    return folder


@pytest.fixture
def results(tmp_path: Path) -> Path:
    folder = write_result(
        tmp_path / "results" / "org__mine" / ("a" * 40), [0.2, 0.4, 0.9, 0.5], task="ArguAna", revision="d" * 40
    )
    (folder / "manifest.jsonl").write_text(
        '{"tasks": {"ArguAna": {"prompts": {"query": "find: "}}}, "versions": {"mteb": "2"}}\n'
    )
    return folder


def test_card_results_and_manifest_are_pushed_in_one_commit(model: Path, results: Path) -> None:
    api = Remembers()
    made = push(model, "org/mine", results, private=True, api=api)
    assert made.commit == "c" * 40 and api.made == [("org/mine", True)]
    assert set(made.files) == set(api.files)
    assert {
        "README.md",
        "modules.json",
        "1_Pooling/config.json",
        "nearfield/manifest.jsonl",
        "nearfield/model_meta.json",
    } <= set(api.files)
    assert not any("checkpoints" in name for name in api.files)
    card = api.files["README.md"]
    assert "## Benchmark texts in the training data" in card and "`find: `" in card and " to " in card
    head = yaml.safe_load(card[4:].partition("\n---\n")[0])
    assert head["library_name"] == "sentence-transformers"
    entry = head["model-index"][0]["results"][0]
    assert entry["metrics"] == [{"type": "ndcg_at_10", "name": "ndcg_at_10", "value": 50.0}]
    assert entry["dataset"] == {
        "type": "mteb/arguana", "name": "ArguAna (default)", "config": "default", "split": "test", "revision": "d" * 40,
    }  # fmt: skip


def test_a_card_is_rebuilt_without_growing(model: Path, results: Path) -> None:
    first = update_card(model, results).read_text()
    assert update_card(model, results).read_text() == first
    with_index(first, "n", {})  # no score: no index
    local = write_result(results.parent / "b", [0.1, 0.2], revision="local-1")
    assert "model-index" not in with_index("# No front matter\n", "n", read_scores(local))
    assert "model-index" not in with_index(first, "n", read_scores(local))


def test_a_card_whose_front_matter_is_broken_stays_as_it_is(model: Path, results: Path) -> None:
    card = model / "README.md"
    card.write_text("---\ntags: [a\n---\n# Mine\n")
    with pytest.raises(BadInputError, match="front matter of this card is no YAML"):
        update_card(model, results)
    assert card.read_text() == "---\ntags: [a\n---\n# Mine\n"


def test_what_must_not_be_pushed(model: Path, results: Path, tmp_path: Path) -> None:
    api = Remembers()
    with pytest.raises(BadInputError, match="organisation/name"):
        push(model, "mine", results, api=api)
    with pytest.raises(BadInputError, match="no model"):
        push(tmp_path, "org/mine", results, api=api)
    (model / "pytorch_model.bin").write_text("")
    with pytest.raises(BadInputError, match="run code"):
        push(model, "org/mine", results, api=api)
    assert api.made == []


def test_a_hub_that_refuses_is_told(model: Path) -> None:
    class Refuses(Remembers):
        def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> None:
            raise OSError("no network\nand more")

    with pytest.raises(BadInputError, match=r"no network\)"):
        push(model, "org/mine", None, api=Refuses())
