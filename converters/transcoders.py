"""The reference's transcoders and SAEs, `.pt` state dicts, one file per site, into a `TranscoderSet`, and back.

1. Files are named `{transcoder|sae}_{img|txt}_{layer}.pt`; one directory holds one role.
2. Widths are read off the first file; every other file must agree, and all that do not are reported together.
3. `TRANSCODER_TORCH` maps one file; `{site}` is the file's name without `.pt`, stacked over a stream's layers.
4. The reference feeds its transcoders t in [0, 1], so they load with `conditioning` "film_raw_t"
   (docs/method.md, section 2).
5. `export_transcoders` runs the table backwards, and refuses sets that the reference's module cannot compute.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from converters.mapping import ArraySource, ConversionError, Rule, load_tree, same, save_tree, transpose
from converters.torch_files import read_state, write_state
from difffract_jax.config import UserError
from difffract_jax.storage.checkpoint import atomic_directory, tree_hash
from difffract_jax.transcoders.sites import ROWS, sites_of
from difffract_jax.transcoders.transcoder import Transcoder, TranscoderConfig, TranscoderSet

State = dict[str, np.ndarray]
STREAMS = ("img", "txt")

TRANSCODER_TORCH = (
    Rule("{site}.time_mlp.0.weight", "time_in.kernel", transpose),
    Rule("{site}.time_mlp.0.bias", "time_in.bias", same),
    Rule("{site}.time_mlp.2.weight", "time_out.kernel", transpose),
    Rule("{site}.time_mlp.2.bias", "time_out.bias", same),
    Rule("{site}.mod_linear.weight", "film.kernel", transpose),  # scale, then shift, as ours
    Rule("{site}.mod_linear.bias", "film.bias", same),
    Rule("{site}.encoder.weight", "enc.kernel", transpose),
    Rule("{site}.encoder.bias", "enc.bias", same),
    Rule("{site}.decoder.weight", "dec.kernel", transpose),
    Rule("{site}.decoder.bias", "dec.bias", same),
)
"""The reference's `TemporalAwareTranscoder` and its SAE, which is the same module."""

_NAME = re.compile(r"(transcoder|sae)_(img|txt)_(\d+)\.pt")


class SiteFile(NamedTuple):
    """One `.pt` file.

    Attributes:
        role: "transcoder" or "sae".
        stream: "img" or "txt".
        layer: double-stream block, from 0.
        path: the file.
    """

    role: str
    stream: str
    layer: int
    path: Path


def is_torch_directory(directory: Path) -> bool:
    """Says whether a directory holds `.pt` files."""
    return directory.is_dir() and any(directory.glob("*.pt"))


def transcoders_from_torch(directory: str | Path, *, dtype: Any = jnp.float32, sharding: Any = None) -> TranscoderSet:
    """Converts a directory of `.pt` files.

    Args:
        directory: holds the files, and no `.pt` files of another name.
        dtype: type of the weights.
        sharding: where the leaves of each stream's stack go: None, one sharding, or a function of the path.

    Raises:
        ConversionError: naming every file and tensor that does not fit.
    """
    files, problems = _list_files(Path(directory))
    states: dict[SiteFile, State] = {}
    for file in files:
        try:
            states[file] = read_state(file.path)
        except UserError as error:
            problems.append(str(error).rstrip("."))
    if not states:
        raise ConversionError(str(directory), problems)
    config = _config(*next(iter(states.items())))
    stacks: dict[str, Transcoder] = {}
    for stream in STREAMS:
        chosen = {file: state for file, state in states.items() if file.stream == stream}
        try:
            if chosen:
                stacks[stream] = _load_stream(str(directory), chosen, config, dtype, sharding)
        except ConversionError as error:
            problems += error.problems
    if problems:
        raise ConversionError(str(directory), problems)
    sites = sites_of({stream: [file.layer for file in states if file.stream == stream] for stream in STREAMS})
    return TranscoderSet(stacks, sites, config, tree_hash(stacks))


