"""How many bytes a command needs, counted from shapes: no weight is read, nothing is compiled.

1. `Work` describes a command: the pipeline's shapes, types, sizes of the run, transcoders, and whether the weights lie
   in memory whole (`device`) or pass through it block by block, from host memory or from disk (`streamed`).
2. A command is a few phases, one after the other. What a phase holds is exact: weights, transcoders, record, codes.
   What it needs in between (`passing`) is counted from the largest arrays that live at once, and errs to more.
3. A command needs what its largest phase needs. Where what is held alone is more than there is, it cannot run.
4. `remedies` says which of a command's own changes would make it fit.

Symbols: S tokens of the joint sequence, D channels, F features of a transcoder, K places for features per position,
T targets pulled back together. `docs/memory.md` has the counts held against what compilers say.
"""

from collections.abc import Callable, Mapping, Sequence
from math import prod

import numpy as np

from converters.pipelines import LAYERED_PARTS
from difffract_jax.circuits.frozen.replacement import ROWS_SHARE
from difffract_jax.estimate.scanning import PEAK, feature_bytes
from difffract_jax.estimate.weights import (
    abstract_parts,
    around_bytes,
    block_bytes,
    bytes_of,
    largest_leaf,
    largest_slice,
    slim_bytes,
    stacks_of,
    transcoder_bytes,
)
from difffract_jax.estimate.work import Estimate, Phase, Work
from difffract_jax.models.stacks import depth_of

WIDE = 4
"""Bytes of a float32 number, the type of what is recorded and traced."""
PROGRAM = 2**29
"""Bytes of Python, JAX and compiled programs in the host's memory; measured: 0.35 to 0.6 GiB."""
ROWS_OF_EDGES = 2**30
"""Bytes that edges of targets pulled back together fill at most: `attribute.LARGEST_ROWS`."""
DECODER_ARRAYS = 4
"""Arrays of the autoencoder's second width that live at once at full size; compiled for CPUs: 3.5."""
KEEPING = ("steer", "evaluate")
"""Commands that keep all of their transcoders on the device, wherever the model's blocks stay."""
CODE_ARRAYS = 4
"""Codes of a site that live at once while it is encoded; compiled for a TPU: 4.0."""


def count(work: Work) -> Estimate:
    """Returns what a command needs, counted."""
    phases = tuple(COMMANDS[work.command](work))
    if work.host:
        phases = tuple(one._replace(held={**one.held, "Python and JAX": PROGRAM}) for one in phases)
    return Estimate(work.command, phases)


def remedies(
    work: Work, available: int, changes: Sequence[tuple[str, Callable[[Work], Work]]]
) -> tuple[list[str], int]:
    """Returns the first changes, one on top of the other, with which a command fits, and what it then needs.

    Args:
        work: that does not fit.
        available: bytes that there are.
        changes: what to write, and what it makes of the work; those that help nothing are left out.

    Returns:
        What to write, and the bytes needed; all that help where even they do not suffice.
    """
    taken, needed = [], count(work).needed
    for words, change in changes:
        if needed <= available:
            break
        changed = change(work)
        less = count(changed).needed
        if less < needed:
            work, needed = changed, less
            taken.append(words)
    return taken, needed


def _model(work: Work, *running: str) -> dict[str, int]:
    """Returns what lies in memory of the model's weights: all, or two blocks of what runs, and what is never streamed.

    Args:
        work: of the command.
        running: the parts whose blocks pass through, if any do.
    """
    parts = abstract_parts(work.shapes, work.dtype)
    if not work.streamed:
        return {"model": sum(map(bytes_of, parts.values()))}
    blocks = max((block_bytes(parts[name]) for name in running if name in LAYERED_PARTS), default=0)
    around = sum(around_bytes(part, name in LAYERED_PARTS) for name, part in parts.items())
    return {"two blocks": 2 * blocks, "weights around the blocks": around}


def _activations(work: Work, itemsize: int) -> int:
    """Returns what a block needs of one example: streams, x, q, k, v, and both sides of the MLP's hidden layer."""
    config = work.shapes["transformer"]
    return round(work.seq * config.d_model * (7 + config.hidden_ratio) * max(itemsize, WIDE))


def _layer(work: Work, name: str) -> int:
    """Returns what a loop over a part's blocks needs of their weights beside them: a copy of the largest block.

    On a processor, float32 copies of all bfloat16 weights as well; streamed, of one block's.
    """
    part = abstract_parts(work.shapes, work.dtype)[name]
    narrow = work.host and np.dtype(work.dtype).itemsize < WIDE
    if work.streamed:
        return 2 * block_bytes(part) if narrow else 0
    return 2 * (sum(map(bytes_of, stacks_of(part))) + block_bytes(part)) if narrow else block_bytes(part)


