"""Score all-MiniLM-L6-v2, and other models that are at hand, on local copies of benchmark data, each score beside the published one.

    python scripts/reproduce_published.py --data FOLDER --out results/reproduction.md \
        --model sentence-transformers/all-mpnet-base-v2 MODEL_FOLDER PUBLISHED_FOLDER --model-tasks STS13,STS16

FOLDER holds local tasks (docs/evaluation.md) whose ``meta.json`` gives, under ``official``, the score that mteb's results
repository has of all-MiniLM-L6-v2, for each subset. PUBLISHED_FOLDER is another model's folder in a copy of that repository
(``results/<org>__<model>``). Scores and vectors are kept, so a second call costs little. Leaves with 1 if a comparable score,
rounded to four decimals, is another number.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nearfield.cli.app import quiet_libraries

MODEL = "sentence-transformers/all-MiniLM-L6-v2"
NOT_COMPARABLE = {
    "LegalSummarization": "this copy has more pairs",
    "SIB200ClusteringS2S": "published before k-means was seeded",
}

Published = Mapping[tuple[str, str], float]
"""(task, subset) -> score."""


@dataclass(frozen=True)
class Row:
    """A subset's score beside the published one."""

    task: str
    subset: str
    type: str
    published: float | None
    ours: float
    ends: tuple[float, float] | None

    @property
    def verdict(self) -> str:
        """Whether the score is reproduced: whether both print the same four decimals."""
        if self.published is None:
            return "nothing published"
        if self.task in NOT_COMPARABLE:
            return f"not comparable: {NOT_COMPARABLE[self.task]}"
        return "yes" if f"{self.ours:.4f}" == f"{self.published:.4f}" else "NO"


def stated_scores(data: Path) -> Published:
    """The published scores of all-MiniLM-L6-v2 that the local tasks state."""
    found: dict[tuple[str, str], float] = {}
    for path in sorted(data.glob("*/meta.json")):
        meta = json.loads(path.read_text(encoding="utf-8"))
        found |= {(path.parent.name, subset): float(score) for subset, score in (meta.get("official") or {}).items()}
    return found


def filed_scores(folder: Path, data: Path) -> Published:
    """The scores in mteb's result files under ``folder``, for the split that each local task has; the newest mteb's hold."""
    found: dict[tuple[str, str], tuple[list[int], float]] = {}
    for path in sorted(data.glob("*/meta.json")):
        split = json.loads(path.read_text(encoding="utf-8"))["split"]
        for file in sorted(folder.rglob(f"{path.parent.name}.json")):
            result = json.loads(file.read_text(encoding="utf-8"))
            version = [int(part) for part in result["mteb_version"].split(".") if part.isdigit()]
            for row in result["scores"].get(split, ()):
                key = (path.parent.name, row["hf_subset"])
                if key not in found or found[key][0] < version:
                    found[key] = (version, float(row["main_score"]))
    return {key: score for key, (_, score) in found.items()}


def rows(model: Any, published: Published, data: Path, tasks: list[str] | None, results: Path) -> list[Row]:
    """A row for each subset of each task; ``model`` as :func:`nearfield.evaluation.open_model` gives it."""
    from nearfield.evaluation import evaluate
    from nearfield.evaluation.results import read_scores
    from nearfield.evaluation.scores import score_interval

    made = evaluate(model, data, results, tasks=tasks)
    if made.failures:
        raise SystemExit(f"failed: {made.failures}")
    found = []
    for key, of in sorted(read_scores(made.results_dir).items()):
        if key[0] not in made.scores:
            continue
        interval = score_interval(key, of, 10_000, 0.95, 0)
        ends = None if interval is None else (interval.low, interval.high)
        found.append(Row(key[0], key[1], of.task_type, published.get((key[0], key[1])), of.score, ends))
    return found


def table(found: list[Row]) -> str:
    """The rows as Markdown."""
    lines = ["| task | type | subset | published | nearfield | 95 % interval | equal to 4 decimals |"]
    lines += ["| --- | --- | --- | ---: | ---: | ---: | --- |"]
    for row in found:
        published = "" if row.published is None else f"{row.published:.4f}"
        ends = "" if row.ends is None else f"{row.ends[0]:.4f} to {row.ends[1]:.4f}"
        cells = [row.task, row.type, row.subset, published, f"{row.ours:.4f}", ends, row.verdict]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def summary(found: list[Row]) -> str:
    """One sentence on what was reproduced."""
    comparable = [row for row in found if row.verdict in ("yes", "NO")]
    equal = sum(row.verdict == "yes" for row in comparable)
    tasks = len({row.task for row in comparable})
    furthest = max((abs(row.ours - float(row.published or 0)) for row in comparable), default=0.0)
    return (
        f"{equal} of {len(comparable)} comparable scores ({tasks} tasks) are the published ones to 4 decimals; "
        f"the largest difference is {furthest:.1e}."
    )


def main() -> None:
    """Score and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--tasks", help="only these, separated by commas")
    parser.add_argument("--model", nargs=3, action="append", default=[], metavar=("NAME", "FOLDER", "PUBLISHED"))
    parser.add_argument("--model-tasks", help="only these for the models of --model")
    parser.add_argument("--results", type=Path, default=Path("runs/reproduction/results"))
    parser.add_argument("--cache", type=Path, default=Path("runs/.cache/vectors"))
    parser.add_argument("--out", type=Path, help="write the tables here")
    arguments = parser.parse_args()
    quiet_libraries()
    from nearfield.encoders import load_encoder
    from nearfield.evaluation import open_model
    from nearfield.provenance import versions

    def chosen(text: str | None) -> list[str] | None:
        return [task.strip() for task in text.split(",")] if text else None

    known = versions()
    stated = ", ".join(f"{name} {known[name]}" for name in ("mteb", "sentence-transformers", "transformers", "torch"))
    parts = [
        "# Published scores, reproduced\n\nMade by `python scripts/reproduce_published.py --data FOLDER --out FILE` "
        f"in float32 on a CPU, with {stated}.\n"
    ]
    failed = False
    wanted = [(MODEL, MODEL, stated_scores(arguments.data), chosen(arguments.tasks))]
    for name, folder, published in arguments.model:
        filed = filed_scores(Path(published), arguments.data)
        wanted.append((name, folder, filed, chosen(arguments.model_tasks)))
    for name, folder, scores, tasks in wanted:
        model = open_model(load_encoder(folder, device="cpu"), name=name, cache=arguments.cache)
        found = rows(model, scores, arguments.data, tasks, arguments.results)
        failed = failed or any(row.verdict == "NO" for row in found)
        parts.append(f"## {name}\n\n{summary(found)}\n\n{table(found)}")
    text = "\n".join(parts)
    if arguments.out:
        arguments.out.write_text(text, encoding="utf-8")
    print(text)
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
