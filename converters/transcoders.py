"""The reference's transcoders and SAEs, state dicts, one file per site, into a `TranscoderSet`, and back.

1. Files are named `{transcoder|sae}_{img|txt}_{layer}.pt`, perhaps with `_final` or the like before the suffix, which
   may also be .pth, .bin, .ckpt or .safetensors; one directory holds one role. What is named otherwise is left aside.
2. A file is a state dict, perhaps within a record of training, and under the keys of a wrapper (`state_dicts`). Its
   content shows what it is: safetensors, which need no PyTorch, or a pickle.
3. Widths are read off the first file; every other file must agree, and all that do not are reported together.
4. `TRANSCODER_TORCH` maps one file; `{site}` is the file's name without `.pt`, stacked over a stream's layers.
5. The reference feeds its transcoders t in [0, 1], so they load with `conditioning` "film_raw_t"
   (docs/method.md, section 2).
6. `export_transcoders` runs the table backwards, and refuses sets that the reference's module cannot compute.
7. `open_torch` and `export_site` do the same leaf by leaf and site by site, for sets that shall not be in memory.
"""

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import compress
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from converters.mapping import ArraySource, ConversionError, Rule, load_tree, open_tree, same, save_tree, transpose
from converters.repositories import SITE
from converters.source import stored_dtype
from converters.state_dicts import NotFound, unwrapped
from converters.streaming import stream_stack
from converters.torch_files import read_state, write_state
from difffract_jax.config import UserError
from difffract_jax.models.shapes import abstract_stack
from difffract_jax.models.streaming import Weights, whole, whole_bytes
from difffract_jax.storage.checkpoint import VERIFY_BELOW_BYTES, atomic_directory, cap, tree_hash
from difffract_jax.storage.files import TensorFile
from difffract_jax.storage.headers import DTYPES
from difffract_jax.storage.streaming import Leaf
from difffract_jax.storage.sums import sample_hash
from difffract_jax.transcoders.sites import ROWS, SiteSet, are_chosen, sites_of
from difffract_jax.transcoders.transcoder import Transcoder, TranscoderConfig, TranscoderSet

_LOG = logging.getLogger(__name__)
State = dict[str, np.ndarray]
M = TypeVar("M")
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

LABELS = {"site": ["site"]}
"""What the one site of a stack is called."""
PICKLES = (".pt", ".pth", ".bin", ".ckpt")
WANTED = "encoder.weight"
"""The key that every file has, and that tells the sizes."""
_OURS = ("config.json", "labels.json")
"""Files that may lie beside the others and are read, or are the training's own."""


