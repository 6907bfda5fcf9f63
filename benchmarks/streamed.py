"""What streaming weights costs where nobody would need it: the organism, resident against host memory and disk.

Model and transcoders are loaded three times, with weights on the device, in host memory and on disk. With each, images
are made and a feature is traced; the first run compiles and does not count. Modes take turns, so that what else the
machine does falls on all alike; a mode's figure is the median of its ratios to the resident run of the same turn. The
images must be identical, and edges agree to 1e-6 of the largest.

    python benchmarks/streamed.py [--repeats 9]

The exit status is 1 if they do not.
"""

import argparse
import os
import statistics
import sys
import time

import jax
import numpy as np

from difffract_jax import attribute, capture, generate, load_pipeline, load_transcoders

PARSER = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
PARSER.add_argument("--repeats", type=int, default=9, help="turns whose median is taken")
MODES = ("device", "host", "disk")
SCENE = "a red circle left of a blue square"


def edges_of(graph):
    """Returns a graph's attributions by its sources' and targets' nodes."""
    names = ("kind", "stream", "block", "position", "feature")
    keys = list(zip(*(getattr(graph, f"node_{name}").tolist() for name in names), strict=True))
    pairs = zip(graph.edge_source.tolist(), graph.edge_target.tolist(), strict=True)
    return {(keys[s], keys[t]): a for (s, t), a in zip(pairs, graph.edge_attribution.tolist(), strict=True)}


def apart(ours, theirs):
    """Returns the largest difference of two graphs' edges over the largest edge; an edge of one alone counts as 0."""
    one, other = edges_of(ours), edges_of(theirs)
    largest = max(map(abs, one.values()))
    return max(abs(one.get(key, 0.0) - other.get(key, 0.0)) for key in one.keys() | other.keys()) / largest


def main():
    """Prints the table."""
    args = PARSER.parse_args()
    held = {
        mode: (load_pipeline("organism", weights=mode), load_transcoders("organism", weights=mode)) for mode in MODES
    }

    def image(mode):
        return np.asarray(generate(held[mode][0], SCENE, seed=0).image)

    def graph(mode):
        pipe, tcs = held[mode]
        return attribute(capture(pipe, tcs, SCENE, step=1), tcs, target="img/1/f159@13", max_nodes=100)

    same, worst = True, 0.0
    took = {name: {mode: [] for mode in MODES} for name in ("generate", "trace")}
    for turn in range(args.repeats + 1):
        made = {}
        for mode in MODES:
            for name, work in (("generate", image), ("trace", graph)):
                begin = time.process_time()
                made[name, mode] = work(mode)
                if turn:
                    took[name][mode].append(time.process_time() - begin)
        for mode in MODES[1:]:
            same &= np.array_equal(made["generate", mode], made["generate", "device"])
            worst = max(worst, apart(made["trace", "device"], made["trace", mode]))
    print(f"jax {jax.__version__}, {os.cpu_count()} processors, load {os.getloadavg()}; processor seconds, medians")
    print("| what | weights | s | over resident |\n|---|---|---|---|")
    for name, modes in took.items():
        for mode, times in modes.items():
            ratio = statistics.median(a / b for a, b in zip(times, modes["device"], strict=True))
            print(f"| {name} | {mode} | {statistics.median(times):.3f} | {ratio:.2f} |")
    print(f"images identical: {same}; edges apart by {worst:.1e} of the largest")
    sys.exit(not same or worst > 1e-6)


if __name__ == "__main__":
    main()
