"""What each test costs in processor seconds.

`pytest --processor-times=FOLDER`, then `python tests/processor_times.py FOLDER`. `--durations` tells wall time, which
grows with whatever else the machine does; processor time does not, and two cores share the sum. Each process of a run
writes its own file into the folder: one line of JSON for collecting and one for each test.

A test's line has the processor seconds of this process and of the processes that it ended, set-up and tear-down
included, how many programs were lowered, and how many of these were compiled because no cache held them.
"""

import json
import os
import resource
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax.monitoring
import pytest

LOWERED = "/jax/core/compile/jaxpr_to_mlir_module_duration"
MISSED = "/jax/compilation_cache/cache_misses"


def spent() -> float:
    """Returns the processor seconds of this process and of its children that have ended."""
    uses = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(use.ru_utime + use.ru_stime for use in uses)


class ProcessorTimes:
    """A pytest plugin that writes one line for each test."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.file = folder / f"{os.getpid()}.jsonl"
        self.lowered = self.compiled = 0
        jax.monitoring.register_event_duration_secs_listener(self._count_lowered)
        jax.monitoring.register_event_listener(self._count_compiled)

    def _count_lowered(self, event: str, duration: float, **_: str | int) -> None:
        self.lowered += event == LOWERED

    def _count_compiled(self, event: str, **_: str | int) -> None:
        self.compiled += event == MISSED

    def _write(self, what: str, seconds: float, lowered: int, compiled: int) -> None:
        line = {"what": what, "seconds": round(seconds, 3), "lowered": lowered, "compiled": compiled}
        with self.file.open("a", encoding="utf-8") as out:
            out.write(json.dumps(line) + "\n")

    def pytest_collection_finish(self) -> None:
        self._write("collecting", spent(), self.lowered, self.compiled)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        begin = spent(), self.lowered, self.compiled
        try:
            return (yield)
        finally:
            used = (now - then for now, then in zip((spent(), self.lowered, self.compiled), begin, strict=True))
            self._write(item.nodeid, *used)


class Cost(NamedTuple):
    """What a file's tests took together."""

    seconds: float
    lowered: int
    compiled: int
    tests: int


def by_file(folder: Path) -> dict[str, Cost]:
    """Returns the cost of each file that a run left in `folder`, the dearest first; collecting counts as a file."""
    costs: defaultdict[str, Cost] = defaultdict(lambda: Cost(0, 0, 0, 0))
    for file in folder.glob("*.jsonl"):
        for line in map(json.loads, file.read_text(encoding="utf-8").splitlines()):
            name = line["what"].partition("::")[0]
            seconds, lowered, compiled, tests = costs[name]
            costs[name] = Cost(
                seconds + line["seconds"], lowered + line["lowered"], compiled + line["compiled"], tests + 1
            )
    return dict(sorted(costs.items(), key=lambda cost: -cost[1].seconds))


if __name__ == "__main__":
    table = by_file(Path(sys.argv[1]))
    total = Cost(*map(sum, zip(*table.values(), strict=True)))
    for name, cost in {**table, "together": total}.items():
        print(f"{cost.seconds:8.1f} s {cost.lowered:6d} lowered {cost.compiled:6d} compiled {cost.tests:5d}  {name}")
