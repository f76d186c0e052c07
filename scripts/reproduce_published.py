"""Score all-MiniLM-L6-v2 on local copies of benchmark data, and set each score beside the published one.

    python scripts/reproduce_published.py --data FOLDER --out results/reproduction.md

FOLDER holds local tasks (docs/evaluation.md) whose ``meta.json`` gives, under ``official``, the score that mteb's results
repository has of this model, for each subset. Vectors are kept, so a second call costs little. Leaves with 1 if a comparable
score differs in the fourth decimal.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from nearfield.cli.app import quiet_libraries

MODEL = "sentence-transformers/all-MiniLM-L6-v2"
NOT_COMPARABLE = {
    "LegalSummarization": "this copy has more pairs",
    "SIB200ClusteringS2S": "published before k-means was seeded",
}


def rows(data: Path, tasks: list[str] | None, results: Path, cache: Path) -> list[dict[str, Any]]:
    """A row for each subset of each task."""
    quiet_libraries()
    from nearfield.encoders import load_encoder
    from nearfield.evaluation import evaluate, open_model
    from nearfield.evaluation.results import read_scores
    from nearfield.evaluation.scores import score_interval

    made = evaluate(open_model(load_encoder(MODEL, device="cpu"), cache=cache), data, results, tasks=tasks)
    if made.failures:
        raise SystemExit(f"failed: {made.failures}")
    found = []
    for key, of in sorted(read_scores(made.results_dir).items()):
        if key[0] not in made.scores:
            continue
        interval = score_interval(key, of, 10_000, 0.95, 0)
        ends = None if interval is None else (interval.low, interval.high)
        meta = json.loads((data / key[0] / "meta.json").read_text(encoding="utf-8"))
        published = (meta.get("official") or {}).get(key[1])
        found.append(
            {
                "task": key[0],
                "subset": key[1],
                "type": of.task_type,
                "published": published,
                "ours": of.score,
                "ends": ends,
            }
        )
    return found


def verdict(row: dict[str, Any]) -> str:
    """Whether a score is reproduced."""
    if row["published"] is None:
        return "nothing published"
    if row["task"] in NOT_COMPARABLE:
        return f"not comparable: {NOT_COMPARABLE[row['task']]}"
    return "yes" if abs(round(row["ours"], 4) - round(row["published"], 4)) < 1.01e-4 else "NO"


def table(found: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = ["| task | type | subset | published | nearfield | 95 % interval | equal to 4 decimals |"]
    lines += ["| --- | --- | --- | ---: | ---: | ---: | --- |"]
    for row in found:
        published = "" if row["published"] is None else f"{row['published']:.4f}"
        ends = "" if row["ends"] is None else f"{row['ends'][0]:.4f} to {row['ends'][1]:.4f}"
        cells = [row["task"], row["type"], row["subset"], published, f"{row['ours']:.4f}", ends, verdict(row)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Score and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--tasks", help="only these, separated by commas")
    parser.add_argument("--results", type=Path, default=Path("runs/reproduction/results"))
    parser.add_argument("--cache", type=Path, default=Path("runs/.cache/vectors"))
    parser.add_argument("--out", type=Path, help="write the table here")
    arguments = parser.parse_args()
    tasks = [task.strip() for task in arguments.tasks.split(",")] if arguments.tasks else None
    found = rows(arguments.data, tasks, arguments.results, arguments.cache)
    from nearfield.provenance import versions

    known = versions()
    stated = ", ".join(f"{name} {known[name]}" for name in ("mteb", "sentence-transformers", "transformers", "torch"))
    text = (
        f"# Published scores of {MODEL}, reproduced\n\nMade by `python scripts/reproduce_published.py --data FOLDER --out FILE` "
        f"in float32 on a CPU, with {stated}.\n\n{table(found)}"
    )
    if arguments.out:
        arguments.out.write_text(text, encoding="utf-8")
    print(text)
    if any(verdict(row) == "NO" for row in found):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
