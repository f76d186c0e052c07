"""Two checkouts of nearfield on one environment: the same training, evaluation, encoding and loss under both; A B A B.

    git worktree add ../before COMMIT
    python scripts/bench_versions.py --base ../before --json versions.json
    python scripts/bench_versions.py --base ../before --pairs 2 --parts plan loss

Parts: ``tokens``, ``plan``, ``train`` and ``evaluate`` are commands into one run folder (`nearfield train --until ...`, MiniLM on
pairs of random words), from the start of the process to its end; ``encode`` (texts to vectors) and ``loss`` (InfoNCE, forward
and backward, plain and with a score mask and hardness) are measured inside a process, imports left out. All on one thread.
Recipe keys, commands and the Python names used here must be the same in both.

``ratio`` is CPU seconds of the base over those of this checkout, of all parts together, with a 95 % interval of the median;
``parts`` has it for each, and ``memory`` the median of our peak over the base's. Leaves with 1 if the lower end of an
interval is below --floor, a peak is more than --memory times the base's, or the two did not do the same work.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from frame import (
    Clock,
    Pair,
    Sample,
    compare,
    finish,
    in_turn,
    machine,
    make_parser,
    peak_bytes,
    run_command,
    versions,
    write,
)

MODEL = "sentence-transformers/all-MiniLM-L6-v2"
HERE = Path(__file__).resolve().parents[1]
COMMANDS = {"tokens": ("--until", "tokens"), "plan": ("--until", "plan"), "train": ("--until", "train"), "evaluate": ()}
"""The parts of one run, in their order: each goes on where the one before ended."""
TEXTS = 1500
ROWS, DIMENSION, REPEATS = 4096, 384, 4


# The work, the same for both.


def write_run(folder: Path, steps: int) -> Path:
    """Pairs of random words, a held-out task, and the recipe of a run on them."""
    draw = random.Random(0)
    rows = []
    for number in range(64 * steps):
        words = [f"{draw.choice('bcdfglmnprst')}{draw.choice('aeiou')}{draw.choice('lmnrst')}" for _ in range(40)]
        query, positive = words[: draw.randint(4, 12)], words[: draw.randint(10, 40)]
        rows.append({"query": " ".join(query), "positive": f"{' '.join(positive)} {number}", "group": str(number)})
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "data.yaml").write_text(
        "name: pairs\nsources:\n  - name: pairs\n    task_type: Retrieval\n    reader: {kind: jsonl, path: pairs.jsonl}\n"
        "    examples: {kind: retrieval, query: query, positives: positive}\n    group: group\n"
        "    split: {kind: hash, fractions: {train: 0.8, test: 0.2}, seed: 0}\n"
    )
    (folder / "suite.yaml").write_text(
        "name: pairs\ntasks:\n  - {kind: heldout, name: Pairs, data: data.yaml, source: pairs, split: test}\n"
    )
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        f"name: versions\nseed: 0\ndata: data.yaml\nencoder: {{model: {MODEL}}}\n"
        "objective: {kind: infonce, temperature: 0.05}\nbatches: {kind: single_source, batch_size: 32}\n"
        f"training: {{max_steps: {steps}, learning_rate: 2.0e-5, device: cpu, checkpoints: {{every_steps: {steps // 2}}}}}\n"
        "evaluation: {suite: suite.yaml}\n"
    )
    return recipe


def encode() -> dict[str, Any]:
    """Texts to vectors, with the model in memory."""
    from nearfield.encoders.encode import text_encoder

    draw = random.Random(1)
    texts = [
        " ".join(
            draw.choices(
                ["the", "of", "and", "to", "in", "is", "that", "it", "was", "for", "on", "are"], k=draw.randint(5, 80)
            )
        )
        for _ in range(TEXTS)
    ]
    to_vectors = text_encoder(MODEL, device="cpu")
    to_vectors(texts[:8])
    with Clock() as clock:
        vectors = to_vectors(texts)
    return {"cpu_seconds": clock.cpu, "result": [float(value) for value in vectors.sum(axis=0)[:8]]}


def loss() -> dict[str, Any]:
    """The loss of a large batch and its gradient, from a table of embeddings."""
    import torch

    from nearfield.objectives import InfoNCEConfig, InfoNCELoss

    class Table(torch.nn.Module):
        """A model whose text is its number."""

        def __init__(self) -> None:
            super().__init__()
            near = torch.randn(ROWS, DIMENSION, generator=torch.Generator().manual_seed(0))
            noise = torch.randn(ROWS, DIMENSION, generator=torch.Generator().manual_seed(1))
            self.weight = torch.nn.Parameter(torch.cat([near, near + 0.7 * noise]))

        def forward(self, features: dict[str, torch.Tensor], **_: Any) -> dict[str, torch.Tensor]:
            return {**features, "sentence_embedding": self.weight[features["input_ids"][:, 0]]}

    table: Any = Table()
    columns = [torch.arange(start, start + ROWS)[:, None] for start in (0, ROWS)]
    features = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in columns]
    options = ({}, {"score_mask": {"margin": 0.1}, "hardness": {"alpha": 5.0}})
    losses = [InfoNCELoss(table, InfoNCEConfig.model_validate(each)) for each in options]
    values = []
    seconds = 0.0
    for repeat in range(REPEATS + 1):
        for each in losses:
            table.weight.grad = None
            with Clock() as clock:
                value = each([dict(column) for column in features])
                value.backward()
            # The first call is to warm up.
            seconds += clock.cpu if repeat else 0.0
            values.append(float(value.detach()))
    return {"cpu_seconds": seconds, "result": [*values[-2:], float(table.weight.grad.norm())]}


INSIDE: dict[str, Callable[[], dict[str, Any]]] = {"encode": encode, "loss": loss}


# Measuring one checkout.


def environment(tree: Path) -> dict[str, str]:
    """One thread, no network, and the package of the checkout before the one that is installed."""
    return {
        "PYTHONPATH": str(tree / "src"),
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
    }


def measure(tree: Path, parts: list[str], steps: int) -> Sample:
    """All parts under one checkout: seconds, peak memory and the results of each."""
    used: dict[str, Sample] = {}
    with tempfile.TemporaryDirectory(prefix="nearfield-versions-") as name:
        folder = Path(name)
        recipe = write_run(folder, steps)
        last = max((list(COMMANDS).index(part) for part in parts if part in COMMANDS), default=-1)
        for part in list(COMMANDS)[: last + 1]:
            command = [sys.executable, "-m", "nearfield", "--quiet", "train", recipe, *COMMANDS[part]]
            used[part] = _run(part, [*command, "--run-folder", folder / "run"], tree, folder)
        results = _results(folder / "run")
        for part in parts:
            if part in INSIDE:
                used[part] = _run(part, [sys.executable, __file__, "--inside", part, "--base", tree], tree, folder)
                results[part] = used[part].pop("result")
    chosen = {part: used[part] for part in parts}
    return {
        "cpu_seconds": sum(each["cpu_seconds"] for each in chosen.values()),
        "peak_bytes": max(each["peak_bytes"] for each in chosen.values()),
        "parts": chosen,
        "results": results,
    }


def _run(part: str, command: list[Any], tree: Path, folder: Path) -> Sample:
    used = run_command(command, folder=folder, environment=environment(tree))
    if used.code:
        raise SystemExit(f"{part} under {tree} ended with {used.code}:\n{used.output[-4000:]}")
    told: Sample = json.loads(used.output.splitlines()[-1]) if part in INSIDE else {}
    return {
        "cpu_seconds": used.cpu_seconds,
        "wall_seconds": used.wall_seconds,
        "peak_bytes": used.peak_bytes,
        **told,
    }


def _results(run: Path) -> dict[str, Any]:
    """The results of the run's stages, as far as it went: steps and tokens of the plan, the losses, the scores."""
    results: dict[str, Any] = {}
    if (run / "plan" / "summary.json").is_file():
        summary = json.loads((run / "plan" / "summary.json").read_text())
        results["plan"] = [summary["steps"], sum(epoch["tokens"] for epoch in summary["epochs"])]
    if (run / "metrics.jsonl").is_file():
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        results["train"] = [line["loss"] for line in lines if "loss" in line]
    if (run / "comparison.json").is_file():
        scores = json.loads((run / "comparison.json").read_text())["scores"]
        results["evaluate"] = [line["score"] for line in scores]
    return results


