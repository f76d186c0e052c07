"""Draw the logit matrices of docs/objectives.md: python docs/pictures/draw_logits.py (writes beside itself)."""

from __future__ import annotations

from html import escape
from pathlib import Path

HERE = Path(__file__).parent
CELL, LEFT, TOP = 30, 44, 34
COLOURS = {
    "p": ("#3b6fb6", "positive"),
    "e": ("#c8792b", "own explicit negative"),
    "n": ("#e8eaee", "in-batch negative"),
    "m": ("url(#m)", "masked: no candidate"),
    "h": ("#8a93a3", "counts more"),
    "x": ("#c8792b", "counts more, explicit"),
    "s": ("#7fb37f", "mixed of the row's own"),
    "q": ("#d9c6e3", "positive of an earlier step"),
    ".": ("#ffffff", "not in the softmax"),
}
DOCUMENTS = ["p₁", "n₁", "p₂", "n₂", "p₃", "n₃", "p₄", "n₄"]
PAIRS, QUERIES = ["p₁", "p₂", "p₃", "p₄"], ["q₁", "q₂", "q₃", "q₄"]
PLAIN = ["pennnnnn", "nnpennnn", "nnnnpenn", "nnnnnnpe"]
Panel = tuple[str, list[str], list[str], list[str]]
"""Title, columns, rows, cells."""

PICTURES: dict[str, tuple[str, list[Panel]]] = {
    "logits-candidates": (
        "Which documents are candidates",
        [
            ("as it is", DOCUMENTS, QUERIES, PLAIN),
            ("shared_negatives: false", DOCUMENTS, QUERIES, ["pen.n.n.", "n.pen.n.", "n.n.pen.", "n.n.n.pe"]),
            ("in_batch_negatives: false", DOCUMENTS, QUERIES, ["pe......", "..pe....", "....pe..", "......pe"]),
        ],
    ),
    "logits-directions": (
        "The four directions of one softmax for each row",
        [
            ("query_document", PAIRS, QUERIES, ["pnnn", "npnn", "nnpn", "nnnp"]),
            ("query_query", QUERIES, QUERIES, [".nnn", "n.nn", "nn.n", "nnn."]),
            ("document_query", QUERIES, PAIRS, [".nnn", "n.nn", "nn.n", "nnn."]),
            ("document_document", PAIRS, PAIRS, [".nnn", "n.nn", "nn.n", "nnn."]),
        ],
    ),
    "logits-masks": (
        "Masks take candidates out of the sum",
        [
            ("known positive (p₃ is q₁'s too)", PAIRS, QUERIES, ["pnmn", "npnn", "nnpn", "nnnp"]),
            ("same label (1, 2 and 3, 4)", PAIRS, QUERIES, ["pmnn", "mpnn", "nnpm", "nnmp"]),
            ("score or guide above its limit", PAIRS, QUERIES, ["pnnm", "npnn", "nmpn", "nnnp"]),
        ],
    ),
    "logits-hardness": (
        "Hardness weights, by where they are put",
        [
            ("on: in_batch", DOCUMENTS, QUERIES, ["pehhhhhh", "hhpehhhh", "hhhhpehh", "hhhhhhpe"]),
            ("on: explicit", DOCUMENTS, QUERIES, ["pxnnnnnn", "nnpxnnnn", "nnnnpxnn", "nnnnnnpx"]),
            ("on: all", DOCUMENTS, QUERIES, ["pxhhhhhh", "hhpxhhhh", "hhhhpxhh", "hhhhhhpx"]),
        ],
    ),
    "logits-mixing": (
        "Mixing adds candidates of the row alone",
        [
            (
                "one pair, one list",
                [*DOCUMENTS, "pair", "list"],
                QUERIES,
                [f"{row}ss" for row in PLAIN],
            )
        ],
    ),
    "logits-queue": (
        "A queue adds the positives of earlier steps to every row",
        [("queue: 4", [*PAIRS, "o₁", "o₂", "o₃", "o₄"], QUERIES, ["pnnnqqqq", "npnnqqqq", "nnpnqqqm", "nnnpqqqq"])],
    ),
    "logits-ring": (
        "A ring of two: rank 0 has rows 1 and 2, and sees its own columns, then those that come by",
        [
            ("its own part", DOCUMENTS, QUERIES[:2], ["penn....", "nnpe...."]),
            ("rank 1's part comes by", DOCUMENTS, QUERIES[:2], ["....nnnn", "....nnnn"]),
        ],
    ),
    "logits-tiles": (
        "blockwise holds one tile and a number for each row",
        [("tiles of 2 x 4", DOCUMENTS, QUERIES, ["pehh....", "hhpe....", "........", "........"])],
    ),
}


def text(x: float, y: float, words: str, anchor: str = "middle", size: int = 12) -> str:
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" fill="#22262c" font-size="{size}">{escape(words)}</text>'


def draw(title: str, panels: list[Panel]) -> str:
    parts: list[str] = []
    x, height = 0.0, 0.0
    for name, columns, rows, cells in panels:
        width = max(LEFT + CELL * len(columns) + 24, 7 * len(name) + 20)
        parts.append(text(x + LEFT + CELL * len(columns) / 2, 18, name))
        parts += [text(x + LEFT + CELL * (i + 0.5), TOP + 14, column) for i, column in enumerate(columns)]
        for r, (row, line) in enumerate(zip(rows, cells, strict=True)):
            y = TOP + 20 + CELL * r
            parts.append(text(x + LEFT - 8, y + 20, row, "end"))
            for c, kind in enumerate(line):
                place = f'x="{x + LEFT + CELL * c:g}" y="{y}" width="{CELL - 3}" height="{CELL - 3}"'
                parts.append(f'<rect {place} fill="{COLOURS[kind][0]}" stroke="#c9ced6" rx="2"/>')
        x += width
        height = max(height, TOP + 20 + CELL * len(rows))
    used = [kind for kind in COLOURS if any(kind in "".join(panel[3]) for panel in panels)]
    place = 12.0
    for kind in used:
        colour, words = COLOURS[kind]
        parts.append(
            f'<rect x="{place:g}" y="{height + 12:g}" width="14" height="14" fill="{colour}" stroke="#c9ced6"/>'
        )
        parts.append(text(place + 20, height + 24, words, "start"))
        place += 40 + 6.6 * len(words)
    wide, tall = max(x, place), height + 38
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide:g} {tall:g}" width="{wide:g}" height="{tall:g}" '
        f'font-family="system-ui, sans-serif" role="img" aria-label="{escape(title)}">\n'
        f'<rect width="{wide:g}" height="{tall:g}" fill="#ffffff"/>\n'
        '<defs><pattern id="m" width="7" height="7" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">'
        '<rect width="7" height="7" fill="#fff"/><rect width="2.5" height="7" fill="#b4443c"/></pattern></defs>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


if __name__ == "__main__":
    for name, (title, panels) in PICTURES.items():
        (HERE / f"{name}.svg").write_text(draw(title, panels))
