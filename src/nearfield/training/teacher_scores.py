"""The scores that a miner's teacher gave to the documents of a planned batch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nearfield.batching.plan import Batch
from nearfield.batching.rows import Floats, Lists, Rows


@dataclass(frozen=True)
class TeacherScores:
    """Of examples: the teacher's score of each known positive and of each mined negative."""

    examples: Rows
    """(n,) example rows, rising."""
    positives: Lists
    positive_scores: Floats
    """One of each value of ``positives``."""
    negatives: Lists
    negative_scores: Floats

    def of(self, batch: Batch) -> Floats:
        """(D,) scores of the batch's documents in the order of its pool; not a number for what was not scored."""
        found: list[Floats] = [np.empty(0, dtype=np.float64)]
        places = np.minimum(np.searchsorted(self.examples, batch.example), max(0, len(self.examples) - 1))
        for row, place in enumerate(places.tolist()):
            known: dict[int, float] = {}
            if len(self.examples) and self.examples[place] == batch.example[row]:
                for lists, scores in (
                    (self.negatives, self.negative_scores),
                    (self.positives, self.positive_scores),
                ):
                    low, high = int(lists.offsets[place]), int(lists.offsets[place + 1])
                    known |= dict(zip(lists.values[low:high].tolist(), scores[low:high].tolist(), strict=True))
            documents = [*batch.positives[row].tolist(), *batch.negatives[row].tolist()]
            found.append(np.asarray([known.get(item, np.nan) for item in documents], dtype=np.float64))
        return np.concatenate(found)
