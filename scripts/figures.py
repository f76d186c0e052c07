"""The figures of README.md, docs/ and results/ come from results/**/*.json: this fills them in, or checks them.

    python scripts/figures.py            # write the pages anew
    python scripts/figures.py --check    # leave with 1 where a page does not agree with its file
    python scripts/figures.py --list     # every name with its text

A page marks a figure with a comment before and after it, in a sentence, in a cell, or around a whole table:

    the ratio is <!-- figure mining ratio -->1.45<!-- / -->

The name is that of a study below and of one of its figures. A line of a paragraph cannot begin with a mark (Markdown would take
it for the end of the paragraph). Pages that a script writes as a whole (results/ablations/*.md) are compared with what it would write.
"""

from __future__ import annotations

import argparse
import difflib
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "results"
MARK = re.compile(r"<!-- figure (?P<name>[^>]*?) -->(?P<text>.*?)<!-- / -->", re.DOTALL)
Texts = Mapping[str, str]


@cache
def read(name: str) -> Any:
    """A file of results/."""
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


# Forms.


def table(head: Sequence[str], rows: Sequence[Sequence[str]], align: str = "") -> str:
    """A Markdown table; ``align`` has a letter a column, r for the right."""
    marks = [" ---: " if place < len(align) and align[place] == "r" else " --- " for place in range(len(head))]
    return "\n".join([_row(head), "|" + "|".join(marks) + "|", *map(_row, rows)])


def _row(cells: Sequence[str]) -> str:
    return "|" + "|".join(f" {cell} " if cell else " " for cell in cells) + "|"


def interval(low: float, high: float, form: str = ".4f") -> str:
    """Two bounds in brackets."""
    return f"[{low:{form}}, {high:{form}}]"


def ratio(made: Mapping[str, Any], form: str = ".2f", bold: bool = False) -> str:
    """A median ratio with its spread."""
    low, high = made["spread"]
    median = f"{made['ratio']:{form}}"
    return f"{f'**{median}**' if bold else median} ({low:{form}} to {high:{form}})"


# Studies: name -> text, one function a folder of results/.


def _comparison(folder: str, name: str = "comparison") -> dict[str, Any]:
    """Scores and differences to the baseline, by task and model."""
    made = read(f"{folder}/{name}.json")
    scores = {(line["task"], line["model"]): line for line in made["scores"]}
    differences = {(line["task"], line["model"]): line for line in made["differences"]}
    return {"scores": scores, "differences": differences}


def _difference(line: Mapping[str, Any], p: bool = True, digits: int = 4, bold: bool = False) -> str:
    value = f"{line['difference']:+.{digits}f}"
    text = f"{f'**{value}**' if bold else value} {interval(line['low'], line['high'], f'+.{digits}f')}"
    if not p:
        return text
    adjusted = line["p_adjusted"]
    text += f", p = {adjusted:.{4 if adjusted < 0.01 else 3}f}"
    return text if line["verdict"] in ("better", "worse") else f"{text}: not separable"


def quickstart() -> Texts:
    """The quickstart on WordNet."""
    made = _comparison("quickstart")
    retrieval, sts = "WordNetGlossRetrieval", "WordNetGlossSTS"
    names = {"random": "random", "bm25": "BM25", "before": "before", "after": "after"}

    def line(task: str, model: str, **form: Any) -> list[str]:
        score, difference = made["scores"][task, model], made["differences"].get((task, model))
        bounds = f"{score['low']:.4f} to {score['high']:.4f}"
        return [f"{score['score']:.4f}", bounds, "" if difference is None else _difference(difference, **form)]

    front = []
    for model, label in (
        ("random", "random"),
        ("bm25", "BM25"),
        ("before", "MiniLM before"),
        ("after", "MiniLM after"),
    ):
        after = model == "after"
        score, bounds, difference = line(retrieval, model, p=after, bold=after)
        front.append([label, f"**{score}**" if after else score, bounds, difference])
    rows = []
    for task, metric in ((retrieval, "nDCG@10"), (sts, "Spearman")):
        models = [model for model in names if (task, model) in made["scores"]]
        for place, model in enumerate(models):
            rows.append([f"{task} ({metric})" if place == 0 else "", names[model], *line(task, model)])
    return {
        "front": table(["model", "nDCG@10", "95 % interval", "difference to before"], front),
        "table": table(["task", "model", "score", "95 % interval", "difference to before"], rows),
        "clusters": f"{made['scores'][retrieval, 'before']['clusters']:,}",
        "queries": f"{made['scores'][retrieval, 'before']['units']:,}",
        "pairs": f"{made['scores'][sts, 'before']['units']:,}",
    }


