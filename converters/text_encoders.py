"""T5 and CLIP from `transformers` directories: two tables of rules and two allow-lists.

1. `t5_config_from_transformers` and `clip_config_from_transformers` read a `config.json`.
2. `t5_tables` and `clip_tables` choose, by the keys of the file, the rules and the keys to leave out; checkpoints of
   one model differ in three ways:
   - T5's embedding is stored as `shared.weight`, as `encoder.embed_tokens.weight`, or as both, equal;
   - T5's feed-forward layer is gated (`wi_0`, `wi_1`) or plain (`wi`);
   - CLIP's keys begin with `text_model.`, as in the FLUX.1 releases, or not, as transformers 5 writes them.
3. The engine applies the rules; `{layer}` becomes the leading axis of our stacked leaves.

The tables in capitals are what transformers 5 itself would write, and what an export writes.
"""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from converters.allow_list import REQUIRED, AllowList, read_attributes
from converters.mapping import Ignored, Rule, transpose
from difffract_jax.config import UserError
from difffract_jax.models.clip import CLIPConfig
from difffract_jax.models.t5 import T5Config

CLIP_PREFIX = "text_model."
"""What the keys of CLIP checkpoints begin with, where they were written before transformers 5."""


class Tables(NamedTuple):
    """How to read one checkpoint.

    Attributes:
        rules: key patterns to leaf paths.
        ignored: keys that no rule reads, each with the reason.
    """

    rules: tuple[Rule, ...]
    ignored: tuple[Ignored, ...] = ()


_T5_LAYER = "encoder.block.{layer}.layer"
_T5_SHARED = Rule("shared.weight", "embed.embedding")
_T5_EMBED_TOKENS = Rule("encoder.embed_tokens.weight", "embed.embedding")
_T5_GATED = (
    Rule(f"{_T5_LAYER}.1.DenseReluDense.wi_0.weight", "blocks.ff.gate.kernel", transpose),
    Rule(f"{_T5_LAYER}.1.DenseReluDense.wi_1.weight", "blocks.ff.up.kernel", transpose),
)
_T5_PLAIN = (Rule(f"{_T5_LAYER}.1.DenseReluDense.wi.weight", "blocks.ff.up.kernel", transpose),)
_T5_COMMON = (
    # The table that all layers share is stored in the first.
    Rule("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", "relative_bias.embedding"),
    Rule(f"{_T5_LAYER}.0.layer_norm.weight", "blocks.attn_norm.scale"),
    *(Rule(f"{_T5_LAYER}.0.SelfAttention.{name}.weight", f"blocks.attn.{name}.kernel", transpose) for name in "qkvo"),
    Rule(f"{_T5_LAYER}.1.layer_norm.weight", "blocks.ff_norm.scale"),
    Rule(f"{_T5_LAYER}.1.DenseReluDense.wo.weight", "blocks.ff.down.kernel", transpose),
    Rule("encoder.final_layer_norm.weight", "final_norm.scale"),
)

T5_TRANSFORMERS = (_T5_SHARED, *_T5_COMMON, *_T5_GATED)
"""`T5EncoderModel` of version 1.1, the one in FLUX.1."""

_T5_TWIN = Ignored("encoder.embed_tokens.weight", "the embedding is read from shared.weight, of which this is a copy")

_T5_TOKENIZER = Ignored(
    "spiece_model", "the tokenizer, which ComfyUI's files carry along and a directory has of its own"
)


def _linear(source: str, target: str) -> tuple[Rule, Rule]:
    return Rule(f"{source}.weight", f"{target}.kernel", transpose), Rule(f"{source}.bias", f"{target}.bias")


def _norm(source: str, target: str) -> tuple[Rule, Rule]:
    return Rule(f"{source}.weight", f"{target}.scale"), Rule(f"{source}.bias", f"{target}.bias")


