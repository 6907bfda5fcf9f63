"""Prompt embeddings in a file: what the text encoders make of some prompts, so that a run need not load them.

A file is one `.npz`: `text` [prompt txt text_width], `pooled` [prompt pooled_width], `mask` [prompt txt], `metadata`:
JSON with the prompts, what was cut of each, the model's content hash and the versions. The empty prompt is always among
them, since a trace reports what its pooled embedding changes.
"""

import json
import logging
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from difffract_jax.config import UserError
from difffract_jax.models.absent import AbsentConfig
from difffract_jax.models.encoded import Embeddings, EncodedPrompt
from difffract_jax.models.pipeline import Pipeline, encode
from difffract_jax.storage.files import atomic_file
from difffract_jax.storage.remote.cache import local_file

_log = logging.getLogger(__name__)
FORMAT_VERSION = 1
NARROW = "bfloat16"


def embed_prompts(pipe: Pipeline, prompts: Sequence[str], text_tokens: int, progress: Any = None) -> Embeddings:
    """Encodes prompts, and the empty one.

    Args:
        pipe: the pipeline.
        prompts: each once.
        text_tokens: length of the text sequence.
        progress: called with (prompts done, prompts in all).
    """
    made: dict[str, EncodedPrompt] = {}
    wanted = tuple(dict.fromkeys((*prompts, "")))
    for number, prompt in enumerate(wanted, 1):
        made[prompt] = encode(pipe, prompt, text_tokens)
        if progress is not None:
            progress(number, len(wanted))
    return Embeddings("", pipe.source, made)


def write_embeddings(embeddings: Embeddings, path: str | Path, record: Mapping[str, Any] | None = None) -> None:
    """Writes a file of embeddings.

    Args:
        embeddings: from `embed_prompts`.
        path: file to write; it appears only when it is complete.
        record: how they were made, from `config.provenance`.
    """
    rows = list(embeddings.prompts.values())
    text, pooled = (np.stack([np.asarray(getattr(one, name)) for one in rows]) for name in ("text", "pooled"))
    metadata = {
        "format_version": FORMAT_VERSION,
        "model": embeddings.model,
        "prompts": list(embeddings.prompts),
        "cut": [one.cut for one in rows],
        "dtype": text.dtype.name,
        "provenance": dict(record or {}),
    }
    with atomic_file(path) as partial:
        # NumPy's files have no bfloat16: its bits are kept.
        arrays = {name: _bits(array) for name, array in {"text": text, "pooled": pooled}.items()}
        mask = np.stack([np.asarray(one.mask) for one in rows])
        np.savez(partial, **arrays, mask=mask, metadata=np.array(json.dumps(metadata)))


def read_embeddings(path: str | Path) -> Embeddings:
    """Reads a file that `write_embeddings` wrote.

    Raises:
        UserError: if it is not one, or of another format version.
    """
    try:
        # Opened here, since NumPy leaves a file open that it cannot read.
        with local_file(path).open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            metadata = json.loads(str(file["metadata"][()]))
            arrays = {name: _numbers(file[name], metadata["dtype"]) for name in ("text", "pooled")}
            mask = file["mask"].astype(bool)
        version = metadata["format_version"]
        columns = zip(metadata["prompts"], arrays["text"], arrays["pooled"], mask, metadata["cut"], strict=True)
        prompts = {str(prompt): EncodedPrompt(*row) for prompt, *row in columns}
        found = Embeddings(str(path), str(metadata["model"]), prompts)
    except FileNotFoundError:
        raise UserError(f"There is no file {path}; write it with `difffract encode`.") from None
    except (ValueError, KeyError, TypeError, EOFError, OSError, zipfile.BadZipFile):
        raise UserError(f"{path} is not a file of prompt embeddings; write one with `difffract encode`.") from None
    if version != FORMAT_VERSION:
        raise UserError(f"{path} has format_version {version}, but this release reads {FORMAT_VERSION}; encode again.")
    if not prompts or not all(np.isfinite(array.astype(np.float32)).all() for array in arrays.values()):
        raise UserError(f"{path} holds no prompts, or values that are not finite; encode again.")
    return found


def with_embeddings(pipe: Pipeline, embeddings: Embeddings) -> Pipeline:
    """Returns a pipeline that takes the embeddings of prompts from a file, and has no text encoders any more.

    Args:
        pipe: the pipeline; one that was loaded without text encoders cannot tell whether the embeddings are its own.
        embeddings: of its model.

    Raises:
        UserError: if they are another model's, or of other widths than the model reads.
    """
    if isinstance(pipe.config.t5, AbsentConfig):
        _log.warning(
            "The model has no text encoders, so that nothing tells whether the embeddings%s are its own.",
            f" in {embeddings.path}" if embeddings.path else "",
        )
    elif embeddings.model != pipe.source:
        raise UserError(
            f"The embeddings{f' in {embeddings.path}' if embeddings.path else ''} were made by another model: its "
            f"content hash is {embeddings.model[:12]}..., but this one has {pipe.source[:12]}...; encode the prompts "
            "with this model, in the same type (--dtype)."
        )
    shape = pipe.config.transformer
    for one in embeddings.prompts.values():
        if (one.text.ndim, one.text.shape[-1], one.pooled.shape) != (2, shape.text_width, (shape.pooled_width,)):
            raise UserError(
                f"{embeddings.path or 'The embeddings'} should hold text of width {shape.text_width} and pooled "
                f"embeddings of width {shape.pooled_width}, but has shapes {one.text.shape} and {one.pooled.shape}; "
                "encode again."
            )
    return pipe._replace(t5=None, clip=None, known=embeddings)


def _bits(array: np.ndarray) -> np.ndarray:
    return array.view(np.uint16) if array.dtype == ml_dtypes.bfloat16 else array


def _numbers(array: np.ndarray, dtype: str) -> np.ndarray:
    return array.view(ml_dtypes.bfloat16) if dtype == NARROW else array.astype(dtype)