def debian() -> Texts:
    """The search model for package descriptions."""
    made = _comparison("debian")
    task = "DebianSearchRetrieval"
    labels = {
        "random": "random",
        "before": "before: MiniLM as published, 256 tokens",
        "bm25": "BM25 (bm25s, English stemmer)",
        "after": "after: 256 tokens, trained on 64",
    }
    rows = []
    for model, label in labels.items():
        score, difference = made["scores"][task, model], made["differences"].get((task, model))
        text = "" if difference is None else _difference(difference, p=model != "random")
        rows.append([label, f"{score['score']:.4f}", f"{score['low']:.4f} to {score['high']:.4f}", text])
    after = made["scores"][task, "after"]
    over = _comparison("debian", "after-bm25")["differences"][task, "after"]
    return {
        "table": table(["model", "nDCG@10", "95 % interval", "difference to before"], rows),
        "before": f"{made['scores'][task, 'before']['score']:.3f}",
        "bm25": f"{made['scores'][task, 'bm25']['score']:.3f}",
        "after": f"{after['score']:.3f} {interval(after['low'], after['high'], '.3f')}",
        "over bm25": _difference(over, p=False, digits=3),
        "over bm25 exactly": _difference(over),
        "queries": f"{after['units']:,}",
    }


def quickstart_image() -> Texts:
    """The quickstart on images, over seeds; in per cent."""
    made = read("quickstart-image/seeds.json")
    tasks = {
        "EmojiImageToName": "picture to name",
        "EmojiNameToImage": "name to picture",
        "EmojiImageToNameNoFlags": "picture to name, without flags",
        "EmojiImageToNameGerman": "picture to German name",
    }

    def mean(task: str, bold: str = "") -> str:
        after = made[task]["after"]
        low, high = after["t_interval"]
        return f"{bold}{100 * after['mean']:.1f}{bold} {interval(100 * low, 100 * high, '.1f')}"

    rows = []
    for task, label in tasks.items():
        seeds = [
            f"{100 * value:.1f} {interval(100 * low, 100 * high, '.1f')}"
            for value, low, high in made[task]["after"]["seeds"]
        ]
        rows.append([label, *seeds, mean(task, "**"), f"{100 * made[task]['before']['mean']:.1f}"])
    seeds = [f"seed {number}" for number in range(len(rows[0]) - 3)]
    front = mean("EmojiImageToName").replace(" [", " % [")
    return {
        "table": table(["task", *seeds, "mean", "before"], rows, "-" * (len(seeds) + 2) + "r"),
        "front": front,
        "validation": f"{made['EmojiValidation']['after']['mean']:.3f}",
    }


