"""How much longer `nearfield --help` takes than the help of an empty typer app: best of five each, A B A B.

    python scripts/bench_help.py

Leaves with 1 if it is more than 0.1 s.
"""

from __future__ import annotations

import sys
from dataclasses import asdict

from frame import Sample, compare, finish, in_turn, make_parser, run_command, versions

EMPTY = "import typer\napp = typer.Typer()\n@app.command()\ndef main() -> None: ...\napp(['--help'])"
COMMANDS = {
    "nearfield": [sys.executable, "-m", "nearfield", "--help"],
    "empty typer app": [sys.executable, "-c", EMPTY],
}
MOST = 0.1


def help_of(name: str) -> Sample:
    """The time of one command."""
    used = run_command(COMMANDS[name])
    if used.code:
        raise SystemExit(f"{name} failed:\n{used.output}")
    return {key: value for key, value in asdict(used).items() if key not in ("code", "output")}


def main() -> int:
    """Measure and print."""
    options = make_parser(__doc__).parse_args()
    pairs = list(in_turn({name: lambda _, name=name: help_of(name) for name in COMMANDS}, options.pairs))
    best = {name: min(pair[name]["wall_seconds"] for pair in pairs) for name in COMMANDS}
    difference = best["nearfield"] - best["empty typer app"]
    for name, value in [*best.items(), ("difference", difference)]:
        print(f"{name:16} {value:.3f} s")
    result = {
        **compare(pairs, "wall_seconds", unit="seconds"),
        "checks": {"difference": difference, "most": MOST},
        "samples": pairs,
        "versions": versions("nearfield", "typer"),
    }
    failed = [f"{difference:.3f} s longer than the help of an empty app"] if difference > MOST else []
    if options.floor is not None and result["ratio"] < options.floor:
        failed.append("floor")
    return finish(result, failed, options.json)


if __name__ == "__main__":
    sys.exit(main())
