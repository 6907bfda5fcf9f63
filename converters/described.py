"""What a diffusers directory says of text encoders and schedules, in the words of their libraries."""

from typing import Any

from difffract_jax.models.clip import CLIPConfig
from difffract_jax.models.qwen3 import Qwen3Config
from difffract_jax.models.t5 import T5Config

SCHEDULER = ["diffusers", "FlowMatchEulerDiscreteScheduler"]
"""The class of every schedule, as `model_index.json` names it."""


def clip_described(config: Any) -> dict[str, Any]:
    """Returns the `config.json` of a CLIP text encoder of our configuration."""
    assert isinstance(config, CLIPConfig)
    return {
        "architectures": ["CLIPTextModel"],
        "eos_token_id": config.eos_token_id,
        "hidden_act": config.activation,
        "hidden_size": config.d_model,
        "intermediate_size": config.d_ff,
        "layer_norm_eps": config.eps,
        "max_position_embeddings": config.positions,
        "model_type": "clip_text_model",
        "num_attention_heads": config.heads,
        "num_hidden_layers": config.layers,
        "vocab_size": config.vocab,
    }


def t5_described(config: Any) -> dict[str, Any]:
    """Returns the `config.json` of a T5 encoder of our configuration."""
    assert isinstance(config, T5Config)
    return {
        "architectures": ["T5EncoderModel"],
        "d_ff": config.d_ff,
        "d_kv": config.d_kv,
        "d_model": config.d_model,
        "dense_act_fn": config.activation,
        "feed_forward_proj": "gated-gelu" if config.gated else "relu",
        "is_encoder_decoder": False,
        "is_gated_act": config.gated,
        "layer_norm_epsilon": config.eps,
        "model_type": "t5",
        "num_heads": config.heads,
        "num_layers": config.layers,
        "relative_attention_max_distance": config.max_distance,
        "relative_attention_num_buckets": config.buckets,
        "vocab_size": config.vocab,
    }


def qwen3_described(config: Any) -> dict[str, Any]:
    """Returns the `config.json` of a Qwen3 of our configuration: of the layers that are read, and one behind them."""
    assert isinstance(config, Qwen3Config)
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": False,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "hidden_size": config.width,
        "intermediate_size": config.d_ff,
        "max_position_embeddings": 40960,
        "model_type": "qwen3",
        "num_attention_heads": config.heads,
        "num_hidden_layers": config.layers + 1,
        "num_key_value_heads": config.key_heads,
        "rms_norm_eps": config.eps,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": True,
        "vocab_size": config.vocab,
    }
