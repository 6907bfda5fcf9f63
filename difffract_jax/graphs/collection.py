"""Graphs of many runs in one directory, traced one after another, and taken up again where it was stopped (NumPy).

    COLLECTION/collection.json         format, and what all runs have in common
               index.jsonl             a line per run: prompt, seed, graph or problem, size
               index-2-of-4.jsonl      the same of a share, where several processes trace
               index.parquet           the same as a table, once all runs are done; with the extra `data`
               graphs/3f1c...npz       a run's graph, named by a hash of prompt and seed

1. A run is a prompt and a seed. `fill_collection` traces those that the index lacks, and adds a line once the graph has
   its name. What a killed process leaves is at most a graph without a line, which is traced again, and part of a line,
   which is left out.
2. A run whose target is inactive, or cannot be traced for another reason that is told, has a line with the problem. It
   is not tried again unless that is asked for; what is said of a run is then its graph, if any try gave one.
3. Runs can be added later, with the same settings; others are refused.
4. Several processes, on one machine or on several with one disk or one bucket, each trace a share and write an index of
   their own.
5. In a bucket, `collection_files` says how an index grows and who holds it; a graph is there before its line.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from difffract_jax.config import UserError
from difffract_jax.graphs.collection_files import CollectionFiles, fetched, files_of
from difffract_jax.graphs.graph import Graph
from difffract_jax.storage.files import atomic_file
from difffract_jax.storage.remote.addresses import is_remote
from difffract_jax.storage.remote.publication import Listing

Run = tuple[str, int]
"""Prompt and seed."""
VERSION = 1
_HEAD, _INDEX, _GRAPHS = "collection.json", "index.jsonl", "graphs"


@dataclass(frozen=True)
class TracedRun:
    """One line of the index.

    Attributes:
        prompt: of the run.
        seed: of its starting noise.
        graph: file of its graph within the collection; None if there is none.
        problem: why there is none; "" if there is one.
        nodes: of the graph.
        edges: of the graph.
    """

    prompt: str
    seed: int
    graph: str | None
    problem: str
    nodes: int
    edges: int


@dataclass(frozen=True)
class Collection:
    """A directory of graphs.

    Attributes:
        path: the directory.
        settings: what all runs have in common, JSON values.
        runs: in the order in which they were traced, share by share.
    """

    path: Path
    settings: Mapping[str, Any]
    runs: tuple[TracedRun, ...]

    def graphs(self) -> Iterator[Graph]:
        """Reads the graphs, one after another."""
        for run in self.runs:
            if run.graph is not None:
                yield Graph.load(self.path / run.graph)


def is_collection(path: str | Path) -> bool:
    """Says whether a path is a collection of graphs."""
    return (Path(path) / _HEAD).is_file()


def read_collection(path: str | Path) -> Collection:
    """Reads what a collection holds, but for the graphs; of one in a bucket, these are fetched.

    Args:
        path: the directory.

    Raises:
        UserError: if it is not a collection, its files are damaged, or it cannot be fetched.
    """
    if not is_remote(path):
        return _read(files_of(path))
    remote = Path(path)
    collection = _read(files_of(fetched(remote, lambda listed: [*filter(_is_index, listed.files)])), remote)

    def graphs(listed: Listing) -> list[str]:
        return [run.graph for run in collection.runs if run.graph in listed.files]

    # Not the indices again, which others may be writing: graphs stay as they are.
    home = fetched(remote, lambda listed: [_HEAD, *graphs(listed)])
    return Collection(home, collection.settings, collection.runs)


def _read(files: CollectionFiles, path: Path | None = None) -> Collection:
    """Reads head and indices of a collection; `path` is what errors name, if it is not where the files are."""
    path = path or files.path
    text = files.text(_HEAD)
    if text is None:
        raise UserError(
            f"{path} is not a collection of graphs, which has a file {_HEAD}; give a directory that `difffract trace "
            "--prompts` wrote."
        )
    try:
        head = json.loads(text)
        version, settings = head["format_version"], dict(head["settings"])
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path / _HEAD} is damaged; trace the collection again.") from None
    if version != VERSION:
        raise UserError(f"{path} has format {version!r}, but this version reads {VERSION}; install a newer one.")
    # Once each: of shares of 2 and of 3 at the same time two may trace one run.
    indices = [name for name in files.names() if _is_index(name) and name != _HEAD]
    lines = (run for name in indices for run in _read_lines(files, name, path))
    return Collection(files.path, settings, tuple(_once(lines)))


def _once(lines: Iterable[TracedRun]) -> list[TracedRun]:
    """Returns what is known of each run: a line with a graph where there is one, else the last that tells a problem."""
    known: dict[Run, TracedRun] = {}
    for line in lines:
        before = known.get((line.prompt, line.seed))
        if before is None or before.graph is None or line.graph is not None:
            known[line.prompt, line.seed] = line
    return list(known.values())


def _is_index(name: str) -> bool:
    """Says whether a file of a collection is one that says what it holds."""
    return name == _HEAD or (name.startswith("index") and name.endswith(".jsonl"))


def _read_lines(files: CollectionFiles, name: str, path: Path | None = None) -> list[TracedRun]:
    """Returns what an index says, line by line; `path` is as for `_read`."""
    runs, lines = [], (files.text(name) or "").split("\n")
    for number, line in enumerate(lines[:-1], 1):  # what follows the last newline was being written
        try:
            runs.append(TracedRun(**json.loads(line)))
        except (ValueError, TypeError):
            raise UserError(
                f"Line {number} of {(path or files.path) / name} is damaged; take the line out, and its run is traced "
                "again."
            ) from None
    return runs


def fill_collection(
    path: str | Path,
    runs: Sequence[Run],
    trace_one: Callable[[str, int], Graph],
    *,
    settings: Mapping[str, Any],
    share: tuple[int, int] = (0, 1),
    retry: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Collection:
    """Traces the runs that a collection lacks.

    Args:
        path: the directory; it is made if it does not exist.
        runs: prompts and seeds.
        trace_one: returns the graph of a prompt and a seed; a `UserError` of it is noted as the run's problem.
        settings: what all runs have in common, JSON values: a collection that was begun with others is refused.
        share: which of how many equal parts of the runs to trace, counted from 0; other processes may trace the others
            at the same time.
        retry: whether runs that could not be traced are tried again.
        progress: called with (runs done, runs) of the share.

    Returns:
        The collection, with runs that it had before.

    Raises:
        UserError: if the directory holds something else or was begun with other settings, a run is asked for twice,
            the share is empty, another process writes it, or not one run could be traced.

    Example:
        >>> import tempfile
        >>> from difffract_jax.graphs.graph import Graph
        >>> def refuse(prompt, seed):
        ...     raise UserError("img/1/f3 is inactive there.")
        >>> with tempfile.TemporaryDirectory() as home:
        ...     fill_collection(f"{home}/many", [("a red circle", 0)], refuse, settings={})
        Traceback (most recent call last):
        ...
        difffract_jax.config.UserError: Not one of 1 runs could be traced; the first: img/1/f3 is inactive there.
    """
    if len(set(runs)) < len(runs):
        twice = next(run for i, run in enumerate(runs) if run in runs[:i])
        raise UserError(f"The run of {twice[0]!r} with seed {twice[1]} is asked for twice; name it once.")
    part, parts = share
    if not 0 <= part < parts:
        raise UserError(f"There is no share {part} of {parts}; shares are counted from 0.")
    if parts > 1 and part >= len(runs):
        raise UserError(f"Share {part + 1} of {parts} is empty, as there are {len(runs)} runs; make fewer shares.")
    files = files_of(path)
    _begin(files, settings)
    index = _INDEX if parts == 1 else f"index-{part + 1}-of-{parts}.jsonl"
    own = list(runs)[part::parts]
    with files.holding(index):
        known = {(run.prompt, run.seed) for run in _read(files).runs if run.graph is not None or not retry}
        text = "".join(map(_line, _read_lines(files, index)))  # without what a killed process left of a line
        files.write(index, text)
        missing = [run for run in own if run not in known]
        for done, (prompt, seed) in enumerate(missing, len(own) - len(missing)):
            if progress is not None:
                progress(done, len(own))
            line = _line(_trace(files.path, prompt, seed, trace_one))
            files.append(index, text, line)
            text += line
        # Of runs that were tried again, what is known of them now.
        files.write(index, "".join(map(_line, _once(_read_lines(files, index)))))
        if progress is not None:
            progress(len(own), len(own))
    everything = _read(files)
    _write_table(files.path, everything.runs)
    wanted = set(own)
    asked = [run for run in everything.runs if (run.prompt, run.seed) in wanted]
    if asked and not any(run.graph for run in asked):
        raise UserError(f"Not one of {len(asked)} runs could be traced; the first: {asked[0].problem}")
    return everything


def check_place(path: str | Path) -> None:
    """Refuses a directory for a collection that holds something else; for use before work.

    Args:
        path: the directory; it need not exist.

    Raises:
        UserError: if it is a file, or has files that are not a collection's.
    """
    _check_place(files_of(path))


def _check_place(files: CollectionFiles) -> None:
    """Refuses a place that holds something else; another share may be beginning there, and have written graphs."""
    names = files.names()
    if _HEAD not in names and any(name != _GRAPHS for name in names):
        raise UserError(f"{files.path} exists already and is not a collection of graphs; name another output.")


def _begin(files: CollectionFiles, settings: Mapping[str, Any]) -> None:
    """Makes a collection; one that exists must have the same settings."""
    plain = json.loads(json.dumps(dict(settings)))
    _check_place(files)
    head = {"kind": "graphs", "format_version": VERSION, "settings": plain}
    files.begin(_HEAD, json.dumps(head, indent=1) + "\n")
    begun = _read(files).settings
    other = sorted(name for name in plain.keys() | begun.keys() if plain.get(name) != begun.get(name))
    if other:
        was = ", ".join(f"{name} {begun.get(name)!r}, not {plain.get(name)!r}" for name in other)
        raise UserError(f"{files.path} was begun with {was}; name another output, or give what it was begun with.")


def _trace(directory: Path, prompt: str, seed: int, trace_one: Callable[[str, int], Graph]) -> TracedRun:
    try:
        graph = trace_one(prompt, seed)
    except UserError as error:
        return TracedRun(prompt, seed, None, str(error), 0, 0)
    key = sha256(json.dumps([prompt, seed]).encode()).hexdigest()[:16]
    name = f"{_GRAPHS}/{key}.npz"
    graph.save(directory / name)
    return TracedRun(prompt, seed, name, "", int(graph.node_kind.size), int(graph.edge_source.size))


def _line(run: TracedRun) -> str:
    return json.dumps(asdict(run)) + "\n"


def _write_table(directory: Path, runs: Sequence[TracedRun]) -> None:
    """Writes the index as a Parquet file, where the extra `data` is installed."""
    if find_spec("pyarrow") is None:
        return
    arrow, parquet = import_module("pyarrow"), import_module("pyarrow.parquet")
    with atomic_file(directory / "index.parquet") as partial, partial.open("wb") as file:
        parquet.write_table(arrow.Table.from_pylist([asdict(run) for run in runs]), file)
