"""PyTorch's transformer and text encoder of Chroma for `convert check`, run in float32.

Both hide padding. diffusers' pipeline gives them masks of floating point numbers, which do not hide it; here they get
the masks that the model was trained with. Every block has modulations of its own, PyTorch's as ours.
"""

import warnings
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float32, Int

from converters.pipeline_kind import ModelCheck
from converters.torch_files import (
    BlockRecord,
    TransformerInputs,
    TransformerRecord,
    load_blockwise,
    load_module,
    record_model,
)
from difffract_jax.models.blocks import Cond, Streams
from difffract_jax.models.chroma import ChromaShared


def record_chroma(directory: Path, inputs: TransformerInputs) -> TransformerRecord:
    """Runs the transformer once and returns what went into and came out of every block.

    Args:
        directory: of the pipeline.
        inputs: of the call; rows of zeros in the text are hidden, and pooled vector and guidance scale are not read.

    Returns:
        What the blocks did; `cond` of a double-stream block has six modulations of the image, then six of the text, and
        of a single-stream block three. What text tokens that are hidden become is PyTorch's own.
    """
    torch, diffusers = load_module("torch"), load_module("diffusers")
    path, kind = directory / "transformer", diffusers.ChromaTransformer2DModel
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`FluxPosEmbed` is deprecated", FutureWarning)  # which this class builds
        model = load_blockwise(torch, lambda: kind.from_config(kind.load_config(path)), path)
    # What tells modulations apart is in no file.
    places = model.time_text_embed
    channels = model.config.approximator_num_channels // 4
    model.time_text_embed = type(places)(num_channels=channels, out_dim=len(places.mod_proj))
    words, seen = len(inputs.text), np.any(inputs.text != 0, axis=-1)
    rows, columns = np.indices(inputs.grid)
    image = np.stack([np.zeros_like(rows), rows, columns], axis=-1).reshape(-1, 3).astype(np.float32)
    given = {
        "hidden_states": torch.from_numpy(inputs.latents[None]),
        "encoder_hidden_states": torch.from_numpy(inputs.text[None]),
        "timestep": torch.tensor([inputs.t]),
        "img_ids": torch.from_numpy(image),
        "txt_ids": torch.zeros(words, 3),
        "attention_mask": torch.from_numpy(np.concatenate([seen, np.ones(len(inputs.latents), bool)])[None]),
    }
    return record_model(torch, model, given, words)


def record_hidden_padding(
    directory: Path, ids: Int[np.ndarray, "txt"], mask: Bool[np.ndarray, "txt"]
) -> Float32[np.ndarray, "txt t5_width"]:
    """Runs PyTorch's T5 on one prompt's ids; returns its last hidden states, and zeros for hidden tokens.

    Args:
        directory: of the pipeline.
        ids: of the prompt, filled up at the end.
        mask: False for padding. The transformer sees the first token of it, too.
    """
    torch, transformers = load_module("torch"), load_module("transformers")
    folder = directory / "text_encoder"
    config = transformers.T5Config.from_pretrained(folder)
    model = load_blockwise(torch, lambda: transformers.T5EncoderModel(config), folder)
    given = {"input_ids": torch.from_numpy(ids[None].astype(np.int64)), "attention_mask": torch.from_numpy(mask[None])}
    with torch.no_grad():
        states = model(**given).last_hidden_state[0].numpy()
    return np.where((np.arange(len(ids)) <= np.sum(mask))[:, None], states, 0)


def _conditions(cond: Cond, record: TransformerRecord) -> tuple[Any, Any]:
    """Returns the modulations of all blocks, ours and PyTorch's."""
    return cond.mod[:2], _modulations(cond.mod, record)[:2]


def _given(cond: Cond, record: TransformerRecord, block: BlockRecord) -> Cond:
    """Returns what conditions a block, with PyTorch's modulations of all."""
    del block  # which finds its own by its number
    return cond._replace(mod=_modulations(cond.mod, record))


def _modulations(ours: ChromaShared, record: TransformerRecord) -> ChromaShared:
    """Returns the modulations of all blocks as PyTorch has them: of those with two streams, then of the others."""
    pairs, others, *rest = ours
    parts = np.split(np.arange(len(record.blocks)), [len(pairs.img)])
    made = [jnp.asarray(np.stack([record.blocks[number].cond for number in part])) for part in parts]
    img, txt = jnp.split(made[0], 2, axis=1)
    both = Streams(img.reshape(pairs.img.shape), txt.reshape(pairs.txt.shape))
    return ChromaShared(both, made[1].reshape(others.shape), *rest)


CHECK = ModelCheck(
    encoder="t5",
    tolerances=1,
    text=lambda directory, ids, config: record_hidden_padding(directory, ids.t5_ids, ids.t5_mask),
    record=record_chroma,
    conditions=_conditions,
    given=_given,
)
"""How Chroma is compared with PyTorch's."""
