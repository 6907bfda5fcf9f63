"""Seconds that the commands take on the organism, from the shell's point of view, without compiled programs and with.

1. Each command runs as a process of its own, first with an empty cache of compiled programs, then again with what the
   first run left. So "first" is what a newcomer waits for, "again" what everyone waits for every day.
2. `python` is the README's ten lines, run the same way; its first run, too, finds nothing compiled.
3. Beside each stands its bar in seconds, and by how much `--tree` (another checkout, as of an earlier commit) was
   slower in the same run. Machines are shared and noisy: give `--repeats` for the least of several runs.

    python benchmarks/commands.py [--only trace,prune] [--repeats 3] [--tree ../earlier]

The exit status is 1 if a bar is missed.
"""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
RUN = "import sys; from difffract_jax.cli.main import main; sys.argv[0] = 'difffract'; main()"
SCENE = "a red circle left of a blue square"
TARGET = "img/1/f159@13"


class Command(NamedTuple):
    """One line of the table.

    Attributes:
        name: of the command.
        arguments: what follows it.
        first: bar of the first run in seconds; None for none.
        again: bar of the second.
    """

    name: str
    arguments: tuple[str, ...]
    first: float | None
    again: float | None


COMMANDS = (
    Command("generate", ("organism", SCENE, "--out", "image.png"), None, 10),
    Command("trace", ("organism", "organism", SCENE, "--target", TARGET, "--step", "1"), 20, 10),
    Command("heads", ("organism", "organism", "graph.npz"), None, 10),
    Command("validate", ("organism", "organism", "graph.npz", "--out", "validation"), None, 10),
    Command(
        "steer",
        (
            "organism",
            "organism",
            SCENE,
            "--edit",
            "img/1/f159=zero",
            "--seeds",
            "0..3",
            "--out",
            "steered",
        ),
        None,
        10,
    ),
    Command("prune", ("graph.npz", "--out", "pruned.npz"), None, 1),
    Command("export", ("graph.npz", "--format", "circuit-tracer", "--slug", "red", "--out", "red.json"), None, 1),
    Command("compare", ("graph.npz", "graph.npz"), None, 1),
    Command("python", (), None, 15),
)


def ten_lines(tree: Path) -> str:
    """Returns the example in Python of a checkout's README."""
    (code,) = re.findall(r"```python\n(.*?)```", (tree / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    return code


def seconds(command: Command, tree: Path, cache: Path, folder: Path) -> float:
    """Runs a command and returns how long it took.

    Args:
        command: to run.
        tree: checkout whose package runs.
        cache: the user's cache directory, for this run.
        folder: where it runs.
    """
    code = [ten_lines(tree)] if command.name == "python" else [RUN, command.name, *command.arguments]
    kept = {name: value for name, value in os.environ.items() if not name.startswith("JAX_COMPILATION")}
    given = kept | {"PYTHONPATH": str(tree), "XDG_CACHE_HOME": str(cache), "PYTHONDONTWRITEBYTECODE": "1"}
    began = time.perf_counter()
    run = subprocess.run([sys.executable, "-c", *code], cwd=folder, env=given, capture_output=True, text=True)
    taken = time.perf_counter() - began
    if run.returncode:
        sys.exit(f"{command.name} failed in {tree}: {run.stderr.strip()}")
    return taken


def measure(command: Command, tree: Path, folder: Path, repeats: int) -> tuple[float, float]:
    """Returns the least seconds of a first and of a second run."""
    pairs = []
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as cache:
            pairs.append([seconds(command, tree, Path(cache), folder) for _ in range(2)])
    first, again = zip(*pairs, strict=True)
    return min(first), min(again)


def main() -> None:
    """Prints the machine and one row per command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="commands to time, by name, with commas; graph.npz is traced in any case")
    parser.add_argument("--repeats", type=int, default=1, help="runs, of which the least counts")
    parser.add_argument("--tree", type=Path, help="another checkout, to time beside this one")
    args = parser.parse_args()
    wanted = args.only.split(",") if args.only else [command.name for command in COMMANDS]
    unknown = set(wanted) - {command.name for command in COMMANDS}
    if unknown:
        parser.error(f"there is no command {', '.join(sorted(unknown))} here")
    machine = {"machine": platform.machine(), "cores": os.cpu_count(), "load": os.getloadavg(), "jax": version("jax")}
    print(json.dumps(machine | {"python": platform.python_version(), "repeats": args.repeats}))
    print(f"{'command':<10} {'first, s':>9} {'bar':>5} {'again, s':>9} {'bar':>5}" + "   before, s" * bool(args.tree))
    missed = False
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        trace = next(command for command in COMMANDS if command.name == "trace")
        seconds(trace, ROOT, folder / "cache", folder)  # the graph that others read; and Python's own caches
        for command in COMMANDS:
            if command.name not in wanted:
                continue
            first, again = measure(command, ROOT, folder, args.repeats)
            bars = [f"{bar or '':>5}" for bar in (command.first, command.again)]
            row = f"{command.name:<10} {first:9.1f} {bars[0]} {again:9.1f} {bars[1]}"
            if args.tree:
                row += "   {:.1f} {:.1f}".format(*measure(command, args.tree.resolve(), folder, args.repeats))
            print(row, flush=True)
            missed |= first > (command.first or first) or again > (command.again or again)
    sys.exit(int(missed))


if __name__ == "__main__":
    main()
