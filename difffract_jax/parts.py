"""One part of a pipeline, as the transformer or T5, from a directory of ours; and the identity of what was loaded."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from converters.configurations import is_diffusers_directory
from converters.pipelines import LAYERED_PARTS, Sharding
from difffract_jax.directories import Directory
from difffract_jax.models.streaming import Weights, aligned, streamed, whole, whole_bytes, with_sources
from difffract_jax.storage.checkpoint import VERIFY_BELOW_BYTES, leaf_paths, load_tree, open_tree, tree_hash
from difffract_jax.storage.files import TensorFile
from difffract_jax.storage.layers import FileLayers
from difffract_jax.storage.streaming import Leaf
from difffract_jax.storage.sums import sample_hash


def dtype_of_files(path: Path) -> Any:
    """Returns the type of a model's weights in its files: bfloat16 where those of the transformer all are, or float32.

    Args:
        path: a directory of ours, or of diffusers'; or a transformer alone, as a `.safetensors` file or in a directory,
            where the largest file tells, since an autoencoder may lie beside it.
    """
    if path.is_file():
        files = [path] if path.suffix == ".safetensors" else []
    elif is_diffusers_directory(path):
        files = sorted((path / "transformer").glob("*.safetensors"))
    else:
        others = sorted(path.glob("*.safetensors"), key=lambda file: file.stat().st_size)
        files = sorted(path.glob("transformer*.safetensors")) or others[-1:]
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
    leaves = [jax.device_put(np.array(files[path][path], leaf.dtype)) for path, leaf in leaf_paths(made).items()]
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
    return sampled_identity(given, base=base, variant=variant)


def identity_of_leaves(
    parts: Mapping[str, Mapping[str, Leaf]],
    given: Directory,
    *,
    base: Directory | None = None,
    variant: str | None = None,
) -> str:
    """Returns what `identity` would of the same weights, before any of them is made; arguments as there.

    Args:
        parts: part of the pipeline -> path of each of its leaves, and what makes it.
        given: where the weights come from.
        base: where those of the parts beside the transformer come from, if from elsewhere.
        variant: which of several files are taken.
    """
    if sum(leaf.nbytes for leaves in parts.values() for leaf in leaves.values()) < VERIFY_BELOW_BYTES:
        return tree_hash({name: {path: leaf.array() for path, leaf in tree.items()} for name, tree in parts.items()})
    return sampled_identity(given, base=base, variant=variant)


def sampled_identity(given: Directory, *, base: Directory | None = None, variant: str | None = None) -> str:
    """Returns an identity by the files' names, sizes, beginnings and ends; arguments as for `identity`."""
    hashes = [sample_hash(home.path, home.weights) for home in (given, base) if home is not None]
    return ":".join(["sampled", *hashes, *([variant] if variant else [])])
