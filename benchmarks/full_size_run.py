"""The commands' work at FLUX.1[schnell]'s size, each step in a process of its own under a cap of private memory.

1. A step is a function of this file: it loads the fake checkpoint streamed from disk, does what its command does, and
   returns figures. `run` starts it as `python full_size_run.py STEP DIR` under `prlimit --data`, which limits private
   memory (not the system's cache of files), and keeps the result in `DIR/results/STEP.json`; a step with a result is
   not run again.
2. A thread reads the private memory of the process (`RssAnon`) five times a second; its maximum is what is reported.
3. All transcoders derive from the one stored site: `DerivedSites`. They read 0.6 GB each as real ones would. Their
   sparsity is that of random weights, and is reported with the figures.
4. `table` writes the rows of docs/full-size.md.
"""

import json
import platform
import re
import resource
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from difffract_jax.circuits.attribution.attribute import attribute
from difffract_jax.circuits.attribution.engine import make_engine
from difffract_jax.circuits.attribution.selection import strongest_feature, target_row
from difffract_jax.circuits.checks.rerun import capture_again
from difffract_jax.circuits.checks.validation import validate
from difffract_jax.circuits.editing.interventions import steer
from difffract_jax.circuits.editing.ranking import rank_features
from difffract_jax.circuits.effects.attention import head_loadings
from difffract_jax.circuits.frozen.replacement import prepare
from difffract_jax.circuits.notation.edits import Edit
from difffract_jax.circuits.trace.capture import capture, capture_steps
from difffract_jax.conversion import convert_flux
from difffract_jax.graphs.pruning import prune
from difffract_jax.loading import load_pipeline, load_transcoders
from difffract_jax.memory import host_memory
from difffract_jax.models.embeddings import embed_prompts, read_embeddings, with_embeddings, write_embeddings
from difffract_jax.models.pipeline import generate
from difffract_jax.models.streaming import READING, Streamed, Take
from difffract_jax.storage.files import atomic_file
from difffract_jax.transcoders.settings import TrainConfig
from difffract_jax.transcoders.sites import parse_sites
from difffract_jax.transcoders.sources import open_sampler
from difffract_jax.transcoders.training import Watch as TrainingWatch
from difffract_jax.transcoders.training import train
from difffract_jax.transcoders.transcoder import FEATURE_AXES, TranscoderSet

GIB = 2**30
BIAS = {3072: 17.0}
"""Width of the model -> factor of the features' biases; 1 for others. The stored site was made for MLP inputs of a root
mean square of 1.3. At full size, where modulations are random, it is about 22: with its own biases 41% of the features
were active, not 0.2%."""
PROMPT = "a red circle above a blue square"
SIXTEEN, EVERY = ("img/3-18", "txt/3-18"), ("*/*",)


class DerivedSites:
    """Transcoders of many sites, of one that is stored: site n has its features rolled by n times `roll`.

    A `models.streaming.LayerSource`; every read reads the whole stored site, as it would a site of its own.
    """

    def __init__(self, stored: Streamed, numbers: range, roll: int) -> None:
        self._stored, self._numbers, self._roll = stored, numbers, roll

    @property
    def depth(self) -> int:
        """How many sites there are."""
        return len(self._numbers)

    def abstract(self) -> Any:
        """Returns the shapes and types of a site."""
        return self._stored.abstract()

    def read(self, layer: int, take: Take | None = None) -> Any:
        """Returns one site's transcoder, or some of its features."""
        source, by = self._stored.source, self._numbers[layer] * self._roll
        features = self.abstract().config.features
        if take is not None:
            part = source.read(0, {path: (axis, (index - by) % features) for path, (axis, index) in take.items()})
            return _sparser(part)
        whole = _sparser(source.read(0))
        for path, axis in FEATURE_AXES.items():
            owner, _, name = path.rpartition(".")
            holder = getattr(whole, owner) if owner else whole
            if owner or hasattr(holder, name):
                setattr(holder, name, type(getattr(holder, name))(np.roll(getattr(holder, name)[...], by, axis)))
        return whole


def _sparser(transcoder: Any) -> Any:
    """Returns a transcoder with its encoder's bias times the factor of `BIAS`, in place."""
    bias, factor = transcoder.enc.bias, BIAS.get(transcoder.config.d_model, 1.0)
    transcoder.enc.bias = type(bias)((np.asarray(bias[...], np.float32) * factor).astype(bias.dtype))
    return transcoder


