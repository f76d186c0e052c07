"""Negatives that change while a model trains: by a schedule, by what it finds hard, or mined anew from its weights."""

from __future__ import annotations

from nearfield.training.negatives.changing import Candidates, ChangingNegatives, NegativeInputs, open_negatives

__all__ = ["Candidates", "ChangingNegatives", "NegativeInputs", "open_negatives"]