def evaluation() -> Texts:
    """Scoring beside mteb."""
    texts: dict[str, str] = {}
    for name in ("short", "whole"):
        made = read(f"evaluation/{name}.json")
        checks, shares = made["checks"], made["share of matrix peak"]
        each = made["ratio of tasks"]
        if name == "whole":
            each = dict(sorted(each.items(), key=lambda one: -one[1]))
        rows = [[task, f"{value:.2f}"] for task, value in each.items()]
        total = f"{ratio(made, bold=True)}: {made['ours']:.1f} against {made['peer']:.1f} s"
        head = "ratio, median of 5 pairs" if name == "short" else "ratio"
        texts |= {
            f"{name} table": table(["task", head], [["all six", total], *rows] if name == "short" else rows, "-r"),
            f"{name} ratio": ratio(made, bold=True),
            f"{name} median": f"{made['ratio']:.1f}",
            f"{name} spread": f"{made['spread'][0]:.1f} to {made['spread'][1]:.1f}",
            f"{name} rows": f"{checks['rows']['ours']:,} texts went through the model instead of {checks['rows']['peer']:,}",
            f"{name} cells": (
                f"{checks['padded tokens']['ours']:,} cells for {checks['real tokens']['ours']:,} real tokens, against "
                f"{checks['padded tokens']['peer']:,} for {checks['real tokens']['peer']:,}"
            ),
            f"{name} outside": f"{100 * made['outside the forward']:.1f} %",
            f"{name} ours of peak": f"{100 * shares['ours']:.0f} %",
            f"{name} mteb of peak": f"{100 * shares['peer']:.0f} %",
            f"{name} difference": f"{checks['largest score difference']:.1e}".replace("e-0", "e-"),
            f"{name} first task": f"{made['seconds to the first task']:.1f}",
        }
    return texts


def mining() -> Texts:
    """Mining beside sentence-transformers."""
    made = read("mining/mining.json")
    texts, faiss, peaks = made["end_to_end"], made["peer_with_faiss"], made["checks"]["peak_bytes"]
    shown = f"{peaks['nearfield'] / 1e9:.2f} and {peaks['peer'] / 1e9:.2f} GB"
    sides = {
        side: max(sample["peak_bytes"] for sample in texts["samples"] if sample["side"] == side)
        for side in ("nearfield-texts", "peer-texts")
    }
    of_texts = " and ".join(f"{value / 1e9:.2f}" for value in sides.values()) + " GB"
    size = f"{made['size']:,}"
    pairs = f"{texts['size']:,} pairs from texts, all-MiniLM-L6-v2"
    return {
        "table": table(
            ["", "nearfield", "sentence-transformers", "ratio, median (least to most)", "peak above the vectors"],
            [
                [f"{size} x {size} vectors, 384 dimensions", f"{made['ours']:.1f} s", f"{made['peer']:.1f} s", ratio(made), shown],
                [
                    "the same, peer with FAISS (flat), one run", f"{made['ours']:.1f} s", f"{faiss['cpu_seconds']:.1f} s",
                    f"{faiss['cpu_seconds'] / made['ours']:.2f}", f"{peaks['nearfield'] / 1e9:.2f} and {faiss['peak_bytes'] / 1e9:.2f} GB",
                ],
                [pairs, f"{texts['ours']:.1f} s", f"{texts['peer']:.1f} s", ratio(texts), of_texts],
            ],
            "-rr",
        ),
        "docs": table(
            ["", "ours", "sentence-transformers", "ratio, median (least to most)", "peak memory above the vectors"],
            [
                [f"{size} x {size} vectors of 384", f"{made['ours']:.1f} CPU s", f"{made['peer']:.1f} CPU s", ratio(made), shown],
                [pairs, f"{texts['ours']:.1f} CPU s", f"{texts['peer']:.1f} CPU s", ratio(texts), of_texts],
            ],
        ),
        "products": f"{made['gemm_floor_seconds']:.1f}",
        "share": f"{made['gemm_floor_seconds']:.0f} s of the {made['ours']:.0f}",
        "speed": f"{made['gemm_peak_flops'] / 1e9:.0f}",
        "faiss": f"{faiss['cpu_seconds']:.1f}",
        "triplets": f"{made['checks']['triplets']['nearfield']:,}",
        "compared": f"{made['checks']['queries_compared_with_brute_force']}",
        "triplets of texts": f"{texts['samples'][0]['triplets']:,}",
        "minutes": f"{made['seconds'] / 60:.0f}",
    }  # fmt: skip


