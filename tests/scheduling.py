"""How pytest-xdist hands files out to its processes, and goes on where a process ends in the middle of a test."""

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from xdist.scheduler import LoadFileScheduling


class Together(LoadFileScheduling):
    """Hands out files as `--dist=loadfile` does, but some of them as one; survives a process that ends.

    pytest-xdist 3.8 waits without end once a process has crashed (pytest-dev/pytest-xdist 1323, 1327, 1378): it hands
    the test that crashed and the files that are done to the next process, and one test alone, which that process holds
    back until it knows of another. Here the test counts as failed and the other files go on.
    """

    def __init__(self, config: Any, log: Any, first: Mapping[str, str]) -> None:
        """Takes what stands together.

        Args:
            config: of pytest.
            log: of pytest-xdist.
            first: a file -> the first of those that it stands with.
        """
        super().__init__(config, log)
        self.first = first

    def _split_scope(self, nodeid: str) -> str:
        file = super()._split_scope(nodeid)
        return self.first.get(file, file)

    def _assign_work_unit(self, node: Any) -> None:
        with suppress(OSError):  # it has ended, which is known a moment later: `remove_node` then takes the files back
            super()._assign_work_unit(node)

    def _reschedule(self, node: Any) -> None:
        if node in self.registered_collections:  # else it is still collecting, and is asked again after that
            super()._reschedule(node)

    def remove_node(self, node: Any) -> str | None:
        """Gives back what a process has not run, and returns the test in which it ended; None if it had run all."""
        work = self.assigned_work.pop(node)
        waiting = [(file, test) for file, tests in work.items() for test, done in tests.items() if not done]
        if not waiting:
            return None
        file, crashed = waiting[0]
        work[file][crashed] = True
        self.workqueue.update({file: tests for file, tests in work.items() if not all(tests.values())})
        for other in self.assigned_work:
            self._reschedule(other)
        return crashed

    def schedule(self) -> None:
        """Hands out files; a process that takes the place of another gets two, or is told that there are no more."""
        begun = self.collection is not None
        super().schedule()
        if begun:
            for node in self.nodes:
                self._reschedule(node)
