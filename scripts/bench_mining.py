"""Mining by nearfield beside sentence-transformers' `mine_hard_negatives`: same vectors, same rule; A B A B.

    python scripts/bench_mining.py --json mining.json
    python scripts/bench_mining.py --size 10000 --texts 1000

Two comparisons. First, precomputed vectors (100,000 queries, as many documents, 384 dimensions, from a seeded mixture):
search, percent-of-positive rule, a table of triplets; sentence-transformers without FAISS in each pair and with FAISS (flat)
once. Second, from texts (WordNet words and glosses, 10,000 pairs) with all-MiniLM-L6-v2. Each measurement is a process of
its own, one thread; time is CPU seconds after loading, memory is the peak above what was held before mining. Our negatives
must be those of brute force in float64 on a sample of queries, and the peer's may differ only where float32 cannot tell two
scores apart. The peak of the machine's matrix products is measured beside. Leaves with 1 if a check fails or the ratio is
below --floor.
"""

from __future__ import annotations

import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from frame import Pair, Sample, alone, compare, finish, in_turn, make_parser, peak_bytes, reset_peak, versions

MODEL = "sentence-transformers/all-MiniLM-L6-v2"
DIMENSION = 384
NEGATIVES = 3
MARGIN = 0.05
DEPTH = 31
"""The candidates that sentence-transformers looks at for three negatives under a margin, the positive not counted."""
CHECKED = 200
MEMORY_LIMIT = 1e9


