"""Items of a store -> vectors by a teacher's model, in this process or in another."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from nearfield.data.store import Rows, Store
from nearfield.encoders.text_encoder import TextEncoder

if TYPE_CHECKING:
    from nearfield.mining.documents import Vectors


@dataclass
class ItemEncoder:
    """Encodes items of a store; can be sent to another process, where store and model are opened when first used."""

    store: Path
    model: str
    revision: str | None
    prompts: Mapping[str, str]
    """Role -> the text put before an item."""
    device: str | None = None
    max_length: int | None = None
    trust_remote_code: bool = False
    _opened: tuple[Store, TextEncoder] | None = field(default=None, init=False, repr=False)

    def __call__(self, role: str, rows: Rows) -> Vectors:
        """The model's vectors of items in a role."""
        if self._opened is None:
            encoder = TextEncoder.load(
                self.model,
                self.revision,
                device=self.device,
                max_length=self.max_length,
                trust_remote_code=self.trust_remote_code,
            )
            self._opened = (Store.open(self.store), encoder)
        store, encoder = self._opened
        return encoder.of_items(store, rows, self.prompts[role], role, f"the teacher {self.model}")
