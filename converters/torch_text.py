"""PyTorch's text encoders for `convert check`, run on one prompt's ids in float32.

1. `record_text`: FLUX.1's T5 and CLIP. 2. `record_states`: Qwen3. 3. `record_encoders`: Stable Diffusion 3's
two CLIPs, and T5 if it is there.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Int

from converters.qwen3 import HEADED
from converters.source import Source
from converters.torch_files import load_blockwise, load_module


class TextRecord(NamedTuple):
    """What PyTorch's text encoders return for one prompt.

    Attributes:
        t5: T5's last hidden state.
        clip: CLIP's last hidden state.
        pooled: CLIP's pooled vector.
    """

    t5: Float32[np.ndarray, "txt t5_width"]
    clip: Float32[np.ndarray, "clip clip_width"]
    pooled: Float32[np.ndarray, "clip_width"]


class EncodersRecord(NamedTuple):
    """What PyTorch's text encoders return for one prompt.

    Attributes:
        clips: of each CLIP, the states before its last layer, and its projected pooled vector.
        t5: T5's last hidden state; None where there is none.
    """

    clips: tuple[tuple[Float32[np.ndarray, "clip _"], Float32[np.ndarray, "_"]], ...]
    t5: Float32[np.ndarray, "t5 text_width"] | None


def record_text(directory: Path, t5_ids: Int[np.ndarray, "txt"], clip_ids: Int[np.ndarray, "clip"]) -> TextRecord:
    """Runs both PyTorch text encoders on one prompt's ids."""
    torch, transformers = load_module("torch"), load_module("transformers")
    config = transformers.T5Config.from_pretrained(directory / "text_encoder_2")
    t5 = load_blockwise(torch, lambda: transformers.T5EncoderModel(config), directory / "text_encoder_2")
    clip = transformers.CLIPTextModel.from_pretrained(directory / "text_encoder", dtype=torch.float32).eval()
    with torch.no_grad():
        hidden = t5(torch.from_numpy(t5_ids[None].astype(np.int64))).last_hidden_state
        del t5
        pooled = clip(torch.from_numpy(clip_ids[None].astype(np.int64)))
    return TextRecord(hidden[0].numpy(), pooled.last_hidden_state[0].numpy(), pooled.pooler_output[0].numpy())


def record_states(
    directory: Path, ids: Int[np.ndarray, "txt"], mask: Bool[np.ndarray, "txt"], layers: Sequence[int]
) -> Float32[np.ndarray, "txt states"]:
    """Runs PyTorch's Qwen3 on one prompt's ids; returns the states after some layers, side by side.

    Args:
        directory: of the pipeline.
        ids: of the prompt, filled up.
        mask: False for padding.
        layers: whose states; 0 is the embedding.
    """
    torch, transformers = load_module("torch"), load_module("transformers")
    folder = directory / "text_encoder"
    config = transformers.Qwen3Config.from_pretrained(folder)
    headed = any(key.startswith(HEADED) for key in Source(folder))
    kind = transformers.Qwen3ForCausalLM if headed else transformers.Qwen3Model
    model = load_blockwise(torch, lambda: kind(config), folder)
    model = model.model if headed else model
    model.rotary_emb = type(model.rotary_emb)(config)  # its wavelengths are in no file
    given = {"input_ids": torch.from_numpy(ids[None].astype(np.int64)), "attention_mask": torch.from_numpy(mask[None])}
    with torch.no_grad():
        states = model(**given, output_hidden_states=True, use_cache=False).hidden_states
    return np.concatenate([states[layer][0].numpy() for layer in layers], axis=1)


def record_encoders(
    directory: Path, clip_ids: Int[np.ndarray, "two_clips"], t5_ids: Int[np.ndarray, "t5"]
) -> EncodersRecord:
    """Runs the text encoders on one prompt's ids.

    Args:
        directory: of the pipeline.
        clip_ids: for the first CLIP, then as many for the second.
        t5_ids: for T5, which may be missing.
    """
    torch, transformers = load_module("torch"), load_module("transformers")
    clips, t5 = [], None
    for folder, ids in zip(("text_encoder", "text_encoder_2"), np.split(clip_ids, 2), strict=True):
        kind = transformers.CLIPTextModelWithProjection
        encoder = kind.from_pretrained(directory / folder, dtype=torch.float32).eval()
        with torch.no_grad():
            made = encoder(torch.from_numpy(ids[None].astype(np.int64)), output_hidden_states=True)
        clips.append((made.hidden_states[-2][0].numpy(), made.text_embeds[0].numpy()))
    if (directory / "text_encoder_3").is_dir():
        config = transformers.T5Config.from_pretrained(directory / "text_encoder_3")
        model = load_blockwise(torch, lambda: transformers.T5EncoderModel(config), directory / "text_encoder_3")
        with torch.no_grad():
            t5 = model(torch.from_numpy(t5_ids[None].astype(np.int64))).last_hidden_state[0].numpy()
    return EncodersRecord(tuple(clips), t5)
