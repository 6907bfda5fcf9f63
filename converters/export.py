"""A pipeline of ours as a diffusers directory, which diffusers' `from_pretrained` loads.

1. Every part's `config.json` says what our configuration says, in the words of its library (`descriptions`).
2. Every part's weights are the rule tables run backwards, tensor by tensor, in shards where they are large.
3. The tokenizers are saved as they are; `model_index.json` names the parts' classes.

What we add to a checkpoint, as the numbers of Chroma's blocks, is left out.

Of a Qwen3 text encoder the layers behind the last that is read are not here. One stands in for all of them, whose
matrices are zeros (`qwen3.behind_last`). No text depends on it.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from converters.autoencoder import AUTOENCODER_DIFFUSERS, AUTOENCODER_FLUX2
from converters.descriptions import descriptions
from converters.flux import FLUX_DIFFUSERS
from converters.flux2 import FLUX2_DIFFUSERS
from converters.kinds import KINDS, tables_of
from converters.mapping import Labels, Rule, save_tree, source_shapes
from converters.qwen3 import QWEN3_TRANSFORMERS, behind_last
from converters.sd3 import SD3_DIFFUSERS, sd3_labels
from converters.text_encoders import CLIP_TRANSFORMERS, PROJECTED_CLIP, t5_tables
from difffract_jax.config import UserError
from difffract_jax.models.absent import Absent
from difffract_jax.models.flux2 import Flux2MMDiT
from difffract_jax.models.mmdit import MMDiT
from difffract_jax.models.pipeline import Pipeline
from difffract_jax.models.sd3 import Sd3MMDiT
from difffract_jax.models.sd3_text import NoText
from difffract_jax.storage.checkpoint import atomic_directory, leaf_paths
from difffract_jax.storage.shards import write_sharded

DIFFUSERS, TRANSFORMERS = "diffusion_pytorch_model", "model"
"""What files of weights are called, by the library of the part."""
COUNTER = "bn.num_batches_tracked"
"""A number of FLUX.2's autoencoder that nothing reads."""


class _Part(NamedTuple):
    """What a folder of weights is made of.

    Attributes:
        folder: its name.
        stem: of its files.
        module: of ours.
        rules: its table.
        labels: names of stacked layers.
        more: tensors that it has besides.
        ours: what keys end with that only we have, and that are not written; None where there are none.
    """

    folder: str
    stem: str
    module: Any
    rules: Sequence[Rule]
    labels: Labels | None = None
    more: dict[str, np.ndarray] | None = None
    ours: str | None = None


def export_pipeline(pipe: Pipeline, out: str | Path, *, overwrite: bool = False) -> None:
    """Writes a diffusers directory.

    Args:
        pipe: the pipeline, of one of `kinds`.
        out: directory to write; it appears only when it is complete.
        overwrite: replace an existing directory.

    Raises:
        UserError: if it is one of another model, or has no text encoders.
    """
    if type(pipe.transformer) not in (MMDiT, Flux2MMDiT, Sd3MMDiT) and tables_of(pipe.config.transformer) is None:
        *first, last = (kind.models for kind in KINDS.values())
        raise UserError(
            f"Pipelines of {', '.join(first)} and {last} can be saved as a diffusers directory, but this is of another "
            "model."
        )
    if pipe.t5 is None or isinstance(pipe.t5, Absent):
        raise UserError(
            "A diffusers directory has text encoders, but this pipeline was loaded without them or takes prompts from "
            "a file of embeddings; load the whole model."
        )
    with atomic_directory(out, overwrite=overwrite) as partial:
        for name, content in descriptions(pipe.config).items():
            write_json(partial / name, content)
        for part in _parts(pipe):
            _write_part(partial / part.folder, part)
        for name, tokenizer in pipe.tokenizers.folders().items():
            tokenizer.save_pretrained(partial / name)


def _parts(pipe: Pipeline) -> list[_Part]:
    """Returns all folders of a pipeline's weights."""
    clip: Any = pipe.clip
    if isinstance(pipe.transformer, Sd3MMDiT):
        parts = [
            _Part("transformer", DIFFUSERS, pipe.transformer, SD3_DIFFUSERS, sd3_labels(pipe.config.transformer)),
            _Part("vae", DIFFUSERS, pipe.vae, AUTOENCODER_DIFFUSERS),
            _Part("text_encoder", TRANSFORMERS, clip.first, PROJECTED_CLIP),
            _Part("text_encoder_2", TRANSFORMERS, clip.second, PROJECTED_CLIP),
        ]
        return parts if isinstance(pipe.t5, NoText) else [*parts, _t5("text_encoder_3", pipe)]
    if isinstance(pipe.transformer, Flux2MMDiT):
        return [
            _Part("transformer", DIFFUSERS, pipe.transformer, FLUX2_DIFFUSERS),
            _Part("vae", DIFFUSERS, pipe.vae, AUTOENCODER_FLUX2, more={COUNTER: np.zeros((), np.int64)}),
            _Part("text_encoder", TRANSFORMERS, pipe.t5, QWEN3_TRANSFORMERS, more=behind_last(pipe.t5)),
        ]
    tables = tables_of(pipe.config.transformer)
    if tables is not None:
        rules, more = tables.encoder(pipe.t5)
        return [
            _Part("transformer", DIFFUSERS, pipe.transformer, tables.rules, ours=tables.added),
            _Part("vae", DIFFUSERS, pipe.vae, AUTOENCODER_DIFFUSERS),
            _Part("text_encoder", TRANSFORMERS, pipe.t5, rules, more=more),
        ]
    return [
        _Part("transformer", DIFFUSERS, pipe.transformer, FLUX_DIFFUSERS),
        _Part("vae", DIFFUSERS, pipe.vae, AUTOENCODER_DIFFUSERS),
        _Part("text_encoder", TRANSFORMERS, clip, CLIP_TRANSFORMERS),
        _t5("text_encoder_2", pipe),
    ]


def _t5(folder: str, pipe: Pipeline) -> _Part:
    config: Any = pipe.config.t5
    rules = t5_tables([] if config.gated else ["shared.weight", ".DenseReluDense.wi."]).rules
    return _Part(folder, TRANSFORMERS, pipe.t5, rules)


def _write_part(directory: Path, part: _Part) -> None:
    dtype = np.dtype(next(iter(leaf_paths(part.module).values())).dtype)
    shapes = source_shapes(part.rules, part.module, part.labels)
    more = part.more or {}
    kinds = {key: (dtype, shape) for key, shape in shapes.items() if _written(part, key)}
    kinds |= {key: (tensor.dtype, tensor.shape) for key, tensor in more.items()}
    tensors = (one for one in save_tree(part.module, part.rules, part.labels) if _written(part, one[0]))
    write_sharded(directory, part.stem, kinds, lambda key: more[key] if key in more else _next(tensors, key))


def _written(part: _Part, key: str) -> bool:
    return part.ours is None or not key.endswith(part.ours)


def _next(tensors: Iterator[tuple[str, np.ndarray]], key: str) -> np.ndarray:
    """Returns the next tensor, which must be the one that the file wants next."""
    found, tensor = next(tensors)
    assert found == key, f"{found} came where {key} was due"
    return tensor


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes a file of a diffusers directory; its folder is made where it is missing."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
