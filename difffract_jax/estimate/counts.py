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

from difffract_jax.estimate.scanning import PEAK, SCAN_STEPS, feature_bytes
from difffract_jax.estimate.weights import (
    abstract_parts,
    block_bytes,
    bytes_of,
    largest_leaf,
    largest_slice,
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


def _model(work: Work, *names: str) -> dict[str, int]:
    """Returns what lies in memory of the named parts' weights: all of them, or two blocks and what lies around them."""
    parts = {name: part for name, part in abstract_parts(work.shapes, work.dtype).items() if not names or name in names}
    if not work.streamed:
        return {"model": sum(map(bytes_of, parts.values()))}
    blocks = max((block_bytes(part) for part in parts.values() if stacks_of(part)), default=0)
    around = max(bytes_of(part) - sum(map(bytes_of, stacks_of(part))) for part in parts.values())
    return {"two blocks": 2 * blocks, "weights around the blocks": around}


def _activations(work: Work, itemsize: int) -> int:
    """Returns what a block needs of one example: streams, x, q, k, v, and both sides of the MLP's hidden layer."""
    config = work.shapes["transformer"]
    return round(work.seq * config.d_model * (7 + 2 * config.mlp_ratio) * max(itemsize, WIDE))


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
    return _layer(work, "transformer") + work.batch * _activations(work, np.dtype(work.dtype).itemsize)


def _text(work: Work) -> list[Phase]:
    """Counts the text encoders, where they are loaded: a layer, its hidden columns, the pattern of all heads."""
    if "t5" not in work.shapes:
        return []
    held = _model(work) if not work.streamed else _model(work, "t5", "clip")
    t5, rows = work.shapes["t5"], work.text_tokens
    activations = WIDE * (rows * (4 * t5.d_model + 3 * t5.d_ff) + 2 * t5.heads * rows**2)
    return [Phase("encode the prompt", held, _layer(work, "t5") + activations)]


def _decode(work: Work) -> Phase:
    vae = work.shapes["vae"]
    pixels = work.batch * prod(work.grid) * (2 * vae.factor) ** 2
    wide = vae.widths[min(1, len(vae.widths) - 1)]
    return Phase(
        "decode the image", _model(work, *(("vae",) if work.streamed else ())), DECODER_ARRAYS * wide * pixels * WIDE
    )


def _load(work: Work) -> Phase:
    """Counts loading: all weights, and the largest array once more on its way; streamed, nothing is loaded."""
    return Phase(
        "load", _model(work) | _transcoders(work), 0 if work.streamed else largest_leaf(work.shapes, work.dtype)
    )


def _transcoders(work: Work) -> dict[str, int]:
    """Returns the bytes of the transcoders: of all sites, or of one where they pass through."""
    if work.tcs is None:
        return {}
    one = transcoder_bytes(work.tcs)
    return {"a transcoder": one} if work.streamed else {"transcoders": one * len(work.tcs.sites.names)}


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
    held = {"record": work.steps * (5 * layers + 1) * wide}
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
    """Returns the recorded blocks' weights, when the rest of the model is gone; streamed, two blocks."""
    first, end = work.recorded
    if work.streamed:
        return {"two blocks": 2 * block_bytes(abstract_parts(work.shapes, work.dtype)["transformer"])}
    held, begin = 0, 0
    for stack in abstract_parts(work.shapes, work.dtype)["transformer"].stacks:
        depth = depth_of(stack)
        held += bytes_of(stack) * max(0, min(end, begin + depth) - max(first, begin)) // depth
        begin += depth
    return {"recorded blocks": held}


def _generate(work: Work) -> list[Phase]:
    denoise = Phase("denoise", _model(work, *(("transformer",) if work.streamed else ())), _forward(work))
    return [_load(work), *_text(work), denoise, _decode(work)]


def _encode(work: Work) -> list[Phase]:
    """Counts `encode`: the text encoders alone."""
    return _text(work._replace(shapes={name: work.shapes[name] for name in ("t5", "clip")}))


def _capture(work: Work) -> list[Phase]:
    """Counts loading, the prompt, and the recording of a run."""
    own = _model(work, *(("transformer",) if work.streamed else ()))
    kept = {} if work.streamed else _transcoders(work)
    return [
        _load(work),
        *(text._replace(held={**text.held, **kept}) for text in _text(work)),
        Phase("record the run", own | kept | _record(work), _forward(work._replace(batch=1))),
    ]


def _attribute(work: Work, weights: Mapping[str, int]) -> list[Phase]:
    """Counts the encoding of a recorded run and the pull-back."""
    record = {"record": _record(work)["record"]}
    rows, cotangents = _pull(work)
    held = {**weights, **_transcoders(work), **record, **_codes(work)}
    return [Phase("encode sites", held, _encoding(work)), Phase("pull back", held | rows, cotangents)]


def _trace(work: Work) -> list[Phase]:
    encode, pull = _attribute(work, _recorded_weights(work))
    return [*_capture(work), encode, pull, *([_explain(work, encode)] if work.explained else [])]


def _explain(work: Work, encode: Phase) -> Phase:
    """Counts one block's scores: each target's gradients, values and pattern, and what is sorted of them."""
    one = work.shapes["transformer"].heads * work.seq**2 * WIDE
    return Phase("explain attention", {**encode.held, "scores": (work.explained + 2) * one}, 3 * one)


def _again(work: Work) -> list[Phase]:
    """Counts commands that capture a graph's run anew and keep the whole model meanwhile: heads, effects, validate."""
    kept = (
        _recorded_weights(work)
        if work.streamed
        else _model(work) | {"copies of recorded blocks": _record(work)["copies of recorded blocks"]}
    )
    return [*_capture(work), *_attribute(work, kept)]


def _coded(work: Work) -> list[Phase]:
    """Counts commands that encode sites while the model runs: features, steer, evaluate."""
    one = _transcoders(work)
    own = _model(work, *(("transformer",) if work.streamed else ())) | one
    run = Phase("run and encode sites", own, _forward(work) + work.batch * _encoding(work))
    kept = {} if work.streamed else one
    phases = [_load(work), *(text._replace(held={**text.held, **kept}) for text in _text(work)), run]
    if work.command == "features":
        return phases
    decode = _decode(work)
    return [*phases, decode._replace(held={**decode.held, **kept})]


def _harvest(work: Work) -> list[Phase]:
    """Counts `harvest`: x and y of every site of all prompts that run together."""
    rows = 2 * work.batch * sum(_rows(work)) * work.shapes["transformer"].d_model * np.dtype(work.dtype).itemsize
    own = _model(work, *(("transformer",) if work.streamed else ()))
    return [_load(work._replace(tcs=None)), *_text(work), Phase("harvest", own | {"rows": rows}, _forward(work))]


def _dashboards(work: Work) -> list[Phase]:
    """Counts `dashboards`: what is kept of every feature, what the sites read of a batch, and a site's codes."""
    assert work.tcs is not None
    features = work.tcs.config.features * len(work.tcs.sites.names)
    read = work.batch * sum(_rows(work)) * work.shapes["transformer"].d_model * np.dtype(work.dtype).itemsize
    kept = {"statistics": features * (feature_bytes(SCAN_STEPS) + work.batch * PEAK), "what sites read": read}
    own = _model(work, *(("transformer",) if work.streamed else ()))
    one = _transcoders(work)
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
