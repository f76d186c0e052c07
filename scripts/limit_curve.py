"""How many documents free vectors of d dimensions can serve if every pair must be found, beside the published numbers.

    python scripts/limit_curve.py --dimensions 4,5,6 --minutes 5 --out results/limit/curve.json

For each d the documents go from two below the published critical number to two above it, and on while all pairs are found; at
each number ``--starts`` random starts go side by side until one finds every pair. A number that no start solves is not proven to be impossible. Numbers that do
not fit in the time are left out, and the file says so; a second call goes on where the first stopped.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from nearfield.files import write_json
from nearfield.methods.capacity import PUBLISHED, best_accuracies, published_fit


def tried(documents: int, dimensions: int, starts: int) -> dict[str, Any]:
    """The best that the starts, side by side, reach until one of them finds all pairs."""
    began = time.process_time()
    found = best_accuracies(documents, dimensions, seeds=range(starts))
    spent = round(time.process_time() - began, 1)
    return {"documents": documents, "best_accuracy": round(max(found), 4), "starts": starts, "cpu_seconds": spent}


def expected(dimensions: int) -> int:
    """The published number of documents, or that of the published fit."""
    return PUBLISHED.get(dimensions) or round(published_fit(dimensions))


def table(found: dict[str, Any]) -> str:
    """Markdown with a row a dimension."""
    lines = [
        "| d | published | largest solved | smallest not solved (best accuracy; starts) |",
        "| ---: | ---: | ---: | --- |",
    ]
    for d, rows in sorted(found["curve"].items(), key=lambda item: int(item[0])):
        solved = [row["documents"] for row in rows if row["best_accuracy"] == 1.0]
        failed = [row for row in rows if row["best_accuracy"] < 1.0]
        first = min(failed, key=lambda row: row["documents"]) if failed else None
        said = "" if first is None else f"{first['documents']} ({first['best_accuracy']:.4f}; {first['starts']})"
        number = f"{'' if int(d) in PUBLISHED else 'fit: '}{expected(int(d))}"
        lines.append(f"| {d} | {number} | {max(solved, default='')} | {said} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Try, write after each number of documents, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dimensions", default="4,5,6,7,8", help="4 and more")
    parser.add_argument("--starts", type=int, default=5)
    parser.add_argument("--minutes", type=float, default=5.0, help="of CPU time; what does not fit is left out")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    found: dict[str, Any] = {"starts": arguments.starts, "curve": {}}
    if arguments.out.is_file():
        found = json.loads(arguments.out.read_text(encoding="utf-8"))
    began = time.process_time()
    for d in [int(part) for part in arguments.dimensions.split(",")]:
        rows = found["curve"].setdefault(str(d), [])
        documents = expected(d) - 2
        while documents <= expected(d) + 2 or rows[-1]["best_accuracy"] == 1.0:
            if not any(row["documents"] == documents for row in rows):
                if time.process_time() - began > 60 * arguments.minutes:
                    break
                rows.append(tried(documents, d, arguments.starts))
                write_json(arguments.out, found)
            documents += 1
    print(table(found))


if __name__ == "__main__":
    main()