LOSSES = {
    "torch": "torch: cosine, cross-entropy",
    "st": "sentence-transformers",
    "st-cached-1024": "sentence-transformers, cached, chunks of 1,024",
    "infcl": "Inf-CL's formula in torch tiles",
    "dense": "`dense`, ids masked",
    "blockwise": "`blockwise`, ids masked",
    "masked": "`blockwise`, score mask and hardness too",
}


def loss() -> Texts:
    """Time and memory of the loss."""
    rows = {(row["impl"], row["B"], row["d"]): row for row in read("loss/sizes.json")["rows"] if not row.get("failed")}
    sizes = sorted({size for _, size, _ in rows})

    def cell(name: str, size: int, dim: int, seconds: str = "", megabytes: str = "") -> str:
        row = rows.get((name, size, dim))
        if row is None:
            return ""
        time = f"{row['seconds']:.{2 if row['seconds'] < 10 else 0}f}"
        return f"{time}{seconds}, {row['peak_above_inputs_bytes'] / 1e6:,.0f}{megabytes}"

    texts = {
        f"d = {dim}": table(
            ["implementation", *(f"{size:,}" for size in sizes)],
            [[label, *(cell(name, size, dim) for size in sizes)] for name, label in LOSSES.items()],
        )
        for dim in (384, 1024)
    }
    places = ((8192, 384), (65536, 384), (65536, 1024))
    labels = {
        **LOSSES,
        "dense": "`dense`",
        "blockwise": "`blockwise`",
        "masked": "`blockwise` with score mask and hardness",
    }
    docs = [[label, *(cell(name, *place, " s", " MB") for place in places)] for name, label in labels.items()]
    for line in docs:
        if line[0] == "`dense`":
            line[2] = f"(a matrix of {65536**2 * 4 / 1e9:.0f} GB)"
    texts["docs"] = table(["implementation", *(f"B = {size:,}, d = {dim:,}" for size, dim in places)], docs)
    for dim in (384, 1024):
        blockwise, dense = (rows[name, 8192, dim]["seconds"] for name in ("blockwise", "dense"))
        texts[f"held d = {dim}"] = f"{rows['blockwise', 65536, dim]['peak_above_inputs_bytes'] / 1e6:,.0f} MB"
        texts[f"to dense d = {dim}"] = f"{blockwise / dense:.2f}"
    for name in ("blockwise", "dense", "torch", "infcl"):
        texts[f"error {name}"] = f"{rows[name, 4096, 384]['grad_rel_error']:.1e}".replace("e-0", "e-")
    shipped = rows["st-cached", 8192, 384]
    texts["shipped cached"] = f"{shipped['seconds']:.1f} s and {shipped['peak_above_inputs_bytes'] / 1e6:,.0f} MB"
    return texts


def step() -> Texts:
    """A training step beside sentence-transformers."""
    labels = {
        "batch-64": "dropout 0.1 on both sides",
        "batch-64-no-dropout": "no dropout on both sides",
        "batch-128-cached": "gradient caching on both sides, batch 128, dropout 0.1",
    }
    ours, peer = "nearfield", "sentence-transformers"
    rows = []
    for name, label in labels.items():
        made = read(f"step/{name}.json")
        share, held = made["share_of_gemm_peak"], made["peak_memory_bytes"]
        peak = f"{100 * share[ours]:.1f} % against {100 * share[peer]:.1f} %"
        memory = f"{held[ours] / 2**30:.1f} against {held[peer] / 2**30:.1f} GiB"
        rows.append([label, ratio(made, bold=True), peak, memory])
    made = [read(f"step/{name}.json") for name in labels]
    apart = max(each["checks"]["loss_difference"] for each in made)
    return {
        "table": table(
            ["", "ratio, pairs a CPU second", "share of the GEMM peak, real tokens", "most memory of the process"], rows
        ),
        "apart": f"{apart:.1e}".replace("e-0", "e-"),
        "tokens": f"{made[0]['mean_text_tokens']:.0f}",
    }


