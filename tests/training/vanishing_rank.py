"""``nearfield`` with a rank that ends at once in a step: ``torchrun ... vanishing_rank.py RANK STEP train RECIPE ...``."""

from __future__ import annotations

import os
import sys
from typing import Any

from nearfield.cli import main
from nearfield.training import step as step_module


def install(step: int) -> None:
    """Let this rank vanish in a step, counted from 1."""
    run_step = step_module.run_step

    def run(*args: Any, **kwargs: Any) -> Any:
        if kwargs["step"] == step - 1:
            os._exit(0)
        return run_step(*args, **kwargs)

    step_module.run_step = run


if __name__ == "__main__":
    if os.environ["RANK"] == sys.argv[1]:
        install(int(sys.argv[2]))
    main(sys.argv[3:])
