"""Texts from data, recipes and results never become markup; what they say stays readable."""

from __future__ import annotations

import itertools
import json
import re
import shutil
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pytest

from nearfield.reporting import build_report
from nearfield.reporting.page import content_policy, embedded_json
from nearfield.reporting.text import visible
from tests.reporting.hostile import HOSTILE, PWN
from tests.reporting.runs import hash_of, write_names, write_run

ATTRIBUTES = {
    "html": {"lang"}, "meta": {"charset", "http-equiv", "content", "name"}, "a": {"class", "href"}, "p": {"class", "id", "role"},
    "nav": {"aria-label"}, "main": {"id"}, "section": {"id", "aria-labelledby"}, "header": {"class"}, "h2": {"id"},
    "h3": {"class", "data-group"}, "div": {"class", "tabindex", "role", "aria-label", "hidden"}, "ul": {"class"},
    "li": {"class", "value", "dir"}, "dl": {"class"}, "span": {"class", "dir"}, "th": {"scope", "class"}, "td": {"class"}, "tr": {"class"},
    "figure": {"class", "tabindex", "aria-label"}, "details": {"class", "data-query", "open"}, "pre": {"tabindex"},
    "article": {"class"}, "input": {"type", "id", "autocomplete", "spellcheck"},
    "button": {"type", "data-show", "aria-pressed"}, "script": {"type", "id"},
    "svg": {"class", "viewbox", "role", "aria-labelledby", "data-chart", "data-box", "data-y", "data-map"}, "title": {"id"}, "desc": {"id"},
    "line": {"class", "x1", "x2", "y1", "y2"}, "text": {"class", "x", "y", "text-anchor"}, "path": {"class", "d"},
    "circle": {"class", "cx", "cy", "r"}, "rect": {"class", "x", "y", "width", "height", "fill-opacity"},
}  # fmt: skip
PLAIN = {
    "head", "style", "body", "h1", "h4", "bdi", "footer", "ol", "dt", "dd", "table", "caption", "thead", "tbody", "summary",
    "figcaption", "code", "label", "wbr",
}  # fmt: skip
VOID = {"meta", "input", "wbr"}
CLASSES = (
    "skip top kind verdict better worse even untested forest absent missing notes lead tiles figure label aside "
    "columns block facts code scroll num strong item path metric finding task charts plot chart line "
    "faint area dot whisker grid tick s1 s2 s3 s4 filter gain loss query delta text sides side "
    "relevant doc badge wanted cursor cell mark m0 m1 m2 m3 m4 m5 m6 apart"
)
PIECES = {
    "class": set(CLASSES.split()),
    "href": {
        f"#{name}"
        for name in ("main", "trained", "comparison", "queries", "geometry", "curves", "batches", "data", "manifest")
    },
}