def plan() -> Texts:
    """Batches without duplicates beside sentence-transformers' samplers."""
    rows = [
        [
            f"{one['pairs_of_texts']:,}",
            f"{one['ours']:.2f}",
            f"{one['peer']:.2f}",
            ratio(one, ".1f"),
            f"{one['plain']:.1f} (one run)",
        ]
        for one in read("plan/plan.json")["sizes"]
    ]
    head = ["pairs of texts", "nearfield", "`NO_DUPLICATES_HASHED`", "ratio (least to most)", "`NO_DUPLICATES`"]
    return {"table": table(head, rows)}


SHAPES = {
    "tiny-kept": "tiny BERT, batch 128, graph kept",
    "tiny-cached": "tiny BERT, batch 256, cached",
    "minilm-short": "MiniLM, batch 16, 5-30 words",
    "minilm-no-dropout": "MiniLM, batch 32, no dropout",
    "minilm-long": "MiniLM, batch 4, 60-200 words",
    "minilm-cached": "MiniLM, batch 32, cached",
    "minilm-sgd": "MiniLM, batch 16, SGD",
    "minilm-frozen": "MiniLM, batch 32, lower half frozen",
    "minilm-lora": "MiniLM, batch 32, LoRA",
    "minilm-recomputed": "MiniLM, batch 4, 60-200 words, gradient checkpointing",
    "minilm-checkpoints": "MiniLM, batch 16, checkpoints while training goes on",
}


def forecast() -> Texts:
    """Forecast and actual."""
    rows = []
    for row in read("forecast/forecast.json")["shapes"]:
        peak = row["held"] + row["actual_growth"]
        values = [
            (row["held"] + row["predicted_growth"]) / peak,
            (row["held"] + row["start_growth"]) / peak,
            *(
                row[key]
                for key in ("growth_ratio", "start_growth_ratio", "cpu_ratio", "wall_ratio", "start_wall_ratio")
            ),
        ]
        growth = f"{row['actual_growth'] / 1e6:,.0f} MB"
        rows.append([SHAPES[row["shape"]], *(f"{value:.2f}" for value in values), growth])
    head = ["shape", "peak", "peak, at the start", "growth", "growth, at the start"]
    head += ["CPU seconds", "wall seconds", "wall, at the start", "actual growth"]
    return {"table": table(head, rows)}


PHASES = {
    "no_duplicates": "plan without duplicates, batches of 256 (with its check)",
    "kmeans": "k-means, {clusters_made:,} clusters, 20 iterations at most",
    "communities": "communities, all steps",
    "graph": "mutual graph alone",
    "cut": "METIS and repair alone",
}


def scale() -> Texts:
    """The cost of plans by the number of examples."""
    records = {(record["phase"], record["size"]): record for record in read("scale/scale.json")["records"]}
    rows = []
    for (phase, size), record in sorted(records.items(), key=lambda one: (list(PHASES).index(one[0][0]), one[0][1])):
        recall = record.get("recall_at_30")
        rows.append(
            [
                PHASES[phase].format_map(record), f"{size:,}", f"{record['cpu_s']:.1f}", f"{record['wall_s']:.1f}",
                f"{record['load_before'][0]:.0f}", record["threads"], f"{record['peak_bytes'] / 2**30:.2f}",
                "" if recall is None else f"{recall:.3f}",
            ]
        )  # fmt: skip
    most = 1_000_000
    seconds = records["communities", most]["seconds_by_phase"]
    return {
        "table": table(["what", "examples", "CPU s", "wall s", "load", "threads", "peak GiB", "recall@30"], rows),
        "imports": f"{min(record['before_bytes'] for record in records.values()) / 2**30:.2f}",
        "plan": f"{records['no_duplicates', most]['wall_s']:.0f} seconds",
        "communities": f"{records['communities', most]['wall_s'] / 60:.0f}",
        "neighbours": f"{seconds['neighbours'] / 60:.0f}",
        "cut": f"{seconds['cut']:.0f} seconds",
        "found": f"{100 * records['communities', most]['recall_at_rank_to']:.0f} %",
    }