def derived(home: Path, layout: Any, sites: tuple[str, ...]) -> TranscoderSet:
    """Returns the transcoders of some sites of a model."""
    made = json.loads((home / "full_size.json").read_text(encoding="utf-8"))["transcoders"]
    stored = load_transcoders(home / "transcoders", dtype=jnp.bfloat16, weights="disk")
    every, wanted = parse_sites(["*/*"], layout), parse_sites(sites, layout)
    first, stacks = 0, {}
    for group, numbers in every.members:
        chosen = wanted.groups.get(group.name, ())
        if chosen:
            source = DerivedSites(stored.stacks["img"], range(first, first + len(numbers)), made["roll"])
            stacks[group.name] = Streamed(source, (), tuple(numbers.index(number) for number in chosen))
        first += len(numbers)
    return TranscoderSet(stacks, wanted, stored.config, stored.source)


class Watch(threading.Thread):
    """Follows the private memory of this process; in bytes `peak`, and `reserved`, which is what the cap counts."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak = self.reserved = 0
        self.start()

    def run(self) -> None:
        """Reads it until the process ends."""
        while True:
            self.look()
            time.sleep(0.2)

    def look(self) -> int:
        """Reads it now; returns the peak."""
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        used, reserved = (re.search(rf"{name}:\s+(\d+) kB", status) for name in ("RssAnon", "VmData"))
        self.peak = max(self.peak, 1024 * int(used[1]) if used else 0)
        self.reserved = max(self.reserved, 1024 * int(reserved[1]) if reserved else 0)
        return self.peak


def say(text: str) -> None:
    """Writes a line of progress with the time."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def _pipe(home: Path, *, encoded: bool = True) -> Any:
    pipe = load_pipeline(home / "diffusers", dtype=jnp.bfloat16, weights="disk")
    return with_embeddings(pipe, read_embeddings(home / "embeddings.npz")) if encoded else pipe


def _last_double(pipe: Any, count: int) -> tuple[str, str, int]:
    """Returns the sites of the last double blocks, and the number of the last."""
    last = len(pipe.config.transformer.layout.labels["img"]) - 1
    return f"img/{max(last - count + 1, 0)}-{last}", f"txt/{max(last - count + 1, 0)}-{last}", last


def _run(pipe: Any, side: int, steps: int) -> Any:
    return pipe.plan(height=side, width=side, steps=steps)


def encode_step(home: Path) -> dict[str, Any]:
    """Encodes a prompt and the empty one."""
    pipe = _pipe(home, encoded=False)
    tokens = pipe.plan().text_tokens
    made = embed_prompts(pipe, [PROMPT], tokens, lambda done, count: say(f"{done} of {count} prompts"))
    write_embeddings(made, home / "embeddings.npz")
    return {"prompts": len(made.prompts)}


def generate_step(home: Path, side: int = 128, steps: int = 4) -> dict[str, Any]:
    """Generates an image."""
    pipe = _pipe(home)
    made = generate(
        pipe, PROMPT, run=_run(pipe, side, steps), progress=lambda done, count: say(f"step {done} of {count}")
    )
    return {"side": side, "steps": steps, "image spread": float(made.image.std())}


def trace_step(
    home: Path, side: int, sites: tuple[str, ...], nodes: int, batch: int = 25, span: bool = False
) -> dict[str, Any]:
    """Traces the strongest feature of the highest block with a transcoder, at the first of four steps."""
    pipe = _pipe(home)
    tcs = derived(home, pipe.config.transformer.layout, sites)
    run, times = _run(pipe, side, 4), {}

    def timed(name: str, work: Callable[[], Any]) -> Any:
        begin, read, waited = time.perf_counter(), READING.seconds, READING.waited
        made = work()
        times[name] = {
            "seconds": time.perf_counter() - begin,
            "reading": READING.seconds - read,
            "waited": READING.waited - waited,
        }
        say(f"{name}: {times[name]['seconds']:.0f} s")
        return made

    if span:
        trace = timed("capture", lambda: capture_steps(pipe, tcs, PROMPT, first=0, last=1, run=run))
    else:
        trace = timed("capture", lambda: capture(pipe, tcs, PROMPT, run=run))
    del pipe
    prepared = timed("encode sites", lambda: prepare(trace, tcs))
    label, number = next(reversed([(group.label, numbers[-1]) for group, numbers in tcs.sites.members if numbers]))
    label, number = ("img", number) if label == "txt" else (label, number)
    target = strongest_feature(prepared, tcs, label, number)
    tell = lambda done, count: say(f"{done} of {count} nodes")  # noqa: E731
    graph = timed(
        "attribute",
        lambda: attribute(
            prepared, tcs, target=target, max_nodes=nodes, expansion_batch=batch, target_batch=batch, progress=tell
        ),
    )
    active = [one.sources.values for one in prepared.steps]
    counts = [float((np.asarray(values) > 0).sum(axis=2).mean()) for step in active for values in step if values.size]
    return {
        "side": side,
        "sites": len(tcs.sites.names),
        "nodes": int(graph.target_node.size),
        "edges": int(graph.edge_source.size),
        "conservation": graph.largest_conservation_error,
        "mean active features": counts,
        "most at one token": [int(values.shape[2]) for values in active[0]],
        "decoder rows kept": [int(s.stack.dec.kernel.shape[1]) for s in prepared.steps[0].sites if s.stack is not None],
        "times": times,
    }


