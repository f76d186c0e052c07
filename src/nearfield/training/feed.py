"""What the rows of a plan are made into batches with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from nearfield.batching.planner import Rows, VectorsOf
from nearfield.batching.rows import Floats
from nearfield.data.tokens import TokenCache
from nearfield.encoders.token_task import TokenTask
from nearfield.objectives.config import Reading
from nearfield.training.teacher_scores import TeacherScores

if TYPE_CHECKING:
    from PIL.Image import Image

Pictures = Callable[[Rows], "Sequence[Image | None]"]
"""Item rows -> their pictures, RGB."""


@dataclass(frozen=True)
class Feed:
    """What is known of the items and examples of the data that batches name by their rows."""

    tokens: TokenCache
    guide: VectorsOf | None = None
    """A guide's vectors of the items, where the objective asks for them."""
    weights: Floats | None = None
    """What each example counts, by its row; None where all count alike."""
    teacher_scores: TeacherScores | None = None
    """What the miner's teacher gave, where the objective learns from it."""
    readings: Mapping[int, Reading] = field(default_factory=dict)
    """The number of a source -> how the texts of its examples are read; those that are not named are read plainly."""
    token_task: TokenTask | None = None
    """What hides tokens and gives the losses on them, where the objective asks for that."""
    pictures: Pictures | None = None
    """The pictures of items, where the data has some."""