# Comparing two.


def largest_difference(ours: Any, base: Any) -> float:
    """The largest difference of two lists of numbers; infinite where they are not as long."""
    if len(ours) != len(base):
        return float("inf")
    return max((abs(one - other) for one, other in zip(ours, base, strict=True)), default=0.0)


def commit_of(tree: Path) -> str:
    """The commit of a checkout, marked where files were changed since."""
    used = run_command(["git", "-C", tree, "describe", "--always", "--dirty", "--abbrev=12"])
    return used.output.strip() if used.code == 0 else "unknown"


def summary(pairs: list[Pair], parts: list[str], options: argparse.Namespace) -> dict[str, Any]:
    """The figures of some pairs."""

    def of(part: str) -> list[Pair]:
        return [{side: sample["parts"][part] for side, sample in pair.items()} for pair in pairs]

    def memory(some: list[Pair]) -> float:
        return statistics.median(pair["ours"]["peak_bytes"] / pair["base"]["peak_bytes"] for pair in some)

    first = pairs[0]
    differences = {
        key: largest_difference(first["ours"]["results"][key], first["base"]["results"].get(key, []))
        for key in first["ours"]["results"]
    }
    return {
        **compare(pairs),
        "memory": memory(pairs),
        "parts": {part: {**compare(of(part)), "memory": memory(of(part))} for part in parts},
        "checks": {
            "commits": {"ours": commit_of(options.ours), "base": commit_of(options.base)},
            "largest difference of results": differences,
            "results": {side: sample["results"] for side, sample in first.items()},
            "threads": 1,
        },
        "steps": options.steps,
        "versions": versions("torch", "sentence-transformers", "transformers", "mteb", "numpy"),
        "machine": machine(),
        "samples": pairs,
    }