def make_vectors(folder: Path, size: int) -> None:
    """Documents of a seeded mixture of Gaussians, and a query near each."""
    random = np.random.default_rng(0)
    centres = random.standard_normal((max(1, size // 50), DIMENSION), dtype=np.float32)
    documents = centres[random.integers(0, len(centres), size)]
    documents = documents + 1.5 * random.standard_normal((size, DIMENSION), dtype=np.float32)
    queries = documents + 1.5 * random.standard_normal((size, DIMENSION), dtype=np.float32)
    for name, vectors in (("queries", queries), ("documents", documents)):
        np.save(folder / f"{name}.npy", vectors / np.linalg.norm(vectors, axis=1, keepdims=True))


def make_texts(folder: Path, size: int) -> None:
    """WordNet words and their glosses, each text once."""
    from nearfield.data import prepare_store

    recipe = Path(__file__).parents[1] / "data_recipes" / "wordnet.yaml"
    store = prepare_store(recipe, folder / "cache")
    part = store.examples.take(store.select("gloss", "train"))
    queries = store.texts(part["query"].to_numpy())
    positives = store.texts([rows[0] for rows in part["positives"].to_pylist()])
    seen: set[str] = set()
    pairs = []
    for number in np.random.default_rng(0).permutation(len(queries)):
        pair = (queries[number], positives[number])
        if not seen & set(pair) and pair[0] != pair[1]:
            seen |= set(pair)
            pairs.append(pair)
        if len(pairs) == size:
            break
    (folder / "texts.json").write_text(json.dumps(pairs))


# One measurement, in a process of its own.


class Stored:
    """A model for sentence-transformers whose vectors are known."""

    device = "cpu"

    def __init__(self, folder: Path) -> None:
        import torch
        from sentence_transformers.util import cos_sim, pairwise_cos_sim

        self.vectors = {name: np.load(folder / f"{name}.npy") for name in ("queries", "documents")}
        self.similarity, self.similarity_pairwise, self.torch = cos_sim, pairwise_cos_sim, torch

    def encode_query(self, texts: Sequence[str], **_: Any) -> Any:
        return self.vectors["queries"]

    def encode_document(self, texts: Sequence[str], **_: Any) -> Any:
        return self.vectors["documents"]

    def get_embedding_dimension(self) -> int:
        return DIMENSION


def measure(side: str, folder: Path) -> Sample:
    """Mine once; the triplets as numbers are left beside for the check."""
    import torch
    from datasets import Dataset

    torch.set_num_threads(1)
    from_texts = side.endswith("-texts")
    if from_texts:
        pairs = json.loads((folder / "texts.json").read_text())
        queries, documents = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    else:
        count = len(np.load(folder / "queries.npy", mmap_mode="r"))
        queries, documents = [f"q{i}" for i in range(count)], [f"d{i}" for i in range(count)]
    if side.startswith("nearfield"):
        from nearfield.arrays import Ragged
        from nearfield.encoders.encode import Encoder
        from nearfield.mining.config import PercentOfPositiveRule
        from nearfield.mining.rules import mine

        if from_texts:
            encoder = Encoder.load(MODEL, device="cpu")
        else:
            q, d = (np.load(folder / f"{name}.npy") for name in ("queries", "documents"))
        held, start = reset_peak(), time.process_time()
        if from_texts:
            q, d = encoder(queries), encoder(documents)
        count = len(queries)
        mined = mine(
            q,
            d,
            Ragged(np.arange(count + 1), np.arange(count)),
            rules=[PercentOfPositiveRule(share=1 - MARGIN).build()],
            negatives=NEGATIVES,
            depth=DEPTH,
        )
        owner = mined.lists.owners()
        table = Dataset.from_dict(
            {
                "anchor": [queries[i] for i in owner],
                "positive": [documents[i] for i in owner],
                "negative": [documents[i] for i in mined.lists.values],
            }
        )
    else:
        from sentence_transformers.util import mine_hard_negatives

        data = Dataset.from_dict({"anchor": queries, "positive": documents})
        model: Any = Stored(folder)
        if from_texts:
            from nearfield.encoders.load import load_encoder

            model = load_encoder(MODEL, device="cpu").model
        held, start = reset_peak(), time.process_time()
        table = mine_hard_negatives(
            data,
            model,
            num_negatives=NEGATIVES,
            relative_margin=MARGIN,
            use_faiss="faiss" in side,
            verbose=False,
        )
    seconds = time.process_time() - start
    peak = peak_bytes() - held
    place = {text: number for number, text in enumerate(documents)}
    owners = {text: number for number, text in enumerate(queries)}
    triplets = [(owners[a], place[n]) for a, n in zip(table["anchor"], table["negative"], strict=True)]
    np.save(folder / f"{side}.npy", np.array(triplets, dtype=np.int64).reshape(-1, 2))
    return {"side": side, "cpu_seconds": seconds, "peak_bytes": peak, "triplets": len(triplets), "gemm": gemm_peak()}


def gemm_peak() -> float:
    """FLOP a CPU second of products of 1024 x 384 with 384 x 1024: the median of 30."""
    import torch

    left, right = torch.randn(1024, DIMENSION), torch.randn(1024, DIMENSION)
    samples = []
    for _ in range(30):
        start = time.process_time()
        left @ right.T
        samples.append(time.process_time() - start)
    return 2 * 1024 * 1024 * DIMENSION / statistics.median(samples)


# Checks.


def check(folder: Path, ours: str, peer: str, vectors: tuple[Any, Any]) -> dict[str, Any]:
    """Our negatives against brute force on a sample, and the peer's against ours."""
    queries, documents = vectors
    mine_, theirs = (_by_query(np.load(folder / f"{side}.npy"), len(queries)) for side in (ours, peer))
    sample = np.random.default_rng(1).choice(len(queries), min(CHECKED, len(queries)), replace=False)
    scores = queries[sample].astype(np.float64) @ documents.astype(np.float64).T
    wrong = 0
    for number, line in zip(sample.tolist(), scores.astype(np.float32), strict=True):
        positive = float(line[number])
        order = [row for row in np.lexsort((np.arange(len(line)), -line))[: DEPTH + 1].tolist() if row != number]
        below = [row for row in order[:DEPTH] if float(line[row]) < positive - abs(positive) * MARGIN]
        wrong += below[:NEGATIVES] != mine_[number]
    different = [number for number in range(len(queries)) if mine_[number] != theirs[number]]
    gaps = []
    for number in different:
        query = queries[number].astype(np.float64)
        left, right = (documents[rows].astype(np.float64) @ query for rows in (mine_[number], theirs[number]))
        # Two that are nearly equal in another order, or one that lies nearly at the bar.
        swapped = float(np.abs(left - right).max(initial=0.0)) if len(left) == len(right) else np.inf
        positive = float(documents[number].astype(np.float64) @ query)
        bar = positive - abs(positive) * MARGIN
        gaps.append(min(swapped, float(np.abs(np.concatenate([left, right]) - bar).min(initial=np.inf))))
    return {
        "queries_compared_with_brute_force": len(sample),
        "queries_unlike_brute_force": wrong,
        "queries_unlike_the_peer": len(different),
        "largest_score_gap_where_unlike": max(gaps, default=0.0),
        "triplets": {side: int(sum(map(len, rows))) for side, rows in ((ours, mine_), (peer, theirs))},
    }


def _by_query(triplets: Any, count: int) -> list[list[int]]:
    rows: list[list[int]] = [[] for _ in range(count)]
    for owner, row in triplets.tolist():
        rows[owner].append(row)
    return rows


def run(side: str, folder: Path) -> Sample:
    """A measurement in a fresh process, and a line of it."""
    sample: Sample = alone(measure, side, folder)
    print(
        f"  {side:28}{sample['cpu_seconds']:9.2f} CPU s  peak {sample['peak_bytes'] / 1e9:5.2f} GB above the vectors"
        f"  products {sample['gemm'] / 1e9:5.1f} GF/s",
        flush=True,
    )
    return sample


def run_pairs(sides: tuple[str, str], folder: Path, count: int) -> list[Pair]:
    """Both sides in turn."""
    return list(in_turn({side: lambda _, side=side: run(side, folder) for side in sides}, count))


def samples_of(pairs: Sequence[Pair]) -> list[Sample]:
    """The measurements in their order."""
    return [sample for pair in pairs for sample in pair.values()]


def compare_texts(folder: Path, size: int, count: int) -> dict[str, Any]:
    """The comparison from texts."""
    make_texts(folder, size)
    print(f"{size:,} pairs from texts, {MODEL}:", flush=True)
    pairs = run_pairs(("nearfield-texts", "peer-texts"), folder, count)
    ours, theirs = (
        {tuple(row) for row in np.load(folder / f"{side}-texts.npy").tolist()} for side in ("nearfield", "peer")
    )
    return {
        **compare(pairs),
        "size": size,
        # The vectors are two computations' in float32, so that near ties fall either way.
        "same_triplets": len(ours & theirs) / max(1, len(ours | theirs)),
        "samples": samples_of(pairs),
    }


def main(arguments: Sequence[str]) -> int:
    """Both comparisons, their checks and the file."""
    parser = make_parser(__doc__)
    parser.add_argument("--size", type=int, default=100_000, help="queries, and documents, with precomputed vectors")
    parser.add_argument("--texts", type=int, default=10_000, help="pairs of the comparison from texts; 0 leaves it out")
    parser.add_argument("--no-faiss", action="store_true", help="leave out the run with FAISS")
    options = parser.parse_args(arguments)
    if options.pairs < 5:
        parser.error("--pairs must be at least 5")
    began = time.time()
    with tempfile.TemporaryDirectory(prefix="nearfield-bench-") as name:
        folder = Path(name)
        make_vectors(folder, options.size)
        print(f"{options.size:,} queries x {options.size:,} documents x {DIMENSION}, precomputed vectors:", flush=True)
        pairs = run_pairs(("nearfield", "peer"), folder, options.pairs)
        faiss = None if options.no_faiss else run("peer-faiss", folder)
        vectors = (np.load(folder / "queries.npy"), np.load(folder / "documents.npy"))
        checks = check(folder, "nearfield", "peer", vectors)
        texts = compare_texts(folder, options.texts, options.pairs) if options.texts else {}
    peak = statistics.median(pair["nearfield"]["gemm"] for pair in pairs)
    memory = {side: max(pair[side]["peak_bytes"] for pair in pairs) for side in ("nearfield", "peer")}
    result = {
        **compare(pairs),
        "size": options.size,
        "checks": {**checks, "threads": 1, "peak_bytes": memory},
        "gemm_peak_flops": peak,
        "gemm_floor_seconds": 2 * options.size**2 * DIMENSION / peak,
        "peer_with_faiss": faiss,
        "end_to_end": texts,
        "samples": samples_of(pairs),
        "versions": {
            "machine": platform.machine(),
            **versions("nearfield", "sentence-transformers", "torch", "numpy", "faiss-cpu"),
        },
        "seconds": time.time() - began,
    }
    failed = failures(result, options.floor)
    show(result)
    return finish({**result, "failed": failed}, failed, options.json)


def failures(result: dict[str, Any], floor: float | None) -> list[str]:
    """The checks that do not hold."""
    checks, texts = result["checks"], result["end_to_end"]
    failed = []
    if checks["queries_unlike_brute_force"]:
        failed.append("not the negatives of brute force")
    if checks["largest_score_gap_where_unlike"] > 1e-5:
        failed.append("the peer's negatives differ by more than float32 errs")
    if checks["peak_bytes"]["nearfield"] >= MEMORY_LIMIT:
        failed.append("memory")
    if texts and texts["same_triplets"] < 0.99:
        failed.append("other triplets from texts")
    if floor is not None and min([result["ratio"], *([texts["ratio"]] if texts else [])]) < floor:
        failed.append("floor")
    return failed


def show(result: dict[str, Any]) -> None:
    """Print the figures."""
    memory, faiss, texts = result["checks"]["peak_bytes"], result["peer_with_faiss"], result["end_to_end"]
    print(
        f"precomputed vectors: {result['ratio']:.2f} times fewer CPU seconds than sentence-transformers (spread "
        f"{result['spread'][0]:.2f} to {result['spread'][1]:.2f}, {result['pairs']} pairs); ours {result['ours']:.1f} s, "
        f"peer {result['peer']:.1f} s, matrix products alone {result['gemm_floor_seconds']:.1f} s"
    )
    print(f"  peak above the vectors: ours {memory['nearfield'] / 1e9:.2f} GB, peer {memory['peer'] / 1e9:.2f} GB")
    if faiss:
        ratio = faiss["cpu_seconds"] / result["ours"]
        print(f"  the peer with FAISS: {faiss['cpu_seconds']:.1f} CPU s ({ratio:.2f} times ours)")
    if texts:
        print(
            f"from texts: {texts['ratio']:.2f} times fewer (spread {texts['spread'][0]:.2f} to {texts['spread'][1]:.2f}); "
            f"ours {texts['ours']:.1f} s, peer {texts['peer']:.1f} s; {texts['same_triplets']:.2%} of the triplets in common"
        )
    print(f"checks: {json.dumps(result['checks'])}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