def features_step(home: Path) -> dict[str, Any]:
    """Ranks the features of four sites."""
    pipe = _pipe(home)
    tcs = derived(home, pipe.config.transformer.layout, _last_double(pipe, 2)[:2])
    found = rank_features(pipe, tcs, PROMPT, run=_run(pipe, 128, 1), top=3)
    return {"sites": len(tcs.sites.names), "ranked": {label: str(rows[0].feature) for label, rows in found.items()}}


def steer_step(home: Path) -> dict[str, Any]:
    """Generates an image with one feature edited."""
    pipe = _pipe(home)
    site = f"img/{_last_double(pipe, 1)[2]}"
    tcs = derived(home, pipe.config.transformer.layout, (site,))
    made = steer(pipe, tcs, PROMPT, [Edit.parse(f"{site}/f7=add:4")], run=_run(pipe, 128, 1))
    return {"image spread": float(made.image.std())}


def heads_step(home: Path) -> dict[str, Any]:
    """Splits the edges into a target by head, through the last four double blocks."""
    pipe = _pipe(home)
    *sites, last = _last_double(pipe, 4)
    tcs = derived(home, pipe.config.transformer.layout, tuple(sites))
    prepared = prepare(capture(pipe, tcs, PROMPT, run=_run(pipe, 128, 4)), tcs)
    engine = make_engine(prepared, tcs)
    found = head_loadings(engine, target_row(engine, strongest_feature(prepared, tcs, "img", last)))
    return {"heads": int(found.head.size), "strongest": float(np.abs(found.loading).sum(axis=1).max())}


def convert_step(home: Path) -> dict[str, Any]:
    """Converts the checkpoint, and deletes what was written."""
    out = home / "converted"
    said = [0]

    def tell(done: int, count: int) -> None:
        if done - said[0] > 2**32 or done == count:
            said[0] = done
            say(f"{done / 1e9:.1f} of {count / 1e9:.1f} GB")

    made = convert_flux(home / "diffusers", out, overwrite=True, progress=tell)
    shutil.rmtree(out)
    return {"parameters": sum(made.parameters.values()), "source": made.source}


def validate_step(home: Path) -> dict[str, Any]:
    """Holds a small graph of the last four double blocks against the model, in the exact reading and the real one."""
    pipe = _pipe(home)
    *sites, last = _last_double(pipe, 4)
    tcs = derived(home, pipe.config.transformer.layout, tuple(sites))
    prepared = prepare(capture(pipe, tcs, PROMPT, run=_run(pipe, 128, 4)), tcs)
    target = strongest_feature(prepared, tcs, "img", last)
    graph = attribute(prepared, tcs, target=target, max_nodes=10, min_attribution=0.0)
    graph = prune(graph, mode="difffract", by_position=True, node_threshold=0.05)
    say(f"{graph.node_kind.size} nodes")
    # The trace is that of the graph: capturing it anew is what `trace` was measured for.
    again = capture_again(pipe, tcs, graph, trace=prepared.trace)
    tell = lambda done, count: say(f"{done} of {count} parts")  # noqa: E731
    found = validate(again, graph, edges=50, ablations=8, draws=1, readings=("propagated", "full"), progress=tell)
    sets = sum(len(one["rows"]) for one in found["completeness"]["curves"])
    return {
        "nodes": int(graph.node_kind.size),
        "worst": {row["kind"]: row["worst"] for row in found["exactness"]},
        "holds": all(row["holds"] for row in found["exactness"]),
        "runs of circuits": 2 * sets,
    }