class Outline(HTMLParser):
    """Every element with its attributes, the text of the page, and what stands in scripts and styles."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, tuple[tuple[str, str | None], ...]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.raw: list[tuple[str, dict[str, str | None], str]] = []
        self.other: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, tuple(attrs)))
        if tag in ("script", "style"):
            self.raw.append((tag, dict(attrs), ""))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, tuple(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("script", "style"):
            tag, attributes, content = self.raw[-1]
            self.raw[-1] = (tag, attributes, content + data)
        elif self.elements and self.elements[-1][0] == "wbr" and self.words:
            self.words[-1] += data
        else:
            self.words.append(data)

    def handle_comment(self, data: str) -> None:
        self.other.append(f"comment {data[:80]}")

    def unknown_decl(self, data: str) -> None:
        self.other.append(f"declaration {data[:80]}")

    def handle_pi(self, data: str) -> None:
        self.other.append(f"instruction {data[:80]}")


def outline(html: str) -> Outline:
    """The parsed page."""
    parser = Outline()
    parser.feed(html)
    parser.close()
    assert parser.open == []
    return parser


def check_structure(parsed: Outline) -> None:
    """No element, attribute, class or link beyond those that the templates and charts write."""
    assert parsed.other == []
    for tag, attributes in parsed.elements:
        assert tag in ATTRIBUTES or tag in PLAIN, tag
        names = [name for name, _ in attributes]
        assert set(names) <= ATTRIBUTES.get(tag, set()), (tag, names)
        assert len(set(names)) == len(names)
        for name, value in attributes:
            if name in PIECES:
                assert set((value or "").split()) <= PIECES[name], (tag, name, value)
            if name in ("dir", "role", "scope", "type"):
                assert value in {
                    "auto",
                    "img",
                    "region",
                    "group",
                    "status",
                    "col",
                    "row",
                    "search",
                    "button",
                    "application/json",
                }
    counted = Counter(tag for tag, _ in parsed.elements)
    assert (counted["script"], counted["style"], counted["meta"], counted["body"]) == (2, 1, 6, 1)


def test_a_hundred_hostile_texts_stay_text(tmp_path: Path, whole_run: Path) -> None:
    """Each text stands in queries, documents, names, reasons, excerpts, sentences and settings, in turn."""
    supply = itertools.cycle(HOSTILE)
    run = write_run(tmp_path, lambda _: next(supply))
    result = build_report(run)
    assert {name: reason for name, reason in result.sections.items() if reason} == {}
    html = result.path.read_text(encoding="utf-8")
    parsed = outline(html)
    check_structure(parsed)
    # The names of elements are those of a harmless run: nothing was added and nothing swallowed the rest.
    harmless = outline(build_report(whole_run, tmp_path / "harmless.html").path.read_text(encoding="utf-8"))
    assert {tag for tag, _ in parsed.elements} == {tag for tag, _ in harmless.elements}
    ids = [value for _, attributes in parsed.elements for name, value in attributes if name == "id"]
    assert len(ids) == len(set(ids))


def words_of(parsed: Outline) -> str:
    """The text of the page on one line."""
    return re.sub(r"[ \t\r\n]+", " ", " ".join(parsed.words))


def shown(hostile: str) -> str:
    """A text as the page should show it."""
    return re.sub(r"[ \t\r\n]+", " ", visible(hostile)).strip(" ")


def test_every_hostile_text_is_harmless_in_every_name(tmp_path: Path) -> None:
    """One after the other as the names of recipe, run, sources, models, tasks, keys, reasons, sentences and excerpts."""
    run = write_run(tmp_path)
    for place in ("results", "metrics.jsonl"):
        path = run / place
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    for hostile in HOSTILE:
        write_names(run, lambda _, text=hostile: text)  # type: ignore[misc]
        result = build_report(run)
        assert [name for name, reason in result.sections.items() if reason] == ["queries", "curves"]
        parsed = outline(result.path.read_text(encoding="utf-8"))
        check_structure(parsed)
        wanted = shown(hostile)
        if 0 < len(wanted) < 60:
            # Heading and title, sentence, source names, reasons, excerpt, conflict, command.
            assert words_of(parsed).count(wanted) >= 12, hostile


def test_every_hostile_text_is_harmless_as_query_and_document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All hundred as queries, with all hundred as their documents, shown at once."""
    monkeypatch.setattr("nearfield.reporting.queries.EACH", 200)
    supply = itertools.cycle(HOSTILE)
    run = write_run(tmp_path, lambda _: next(supply), len(HOSTILE), (lambda i: 2, lambda i: 1 + 2 * (i % 2)))
    parsed = outline(build_report(run).path.read_text(encoding="utf-8"))
    check_structure(parsed)
    data = json.loads(next(content for tag, attrs, content in parsed.raw if attrs.get("id") == "report-data"))
    stored = [text.encode("utf-8", "replace").decode() for text in HOSTILE]
    assert {query["text"] for query in data["queries"]} == set(stored)
    found = {result["text"] for query in data["queries"] for result in query["results"]["after"]}
    assert found == set(stored)
    words = words_of(parsed)
    for text in stored:
        if 0 < len(shown(text)) < 200:
            assert words.count(shown(text)) >= 2, text


