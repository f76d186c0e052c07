"""How long a test waits for what must come: long enough for any busy machine. It ends a hang, and decides nothing else."""

PATIENCE = 1800.0
"""Seconds."""
