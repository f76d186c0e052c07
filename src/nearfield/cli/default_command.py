"""Groups with a command that need not be named: ``nearfield mine RECIPE`` beside ``nearfield mine audit RUN``."""

from __future__ import annotations

from typing import Any

from typer.core import TyperGroup

DEFAULT = "run"


class DefaultGroup(TyperGroup):
    """Takes arguments that begin with no command's name as those of the command ``run``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put the name of the command before the arguments where it is left out."""
        if args and args[0] not in self.commands and args[0] not in ("--help", "-h"):
            args = [DEFAULT, *args]
        return super().parse_args(ctx, args)