def train_step(home: Path, steps: int = 20) -> dict[str, Any]:
    """Trains the transcoder of one site, its rows from the model, streamed from disk."""
    prompts = home / "prompts.txt"
    words = [
        f"a {colour} {shape} number {n}" for n in range(40) for colour in ("red", "blue") for shape in ("cat", "cup")
    ]
    prompts.write_text("\n".join(words) + "\n", encoding="utf-8")
    pipe = load_pipeline(home / "diffusers", dtype=jnp.bfloat16, weights="disk")
    given = {
        "sites": (f"img/{_last_double(pipe, 1)[2]}",),
        "model_dtype": "bf16",
        "height": 128,
        "width": 128,
        "text_tokens": 32,
    }
    # Rows are what takes time: few at a time, so that two runs of the model do.
    given |= {"steps_per_image": 1, "prompts_at_once": 2, "batch": 4, "buffer_rows": 128, "k": 32}
    settings = TrainConfig(
        model=str(home / "diffusers"), prompts=str(prompts), weights="disk", steps=steps, out=home / "training", **given
    )
    watch = TrainingWatch(lambda done, count, means: say(f"step {done} of {count}: {means}"), say)
    shutil.rmtree(settings.out, ignore_errors=True)
    done = train(settings, open_sampler(settings, pipe, "train"), {}, watch)
    shutil.rmtree(settings.out)
    return {"steps": done.step, "last": done.metrics}


class Step(NamedTuple):
    """One step: what it does, and how much private memory it may use, in GiB."""

    work: Callable[[Path], dict[str, Any]]
    cap: float


STEPS: Mapping[str, Step] = {
    "encode": Step(encode_step, 8),
    "convert": Step(convert_step, 4),
    "generate-128": Step(generate_step, 8),
    "trace-16-128": Step(lambda home: trace_step(home, 128, SIXTEEN, 100), 8),
    "trace-16-256": Step(lambda home: trace_step(home, 256, SIXTEEN, 100), 8),
    "trace-57-128": Step(lambda home: trace_step(home, 128, EVERY, 25, 5), 12),
    "features": Step(features_step, 8),
    "steer": Step(steer_step, 8),
    "heads": Step(heads_step, 8),
    "validate": Step(validate_step, 12),
    "train": Step(train_step, 16),
    "trace-16-512": Step(lambda home: trace_step(home, 512, SIXTEEN, 20, 20), 16),
}
"""In the order in which they are run; the first writes the embeddings that the others read."""


def run(home: Path, names: list[str]) -> None:
    """Runs the steps that have no result yet, one after the other."""
    results = home / "results"
    results.mkdir(exist_ok=True)
    failed = []
    for name in names or STEPS:
        if name not in STEPS:
            sys.exit(f"There is no step {name}; there are {', '.join(STEPS)}.")
        if (results / f"{name}.json").exists():
            say(f"{name} has a result already")
            continue
        cap = int(STEPS[name].cap * GIB)
        say(f"{name}, with at most {STEPS[name].cap:g} GiB of private memory")
        command = ["prlimit", f"--data={cap}", sys.executable, __file__, name, str(home), str(host_memory().total)]
        status = subprocess.run(command, check=False).returncode
        if status:
            say(f"{name} ended with status {status}")
            failed.append(name)
    if failed:
        sys.exit(f"Without a result: {', '.join(failed)}; the same call tries them again.")


def measure(name: str, home: Path, step: Step, memory: int) -> None:
    """Does one step in this process, and writes its result.

    Args:
        name: of the step.
        home: of the checkpoint.
        step: what it does.
        memory: bytes that the machine has, or a control group leaves of it, pages of files included.
    """
    watch, begin = Watch(), time.perf_counter()
    found = step.work(home)
    usage = resource.getrusage(resource.RUSAGE_SELF)
    figures = {
        "step": name,
        "cap": step.cap,
        "minutes": (time.perf_counter() - begin) / 60,
        "processor minutes": (usage.ru_utime + usage.ru_stime) / 60,
        "private peak": watch.look() / GIB,
        "reserved peak": watch.reserved / GIB,
        "read": READING.nbytes / 1e9,
        "reading minutes": READING.seconds / 60,
        "waited minutes": READING.waited / 60,
        "memory of the host": memory / GIB,
        "machine": f"{platform.processor() or platform.machine()}, jax {jax.__version__}",
    }
    with atomic_file(home / "results" / f"{name}.json") as partial:
        partial.write_text(json.dumps(figures | {"found": found}, indent=2) + "\n", encoding="utf-8")
    say(json.dumps(figures))


def table(home: Path) -> str:
    """Returns the rows of docs/full-size.md, of all results that there are."""
    lines = [
        "| step | private memory, GiB (cap) | minutes | processor minutes | read, GB | minutes waiting for layers |",
        "|---|---|---|---|---|---|",
    ]
    for name in STEPS:
        path = home / "results" / f"{name}.json"
        if path.exists():
            one = json.loads(path.read_text(encoding="utf-8"))
            lines.append(
                f"| {name} | {one['private peak']:.1f} ({one['cap']:g}) | {one['minutes']:.1f} | "
                f"{one['processor minutes']:.1f} | {one['read']:.0f} | {one['waited minutes']:.1f} |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    measure(sys.argv[1], Path(sys.argv[2]), STEPS[sys.argv[1]], int(sys.argv[3]))
