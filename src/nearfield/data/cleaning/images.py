"""Steps for images and their captions: filters of ALIGN (arXiv 2102.05918, section 3), and near-duplicate images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
from pydantic import Field

from nearfield.arrays import Rows
from nearfield.console import track
from nearfield.data.cleaning import SidesStep, StepBase
from nearfield.data.cleaning.duplicates import DuplicateStep
from nearfield.data.images import PerceptualHashes

if TYPE_CHECKING:
    from nearfield.data.cleaning.run import Encoders, ExampleTable, Taken

_BATCH = 256


class ImageSizeStep(SidesStep):
    """Images whose files are too small, or much longer than wide. The defaults take nothing out.

    ALIGN keeps a shorter side of more than 200 pixels and sides of less than 3 to 1.
    """

    kind: Literal["picture_size"] = "picture_size"
    min_side: Annotated[int, Field(ge=0)] = 0
    """Of the shorter side, in pixels of the file."""
    max_ratio: Annotated[float, Field(ge=1)] | None = None
    """Longer to shorter side; one that is exactly this stays."""

    def apply(self, table: ExampleTable, sources: Sequence[int], taken: Taken, encoders: Encoders) -> None:
        """Take out the images that have a reason to go."""
        examples = table.of_sources(sources)
        items = table.items(examples, self.sides)
        sizes = table.store.original_sizes(items)
        bad: dict[int, str] = {}
        for row, short, long in zip(
            items.tolist(), sizes.min(axis=1).tolist(), sizes.max(axis=1).tolist(), strict=True
        ):
            if not short:
                continue
            if short < self.min_side:
                bad[row] = f"a side under {self.min_side:,} pixels"
            elif self.max_ratio is not None and long > self.max_ratio * short:
                bad[row] = f"sides over {self.max_ratio:g} to 1"
        taken.take_out(examples, self.sides, bad)


class SharedStep(StepBase):
    """Images with too many different texts, and texts of too many different images. Null takes nothing out.

    A pair is a query and a positive of which one has an image and the other has none. Run it before anything is drawn from
    the data. ALIGN's bounds are 1,000 and 10.
    """

    kind: Literal["shared"] = "shared"
    texts_per_picture: Annotated[int, Field(ge=1)] | None = None
    """An image with more different texts goes; null lets all stay."""
    pictures_per_text: Annotated[int, Field(ge=1)] | None = None
    """A text of more different images goes; null lets all stay."""

    def apply(self, table: ExampleTable, sources: Sequence[int], taken: Taken, encoders: Encoders) -> None:
        """Take out what is shared by too many; both are counted before either goes."""
        if self.texts_per_picture is None and self.pictures_per_text is None:
            return
        examples = table.of_sources(sources)
        pairs = image_and_text(table, examples)
        bad: dict[int, str] = {}
        if self.texts_per_picture is not None:
            crowded = _over(pairs[:, 0], self.texts_per_picture)
            items = table.items(examples, ("query", "positives"))
            hit = np.isin(table.store.image_rows(items), crowded)
            bad |= dict.fromkeys(items[hit].tolist(), f"an image with over {self.texts_per_picture:,} texts")
        if self.pictures_per_text is not None:
            common = _over(pairs[:, 1], self.pictures_per_text)
            bad |= dict.fromkeys(common.tolist(), f"a text of over {self.pictures_per_text:,} images")
        taken.take_out(examples, ("query", "positives"), bad)


def image_and_text(table: ExampleTable, examples: Rows) -> Rows:
    """[pairs, 2]: the different pairs of an image (row of the images) and a text (row of the items) in examples.

    A pair is a query and a positive of which one has an image and the other has none.
    """
    members = table.positives
    mine = np.flatnonzero(members.alive & np.isin(members.owners, examples))
    sides = np.stack([table.query[members.owners[mine]], members.rows[mine]], axis=1)
    images = np.stack([table.store.image_rows(sides[:, side]) for side in (0, 1)], axis=1)
    parts = [
        np.stack([images[one, seen], sides[one, 1 - seen]], axis=1)
        for seen in (0, 1)
        for one in [(images[:, seen] >= 0) & (images[:, 1 - seen] < 0)]
    ]
    pairs: Rows = np.unique(np.concatenate(parts), axis=0)
    return pairs


def _over(members: Rows, most: int) -> Rows:
    values, counts = np.unique(members, return_counts=True)
    return values[counts > most]


class NearImagesStep(DuplicateStep):
    """Examples whose images look like an earlier example's, by a difference hash of 64 bits and by colour.

    With ``compare: query`` or ``positives`` the images of that side alone count; ``keep: [test]`` takes copies of test
    images out of training. Images that are one item with a text are not compared.
    """

    kind: Literal["near_pictures"] = "near_pictures"
    bits: Annotated[int, Field(ge=0, le=16)] | None = 3
    """Bits of the hash that may differ; null takes nothing out."""
    tolerance: Annotated[float, Field(ge=0, le=255)] = 8
    """Mean difference of the images at 8 x 8 pixels, of 255."""

    def apply(self, table: ExampleTable, sources: Sequence[int], taken: Taken, encoders: Encoders) -> None:
        """Take out examples that repeat one before them; texts are equal only where they are the same item."""
        if self.bits is None:
            return
        store = table.store
        examples = self.in_order(table, sources)
        items = self.by_first_use(table, examples)
        kinds = np.asarray(store.modalities(items), dtype=object)
        seen: Rows = items[kinds == "image"]
        parts: list[PerceptualHashes] = []
        for start in track(range(0, len(seen), _BATCH), "Cleaning: hashing images"):
            images = store.images(seen[start : start + _BATCH])
            parts.append(PerceptualHashes.of([image for image in images if image is not None]))
        leader = np.arange(store.items.num_rows, dtype=np.int64)
        if parts:
            first = PerceptualHashes.join(parts).first_alike(self.bits, self.tolerance)
            leader[seen] = seen[first]
        self.take_out_repeats(taken, examples, items, leader[items], "near-duplicate image")
