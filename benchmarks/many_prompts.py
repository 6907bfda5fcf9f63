"""Minutes that many prompts of the organism take, traced and aggregated, and how sure their edges become.

1. `difffract trace --prompts` traces `--prompts` captions, distinct ones of the organism's world, in one process.
2. Beside it, `--single` captions are each traced by a command of its own, with compiled programs kept as usual; what
   all would take that way is their mean times the number of captions.
3. `difffract combine intervals` of all; then, for growing numbers of prompts, the median half-width of the intervals of
   edges into the target, over the absolute mean of each, of those that all prompts have.

    python benchmarks/many_prompts.py [--prompts 1000] [--single 5]

Machines are shared and noisy: seconds of the processor stand beside those of the clock.
"""

import argparse
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

from difffract_jax.graphs.collection import read_collection
from difffract_jax.graphs.population import edge_table, intervals
from difffract_jax.organism.world import scenes

PARSER = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
PARSER.add_argument("--prompts", type=int, default=1000, help="how many")
PARSER.add_argument("--single", type=int, default=5, help="how many are traced one by one")
RUN = "import sys; from difffract_jax.cli.main import main; sys.argv[0] = 'difffract'; main()"
TRACE = ("trace", "organism", "organism")
TARGET = ("--target", "img/1/f159", "--step", "1", "--max-nodes", "100")


def difffract(*arguments):
    """Runs a command; returns seconds of the clock and of the processor."""
    before, begin = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run([sys.executable, "-c", RUN, *map(str, arguments)], check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return np.array([time.perf_counter() - begin, used])


def captions(count):
    """Returns distinct captions of the organism's world."""
    drawn = dict.fromkeys(scenes(0, 0, 4 * count).captions)
    return list(drawn)[:count]


def main():
    """Prints the figures."""
    args = PARSER.parse_args()
    print(f"{platform.machine()}, {os.cpu_count()} processors, load {os.getloadavg()}, jax {jax.__version__}")
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        texts = captions(args.prompts)
        (home / "prompts.txt").write_text("\n".join(texts), encoding="utf-8")
        difffract(*TRACE, texts[0], *TARGET, "--out", home / "one.npz")  # compiles
        singles = [difffract(*TRACE, text, *TARGET, "--out", home / "one.npz") for text in texts[: args.single]]
        many = difffract(*TRACE, "--prompts", home / "prompts.txt", *TARGET, "--out", home / "graphs")
        table_of_all = difffract("combine", "intervals", home / "graphs", "--out", home / "edges.csv")
        each = np.mean(singles, axis=0) * len(texts)
        print(f"{len(texts)} prompts | clock, min | processor, min")
        for name, (clock, used) in {"in one command": many, "one by one, from the mean": each}.items():
            print(f"{name} | {clock / 60:.1f} | {used / 60:.1f}")
        print(f"intervals of all: {table_of_all[0]:.1f} s, {table_of_all[1]:.1f} s of the processor")
        collection = read_collection(home / "graphs")
        graphs = list(collection.graphs())
        print(f"traced {len(graphs)} of {len(texts)}")
        print("prompts | edges into the target that all have | median half-width")
        for count in (n for n in (10, 30, 100, 300, 1000, 3000) if n <= len(graphs)):
            table = edge_table(graphs[:count])
            rows = [row for row in intervals(table) if row.share == 1 and row.target in table.roots]
            widths = [(row.high - row.low) / 2 / abs(row.mean) for row in rows]
            print(f"{count} | {len(rows)} | {np.median(widths):.3f}")


if __name__ == "__main__":
    main()