def export_transcoders(tcs: TranscoderSet, out: str | Path, *, overwrite: bool = False) -> None:
    """Writes a set as the reference's `.pt` files, one per site.

    Raises:
        UserError: when the set has parts that the reference's module lacks.
    """
    config = tcs.config
    differs = [
        f"{name}={value!r} (the reference has {wanted!r})"
        for name, value, wanted in (
            ("conditioning", config.conditioning, "film_raw_t"),
            ("activation", config.activation, "relu"),
            ("skip", config.skip, False),
        )
        if value != wanted
    ]
    if config.d_out is not None:
        differs.append(f"{config.d_model} channels in and {config.d_out} out (the reference has as many in as out)")
    if set(tcs.stacks) - {*STREAMS, ROWS.name}:
        differs.append("sites in single-stream blocks (the reference has none)")
    if ROWS.name in tcs.stacks:
        differs.append("a site that belongs to no block (the reference has img and txt)")
    if differs:
        raise UserError(
            f"These transcoders cannot be written as `.pt` files, as they have {', '.join(differs)}; "
            "save them in this package's own format."
        )
    with atomic_directory(out, overwrite=overwrite) as partial:
        for stream, layers in tcs.sites.groups.items():
            _write_stream(partial, config.role, stream, tcs.stacks[stream], layers)


def stacked_transcoders(config: TranscoderConfig, count: int, dtype: Any) -> Any:
    """Returns the shapes of `count` stacked transcoders."""

    def build(key: jax.Array) -> Transcoder:
        return Transcoder(config, rngs=nnx.Rngs(key), dtype=dtype)

    return jax.eval_shape(lambda: jax.vmap(build)(jax.random.split(jax.random.key(0), count)))


def _list_files(directory: Path) -> tuple[list[SiteFile], list[str]]:
    """Returns the files in order of stream and layer, and what is wrong with their names."""
    matches = {path: _NAME.fullmatch(path.name) for path in sorted(directory.glob("*.pt"))}
    problems = [f"{path.name} is not named like transcoder_img_0.pt" for path, m in matches.items() if m is None]
    files = [SiteFile(m[1], m[2], int(m[3]), path) for path, m in matches.items() if m is not None]
    if len({file.role for file in files}) > 1:
        problems.append("transcoders and SAEs lie in one directory; keep each in its own")
    elif len({(file.stream, file.layer) for file in files}) < len(files):
        problems.append("two files are of one site; keep one of them")
    if not matches:
        problems.append("it holds no .pt files")
    return sorted(files, key=lambda file: (file.stream, file.layer)), problems


def _config(first: SiteFile, state: State) -> TranscoderConfig:
    missing = [key for key in ("encoder.weight", "time_mlp.0.weight") if key not in state or state[key].ndim != 2]
    if missing:
        raise ConversionError(str(first.path), [f"missing matrix {key}, which tells the sizes" for key in missing])
    features, d_model = state["encoder.weight"].shape
    return TranscoderConfig(
        d_model=d_model,
        features=features,
        time_embed=state["time_mlp.0.weight"].shape[0],
        conditioning="film_raw_t",
        role="sae" if first.role == "sae" else "transcoder",
    )


def _load_stream(
    name: str, states: Mapping[SiteFile, State], config: TranscoderConfig, dtype: Any, sharding: Any
) -> Transcoder:
    arrays = {f"{file.path.stem}.{key}": array for file, state in states.items() for key, array in state.items()}
    return load_tree(
        ArraySource(name, arrays),
        TRANSCODER_TORCH,
        stacked_transcoders(config, len(states), dtype),
        labels={"site": [file.path.stem for file in states]},
        sharding=sharding,
    )


def _write_stream(directory: Path, role: str, stream: str, stack: Any, layers: Sequence[int]) -> None:
    """Writes one file per layer; only one layer's tensors are in memory at a time."""
    for number, layer in enumerate(layers):
        stem = f"{role}_{stream}_{layer}"
        one = jax.tree.map(lambda leaf, i=number: leaf[i : i + 1], stack)
        state = dict(save_tree(one, TRANSCODER_TORCH, labels={"site": [stem]}))
        write_state(directory / f"{stem}.pt", {key.removeprefix(f"{stem}."): value for key, value in state.items()})
