"""Equalities that gradients must satisfy on any number of devices, in any chunks; for tests and for users.

``nearfield doctor --conformance`` runs them on the machine at hand and prints a table.
"""

from __future__ import annotations
