"""FLUX.1[schnell] at its own size with random weights: what the commands need of memory and time on this machine.

`make DIR` writes a fake checkpoint (34 GB) and one site of transcoders (1.2 GB), see `full_size_checkpoint.py`. It
takes minutes, needs less than 1 GiB of private memory, and may be interrupted: the same call goes on.

    python benchmarks/full_size.py make DIR [--small]

`run DIR [STEP ...]` does what the commands do, streamed from disk, each step in a process of its own under a cap of
private memory, see `full_size_run.py`; a step that has a result is not run again. `table DIR` prints the results.

    python benchmarks/full_size.py run DIR
    python benchmarks/full_size.py table DIR
"""

import argparse
import sys
from pathlib import Path

import full_size_checkpoint as checkpoint
import full_size_run as rehearsal


def main() -> None:
    """Runs the subcommand that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    made = commands.add_parser("make", help="write the fake checkpoint and the transcoders")
    made.add_argument("directory", type=Path, metavar="DIR", help="where to; made when missing")
    made.add_argument("--small", action="store_true", help="the same layout with tiny sizes")
    run = commands.add_parser("run", help="do the commands' work and keep what it took")
    run.add_argument("directory", type=Path, metavar="DIR", help="from `make`")
    run.add_argument("steps", nargs="*", metavar="STEP", help=f"some of {', '.join(rehearsal.STEPS)}; all if left out")
    results = commands.add_parser("table", help="print the results as a table")
    results.add_argument("directory", type=Path, metavar="DIR", help="from `run`")
    options = parser.parse_args()
    if options.command == "run":
        return rehearsal.run(options.directory, options.steps)
    if options.command == "table":
        return print(rehearsal.table(options.directory))
    size = checkpoint.SMALL if options.small else checkpoint.FULL
    print(checkpoint.make(options.directory, size, say=lambda text: print(text, file=sys.stderr, flush=True)))


if __name__ == "__main__":
    main()
