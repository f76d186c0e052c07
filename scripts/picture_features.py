"""The vectors of a frozen vision model for the images of captions, as the file that guides the objective `mcse`.

    python scripts/picture_features.py data_recipes/emoji.yaml --captions data_recipes/captions.yaml --model microsoft/resnet-50

The first data recipe has the images with their captions, the second all texts that are trained on. Each text gets the mean of
the features of the images that it is a caption of; a text without an image gets zeros, which MCSE reads as "no image". The
model is any vision model of transformers, from a folder or a hub: its pooled output, or the mean of its last states. Written are
OUT.npy, float32 [texts, width], and OUT.ids.txt with the texts' ids.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.progress import track

from nearfield.data import prepare_store
from nearfield.data.store import Store
from nearfield.errors import BadInputError, NearfieldError
from nearfield.files import atomic_path, write_text

Floats = npt.NDArray[np.float32]


def caption_pictures(store: Store) -> dict[bytes, list[int]]:
    """The id of each caption -> the item rows of its images, whichever side of an example they are on."""
    ids, found = store.items.column("id"), {}
    for part in store.examples.select(["query", "positives"]).to_batches():
        for query, positives in zip(part["query"].to_pylist(), part["positives"].to_pylist(), strict=True):
            rows = [query, *(positives or ())]
            sides = store.modalities(rows)
            pictures = [row for row, side in zip(rows, sides, strict=True) if side == "image"]
            for row, side in zip(rows, sides, strict=True):
                if side == "text":
                    found.setdefault(ids[row].as_py(), []).extend(pictures)
    return {caption: sorted(set(rows)) for caption, rows in found.items() if rows}


def embed(store: Store, rows: list[int], model: str, batch: int) -> Floats:
    """(n, width) features of images."""
    import torch
    from transformers import AutoImageProcessor, AutoModel

    try:
        processor, vision = AutoImageProcessor.from_pretrained(model), AutoModel.from_pretrained(model).eval()
    except (OSError, ValueError) as error:
        raise BadInputError(f"this vision model cannot be read ({error})", where=model) from error

    def parts() -> Iterator[Floats]:
        for low in track(range(0, len(rows), batch), description="Images"):
            pictures: list[Any] = store.images(rows[low : low + batch])
            with torch.inference_mode():
                out = vision(**processor(images=pictures, return_tensors="pt"))
            pooled = getattr(out, "pooler_output", None)
            yield (out.last_hidden_state.mean(dim=1) if pooled is None else pooled).flatten(1).float().numpy()

    return np.concatenate(list(parts()))


def main() -> int:
    """Write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pictures", type=Path, help="data recipe with images and captions")
    parser.add_argument("--captions", type=Path, required=True, help="data recipe with all texts that are trained on")
    parser.add_argument("--model", required=True, help="a vision model's folder or hub id")
    parser.add_argument("--out", type=Path, default=Path("features/captions.npy"))
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--cache", type=Path, default=Path("runs/.cache"))
    arguments = parser.parse_args()
    pictures, texts = (prepare_store(path, arguments.cache) for path in (arguments.pictures, arguments.captions))
    if not pictures.has_images:
        raise BadInputError("this data has no images", where=str(arguments.pictures))
    ids = texts.items.column("id").to_pylist()
    known = set(ids)
    wanted = {caption: rows for caption, rows in caption_pictures(pictures).items() if caption in known}
    if not wanted:
        raise BadInputError(f"no text of {arguments.captions} is a caption here", where=str(arguments.pictures))
    rows = sorted({row for found in wanted.values() for row in found})
    place = {row: number for number, row in enumerate(rows)}
    features = embed(pictures, rows, arguments.model, arguments.batch)
    found = np.zeros((len(ids), features.shape[1]), dtype=np.float32)
    for number, item in enumerate(ids):
        if item in wanted:
            found[number] = features[[place[row] for row in wanted[item]]].mean(axis=0)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(arguments.out) as aside, aside.open("wb") as file:
        np.save(file, found)
    write_text(arguments.out.with_suffix(".ids.txt"), "".join(item.hex() + "\n" for item in ids))
    print(f"{len(wanted):,} of {len(ids):,} texts have images ({len(rows):,}): {arguments.out}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except NearfieldError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