def statistics() -> Texts:
    """The simulations of intervals and tests."""
    from simulate_statistics import shared_summary, shared_tables
    from simulate_statistics import table as tables

    made = read("statistics/simulations.json")
    return {
        "tables": tables(made).rstrip("\n"),
        "shared": shared_summary(made),
        "shared tables": "\n".join(shared_tables(made)).strip("\n"),
        "shared seconds": f"{made['shared_cpu_seconds']} CPU seconds",
        "seconds": f"{made['cpu_seconds']} CPU seconds",
        "simulations": f"{made['simulations']:,}",
    }


def limit() -> Texts:
    """LIMIT: the leaderboard, and free vectors."""
    from limit_curve import PUBLISHED, expected

    rows = []
    for d, tried in sorted(read("limit/curve.json")["curve"].items(), key=lambda one: int(one[0])):
        solved = max(line["documents"] for line in tried if line["best_accuracy"] == 1)
        unsolved = min((line for line in tried if line["best_accuracy"] < 1), key=lambda line: line["documents"])
        shown = str(expected(int(d))) if int(d) in PUBLISHED else f"({expected(int(d))})"
        rows.append([d, shown, str(solved), f"{unsolved['documents']} (best {unsolved['best_accuracy']:.4f})"])
    return {
        "board": board("limit/leaderboard.json"),
        "curve": table(["d", "published", "largest solved", "smallest that no start solved"], rows, "rrr"),
    }


def board(name: str) -> str:
    """The table of a leaderboard."""

    def figure(value: Mapping[str, float | None], form: str) -> str:
        shown = [f"{value[key]:{form}}" for key in ("value", "low", "high") if value[key] is not None]
        if not shown:
            return ""
        return shown[0] if len(set(shown)) == 1 else f"{shown[0]} [{shown[1]}, {shown[2]}]"

    rows = []
    for row in read(name)["rows"]:
        ranks = str(row["rank_low"]) if row["rank_low"] == row["rank_high"] else f"{row['rank_low']}-{row['rank_high']}"
        means = [figure(row[key], form) for key, form in (("mean_type", ".4f"), ("borda", ".1f"), ("mean_rank", ".2f"))]
        rows.append([str(row["place"]), row["label"], figure(row["mean_task"], ".4f"), ranks, *means])
    return table(["place", "model", "mean of tasks", "ranks", "mean of types", "Borda", "mean rank"], rows, "--rrrrr")


def torture() -> Texts:
    """The chained kills."""
    rows = []
    for backend in ("ddp", "fsdp2", "zero1", "zero2", "zero3"):
        made = json.loads((RESULTS / "torture" / f"{backend}.jsonl").read_text().splitlines()[-1])
        same = ["yes" if made[key] else "no" for key in ("weights_identical", "metrics_identical")]
        rows.append([backend, str(made["kills"]), *same, f"{made['seconds']:.0f}"])
    return {"table": table(["backend", "kills", "weights identical", "metrics identical", "seconds"], rows)}


def leaderboard() -> Texts:
    """The derived models."""
    return {"seconds": f"{read('leaderboard/leaderboard.json')['cpu_seconds']}"}


