"""Packages that an installation may lack."""

from __future__ import annotations

import importlib.util

from nearfield.errors import BadInputError


def require_bitsandbytes(what: str, device_type: str, where: str, otherwise: str) -> None:
    """Raise :class:`BadInputError` unless bitsandbytes is installed and the device is a CUDA one.

    ``what`` needs it, ``where`` names the setting and ``otherwise`` says what to do without it.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise BadInputError(
            f"{what} needs bitsandbytes, which is not installed",
            where=where,
            hint=f"Install it with: pip install bitsandbytes. {otherwise}",
        )
    if device_type != "cuda":
        raise BadInputError(f"{what} needs a CUDA device; this is {device_type}", where=where, hint=otherwise)