def test_the_page_has_no_hidden_characters(tmp_path: Path) -> None:
    """No control character, bidi override or lone surrogate reaches the file."""
    supply = itertools.cycle(HOSTILE)
    html = build_report(write_run(tmp_path, lambda _: next(supply))).path.read_bytes().decode("utf-8")
    hidden = set("\x00\x01\x1b\x7f\x80\u2028\u2029\u202e\u2066\u200f\u200b\u2060\u00ad\ufeff\ufffe")
    assert hidden & set(html) == set()


def test_policy_hashes_are_those_of_the_page(whole_run: Path, tmp_path: Path) -> None:
    """The policy in the page names the hash of the script and the style that really stand there, and nothing looser."""
    parsed = outline(build_report(whole_run, tmp_path / "page.html").path.read_text(encoding="utf-8"))
    policy = next(
        dict(attrs)["content"]
        for tag, attrs in parsed.elements
        if tag == "meta" and ("http-equiv", "Content-Security-Policy") in attrs
    )
    assert policy is not None
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    scripts = [content for tag, attrs, content in parsed.raw if tag == "script" and attrs.get("type") is None]
    styles = [content for tag, _, content in parsed.raw if tag == "style"]
    assert len(scripts) == len(styles) == 1
    assert rules["script-src"] == hash_of(scripts[0])
    assert rules["style-src"] == hash_of(styles[0])
    assert {name: rule for name, rule in rules.items() if not name.endswith("-src") or name == "default-src"} == {
        "default-src": "'none'",
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    assert "unsafe" not in policy and "http" not in policy
    assert content_policy(scripts[0], styles[0]) == policy


def test_policy_stands_before_anything_that_it_governs(whole_run: Path, tmp_path: Path) -> None:
    html = build_report(whole_run, tmp_path / "page.html").path.read_text(encoding="utf-8")
    assert html.index("Content-Security-Policy") < min(
        html.index("<style"), html.index("<script"), html.index("<title")
    )


@pytest.mark.parametrize("hostile", HOSTILE, ids=range(100))
def test_embedded_json_round_trips(hostile: str) -> None:
    """JSON in a script element gives back the very text, and holds nothing that ends the element."""
    value = {"text": hostile, hostile: [hostile]}
    markup = str(embedded_json(value))
    assert json.loads(markup) == value
    assert markup.isascii() and not set("<>&") & set(markup)


def test_the_json_of_the_page_holds_the_texts(tmp_path: Path) -> None:
    """The figures in the page are the run's own: queries uncut, scores exact, curves with gaps as null."""
    supply = itertools.cycle(HOSTILE)
    run = write_run(tmp_path, lambda _: next(supply))
    with (run / "metrics.jsonl").open("r+") as file:
        lines = file.read().splitlines()
        lines[5] = '{"step": 6, "loss": NaN, "learning_rate": 1e-5}'
        file.seek(0)
        file.write("\n".join(lines))
    parsed = outline(build_report(run).path.read_text(encoding="utf-8"))
    data = json.loads(next(content for tag, attrs, content in parsed.raw if attrs.get("id") == "report-data"))
    assert data["comparison"] == {
        name: value
        for name, value in json.loads((run / "comparison.json").read_text()).items()
        if name not in ("version", "notes")
    }
    assert data["charts"]["learning-rate"]["x"][:3] == [1, 2, 3]
    assert data["charts"]["loss"]["series"][0]["y"][5] is None
    texts = [query["text"] for query in data["queries"]]
    stored = {text.encode("utf-8", "replace").decode() for text in HOSTILE}
    assert texts and set(texts) <= stored
    assert PWN in json.dumps(data)