def failures(result: dict[str, Any], options: argparse.Namespace) -> list[str]:
    """The checks that do not hold."""
    failed = []
    for name, figures in [("all parts", result), *result["parts"].items()]:
        low, high = figures["interval"]
        if low < options.floor:
            failed.append(f"{name}: the interval of the ratio, {low:.3f} to {high:.3f}, goes below {options.floor}")
        if figures["memory"] > options.memory:
            failed.append(f"{name}: {figures['memory']:.3f} times the base's peak memory")
    failed += [
        f"{name}: the results differ by {difference:.1e}"
        for name, difference in result["checks"]["largest difference of results"].items()
        if difference > options.tolerance
    ]
    return failed


def main() -> int:
    """Measure pair by pair, print a table, write the figures."""
    everything = [*COMMANDS, *INSIDE]
    parser = make_parser(__doc__, pairs=10, floor=0.95)
    parser.add_argument("--base", type=Path, required=True, metavar="CHECKOUT", help="the checkout to compare with")
    parser.add_argument("--ours", type=Path, default=HERE, metavar="CHECKOUT", help="by default the one of this script")
    parser.add_argument("--parts", nargs="+", choices=everything, default=everything)
    parser.add_argument("--steps", type=int, default=24, help="of the training, 32 pairs each")
    parser.add_argument(
        "--memory", type=float, default=1.05, help="leave with 1 if a peak is above this many times the base's"
    )
    parser.add_argument("--tolerance", type=float, default=1e-4, help="by which losses, scores and vectors may differ")
    parser.add_argument("--inside", choices=list(INSIDE), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside:
        import torch

        torch.set_num_threads(1)
        print(json.dumps({**INSIDE[options.inside](), "peak_bytes": peak_bytes()}))
        return 0
    options.base, options.ours = options.base.resolve(), options.ours.resolve()
    for tree in (options.ours, options.base):
        used = run_command(
            [sys.executable, "-c", "import nearfield; print(nearfield.__file__)"], environment=environment(tree)
        )
        if not Path(used.output.strip()).is_relative_to(tree):
            parser.error(f"{tree} holds no src/nearfield that can be imported: {used.output.strip()}")
    sides = {
        name: lambda _, tree=tree: measure(tree, options.parts, options.steps)
        for name, tree in (("ours", options.ours), ("base", options.base))
    }
    pairs: list[Pair] = []
    for pair in in_turn(sides, options.pairs):
        pairs.append(pair)
        ours, base = pair["ours"]["cpu_seconds"], pair["base"]["cpu_seconds"]
        print(f"pair {len(pairs)}: ours {ours:.1f}, base {base:.1f} CPU s", flush=True)
        write(options.json, summary(pairs, options.parts, options))
    result = summary(pairs, options.parts, options)
    print(f"{'':10}{'ours':>10}{'base':>10}{'ratio':>8}{'95 % interval':>18}{'memory':>8}")
    for name, figures in [*result["parts"].items(), ("all", result)]:
        low, high = figures["interval"]
        print(
            f"{name:10}{figures['ours']:>8.2f} s{figures['peer']:>8.2f} s"
            f"{figures['ratio']:>8.3f}{f'{low:.3f} to {high:.3f}':>18}{figures['memory']:>8.3f}"
        )
    return finish(result, failures(result, options), options.json)


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    sys.exit(main())
