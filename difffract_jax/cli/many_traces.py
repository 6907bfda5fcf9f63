"""`trace --prompts` and `--seeds`: many runs, a graph each, into one directory that can be taken up again."""

import re
import shlex
from collections import Counter
from pathlib import Path
from typing import Any

from difffract_jax.circuits.attribution.attribute import attribute
from difffract_jax.cli import options as opt
from difffract_jax.cli.bars import progress
from difffract_jax.cli.output import emit
from difffract_jax.cli.tracing import Tracing, listed, open_tracing, recorded, resolved
from difffract_jax.config import UserError, provenance
from difffract_jax.graphs.collection import Collection, Run, check_place, fill_collection
from difffract_jax.graphs.graph import Graph
from difffract_jax.graphs.population import FEWEST_UNITS
from difffract_jax.trace_settings import TraceConfig
from difffract_jax.transcoders.prompt_files import read_prompts

SHARED = (
    *("target", "sites", "weight", "step", "steps", "height", "width", "text_tokens", "guidance", "noise"),
    *("max_nodes", "expansion_batch", "min_attribution", "precision", "attention", "max_scores", "pooled"),
    *("include_padding", "model_dtype", "transcoder_dtype"),
)
"""Settings that all graphs of a collection have in common, beside the model and its transcoders."""
ONE_RUN = ("activations", "latents", "export_json")
"""Settings that describe one run alone."""
MOST_SEEDS = 100_000
SHOWN_PROBLEMS = 5


def trace_many(settings: TraceConfig, *, share: str | None, retry: bool, json: bool) -> None:
    """Traces every prompt with every seed.

    Args:
        settings: of `trace`.
        share: which part of the runs, as in 2/4; None for all.
        retry: whether runs that could not be traced before are tried again.
        json: print one JSON object.
    """
    part = read_share(share)
    runs, out = runs_of(settings), settings.out if "out" in settings.model_fields_set else Path("graphs")
    if out.suffix == ".npz":
        raise UserError(f"Many runs are written into a directory, but --out {out} is a graph file; name a directory.")
    if not runs[part[0] :: part[1]]:
        raise UserError(f"--share {share} is empty, as there are {len(runs)} runs; make fewer shares.")
    check_place(out)
    opened = open_tracing(settings)
    shared = settings.model_dump(mode="json", include=set(SHARED)) | {"target": listed(settings.target)}
    shared |= {"model": opened.pipe.source, "transcoders": opened.tcs.source}
    # Collections of other models do not name it.
    shared |= {} if settings.negative_prompt is None else {"negative_prompt": settings.negative_prompt}

    def trace_one(prompt: str, seed: int) -> Graph:
        return _trace(opened, settings.model_copy(update={"prompt": prompt, "seed": seed, "out": out}))

    with progress("Tracing runs") as advance:
        collection = fill_collection(out, runs, trace_one, settings=shared, share=part, retry=retry, progress=advance)
    emit(_summary(collection, runs[part[0] :: part[1]]), as_json=json)


def runs_of(settings: TraceConfig) -> list[Run]:
    """Returns prompts and seeds, prompt by prompt.

    Args:
        settings: of `trace`.

    Raises:
        UserError: if it is not clear what shall run, or a prompt or seed is given twice.
    """
    for name in ONE_RUN:
        if getattr(settings, name) is not None:
            raise UserError(f"{name} describes one run; leave it out, or --prompts and --seeds.")
    if settings.prompts is None and settings.prompt is None:
        raise UserError("PROMPT is missing; give the prompt of all seeds, or --prompts FILE.")
    if settings.prompts is not None and settings.prompt is not None:
        raise UserError("Both PROMPT and --prompts name what shall run; give one of them.")
    if settings.seeds is not None and "seed" in settings.model_fields_set:
        raise UserError("Both --seed and --seeds name what shall run; give one of them.")
    prompts = [settings.prompt] if settings.prompts is None else read_prompts(settings.prompts)
    twice = [prompt for prompt, often in Counter(prompts).items() if often > 1]
    if twice:
        raise UserError(f"{settings.prompts} holds {twice[0]!r} more than once; keep it once, and use --seeds.")
    seeds = [settings.seed] if settings.seeds is None else read_seeds(settings.seeds)
    return [(prompt, seed) for prompt in prompts if prompt is not None for seed in seeds]


def read_share(text: str | None) -> tuple[int, int]:
    """Reads `2/4`, the second of four.

    Args:
        text: what was given; None for all.

    Returns:
        Number of the share, from 0, and of all shares.

    Raises:
        UserError: if it is not such a share.
    """
    match = re.fullmatch(r"(\d+)/(\d+)", text or "1/1")
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise UserError(f"share must be which of how many, as in 2/4, but got {text!r}.")
    return int(match[1]) - 1, int(match[2])


def read_seeds(text: str) -> list[int]:
    """Reads `0-9`, `0..9` or `0,3,7`, or several of these joined by commas.

    Args:
        text: what was given.

    Raises:
        UserError: if it is none of these, a range descends, or a seed comes twice.

    Example:
        >>> read_seeds("0-2,7")
        [0, 1, 2, 7]
    """
    seeds: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:\s*(?:-|\.\.)\s*(\d+))?\s*", part)
        if match is None:
            raise UserError(f"seeds must be numbers or ranges, as in 0-9 or 0,3,7, but got {text!r}.")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise UserError(f"The seeds {part.strip()} count down; write {last}-{first}.")
        if last - first >= MOST_SEEDS:
            raise UserError(f"The seeds {part.strip()} are more than {MOST_SEEDS:,}; give fewer.")
        seeds += range(first, last + 1)
    if len(set(seeds)) < len(seeds):
        raise UserError(f"The seeds {text} name one twice; name each once.")
    return seeds


def _trace(opened: Tracing, settings: TraceConfig) -> Graph:
    """Traces one run."""
    trace = recorded(opened, settings)
    graph = attribute(trace, opened.tcs, target=resolved(opened, trace), **opened.expansion)
    sources = opt.sources(model=opened.pipe, transcoders=opened.tcs)
    alone = settings.model_copy(update={"prompts": None, "seeds": None})
    return graph.with_provenance(**provenance("trace", alone, **sources))


def _summary(collection: Collection, runs: list[Run]) -> dict[str, Any]:
    """Returns what the command prints."""
    wanted = set(runs)
    done = [run for run in collection.runs if (run.prompt, run.seed) in wanted]
    problems = [run for run in done if run.problem]
    summary: dict[str, Any] = {
        "collection": str(collection.path),
        "runs": len(runs),
        "traced": len(done) - len(problems),
    }
    if problems:
        rows = [{"prompt": run.prompt, "seed": run.seed, "why": run.problem} for run in problems[:SHOWN_PROBLEMS]]
        summary |= {"not traced": len(problems), "the first of them": rows}
    if len(collection.runs) > len(done):
        summary |= {"further runs there": len(collection.runs) - len(done)}
    graphs = [(run.prompt, run.seed) for run in collection.runs if run.graph]
    prompts, seeds = ({run[place] for run in graphs} for place in (0, 1))
    enough = len(prompts if len(prompts) > 1 else seeds) >= FEWEST_UNITS
    path = shlex.quote(str(collection.path))
    return summary | {"next": f"difffract combine {'intervals' if enough else 'average'} {path}"}