class SiteFile(NamedTuple):
    """The file of one site.

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


class OpenedSites(NamedTuple):
    """A set of transcoders before any of its weights is read.

    Attributes:
        config: shape of each.
        sites: which there are.
        stacks: name of a group -> path of each leaf of its stack, and what makes it.
        files: that the weights are read from.
    """

    config: TranscoderConfig
    sites: SiteSet
    stacks: dict[str, dict[str, Leaf]]
    files: tuple[Path, ...]


def is_torch_directory(directory: Path) -> bool:
    """Says whether a directory holds files of the reference, or pickles that might be some."""
    names = [path.name for path in directory.iterdir()] if directory.is_dir() else []
    pickles = any(name.endswith(PICKLES) and not name.startswith(".") for name in names)
    return any(map(SITE.fullmatch, names)) or (pickles and "config.json" not in names)


def transcoders_from_torch(
    directory: str | Path,
    *,
    sites: Sequence[str] | None = None,
    files: Collection[str] = (),
    dtype: Any = jnp.float32,
    sharding: Any = None,
    weights: Weights = "device",
) -> TranscoderSet:
    """Converts a directory of the reference's files.

    Args:
        directory: holds the files; those of other names are left aside, and a line in the log names them.
        sites: those wanted, as in img/0-3; all if left out.
        files: names of those to read; all if left out.
        dtype: type of the weights.
        sharding: where the leaves of each stream's stack go: None, one sharding, or a function of the path.
        weights: where the stacks stay; see `models.streaming`.

    Raises:
        ConversionError: naming every file and tensor that does not fit.
    """

    def load(arrays: ArraySource, abstract: Any, names: list[str]) -> Any:
        if weights != "device":
            return stream_stack(arrays, TRANSCODER_TORCH, abstract, {"site": names}, weights)
        return load_tree(arrays, TRANSCODER_TORCH, abstract, labels={"site": names}, sharding=sharding)

    stacks, held, config, paths = _converted(Path(directory), sites, files, dtype, load)
    if weights != "device" and sum(map(whole_bytes, stacks.values())) >= VERIFY_BELOW_BYTES:
        return TranscoderSet(stacks, held, config, sample_hash(Path(directory), [path.name for path in paths]))
    return TranscoderSet(stacks, held, config, tree_hash({name: whole(stack) for name, stack in stacks.items()}))


def open_torch(
    directory: str | Path, *, sites: Sequence[str] | None = None, files: Collection[str] = (), dtype: Any = None
) -> OpenedSites:
    """Checks a directory of the reference's files as `transcoders_from_torch` does, and says how leaves are made.

    Args:
        directory: as there.
        sites: as there.
        files: as there.
        dtype: type of the weights; if left out, bfloat16 where all are, else float32.

    Raises:
        ConversionError: naming every file and tensor that does not fit, by its shape or type.
    """

    def open_stack(arrays: ArraySource, abstract: Any, names: list[str]) -> dict[str, Leaf]:
        kind = stored_dtype(arrays.kinds()) if dtype is None else dtype
        return open_tree(arrays, TRANSCODER_TORCH, abstract, labels={"site": names}, dtype=kind)

    stacks, held, config, paths = _converted(Path(directory), sites, files, jnp.float32, open_stack)
    return OpenedSites(config, held, stacks, paths)


def _converted(
    directory: Path,
    sites: Sequence[str] | None,
    names: Collection[str],
    dtype: Any,
    use: Callable[[ArraySource, Any, list[str]], M],
) -> tuple[dict[str, M], SiteSet, TranscoderConfig, tuple[Path, ...]]:
    """Reads the files' headers and makes what is wanted of each stream; returns the files, too."""
    site_files, problems = _list_files(directory, names)
    if sites is not None:
        site_files = _chosen(site_files, sites, directory)
    if problems:
        raise ConversionError(str(directory), problems)
    states: dict[SiteFile, State] = {}
    for file in site_files:
        try:
            states[file] = _read(file.path)
        except UserError as error:
            problems.append(str(error).rstrip("."))
        except FileNotFoundError:
            problems.append(f"{file.path.name} is a link to a file that is not there")
    # What is wrong with all files is said once, instead of file by file.
    common = _transposed(states) or _other_keys(states)
    if common or not states:
        raise ConversionError(str(directory), [*common, *dict.fromkeys(problems)])
    config = _config(*next(iter(states.items())))
    stacks: dict[str, M] = {}
    for stream in STREAMS:
        chosen = {file.path.stem: state for file, state in states.items() if file.stream == stream}
        arrays = {f"{stem}.{key}": array for stem, state in chosen.items() for key, array in state.items()}
        try:
            if chosen:
                abstract = stacked_transcoders(config, len(chosen), dtype)
                stacks[stream] = use(ArraySource(str(directory), arrays), abstract, list(chosen))
        except ConversionError as error:
            problems += error.problems
    if problems:
        raise ConversionError(str(directory), problems)
    held = sites_of({stream: [file.layer for file in states if file.stream == stream] for stream in STREAMS})
    return stacks, held, config, tuple(file.path for file in states)