def _clip_rules(prefix: str) -> tuple[Rule, ...]:
    layer = f"{prefix}encoder.layers.{{layer}}"
    return (
        Rule(f"{prefix}embeddings.token_embedding.weight", "embed.embedding"),
        Rule(f"{prefix}embeddings.position_embedding.weight", "positions.embedding"),
        *_norm(f"{layer}.layer_norm1", "blocks.attn_norm"),
        *_linear(f"{layer}.self_attn.q_proj", "blocks.attn.q"),
        *_linear(f"{layer}.self_attn.k_proj", "blocks.attn.k"),
        *_linear(f"{layer}.self_attn.v_proj", "blocks.attn.v"),
        *_linear(f"{layer}.self_attn.out_proj", "blocks.attn.out"),
        *_norm(f"{layer}.layer_norm2", "blocks.mlp_norm"),
        *_linear(f"{layer}.mlp.fc1", "blocks.up"),
        *_linear(f"{layer}.mlp.fc2", "blocks.down"),
        *_norm(f"{prefix}final_layer_norm", "final_norm"),
    )


CLIP_TRANSFORMERS = _clip_rules("")
"""`CLIPTextModel`, with the keys of transformers 5."""


_PROJECTION = "text_projection.weight"
PROJECTED_CLIP = (
    *(rule._replace(target=f"text.{rule.target}") for rule in _clip_rules(CLIP_PREFIX)),
    Rule(_PROJECTION, "projection.kernel", transpose),
)
"""`CLIPTextModelWithProjection`."""


def t5_tables(keys: Iterable[str]) -> Tables:
    """Chooses the rules for a T5 checkpoint.

    Args:
        keys: the keys of the checkpoint.

    Returns:
        Rules that fit the way it stores the embedding and the feed-forward layers.
    """
    keys = set(keys)
    shared = _T5_SHARED.source in keys or _T5_EMBED_TOKENS.source not in keys
    gated = not any(".DenseReluDense.wi." in key for key in keys)
    rules = (_T5_SHARED if shared else _T5_EMBED_TOKENS, *_T5_COMMON, *(_T5_GATED if gated else _T5_PLAIN))
    return Tables(rules, (_T5_TWIN, _T5_TOKENIZER) if shared else (_T5_TOKENIZER,))


def clip_tables(keys: Iterable[str]) -> Tables:
    """Chooses the rules for a CLIP checkpoint.

    Args:
        keys: the keys of the checkpoint.

    Returns:
        Rules that fit the prefix its keys have.
    """
    prefix = CLIP_PREFIX if any(key.startswith(CLIP_PREFIX) for key in keys) else ""
    ignored = (
        Ignored(f"{prefix}embeddings.position_ids", "the numbers 0, 1, 2, ..., which need not be stored"),
        Ignored(_PROJECTION, "FLUX takes the pooled vector before this projection"),
        Ignored("logit_scale", "compares texts with images, which FLUX does not"),
        Ignored("vision_model.*", "reads images, in files of CLIP as a whole"),
        Ignored("visual_projection.weight", "the same"),
    )
    return Tables(_clip_rules(prefix), ignored)


def two_clip_tables(parts: Mapping[str, Iterable[str]]) -> Tables:
    """Chooses the rules for several CLIPs with projections, the name of each before its keys and its leaves.

    Args:
        parts: name of each -> the keys of its checkpoint.
    """
    rules: list[Rule] = []
    ignored: list[Ignored] = []
    for name, keys in parts.items():
        one = clip_tables(keys)
        rules += [rule._replace(source=f"{name}.{rule.source}", target=f"{name}.text.{rule.target}") for rule in one[0]]
        rules.append(Rule(f"{name}.{_PROJECTION}", f"{name}.projection.kernel", transpose))
        ignored += [item._replace(source=f"{name}.{item.source}") for item in one[1] if item.source != _PROJECTION]
    return Tables(tuple(rules), tuple(ignored))


# What transformers writes into every config.json, and what has to do with training or generation only.
_INERT = frozenset(
    (
        *("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version"),
        *("attention_dropout", "classifier_dropout", "dropout", "dropout_rate", "gradient_checkpointing"),
        *("initializer_factor", "initializer_range"),
        *("bos_token_id", "decoder_start_token_id", "is_encoder_decoder", "n_positions", "num_decoder_layers"),
        *("chunk_size_feed_forward", "id2label", "label2id", "problem_type"),
        *("output_attentions", "output_hidden_states", "return_dict"),
        *("output_past", "pad_token_id", "scale_decoder_outputs", "task_specific_params", "tie_word_embeddings"),
        *("projection_dim", "use_cache"),
    )
)