def decontamination() -> Texts:
    """Plants that are found, false alarms, and what is said otherwise."""
    made = read("decontamination/figures.json")

    def percent(found: Mapping[str, Any], digits: int = 1) -> str:
        return f"{100 * found['share']:.{digits}f}"

    def bounds(found: Mapping[str, Any], digits: int = 2) -> str:
        return f"{percent(found, digits)} % " + interval(*(100 * end for end in found["interval"]), f".{digits}f")

    texts = {}
    for short, name in (("dictionary", "wordnet among wordnet"), ("tasks", "tasks among debian and docstrings")):
        plants = made["plants"][name]
        lengths = list(next(iter(plants.values())))
        rows = [[how, *(percent(found[length]) for length in lengths)] for how, found in plants.items()]
        texts[f"plants {short}"] = table(["planted, found in %", *(f"{n} words" for n in lengths)], rows, "l" + "r" * 9)
    rows = []
    for name, alarms in made["false_alarms"].items():
        kinds = ", ".join(f"{count} {kind}" for kind, count in alarms["by_kind"].items() if count) or "none"
        sizes = [f"{alarms['n']:,}", f"{alarms['of_benchmark']['n']:,}"]
        rows.append(
            [name, *sizes, f"{alarms['hits']} ({bounds(alarms, 3)})", kinds, str(alarms["of_benchmark"]["hits"])]
        )
    head = ["training, benchmark", "training texts", "benchmark texts", "training texts that match", "by kind"]
    texts["alarms"] = table([*head, "benchmark texts that match"], rows, "lrrrlr")
    rows = [[name, f"{found['n']:,}", bounds(found, 1)] for name, found in made["said_otherwise"].items()]
    texts["otherwise"] = table(["training holds only", "pairs", "found"], rows, "lrr")
    edits = {"exact": "as it is", "case": "case changed", "punctuation": "punctuation stripped, spaced or added"}
    rows = [
        [edits.get(name, name), bounds(found), bounds(found["of_8_words"])] for name, found in made["recall"].items()
    ]
    texts["edits"] = table(["planted", "found, all glosses", "found, 8 words and more"], rows)
    texts["glosses"] = f"{made['glosses_in_tasks']['of_benchmark']['hits']:,}"
    return texts


class Ablations(Mapping[str, str]):
    """The paired differences of the ablations: ``STUDY SET ARM ARM DIGITS FORM``, such as ``batches mixed communities-32
    shuffled-256 4 signed``.

    Forms: ``signed`` (+0.0011 [-0.0027, +0.0049]), ``gain`` (+0.0082 [0.0037, 0.0127]), ``size`` (0.0198 [0.0151, 0.0244],
    which a loss has too), ``mean`` (+0.0017), ``amount`` (0.0017).
    """

    def __getitem__(self, name: str) -> str:
        study, of, ours, other, digits, form = name.split()
        mean, low, high = difference_of(study, of, ours, other)
        signed, plain = f"+.{digits}f", f".{digits}f"
        if form in ("mean", "amount"):
            return f"{mean:{signed}}" if form == "mean" else f"{abs(mean):{plain}}"
        if form == "size":
            low, high = (low, high) if mean >= 0 else (-high, -low)
            return f"{abs(mean):{plain}} {interval(low, high, plain)}"
        return f"{mean:{signed}} {interval(low, high, signed if form == 'signed' else plain)}"

    def __iter__(self) -> Iterator[str]:
        """None is listed: there are as many as pairs of arms."""
        return iter(())

    def __len__(self) -> int:
        return 0


@cache
def difference_of(study: str, of: str, ours: str, other: str) -> tuple[float, float, float]:
    """The mean difference of two arms over their common seeds, with its t interval."""
    from nearfield.evaluation.statistics import paired_interval

    seeds: dict[str, dict[int, float]] = {ours: {}, other: {}}
    for record in read(f"ablations/{study}.json")["records"]:
        if record["set"] == of and record["arm"] in seeds:
            seeds[record["arm"]][record["seed"]] = record["score"]
    differences = [seeds[ours][seed] - seeds[other][seed] for seed in sorted(set(seeds[ours]) & set(seeds[other]))]
    low, high, _ = paired_interval(differences, 0.95)
    return sum(differences) / len(differences), low, high


