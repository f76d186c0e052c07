"""How much longer `nearfield --help` takes than the help of an empty typer app: best of five each, A B A B.

    python scripts/bench_help.py

Leaves with 1 if it is more than 0.1 s.
"""

from __future__ import annotations

import subprocess
import sys
import time

EMPTY = "import typer\napp = typer.Typer()\n@app.command()\ndef main() -> None: ...\napp(['--help'])"
COMMANDS = {
    "empty typer app": [sys.executable, "-c", EMPTY],
    "nearfield": [sys.executable, "-m", "nearfield", "--help"],
}


def seconds(command: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - start


def main() -> int:
    best = dict.fromkeys(COMMANDS, float("inf"))
    for _ in range(5):
        for name, command in COMMANDS.items():
            best[name] = min(best[name], seconds(command))
    for name, value in best.items():
        print(f"{name:16} {value:.3f} s")
    difference = best["nearfield"] - best["empty typer app"]
    print(f"{'difference':16} {difference:.3f} s")
    return 0 if difference <= 0.1 else 1


if __name__ == "__main__":
    sys.exit(main())
