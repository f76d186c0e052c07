"""Mining: hard negatives for examples, by a teacher, with its scores and ranks."""

from __future__ import annotations
