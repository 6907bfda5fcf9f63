"""The Qwen3 text encoder from a `transformers` directory: a table of rules and an allow-list.

1. `qwen3_config_from_transformers` reads a `config.json`, as transformers 4 or 5 writes it. The token that fills
   prompts up is the tokenizer's.
2. `qwen3_tables` says which keys make which leaves, of `Qwen3ForCausalLM` and of `Qwen3Model`, which has no head and
   whose keys begin without `model.`. Layers that are never read are left out, with the last norm and the output head.
3. `behind_last` stands for these where a directory is written: transformers puts the last norm behind the last layer,
   so that the states that are read must not be the last.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from converters.allow_list import REQUIRED, AllowList, read_attributes
from converters.mapping import Ignored, Rule, source_shapes, transpose
from converters.text_encoders import Tables
from difffract_jax.config import UserError
from difffract_jax.models.qwen3 import Qwen3Config, Qwen3Encoder
from difffract_jax.storage.checkpoint import leaf_paths

READ_LAYERS = (9, 18, 27)
"""The states that FLUX.2 takes for text; the embedding is state 0."""
HEADED = "model."
"""What keys of a model with a head begin with, but the head's own."""


def _rules(prefix: str) -> tuple[Rule, ...]:
    """Returns the table of a model whose keys begin with a prefix."""
    layer = f"{prefix}layers.{{layer}}"
    return (
        Rule(f"{prefix}embed_tokens.weight", "embed.embedding"),
        Rule(f"{layer}.input_layernorm.weight", "blocks.attn_norm.scale"),
        *(Rule(f"{layer}.self_attn.{name}_proj.weight", f"blocks.attn.{name}.kernel", transpose) for name in "qkvo"),
        *(Rule(f"{layer}.self_attn.{name}_norm.weight", f"blocks.attn.{name}_norm.scale") for name in "qk"),
        Rule(f"{layer}.post_attention_layernorm.weight", "blocks.ff_norm.scale"),
        *(
            Rule(f"{layer}.mlp.{name}_proj.weight", f"blocks.ff.{name}.kernel", transpose)
            for name in ("gate", "up", "down")
        ),
    )


QWEN3_TRANSFORMERS = _rules(HEADED)
"""`Qwen3ForCausalLM`."""
QWEN3_MODEL = _rules("")
"""`Qwen3Model`."""


def qwen3_tables(config: Qwen3Config, keys: Any) -> Tables:
    """Returns the rules, and the keys to leave out.

    Args:
        config: which layers there are.
        keys: the keys of the checkpoint.
    """
    prefix = HEADED if any(key.startswith(HEADED) for key in keys) else ""
    layers = f"{prefix}layers."
    numbers = {int(key.removeprefix(layers).split(".")[0]) for key in keys if key.startswith(layers)}
    unread = tuple(
        Ignored(f"{layers}{number}.*", f"the text is read after {config.layers} layers")
        for number in sorted(numbers)
        if number >= config.layers
    )
    behind = (
        Ignored(f"{prefix}norm.weight", "stands behind the last layer, which is not read"),
        Ignored("lm_head.weight", "gives the next token, which is not asked for"),
    )
    return Tables(QWEN3_TRANSFORMERS if prefix else QWEN3_MODEL, (*unread, *behind))


def behind_last(encoder: Qwen3Encoder) -> dict[str, np.ndarray]:
    """Returns a layer behind the last of ours that adds nothing, and the last norm, by the keys of a model with a head.

    Args:
        encoder: ours.
    """
    dtype = np.dtype(next(iter(leaf_paths(encoder).values())).dtype)
    first = {
        key: shape
        for key, shape in source_shapes(QWEN3_TRANSFORMERS, encoder).items()
        if key.startswith("model.layers.0.")
    }
    layer = {
        key.replace(".0.", f".{encoder.config.layers}.", 1): (np.ones if "norm" in key else np.zeros)(shape, dtype)
        for key, shape in first.items()
    }
    return layer | {"model.norm.weight": np.ones(encoder.config.width, dtype)}


_ALLOWED = AllowList(
    component="Qwen3 text encoder",
    read={
        "vocab_size": REQUIRED,
        "hidden_size": REQUIRED,
        "intermediate_size": REQUIRED,
        "num_hidden_layers": REQUIRED,
        "num_attention_heads": REQUIRED,
        "num_key_value_heads": REQUIRED,
        "head_dim": 128,
        "rms_norm_eps": 1e-6,
        "rope_theta": None,
    },
    fixed={
        "model_type": ("qwen3",),
        "hidden_act": ("silu",),
        "attention_bias": (False,),
        "use_sliding_window": (False,),
        "sliding_window": (None,),
        "rope_scaling": (None,),
    },
    inert=frozenset(
        (
            *("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "attention_dropout"),
            *("bos_token_id", "eos_token_id", "pad_token_id", "initializer_range", "max_position_embeddings"),
            *("max_window_layers", "tie_word_embeddings", "use_cache", "chunk_size_feed_forward", "id2label"),
            *("label2id", "problem_type", "output_attentions", "output_hidden_states", "return_dict"),
            *("is_encoder_decoder", "layer_types", "rope_parameters"),
        )
    ),
)


def qwen3_config_from_transformers(
    attributes: Mapping[str, object], *, padding_id: int = 0, before_last: bool = False
) -> Qwen3Config:
    """Reads the configuration of a Qwen3 language model.

    Args:
        attributes: the contents of its `config.json`.
        padding_id: token that fills prompts up, from the tokenizer.
        before_last: whether the text is the state before the last layer; else those of `READ_LAYERS`.

    Raises:
        UserError: naming every attribute that is missing, not understood, or has an unsupported value; or if the model
            has too few layers.
    """
    read: dict[str, Any] = read_attributes(attributes, _ALLOWED)
    rope = attributes.get("rope_parameters") or {}
    theta = read["rope_theta"] or (rope.get("rope_theta") if isinstance(rope, Mapping) else None)
    kinds = attributes.get("layer_types") or ()
    odd = (
        sorted({str(kind) for kind in kinds} - {"full_attention"}) if isinstance(kinds, list | tuple) else [str(kinds)]
    )
    if theta is None or not isinstance(rope, Mapping) or rope.get("rope_type", "default") != "default" or odd:
        raise UserError(
            f"The Qwen3 text encoder has rope_parameters={rope!r} and layers of {odd or 'full_attention'}; only plain "
            "rotary positions (rope_type default, with a rope_theta) and full attention are supported."
        )
    layers = read["num_hidden_layers"]
    wanted = (max(layers - 1, 1),) if before_last else READ_LAYERS
    if layers <= wanted[-1]:
        release = "Z-Image" if before_last else "FLUX.2-klein"
        numbers = ", ".join(map(str, wanted))
        raise UserError(
            f"The number of layers of the Qwen3 text encoder is {layers}, but its states after layers {numbers} are "
            f"wanted, so that it must have more than {wanted[-1]}; give the text encoder of {release}."
        )
    return Qwen3Config(
        vocab=read["vocab_size"],
        width=read["hidden_size"],
        d_ff=read["intermediate_size"],
        heads=read["num_attention_heads"],
        key_heads=read["num_key_value_heads"],
        head_dim=read["head_dim"],
        padding_id=padding_id,
        read_layers=wanted,
        rope_theta=float(theta),
        eps=read["rms_norm_eps"],
    )
