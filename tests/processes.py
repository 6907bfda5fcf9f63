"""Real processes that run the command line, each forked off one that has imported everything and started nothing.

1. `start` forks a process, gives it devices and limits, and runs `difffract ARGUMENTS` in it, as a shell would.
2. What it prints goes to `NAME.out` and `NAME.err`; it can be killed as any other, and has its own threads and devices.
3. Compiled programs are read from a cache, which only processes that are to end by themselves add to: one that is
   killed could leave half an entry.
"""

import multiprocessing
import os
import resource
import sys
from pathlib import Path

import jax
from jax.experimental import multihost_utils

from difffract_jax.cli.main import main
from difffract_jax.transcoders import deadlines
from difffract_jax.transcoders.settings import SUPERVISED

CONTEXT = multiprocessing.get_context("forkserver")
PRELOADED = ["processes", "difffract_jax.transcoders.training", "difffract_jax.loading", "difffract_jax.cli.bars"]
NEVER = 10**9


def start(arguments, log, *, cache, devices=1, adds=True, most_bytes=None, start_up=None, fails=None, supervised=False):
    """Starts `difffract ARGUMENTS` and returns its process.

    Args:
        arguments: of the command line.
        log: path without suffix of what it prints.
        cache: directory of compiled programs.
        devices: how many virtual ones it has.
        adds: whether it may add to the cache.
        most_bytes: the longest file it may write; None for any.
        start_up: seconds it waits for others at the start; None for as long as users' processes do.
        fails: after how many computations that processes share the next one fails, and what JAX says then.
        supervised: whether it was started by `--max-restarts`.
    """
    CONTEXT.set_forkserver_preload(PRELOADED)
    given = ([str(argument) for argument in arguments], str(log), str(cache), devices, adds, most_bytes)
    given += (start_up, fails, supervised)
    process = CONTEXT.Process(target=_run, args=given)
    process.start()
    return process


def finish(process, log, seconds=120):
    """Waits for a process, and returns its exit status and what it printed on stderr."""
    process.join(seconds)
    assert process.exitcode is not None, "still running"
    return process.exitcode, Path(f"{log}.err").read_text()


def _run(arguments, log, cache, devices, adds, most_bytes, start_up, fails, supervised):
    for number, suffix in ((1, ".out"), (2, ".err")):
        os.dup2(os.open(log + suffix, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    if most_bytes is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, most_bytes))
    jax.config.update("jax_num_cpu_devices", devices)
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0 if adds else NEVER)
    if supervised:
        os.environ[SUPERVISED] = "0"
    if start_up is not None:
        deadlines.START_UP = start_up
    if fails is not None:
        _let_fail(*fails)
    sys.argv = ["difffract", *arguments]
    main()


def _let_fail(after, said):
    """Has a computation that processes share fail after some that do not, as JAX tells it."""
    shared, done = multihost_utils.process_allgather, []

    def or_fails(*given, **more):
        if len(done) == after:
            raise jax.errors.JaxRuntimeError(said)
        done.append(1)
        return shared(*given, **more)

    multihost_utils.process_allgather = or_fails
