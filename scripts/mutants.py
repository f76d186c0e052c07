"""Change 200 places of the code, one at a time, and see whether the tests notice.

    python scripts/mutants.py [MUTANT ...] [--count 200] [--seed 0] [--max-children N] [--json OUT]

mutmut's operators make every mutant of the files that ``[tool.mutmut]`` in pyproject.toml names; ``--count`` of them are
drawn with the seed from the sorted list of their names, or those named are taken. Each is tried in a copy of the tree, in
a process that is forked after torch was imported, by the tests that run a line of the changed function (all tests, where
the change is outside of functions: the default values of configs, constants), the fastest first, until one fails.

Never changed: docstrings, the text inside f-strings, type annotations (so the bounds of config fields), decorators,
decorated functions (validators), calls of ``len`` and ``isinstance``. Texts of errors, hints and log lines are changed.
Left out of the tests: what ``[tool.mutmut]`` deselects, the tests that start processes, for their time.

Controls come first: the unchanged code must pass, in this order of the tests too, and an objective that cannot be called
must be noticed. A mutant has three times the time that its tests take on the unchanged code, and 30 s; 200 mutants take
5 to 10 minutes one at a time. With ``--json OUT`` the figures are written after each mutant, and a run that was stopped
goes on from there when code and tests are the same.

Leaves with 1 if less than 80 % of the mutants are killed. A mutant that runs out of time is killed; one that no test
runs survives.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import difflib
import hashlib
import importlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pytest

ROOT = Path(__file__).resolve().parents[1]
COPIED = ("src", "tests", "training", "eval", "data_recipes", "pyproject.toml", "README.md", "LICENSE")
WANTED = 0.8
ONE_THREAD = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
# Modules that the tests import beside nearfield, so that a forked process need not. An import starts no thread; work would.
PRELOADED = (
    "accelerate",
    "hypothesis.strategies",
    "pyarrow.parquet",
    "pydantic",
    "pytest",
    "rich.progress",
    "safetensors.torch",
    "sentence_transformers",
    "tokenizers.processors",
    "torch._dynamo",
    "torch.utils.tensorboard",
    "transformers",
    "typer",
    "yaml",
)
CONTROL = "src/nearfield/objectives/infonce.py"
NO_TESTS_COLLECTED = 5


@dataclass(frozen=True)
class Mutant:
    """One changed place."""

    name: str
    file: str
    line: int
    code: str
    """The whole changed file."""
    diff: str


@dataclass(frozen=True)
class Outcome:
    """The tests' verdict on a mutant."""

    name: str
    status: str
    """killed, timeout, survived, no tests."""
    seconds: float
    by: str
    """The first test that failed."""
    file: str
    line: int
    diff: str


@dataclass(frozen=True)
class Baseline:
    """The tests on the unchanged code."""

    seconds: dict[str, float]
    """Of each test, its fixtures included."""
    lines: dict[str, dict[str, list[str]]]
    """file -> line -> the tests that run it."""


class Watcher:
    """A pytest plugin: picks and orders the tests, notes their seconds and the first that fails."""

    def __init__(self, wanted: Sequence[str] | None, note: Path) -> None:
        self.wanted = wanted
        self.note = note
        self.seconds: defaultdict[str, float] = defaultdict(float)

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        if self.wanted is not None:
            found = {item.nodeid: item for item in items}
            items[:] = [found[name] for name in self.wanted if name in found]

    def _failed(self, name: str) -> None:
        if not self.note.exists():
            self.note.write_text(name)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._failed(report.nodeid)

    def pytest_keyboard_interrupt(self, excinfo: object) -> None:
        self._failed("an interrupt that no test caught")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.seconds[report.nodeid] += report.duration
        if report.failed:
            self._failed(report.nodeid)


class LineWatcher(Watcher):
    """Also notes which lines each test runs."""

    def __init__(self, folder: Path, files: Sequence[str]) -> None:
        import coverage

        super().__init__(None, folder / "note")
        self.files = {file: str(folder / file) for file in files}
        self.coverage = coverage.Coverage(data_file=None, include=list(self.files.values()), config_file=False)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.coverage.switch_context(nodeid)

    def lines(self) -> dict[str, dict[str, list[str]]]:
        data = self.coverage.get_data()
        return {
            file: {str(line): [name for name in names if name] for line, names in data.contexts_by_lineno(path).items()}
            for file, path in self.files.items()
        }


def find_packages(folder: Path) -> None:
    """Let imports, those of started processes too, find the copy in ``folder`` first."""
    sys.path[:0] = [str(folder), str(folder / "src")]
    os.environ["PYTHONPATH"] = str(folder / "src")