def _forward(work: Work) -> int:
    """Returns what a run of the model needs in between, images in a batch together: a block's weights, activations."""
    together = work.batch * work.branches
    return _layer(work, "transformer") + together * _activations(work, np.dtype(work.dtype).itemsize)


def _text(work: Work) -> list[Phase]:
    """Counts the text encoders, where they are loaded: a layer, its hidden columns, the pattern of all heads."""
    if "t5" not in work.shapes:
        return []
    return [Phase("encode the prompt", _model(work, "t5"), _text_layer(work))]


def _text_layer(work: Work) -> int:
    t5, rows = work.shapes["t5"], work.text_tokens
    return _layer(work, "t5") + WIDE * (rows * (4 * t5.d_model + 3 * t5.d_ff) + 2 * t5.heads * rows**2)


def _decode(work: Work) -> Phase:
    vae = work.shapes["vae"]
    pixels = work.batch * prod(work.grid) * (2 * vae.factor) ** 2
    wide = vae.widths[min(1, len(vae.widths) - 1)]
    return Phase("decode the image", _model(work), DECODER_ARRAYS * wide * pixels * WIDE)


def _load(work: Work) -> Phase:
    """Counts loading: all weights, and the largest array once more on its way; streamed, nothing is loaded."""
    return Phase(
        "load", _model(work) | _transcoders(work), 0 if work.streamed else largest_leaf(work.shapes, work.dtype)
    )


def _transcoders(work: Work, *, resident: bool = False) -> dict[str, int]:
    """Returns the bytes of the transcoders: of all sites; or of two, where one is fetched while one is used."""
    if work.tcs is None:
        return {}
    one, sites = transcoder_bytes(work.tcs), len(work.tcs.sites.names)
    if work.streamed and not resident:
        return {"two transcoders": min(2, sites) * one}
    return {"transcoders": one * sites}


def _rows(work: Work) -> list[int]:
    """Returns the tokens of every site."""
    assert work.tcs is not None
    sizes = {"img": prod(work.grid), "txt": work.text_tokens}
    return [sum(sizes[s] for s in group.streams) for group, numbers in work.tcs.sites.members for _ in numbers]


def _record(work: Work) -> dict[str, int]:
    """Returns the bytes of a record: what enters, and q, k, x, y and a second run's x of every block; and copies."""
    config, (first, end) = work.shapes["transformer"], work.recorded
    layers, wide = end - first, work.seq * config.d_model * WIDE
    copies, begin = 0, 0
    for stack in abstract_parts(work.shapes, work.dtype)["transformer"].stacks:
        depth = depth_of(stack)
        taken = max(0, min(end, begin + depth) - max(first, begin))
        copies += bytes_of(stack) * taken // depth if taken < depth else 0
        begin += depth
    queries_keys = 2 * layers * work.seq * config.score_columns * WIDE
    held = {"record": work.steps * ((3 * layers + 1) * wide + queries_keys)}
    return held if work.streamed else held | {"copies of recorded blocks": copies}


def _codes(work: Work) -> dict[str, int]:
    """Returns the bytes of codes and errors: an index and a value per place, a row per position."""
    assert work.tcs is not None
    wide = work.shapes["transformer"].d_model * WIDE
    return {"codes and errors": work.steps * sum(_rows(work)) * (2 * WIDE * work.tcs.active + wide)}


def _encoding(work: Work) -> int:
    """Returns what encoding a site needs in between."""
    assert work.tcs is not None
    return CODE_ARRAYS * max(_rows(work)) * work.tcs.config.features * WIDE


