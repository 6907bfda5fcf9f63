"""FLUX.1[schnell] at its own size with random weights: what the commands need of memory and time on this machine.

`make DIR` writes a fake checkpoint (34 GB) and one site of transcoders (1.2 GB), see `full_size_checkpoint.py`. It
takes minutes, needs less than 1 GiB of private memory, and may be interrupted: the same call goes on.

    python benchmarks/full_size.py make DIR [--small]
"""

import argparse
import sys
from pathlib import Path

import full_size_checkpoint as checkpoint


def main() -> None:
    """Runs the subcommand that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    made = commands.add_parser("make", help="write the fake checkpoint and the transcoders")
    made.add_argument("directory", type=Path, metavar="DIR", help="where to; made when missing")
    made.add_argument("--small", action="store_true", help="the same layout with tiny sizes")
    options = parser.parse_args()
    size = checkpoint.SMALL if options.small else checkpoint.FULL
    print(checkpoint.make(options.directory, size, say=lambda text: print(text, file=sys.stderr, flush=True)))


if __name__ == "__main__":
    main()