def module_name(file: str) -> str:
    """src/nearfield/a/b.py -> nearfield.a.b"""
    return file.removeprefix("src/").removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def run_pytest(folder: Path, plugin: Watcher, *, stop_at_first: bool) -> int:
    """Run the selected tests on the copy in ``folder``, in this process, which ends soon."""
    import hypothesis
    import pytest
    from mutmut.configuration import config

    hypothesis.settings.register_profile(
        "mutants",
        database=None,
        deadline=None,
        derandomize=True,
        phases=(hypothesis.Phase.explicit, hypothesis.Phase.generate),
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    hypothesis.settings.load_profile("mutants")
    arguments = ["-q", "-p", "no:cacheprovider", "--tb=short", f"--basetemp={folder / 'tmp'}"]
    arguments += ["-x"] if stop_at_first else []
    arguments += [*config().pytest_add_cli_args, *config().pytest_add_cli_args_test_selection]
    code = int(pytest.main(arguments, plugins=[plugin]))
    import nearfield

    assert str(nearfield.__file__).startswith(str(folder)), "the tests ran on another copy of nearfield"
    return code


def fork(folder: Path, work: Callable[[], int]) -> int:
    """Run ``work()`` in a forked process with its own group, its output in ``folder/log``; the process number."""
    pid = os.fork()
    if pid:
        with contextlib.suppress(OSError):
            os.setpgid(pid, pid)
        return pid
    code = 99
    try:
        os.setpgid(0, 0)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.chdir(folder)
        log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        code = work()
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def kill(pid: int) -> None:
    """End a forked process and what it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


def copy_tree(folder: Path) -> None:
    """Copy the files that the tests need, without caches."""
    folder.mkdir(parents=True)
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        elif source.is_file():
            shutil.copy2(source, folder / name)


def tree_hash(folder: Path) -> str:
    """A hash of all files that a result depends on."""
    digest = hashlib.sha256(Path(__file__).read_bytes())
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(f"{path.relative_to(folder)}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def mutated_files() -> list[str]:
    """The files that ``[tool.mutmut]`` names, relative to the copy, which is the working folder."""
    from mutmut.configuration import config

    paths = (path for source in config().source_paths for path in source.rglob("*.py"))
    return sorted(str(path) for path in paths if config().should_mutate(path))


def draw(names: Sequence[str], count: int, seed: int) -> tuple[list[Mutant], int]:
    """The named mutants, or ``count`` drawn from all; and the number of all."""
    import libcst as cst
    from mutmut.mutation.file_mutation import create_mutations

    modules, all_names = {}, []
    for file in mutated_files():
        dotted = module_name(file)
        module, mutations, _, _ = create_mutations(file, Path(file).read_text(encoding="utf-8"))
        modules[dotted] = (file, module, mutations)
        all_names += [f"{dotted}#{number:04d}" for number in range(len(mutations))]
    order = sorted(all_names)
    if names:
        unknown = sorted(set(names) - set(order))
        if unknown:
            sys.exit(f"these mutants do not exist: {', '.join(unknown)}")
        order = list(names)
    else:
        random.Random(seed).shuffle(order)
    drawn: list[Mutant] = []
    seen: set[tuple[str, str]] = set()
    for name in order:
        if len(drawn) == count and not names:
            break
        dotted, _, number = name.partition("#")
        file, module, mutations = modules[dotted]
        mutation = mutations[int(number)]
        code = cst.ensure_type(module.deep_replace(mutation.original_node, mutation.mutated_node), cst.Module).code
        # Two operators may make the same change, or one that changes nothing.
        if code == module.code or (file, code) in seen:
            continue
        seen.add((file, code))
        before, after = module.code.splitlines(), code.splitlines()
        line = next((n for n, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), len(after))
        diff = [
            text for text in difflib.unified_diff(before, after, n=0, lineterm="") if text[:3] not in ("---", "+++")
        ]
        drawn.append(Mutant(name, file, line + 1, code, "\n".join(diff[1:])))
    return sorted(drawn, key=lambda mutant: (mutant.file, mutant.line, mutant.name)), len(all_names)


def functions(file: str) -> Iterator[tuple[int, int, int]]:
    """First line, first line of the body and last line of each function and method that is not inside another."""
    module = ast.parse(Path(file).read_text(encoding="utf-8"))
    bodies = [module.body, *(node.body for node in module.body if isinstance(node, ast.ClassDef))]
    for node in (node for body in bodies for node in body):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.lineno, node.body[0].lineno, node.end_lineno or node.lineno


def covering(mutant: Mutant, baseline: Baseline) -> list[str]:
    """The tests that could notice a mutant, fastest first."""
    inside = [(body, last) for first, body, last in functions(mutant.file) if first <= mutant.line <= last]
    if not inside:
        names = set(baseline.seconds)
    else:
        body, last = inside[0]
        lines = baseline.lines[mutant.file]
        names = {name for line in range(body, last + 1) for name in lines.get(str(line), [])}
    return sorted(names, key=lambda name: (baseline.seconds[name], name))


def measure(folder: Path) -> Baseline:
    """Run all tests on the unchanged code in their order, then as the controls: fastest first, and on a broken objective."""
    result = folder / "baseline.json"

    def work() -> int:
        plugin = LineWatcher(folder, mutated_files())
        find_packages(folder)
        plugin.coverage.start()
        code = run_pytest(folder, plugin, stop_at_first=True)
        plugin.coverage.stop()
        result.write_text(json.dumps({"seconds": plugin.seconds, "lines": plugin.lines()}))
        return code

    _, status = os.waitpid(fork(folder, work), 0)
    if os.waitstatus_to_exitcode(status) != 0:
        sys.exit(f"the tests must pass on the unchanged code:\n{(folder / 'log').read_text()[-3000:]}")
    baseline = Baseline(**json.loads(result.read_text()))
    original = (folder / CONTROL).read_text(encoding="utf-8")
    for change, wanted in (("", "survived"), ("\n\nInfoNCE.__call__ = None\n", "killed")):
        trial = Trial(Mutant("control", CONTROL, 1, original + change, change), folder, baseline)
        while (outcome := trial.poll()) is None:
            time.sleep(0.1)
        if outcome.status != wanted:
            sys.exit(
                f"a control was {outcome.status}, not {wanted}, by {outcome.by or 'no test'}: {change or 'no change'}"
            )
    return baseline


class Trial:
    """The tests at work on one mutant in one copy."""

    def __init__(self, mutant: Mutant, folder: Path, baseline: Baseline) -> None:
        self.mutant, self.folder = mutant, folder
        self.tests = covering(mutant, baseline)
        self.limit = 30 + 3 * sum(baseline.seconds[name] for name in self.tests)
        self.start = time.monotonic()
        self.original = (folder / mutant.file).read_bytes()
        self.note = folder / "note"
        self.note.unlink(missing_ok=True)
        shutil.rmtree(folder / "tmp", ignore_errors=True)
        (folder / mutant.file).write_text(mutant.code, encoding="utf-8")
        self.pid = fork(folder, self._work) if self.tests else None

    def _work(self) -> int:
        find_packages(self.folder)
        try:
            importlib.import_module(module_name(self.mutant.file))
        except Exception as error:
            # A conftest.py may be the first to import it, which pytest would take for wrong usage.
            self.note.write_text(f"the import: {error!r}")
            return 1
        return run_pytest(self.folder, Watcher(self.tests, self.note), stop_at_first=True)

    def poll(self) -> Outcome | None:
        """The outcome, once it is there."""
        status = "no tests"
        if self.pid is not None:
            ended, code = os.waitpid(self.pid, os.WNOHANG)
            late = time.monotonic() - self.start > self.limit
            if not ended and not late:
                return None
            if not ended:
                kill(self.pid)
                os.waitpid(self.pid, 0)
                status = "timeout"
            else:
                status = self._status(os.waitstatus_to_exitcode(code))
            kill(self.pid)
        return self._outcome(status)

    def _status(self, exit_code: int) -> str:
        if exit_code in (0, NO_TESTS_COLLECTED):
            return "survived" if exit_code == 0 else "no tests"
        if exit_code > 0 and not self.note.exists():
            # No test failed: the fault is here, and must not pass for a kill.
            sys.exit(f"{self.mutant.name}: the tests could not be run:\n{(self.folder / 'log').read_text()[-3000:]}")
        return "killed"

    def _outcome(self, status: str) -> Outcome:
        (self.folder / self.mutant.file).write_bytes(self.original)
        seconds = round(time.monotonic() - self.start, 1)
        by = self.note.read_text() if self.note.exists() else ""
        return Outcome(self.mutant.name, status, seconds, by, self.mutant.file, self.mutant.line, self.mutant.diff)


def run_all(mutants: Sequence[Mutant], folders: Sequence[Path], baseline: Baseline) -> Iterator[Outcome]:
    """Try the mutants, one in each copy at a time; outcomes as they come."""
    waiting, free = list(reversed(mutants)), list(folders)
    running: list[Trial] = []
    looked = time.monotonic()
    try:
        while waiting or running:
            while waiting and free:
                running.append(Trial(waiting.pop(), free.pop(), baseline))
            time.sleep(0.05)
            gap, looked = time.monotonic() - looked, time.monotonic()
            for trial in list(running):
                # Where this process itself stood still (Ctrl-Z, a machine asleep), its children did too.
                trial.limit += gap if gap > 5 else 0
                if (outcome := trial.poll()) is not None:
                    running.remove(trial)
                    free.append(trial.folder)
                    yield outcome
    finally:
        for trial in running:
            if trial.pid is not None:
                kill(trial.pid)


def killed_share(outcomes: Sequence[Outcome]) -> float:
    """Killed and timed out, of all."""
    return sum(outcome.status in ("killed", "timeout") for outcome in outcomes) / max(1, len(outcomes))


def show(outcomes: Sequence[Outcome], drawn_from: int, seconds: float) -> None:
    """The table and the survivors."""
    for outcome in outcomes:
        if outcome.status in ("survived", "no tests"):
            print(f"\n{outcome.status}: {outcome.file}:{outcome.line}  ({outcome.name})\n{outcome.diff}")
    counts = Counter(outcome.status for outcome in outcomes)
    print(f"\n{len(outcomes)} of {drawn_from} mutants in {seconds:.0f} s")
    for status in ("killed", "timeout", "survived", "no tests"):
        print(f"  {status:9} {counts[status]:4}")
    print(f"  killed or timed out: {killed_share(outcomes):.1%} (wanted: {WANTED:.0%})")


def load_done(path: Path | None, tree: str) -> dict[str, Outcome]:
    """Outcomes of an earlier run on the same code and tests."""
    if path is None or not path.is_file():
        return {}
    saved = json.loads(path.read_text(encoding="utf-8"))
    return {line["name"]: Outcome(**line) for line in saved["mutants"]} if saved.get("tree") == tree else {}


def save(path: Path, outcomes: Sequence[Outcome], **facts: object) -> None:
    """The figures, complete at any time."""
    counts = Counter(outcome.status for outcome in outcomes)
    report = {**facts, "share": killed_share(outcomes), "counts": counts, "mutants": [asdict(o) for o in outcomes]}
    aside = path.with_name(f"{path.name}.part")
    aside.write_text(json.dumps(report, indent=1), encoding="utf-8")
    aside.replace(path)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="MUTANT", help="only these, named as in the output")
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-children", type=int, default=os.cpu_count() or 1, help="mutants at a time")
    parser.add_argument("--json", type=Path, help="where the figures go, and whence a stopped run goes on")
    return parser.parse_args()


def main() -> int:
    options = parse()
    out = options.json.resolve() if options.json else None
    os.environ.update(dict.fromkeys(ONE_THREAD, "1"))
    os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", PYTHONDONTWRITEBYTECODE="1")
    sys.dont_write_bytecode = True
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    # Being stopped must end the forked processes and remove the copies.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(f"stopped by {signal.SIGTERM.name}"))
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mutants-") as temporary:
        folders = [Path(temporary).resolve() / str(number) for number in range(max(1, options.max_children))]
        for folder in folders:
            copy_tree(folder)
        tree = tree_hash(folders[0])
        os.chdir(folders[0])
        mutants, drawn_from = draw(options.names, options.count, options.seed)
        for name in PRELOADED:
            importlib.import_module(name)
        baseline = measure(folders[0])
        print(
            f"{len(baseline.seconds)} tests pass on the unchanged code in {sum(baseline.seconds.values()):.0f} s; ",
            end="",
        )
        print("a broken objective is noticed")
        done = load_done(out, tree)
        outcomes = [done[mutant.name] for mutant in mutants if mutant.name in done]
        left = [mutant for mutant in mutants if mutant.name not in done]
        bound = sum(2 + sum(baseline.seconds[name] for name in covering(mutant, baseline)) for mutant in left)
        print(f"{len(left)} mutants; at most about {bound / len(folders) / 60:.0f} minutes if all survive")
        for outcome in run_all(left, folders, baseline):
            outcomes.append(outcome)
            print(
                f"{len(outcomes):4}/{len(mutants)} {outcome.status:9}{outcome.seconds:6.1f} s  {outcome.file}:{outcome.line}"
            )
            if out is not None:
                save(out, outcomes, tree=tree, seed=options.seed, drawn_from=drawn_from)
        os.chdir(ROOT)
    outcomes.sort(key=lambda outcome: (outcome.file, outcome.line, outcome.name))
    show(outcomes, drawn_from, time.monotonic() - start)
    return 0 if outcomes and killed_share(outcomes) >= WANTED else 1


if __name__ == "__main__":
    sys.exit(main())
