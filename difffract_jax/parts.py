"""One part of a pipeline, as the transformer or T5, from a directory of ours; and the identity of what was loaded."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from converters.configurations import is_diffusers_directory
from converters.pipelines import LAYERED_PARTS, Sharding
from difffract_jax.directories import Directory
from difffract_jax.models.streaming import Weights, aligned, streamed, whole, whole_bytes, with_sources
from difffract_jax.storage.checkpoint import VERIFY_BELOW_BYTES, leaf_paths, load_tree, open_tree, tree_hash
from difffract_jax.storage.files import TensorFile
from difffract_jax.storage.layers import FileLayers
from difffract_jax.storage.sums import sample_hash


def stored_dtype(directory: Path) -> Any:
    """Returns the type of a model's weights in its files: bfloat16 where those of the transformer all are.

    Args:
        directory: of ours, or of diffusers'; anything else counts as float32.
    """
    folder = directory / "transformer" if is_diffusers_directory(directory) else directory
    files = sorted(folder.glob("*.safetensors" if folder != directory else "transformer*.safetensors"))
    if not files or not directory.is_dir():
        return jnp.float32
    kinds = {info.dtype for file in files for info in TensorFile(file).tensors.values()}
    return jnp.bfloat16 if kinds == {"BF16"} else jnp.float32


def load_part(
    directory: Path,
    name: str,
    abstract: Any,
    *,
    weights: Weights = "device",
    sharding: Sharding | None = None,
    verify: bool | None = None,
) -> Any:
    """Loads one part of a directory of ours.

    Args:
        directory: the directory.
        name: of the part.
        abstract: its shapes and types.
        weights: where its stacks stay, if it has any.
        sharding: where leaves go that are loaded.
        verify: compare the content hash; see `storage.checkpoint.load_tree`.
    """
    if weights == "device" or name not in LAYERED_PARTS:
        target = None if sharding is None else sharding(name, abstract)
        return load_tree(directory, abstract, name=name, sharding=target, verify=verify)
    files = open_tree(directory, abstract, name=name, verify=verify)
    stacks = {one: FileLayers(files, f"{one}.", getattr(abstract, one), aligned) for one in abstract.layered}
    made = with_sources(abstract, stacks, weights)
    leaves = [jnp.array(files[path][path], leaf.dtype) for path, leaf in leaf_paths(made).items()]
    return jax.tree.unflatten(jax.tree.structure(made), leaves)


def load_stack(
    directory: Path,
    name: str,
    like: Any,
    *,
    weights: Weights = "device",
    sharding: Any = None,
    verify: bool | None = None,
    layers: Sequence[int] | None = None,
) -> Any:
    """Loads a stack that is a file of its own, as a group of transcoders is.

    Args:
        directory: of ours.
        name: of the file.
        like: the stack's shapes and types.
        weights: where it stays.
        sharding: where leaves go that are loaded.
        verify: compare the content hash.
        layers: those wanted; all if left out.
    """
    if weights == "device":
        return load_tree(directory, like, name=name, sharding=sharding, verify=verify, layers=layers)
    files = FileLayers(open_tree(directory, like, name=name, verify=verify), "", like, aligned)
    return streamed(files, (), weights, layers)


def identity(
    parts: Mapping[str, Any], given: Directory, *, base: Directory | None = None, variant: str | None = None
) -> str:
    """Returns the identity that images and graphs record of a pipeline that was converted in memory.

    Args:
        parts: of the pipeline, by name.
        given: where its weights came from.
        base: where those of the parts beside the transformer came from, if from elsewhere.
        variant: which of several files were taken.

    Returns:
        The content hash that it would be saved under; for weights too large to hash in passing, that of their files'
        names, sizes, beginnings and ends.
    """
    if sum(map(whole_bytes, parts.values())) < VERIFY_BELOW_BYTES:
        return tree_hash({name: whole(tree) for name, tree in parts.items()})
    hashes = [sample_hash(home.path, home.weights) for home in (given, base) if home is not None]
    return ":".join(["sampled", *hashes, *([variant] if variant else [])])