STUDIES: dict[str, Callable[[], Texts]] = {
    "quickstart": quickstart,
    "quickstart-image": quickstart_image,
    "debian": debian,
    "evaluation": evaluation,
    "mining": mining,
    "loss": loss,
    "step": step,
    "plan": plan,
    "forecast": forecast,
    "scale": scale,
    "statistics": statistics,
    "limit": limit,
    "leaderboard": leaderboard,
    "torture": torture,
    "decontamination": decontamination,
    "ablations": Ablations,
}


@cache
def texts_of(study: str) -> Texts:
    """The figures of a study."""
    return STUDIES[study]()


def text_of(name: str) -> str:
    """The text of a mark."""
    study, _, figure = name.partition(" ")
    if study not in STUDIES:
        raise SystemExit(f"there is no study {study!r}: {', '.join(STUDIES)}")
    try:
        text = texts_of(study)[figure]
    except KeyError:
        raise SystemExit(f"the study {study} has no figure {figure!r}") from None
    return f"\n{text}\n" if "\n" in text else text


# Pages.


def pages() -> list[Path]:
    """The pages that may have marks."""
    return [
        ROOT / "README.md",
        *sorted((ROOT / "docs").glob("*.md")),
        *sorted(RESULTS.glob("*/README.md")),
        RESULTS / "README.md",
    ]


def filled(page: str) -> str:
    """A page with the figures of today's files."""
    return MARK.sub(lambda mark: f"<!-- figure {mark['name']} -->{text_of(mark['name'])}<!-- / -->", page)


def misplaced(page: str) -> list[str]:
    """The marks that begin a line of a paragraph, or are not closed."""
    lines = page.splitlines()
    wrong = [
        line
        for before, line in zip(["", *lines], lines, strict=False)
        if line.startswith("<!-- figure") and (not line.endswith("-->") or (before and not before.startswith("<!--")))
    ]
    if page.count("<!-- figure ") != len(MARK.findall(page)) or page.count("<!-- / -->") != len(MARK.findall(page)):
        wrong.append("a mark is not closed")
    return wrong


def whole_pages() -> Iterator[tuple[Path, str]]:
    """The pages that a script writes as a whole, with what it would write."""
    from ablate import Study, report

    for study in sorted((RESULTS / "ablations").glob("*.yaml")):
        yield study.with_suffix(".md"), report(Study(study))


def difference(path: Path, is_: str, should: str) -> str:
    """The lines that do not agree."""
    name = str(path.relative_to(ROOT))
    lines = difflib.unified_diff(
        is_.splitlines(), should.splitlines(), name, f"{name}, from results/", lineterm="", n=0
    )
    return "\n".join(lines)


def main() -> int:
    """Fill the pages, or check them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; leave with 1 where a page does not agree")
    parser.add_argument("--list", action="store_true", help="print every name with its text")
    options = parser.parse_args()
    if options.list:
        for study in STUDIES:
            for name in texts_of(study):
                print(f"{study} {name}: {text_of(f'{study} {name}')}")
        return 0
    made = [(path, path.read_text(encoding="utf-8")) for path in pages() if path.is_file()]
    wanted = [(path, text, filled(text)) for path, text in made]
    wanted += [(path, path.read_text(encoding="utf-8"), text) for path, text in whole_pages()]
    wrong = [f"{path.relative_to(ROOT)}: {line}" for path, text in made for line in misplaced(text)]
    for path, text, should in wanted:
        if text == should:
            continue
        if options.check:
            wrong.append(difference(path, text, should))
        else:
            path.write_text(should, encoding="utf-8")
            print(f"written: {path.relative_to(ROOT)}")
    print("\n".join(wrong), end="\n" if wrong else "")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