_T5_ALLOWED = AllowList(
    component="T5 text encoder",
    read={
        "vocab_size": REQUIRED,
        "d_model": REQUIRED,
        "d_kv": REQUIRED,
        "d_ff": REQUIRED,
        "num_layers": REQUIRED,
        "num_heads": REQUIRED,
        "relative_attention_num_buckets": 32,
        "relative_attention_max_distance": 128,
        "layer_norm_epsilon": 1e-6,
        "feed_forward_proj": "relu",
    },
    fixed={
        "model_type": ("t5",),
        "is_decoder": (False,),
        "feed_forward_proj": ("gated-gelu", "relu"),
        # Both follow from feed_forward_proj; the check below holds them to it.
        "dense_act_fn": ("gelu_new", "relu"),
        "is_gated_act": (True, False),
    },
    inert=_INERT | {"eos_token_id"},
)

_CLIP_ALLOWED = AllowList(
    component="CLIP text encoder",
    read={
        "vocab_size": REQUIRED,
        "hidden_size": REQUIRED,
        "intermediate_size": REQUIRED,
        "num_hidden_layers": REQUIRED,
        "num_attention_heads": REQUIRED,
        "max_position_embeddings": 77,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
        "eos_token_id": 49407,
    },
    fixed={"model_type": ("clip_text_model",), "hidden_act": ("quick_gelu", "gelu")},
    inert=_INERT,
)


def t5_config_from_transformers(attributes: Mapping[str, object]) -> T5Config:
    """Reads the configuration of a T5 encoder.

    Args:
        attributes: the contents of its `config.json`.

    Returns:
        Our configuration.

    Raises:
        UserError: naming every attribute that is missing, not understood, or has an unsupported value.
    """
    read: dict[str, Any] = read_attributes(attributes, _T5_ALLOWED)
    gated = read["feed_forward_proj"] == "gated-gelu"
    implied = {"is_gated_act": gated, "dense_act_fn": "gelu_new" if gated else "relu"}
    clash = [f"{name}={attributes[name]!r}" for name in implied if attributes.get(name, implied[name]) != implied[name]]
    if clash:
        raise UserError(
            f"The T5 text encoder says feed_forward_proj={read['feed_forward_proj']!r} but {' and '.join(clash)}, "
            "which contradict each other; correct its config.json."
        )
    return T5Config(
        vocab=read["vocab_size"],
        d_model=read["d_model"],
        d_kv=read["d_kv"],
        d_ff=read["d_ff"],
        layers=read["num_layers"],
        heads=read["num_heads"],
        buckets=read["relative_attention_num_buckets"],
        max_distance=read["relative_attention_max_distance"],
        eps=read["layer_norm_epsilon"],
        gated=gated,
        activation="gelu_new" if gated else "relu",
    )


def clip_config_from_transformers(attributes: Mapping[str, object]) -> CLIPConfig:
    """Reads the configuration of a CLIP text encoder.

    Args:
        attributes: the contents of its `config.json`.

    Returns:
        Our configuration.

    Raises:
        UserError: naming every attribute that is missing, not understood, or has an unsupported value.
    """
    read: dict[str, Any] = read_attributes(attributes, _CLIP_ALLOWED)
    if not isinstance(read["eos_token_id"], int):
        raise UserError(
            f"The CLIP text encoder has eos_token_id={read['eos_token_id']!r}, but only a single id is supported; "
            "set it to the one that ends a prompt."
        )
    return CLIPConfig(
        vocab=read["vocab_size"],
        d_model=read["hidden_size"],
        d_ff=read["intermediate_size"],
        layers=read["num_hidden_layers"],
        heads=read["num_attention_heads"],
        positions=read["max_position_embeddings"],
        activation=read["hidden_act"],
        eps=read["layer_norm_eps"],
        eos_token_id=read["eos_token_id"],
    )
