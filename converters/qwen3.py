"""The Qwen3 text encoder of FLUX.2 from a `transformers` directory: a table of rules and an allow-list.

1. `qwen3_config_from_transformers` reads a `config.json`, as transformers 4 or 5 writes it. The token that fills
   prompts up is the tokenizer's.
2. `qwen3_tables` says which keys make which leaves. Layers that are never read are left out, with the last norm and the
   output head.
"""

from collections.abc import Mapping
from typing import Any

from converters.allow_list import REQUIRED, AllowList, read_attributes
from converters.mapping import Ignored, Rule, transpose
from converters.text_encoders import Tables
from difffract_jax.config import UserError
from difffract_jax.models.qwen3 import Qwen3Config

READ_LAYERS = (9, 18, 27)
"""The states that FLUX.2 takes for text; the embedding is state 0."""
_LAYER = "model.layers.{layer}"

QWEN3_TRANSFORMERS = (
    Rule("model.embed_tokens.weight", "embed.embedding"),
    Rule(f"{_LAYER}.input_layernorm.weight", "blocks.attn_norm.scale"),
    *(Rule(f"{_LAYER}.self_attn.{name}_proj.weight", f"blocks.attn.{name}.kernel", transpose) for name in "qkvo"),
    *(Rule(f"{_LAYER}.self_attn.{name}_norm.weight", f"blocks.attn.{name}_norm.scale") for name in "qk"),
    Rule(f"{_LAYER}.post_attention_layernorm.weight", "blocks.ff_norm.scale"),
    *(
        Rule(f"{_LAYER}.mlp.{name}_proj.weight", f"blocks.ff.{name}.kernel", transpose)
        for name in ("gate", "up", "down")
    ),
)
"""`Qwen3ForCausalLM`."""


def qwen3_tables(config: Qwen3Config, keys: Any) -> Tables:
    """Returns the rules, and the keys to leave out.

    Args:
        config: which layers there are.
        keys: the keys of the checkpoint.
    """
    numbers = {int(key.split(".")[2]) for key in keys if key.startswith("model.layers.")}
    unread = tuple(
        Ignored(f"model.layers.{number}.*", f"the text is read after {config.layers} layers")
        for number in sorted(numbers)
        if number >= config.layers
    )
    behind = (
        Ignored("model.norm.weight", "stands behind the last layer, which is not read"),
        Ignored("lm_head.weight", "gives the next token, which is not asked for"),
    )
    return Tables(QWEN3_TRANSFORMERS, (*unread, *behind))


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


def qwen3_config_from_transformers(attributes: Mapping[str, object], *, padding_id: int = 0) -> Qwen3Config:
    """Reads the configuration of a Qwen3 language model.

    Args:
        attributes: the contents of its `config.json`.
        padding_id: token that fills prompts up, from the tokenizer.

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
    if layers <= READ_LAYERS[-1]:
        raise UserError(
            f"The Qwen3 text encoder has {layers} layers, but its states {READ_LAYERS} are wanted, so that it must "
            f"have more than {READ_LAYERS[-1]}; give the text encoder of FLUX.2-klein."
        )
    return Qwen3Config(
        vocab=read["vocab_size"],
        width=read["hidden_size"],
        d_ff=read["intermediate_size"],
        heads=read["num_attention_heads"],
        key_heads=read["num_key_value_heads"],
        head_dim=read["head_dim"],
        padding_id=padding_id,
        read_layers=READ_LAYERS,
        rope_theta=float(theta),
        eps=read["rms_norm_eps"],
    )
