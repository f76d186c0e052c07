"""The section on embeddings: what stands in it, and what it does with damage."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nearfield.analysis.geometry import analyse
from nearfield.analysis.search import Questions, searched
from nearfield.errors import BadInputError
from nearfield.methods.likeness import versions
from nearfield.reporting import build_report
from nearfield.reporting.analysis import analysis_section, build_analysis, short_names, write_analysis_page
from nearfield.reporting.svg import clustered, heat_map, scatter
from nearfield.reporting.text import AbsentError, part
from tests.reporting.analyses import made_analysis
from tests.reporting.runs import write_run


def test_all_parts_are_drawn_and_said() -> None:
    made = made_analysis()
    section = analysis_section(made)
    keys = {match for one in section.figures for match in re.findall(r'aria-labelledby="(.+?)-title', one.svg)}
    assert {
        "map-0",
        "map-1",
        "spectrum",
        "truncation-0",
        "heat-cka",
        "heat-jaccard",
        "sweep",
        "accuracy",
        "cuts",
    } <= keys
    assert {"samples-0", "versions", "audit-0", "associations", "rankability"} <= keys
    assert all(one.svg for one in section.figures) and set(section.maps) == {"map-0", "map-1"}
    assert {table.caption.split(" ")[0] for table in section.tables} == {"Shape", "Cuts", "Associations"}
    assert any("It says nothing of" in line for line in section.sentences)
    assert any("degenerate" in line for line in section.sentences) is False
    for key, chart in ((one.key, one.values) for one in section.figures if one.values is not None):
        assert any(f'data-chart="{key}"' in one.svg for one in section.figures), (key, chart)


def test_one_model_alone() -> None:
    vectors = np.random.default_rng(0).normal(size=(60, 8))
    section = analysis_section(analyse({"org/one": vectors}).to_json())
    assert section.tables[0].heads == ["figure", "one"] and not section.maps
    assert [one for one in section.figures if "data-chart" in one.svg]
    with pytest.raises(AbsentError):
        analysis_section({"models": []})


def test_any_damage_of_the_file_leaves_a_report(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    made = json.loads(json.dumps(made_analysis()))
    for key in made:
        for damage in (None, 3, "x", [], {}, [[None]], {"a": [1]}):
            (run / "analysis.json").write_text(json.dumps(made | {key: damage}))
            part("analysis.json", lambda: build_analysis(run))
    (run / "analysis.json").write_text(json.dumps(made))
    result = build_report(run)
    assert result.sections["geometry"] is None and result.size < 1_000_000


def test_a_page_of_its_own(tmp_path: Path) -> None:
    path = write_analysis_page(made_analysis(say=lambda text: f"<b>{text}"), tmp_path / "page.html")
    html = path.read_text()
    assert "<b>" not in html and "&lt;b&gt;" in html and "://" not in html.replace("http://www.w3.org/2000/svg", "")
    with pytest.raises(BadInputError):
        write_analysis_page(made_analysis(), tmp_path)


def test_like_models_stand_side_by_side() -> None:
    table = [[1, 0.1, 0.9], [0.1, 1, 0.2], [0.9, 0.2, 1]]
    order = clustered(table)
    assert abs(order.index(0) - order.index(2)) == 1
    svg = heat_map(
        "h",
        "t",
        ["a", "b", "c"],
        [[None if i == j else v for j, v in enumerate(r)] for i, r in enumerate(table)],
        order,
    )
    assert svg.count("<rect") == 6 and "a and c: 0.90" in svg.replace("c and a", "a and c")


def test_rare_labels_share_a_colour() -> None:
    labels = [f"l{i}" for i in range(9) for _ in range(9 - i)]
    points = [(float(i), float(i * i % 7)) for i in range(len(labels))]
    svg = scatter("m", "t", points, labels)
    assert svg.count('class="mark m1"') == 9 + 1 and svg.count('class="mark m0"') == 3 + 2 + 1 + 1
    assert "other labels" in svg and scatter("m", "t", [], []) == ""
    assert svg.count("<circle") == len(labels) + 7


def test_short_names() -> None:
    assert short_names(["org/a", "runs/b/model", "a/c", "b/c"]) == ["a", "b", "a/c", "b/c"]


def test_the_samples_come_through(tmp_path: Path) -> None:
    """The results of search and versions have the keys that the section reads."""
    rng = np.random.default_rng(1)
    documents = rng.normal(size=(80, 6))
    of = Questions(documents[:40] + 0.2, documents, tuple((i,) for i in range(40)))
    from dataclasses import asdict

    extras: dict[str, Any] = {"search": {"a": asdict(searched(of))}, "versions": asdict(versions({"a": of, "b": of}))}
    made = analyse({"a": documents, "b": documents}).to_json() | {"extras": extras}
    captions = [one.caption for one in analysis_section(made).figures]
    assert any("right, random" in one for one in captions) and any("index" in one for one in captions)