def export_transcoders(tcs: TranscoderSet, out: str | Path, *, overwrite: bool = False) -> None:
    """Writes a set as the reference's `.pt` files, one per site.

    Raises:
        UserError: when the set has parts that the reference's module lacks.
    """
    refuse_foreign_parts(tcs.config, tcs.stacks)
    with atomic_directory(out, overwrite=overwrite) as partial:
        for stream, layers in tcs.sites.groups.items():
            for place, layer in enumerate(layers):
                one = jax.tree.map(lambda leaf, i=place: leaf[i : i + 1], tcs.stacks[stream])
                _write_site(partial / f"{tcs.config.role}_{stream}_{layer}.pt", one)


def export_site(leaves: Mapping[str, Leaf], place: int, path: Path) -> None:
    """Writes the `.pt` file of one site of a stack.

    Args:
        leaves: of the stack.
        place: of the site in the stack.
        path: the file.
    """
    _write_site(path, {name: leaf.make(place)[None] for name, leaf in leaves.items()})


def refuse_foreign_parts(config: TranscoderConfig, groups: Collection[str]) -> None:
    """Refuses sets that the reference's module cannot compute.

    Args:
        config: shape of each transcoder.
        groups: names of the groups of sites.

    Raises:
        UserError: naming what it lacks.
    """
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
    if set(groups) - {*STREAMS, ROWS.name}:
        differs.append("sites in single-stream blocks (the reference has none)")
    if ROWS.name in groups:
        differs.append("a site that belongs to no block (the reference has img and txt)")
    if differs:
        raise UserError(
            f"These transcoders cannot be written as `.pt` files, as they have {', '.join(differs)}; "
            "save them in this package's own format."
        )


def stacked_transcoders(config: TranscoderConfig, count: int, dtype: Any) -> Any:
    """Returns the shapes of `count` stacked transcoders."""
    return abstract_stack(Transcoder, config, count, dtype)


def _list_files(directory: Path, names: Collection[str] = ()) -> tuple[list[SiteFile], list[str]]:
    """Returns the files in order of stream and layer, and what is wrong with their names; logs those left aside."""
    # A link that leads nowhere is kept: left out without a word, its site would be missing.
    paths = [path for path in sorted(directory.iterdir()) if not path.is_dir() and not path.name.startswith(".")]
    paths = [path for path in paths if not names or path.name in names]
    matches = {path: SITE.fullmatch(path.name) for path in paths}
    files = [SiteFile(m[1], m[2], int(m[3]), path) for path, m in matches.items() if m is not None]
    others = [path.name for path, m in matches.items() if m is None]
    if not files:
        held = f"found {', '.join(cap(others))}" if others else "it is empty"
        raise ConversionError(str(directory), [f"no file is named like transcoder_img_0.pt ({held})"])
    aside = [name for name in others if name not in _OURS]
    if aside:
        _LOG.warning("Note: in %s, %s left aside, not named like transcoder_img_0.pt.", directory, _were(aside))
    return sorted(files, key=lambda file: (file.stream, file.layer)), _wrong_sites(files)


def _were(names: list[str]) -> str:
    return f"{', '.join(cap(names))} {'was' if len(names) == 1 else 'were'}"


def _wrong_sites(files: Sequence[SiteFile]) -> list[str]:
    """Names files that do not go together."""
    roles = {file.role: file.path.name for file in files}
    if len(roles) > 1:
        shown = " and ".join(sorted(roles.values()))
        return [f"transcoders and SAEs lie in one directory, {shown}; keep each in its own"]
    first: dict[tuple[str, int], str] = {}
    problems = []
    for file in files:
        other = first.setdefault((file.stream, file.layer), file.path.name)
        if other != file.path.name:
            problems.append(f"{other} and {file.path.name} are both of {file.stream}/{file.layer}; keep one of them")
    return problems