def _pull(work: Work) -> tuple[dict[str, int], int]:
    """Returns rows of edges, twice since they go to the host while the next are made, and what cotangents need."""
    assert work.tcs is not None
    wide = work.seq * work.shapes["transformer"].d_model * WIDE
    row = work.steps * sum(_rows(work)) * (work.tcs.active + 1) * WIDE
    targets = max(1, min(work.targets, ROWS_OF_EDGES // max(row, 1)))
    return {"rows of edges": 2 * targets * row}, 4 * targets * wide


def _recorded_weights(work: Work) -> dict[str, int]:
    """Returns what a trace keeps of the recorded blocks, when the rest of the model is gone; streamed, slim blocks."""
    first, end = work.recorded
    part = abstract_parts(work.shapes, work.dtype)["transformer"]
    if work.streamed:
        around = around_bytes(part, streamed=True)
        return {"slim blocks": slim_bytes(part, first, end), "weights around the blocks": around}
    held, begin = 0, 0
    for stack in part.stacks:
        depth = depth_of(stack)
        held += bytes_of(stack) * max(0, min(end, begin + depth) - max(first, begin)) // depth
        begin += depth
    return {"recorded blocks": held}


def _slim(work: Work) -> dict[str, int]:
    """Returns the slim blocks that a streamed trace records, beside the blocks on their way."""
    return {"slim blocks": _recorded_weights(work)["slim blocks"]} if work.streamed else {}


def decoder_rows(work: Work, *, bounded: bool) -> int:
    """Returns the bytes of decoder rows that a streamed trace keeps, at most: of every feature that can be active.

    Args:
        work: with transcoders.
        bounded: whether rows that take more than their share of the memory are streamed, as in `attribute` with
            attention frozen and in `total_effects`.
    """
    assert work.tcs is not None
    config, names = work.tcs.config, work.tcs.sites.names
    most = max(min(config.features, rows * work.tcs.active) for rows in _rows(work))
    total = work.steps * len(names) * most * config.d_model_out * work.tcs.itemsize
    return min(total, round(ROWS_SHARE * work.room)) if bounded and work.room is not None else total


def _generate(work: Work) -> list[Phase]:
    denoise = Phase("denoise", _model(work, "transformer"), _forward(work))
    return [_load(work), *_text(work), denoise, _decode(work)]


def _encode(work: Work) -> list[Phase]:
    """Counts `encode`: the text encoders run, and the transformer's blocks are not read."""
    parts = abstract_parts(work.shapes, work.dtype)
    if work.streamed or "transformer" not in parts:
        return _text(work)
    held = sum(around_bytes(part, name == "transformer") for name, part in parts.items())
    return [Phase("encode the prompt", {"text encoders, and what is never streamed": held}, _text_layer(work))]


def _capture(work: Work) -> list[Phase]:
    """Counts loading, the prompt, and the recording of a run."""
    kept = {} if work.streamed else _transcoders(work)
    recording = _model(work, "transformer") | kept | _slim(work) | _record(work)
    return [
        _load(work),
        *(text._replace(held={**text.held, **kept}) for text in _text(work)),
        Phase("record the run", recording, _forward(work._replace(batch=1))),
    ]


def _attribute(work: Work, weights: Mapping[str, int], *, bounded: bool) -> list[Phase]:
    """Counts the encoding of a recorded run and the pull-back."""
    record = {"record": _record(work)["record"]}
    rows, cotangents = _pull(work)
    held = {**weights, **record, **_codes(work)}
    # How many features are active anywhere nobody knows beforehand: an estimate from above.
    decoders = decoder_rows(work, bounded=bounded) if work.streamed else 0
    sites, pulled = _transcoders(work), {} if work.streamed else _transcoders(work)
    return [
        Phase("encode sites", held | sites, _encoding(work) + decoders),
        Phase("pull back", held | pulled | rows, cotangents + decoders),
    ]


def _trace(work: Work) -> list[Phase]:
    encode, pull = _attribute(work, _recorded_weights(work), bounded=not work.explained)
    phases = [*_capture(work), encode, pull, *([_explain(work, encode)] if work.explained else [])]
    if not work.pooled:
        return phases
    # The whole model stays beside what is traced, and runs backwards last.
    kept = _model(work, "transformer")
    longer = [one._replace(held={**kept, **one.held}) for one in phases]
    return [*longer, _explain_pooled(work, longer[-1])]


def _explain(work: Work, encode: Phase) -> Phase:
    """Counts one block's scores: each target's gradients, values and pattern, and what is sorted of them."""
    one = work.shapes["transformer"].heads * work.seq**2 * WIDE
    decoders = decoder_rows(work, bounded=False) if work.streamed else 0
    return Phase("explain attention", {**encode.held, "scores": (work.explained + 2) * one}, 3 * one + decoders)


def _explain_pooled(work: Work, before: Phase) -> Phase:
    """Counts the live model's runs along the lines between pooled embeddings, and what evaluations hold meanwhile.

    Backwards a run holds the streams entering every block, twice, and one block's activations three times; between two
    points what every MLP reads, of both runs and of their difference. Over several steps each exchange of a modulation
    alone moves latents of its own: those entering a step, and a velocity from each of its branches.
    """
    config = work.shapes["transformer"]
    stream, modulations = work.seq * config.d_model * WIDE, _modulations(work)
    streams = sum(stack.depth for stack in config.layout.stacks) * stream
    block = _activations(work, WIDE) + config.heads * work.seq**2 * WIDE
    passing = _layer(work, "transformer") + max(3 * block + streams, block + 2 * streams)
    end = stream + (modulations + 3) * config.d_model * WIDE + work.seq * config.head_dim * WIDE
    held = {**before.held, "streams entering blocks": streams, "ends of lines": work.steps * end}
    if work.steps > work.branches:
        moved = modulations * prod(work.grid) * WIDE
        latents = moved * (config.in_channels + work.branches * config.out_channels)
        held["latents of exchanges"] = latents
        passing = max(passing, latents)  # a step forward: every velocity by its weight, and their sum
    return Phase("explain the pooled path", held, passing)


def _modulations(work: Work) -> int:
    """Returns how many shifts, scales and gates an evaluation has, the last norm's included."""
    layout = work.shapes["transformer"].layout
    each = (len(group.modulations) * len(layout.blocks_of(number)) for number, group in enumerate(layout.groups))
    return sum(each) + 2


def _again(work: Work) -> list[Phase]:
    """Counts commands that capture a graph's run anew and keep the whole model meanwhile: heads, effects, validate."""
    copies = {} if work.streamed else {"copies of recorded blocks": _record(work)["copies of recorded blocks"]}
    kept = _model(work, "transformer") | _slim(work) | copies
    return [*_capture(work), *_attribute(work, kept, bounded=work.command == "effects")]


def _coded(work: Work) -> list[Phase]:
    """Counts commands that encode sites while the model runs: features, steer, evaluate."""
    resident = not work.streamed or work.command in KEEPING
    one = _transcoders(work, resident=resident)
    kept = one if resident else {}
    phases = [_load(work), *(text._replace(held={**text.held, **kept}) for text in _text(work))]
    encoding = work.batch * work.branches * _encoding(work)
    run = Phase("run and encode sites", _model(work, "transformer") | one, _forward(work) + encoding)
    if work.command == "evaluate":
        phases.append(_rows_of_prompts(work, "measure rows", one))
    if work.command == "features":
        return [*phases, run]
    decode = _decode(work)
    return [*phases, run, decode._replace(held={**decode.held, **kept})]


def _rows_of_prompts(work: Work, name: str, beside: Mapping[str, int]) -> Phase:
    """Counts what gives x and y of every site, of all prompts that run together and all steps."""
    tokens = [min(rows, work.tokens or rows) for rows in _rows(work)]
    each = 2 * work.batch * work.shapes["transformer"].d_model * np.dtype(work.dtype).itemsize
    # Where blocks are streamed, all tokens of a step are there before some are chosen.
    chosen = each * sum(_rows(work)) if work.streamed and work.tokens else 0
    held = _model(work, "transformer") | dict(beside) | {"rows": each * work.steps * sum(tokens)}
    return Phase(name, held, _forward(work) + chosen)


def _harvest(work: Work) -> list[Phase]:
    """Counts `harvest`; of the transcoders the sites alone count."""
    return [_load(work._replace(tcs=None)), *_text(work), _rows_of_prompts(work, "harvest", {})]


def _dashboards(work: Work) -> list[Phase]:
    """Counts `dashboards`: what is kept of every feature, what the sites read of a batch, and a site's codes."""
    assert work.tcs is not None
    features = work.tcs.config.features * len(work.tcs.sites.names)
    each = work.shapes["transformer"].d_model * np.dtype(work.dtype).itemsize
    read = work.batch * work.branches * sum(_rows(work)) * each
    kept = {"statistics": features * (feature_bytes(work.scanned) + work.batch * PEAK), "what sites read": read}
    own, one = _model(work, "transformer"), _transcoders(work)
    passing = max(_forward(work), work.batch * _encoding(work))
    return [
        _load(work),
        *(text._replace(held={**text.held, **({} if work.streamed else one)}) for text in _text(work)),
        Phase("scan", own | one | kept, passing),
        _decode(work),
    ]


def _convert(work: Work) -> list[Phase]:
    """Counts `convert`: one slice as it is stored, as it is written, and which of its values are finite."""
    return [Phase("convert", {}, 3 * largest_slice(work.shapes, work.dtype))]


COMMANDS: Mapping[str, Callable[[Work], list[Phase]]] = {
    "generate": _generate,
    "encode": _encode,
    "trace": _trace,
    "features": _coded,
    "steer": _coded,
    "evaluate": _coded,
    "dashboards": _dashboards,
    "heads": _again,
    "effects": _again,
    "validate": _again,
    "harvest": _harvest,
    "convert": _convert,
}