def _read(path: Path) -> State:
    """Reads one file's state dict, under the keys of the reference."""
    with path.open("rb") as stream:
        beginning = stream.read(32)
    if beginning.startswith(b"version https://git-lfs"):
        raise UserError(f"{path} is a placeholder of Git LFS and not the weights; run `git lfs pull` beside it.")
    # Safetensors begin with the length of a header in JSON; no pickle has a brace there.
    is_safetensors = path.suffix == ".safetensors" or beginning[8:9] == b"{"
    state = _read_safetensors(path) if is_safetensors else read_state(path, WANTED)
    try:
        return unwrapped(state, WANTED)
    except NotFound as error:
        raise UserError(f"{path} {error}.") from None


def _read_safetensors(path: Path) -> State:
    file = TensorFile(path)
    if file.missing_bytes:
        raise UserError(f"{path} is truncated, its last {file.missing_bytes} bytes are missing; copy it again.")
    unknown = [name for name, info in file.tensors.items() if info.dtype not in DTYPES]
    if unknown:
        raise UserError(f"{path} holds {unknown[0]} in the type {file.tensors[unknown[0]].dtype}, which is not read.")
    # Numbers of eight bits are widened, exactly, so that the rest of the conversion knows their type.
    narrow = {name for name, info in file.tensors.items() if info.dtype.startswith("F8")}
    return {name: file[name].astype(np.float32) if name in narrow else file[name] for name in file.tensors}


def _other_keys(states: Mapping[SiteFile, State]) -> list[str]:
    """Names the keys in which all of several files differ from the reference's."""
    wanted = {str(rule.source).removeprefix("{site}.") for rule in TRANSCODER_TORCH}
    held = [set(state) for state in states.values()]
    if len(held) < 2:
        return []
    missing, unknown = sorted(wanted - set.union(*held)), sorted(set.intersection(*held) - wanted)
    problems = [f"all {len(held)} files lack {', '.join(cap(missing))}"] if missing else []
    if unknown:
        problems.append(
            f"all {len(held)} files hold {', '.join(cap(unknown))}, which the reference's module does not have"
        )
    return problems


def _transposed(states: Mapping[SiteFile, State]) -> list[str]:
    """Names matrices that are stored inputs first, which their biases show; PyTorch's have outputs first."""
    guilty: dict[str, list[str]] = {}
    for file, state in states.items():
        for key, weight in state.items():
            bias = state.get(f"{key.removesuffix('.weight')}.bias")
            if bias is None or not key.endswith(".weight") or (weight.ndim, bias.ndim) != (2, 1):
                continue
            if bias.size == weight.shape[1] != weight.shape[0]:
                guilty.setdefault(file.path.name, []).append(key)
    if not guilty:
        return []
    keys = list(dict.fromkeys(key for transposed in guilty.values() for key in transposed))
    return [
        f"{', '.join(keys)} of {', '.join(cap(list(guilty)))} are transposed, as the lengths of the biases show; store "
        "them outputs first, as torch.nn.Linear does"
    ]


def _chosen(files: list[SiteFile], sites: Sequence[str], directory: Path) -> list[SiteFile]:
    """Returns the files of the sites that are wanted."""
    held = [(file.stream, file.layer) for file in files]
    return list(compress(files, are_chosen(sites, held, str(directory)))) if files else []


def _config(first: SiteFile, state: State) -> TranscoderConfig:
    missing = [key for key in (WANTED, "time_mlp.0.weight") if key not in state or state[key].ndim != 2]
    if missing:
        held = f"; it holds {', '.join(cap(list(state)))}" if state else ""
        problems = [f"missing matrix {key}, which tells the sizes{held}" for key in missing[:1]]
        raise ConversionError(str(first.path), problems)
    features, d_model = state[WANTED].shape
    return TranscoderConfig(
        d_model=d_model,
        features=features,
        time_embed=state["time_mlp.0.weight"].shape[0],
        conditioning="film_raw_t",
        role="sae" if first.role == "sae" else "transcoder",
    )


def _write_site(path: Path, one: Any) -> None:
    """Writes one site's file, from a stack of it alone."""
    write_state(path, {key.removeprefix("site."): value for key, value in save_tree(one, TRANSCODER_TORCH, LABELS)})
