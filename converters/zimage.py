"""The MM-DiT of Z-Image: tables of rules for diffusers' names and the original ones, and its configuration.

1. diffusers packs a token of the image in the order row, column, channel; ours is channel, row, column, as in FLUX.1.
   The matrices that read and write tokens are arranged anew.
2. `zimage_config_from_diffusers` reads its `config.json` by an allow-list, and `zimage_config_to_diffusers` writes it.
   How far the table of positions reaches (`axes_lens`) is not read: angles are computed.
"""

from collections.abc import Callable, Mapping
from typing import Any

from converters.allow_list import REQUIRED, AllowList, read_attributes
from converters.mapping import Rule, fuse_qkv, pack_columns, pack_rows, transpose
from difffract_jax.config import UserError
from difffract_jax.models.sampler import PATCH
from difffract_jax.models.zimage_blocks import NORM_EPS, ZImageConfig

CLASS = "ZImageTransformer2DModel"
_PATCH = f"{PATCH}-1"
"""What diffusers calls the patches of 2 x 2 latents of one frame."""
_STACKS = {"noise_refiner": "refine_img", "context_refiner": "refine_txt", "layers": "trunk"}
"""What diffusers calls a run of blocks -> our stack."""
_NORMS = {
    "attention_norm1": "before_attn",
    "attention_norm2": "behind_attn",
    "ffn_norm1": "before_mlp",
    "ffn_norm2": "behind_mlp",
}


def _linear(source: str, target: str, order: Any = transpose) -> tuple[Rule, Rule]:
    return Rule(f"{source}.weight", f"{target}.kernel", order), Rule(f"{source}.bias", f"{target}.bias", order)


def _attention(block: str, stack: str) -> tuple[Rule, ...]:
    """Returns the rules of a block's attention in diffusers' names."""
    return (
        Rule(tuple(f"{block}.attention.to_{name}.weight" for name in "qkv"), f"{stack}.qkv.kernel", fuse_qkv),
        *(Rule(f"{block}.attention.norm_{name}.weight", f"{stack}.{name}_norm.scale") for name in "qk"),
        Rule(f"{block}.attention.to_out.0.weight", f"{stack}.attn_out.kernel", transpose),
    )


def _original_attention(block: str, stack: str) -> tuple[Rule, ...]:
    """Returns the rules of a block's attention in the names of the original release."""
    return (
        Rule(f"{block}.attention.qkv.weight", f"{stack}.qkv.kernel", transpose),
        *(Rule(f"{block}.attention.{name}_norm.weight", f"{stack}.{name}_norm.scale") for name in "qk"),
        Rule(f"{block}.attention.out.weight", f"{stack}.attn_out.kernel", transpose),
    )


def _stack(blocks: str, stack: str, attention: Callable[[str, str], tuple[Rule, ...]]) -> tuple[Rule, ...]:
    """Returns the rules of a run of blocks; those of modulations that it lacks match no leaf."""
    block = f"{blocks}.{{layer}}"
    return (
        *_linear(f"{block}.adaLN_modulation.0", f"{stack}.mod"),
        *attention(block, stack),
        *(
            Rule(f"{block}.feed_forward.{theirs}.weight", f"{stack}.mlp.{ours}.kernel", transpose)
            for theirs, ours in (("w1", "gate"), ("w3", "up"), ("w2", "down"))
        ),
        *(Rule(f"{block}.{theirs}.weight", f"{stack}.{ours}.scale") for theirs, ours in _NORMS.items()),
    )


def _table(img_in: str, final: str, attention: Callable[[str, str], tuple[Rule, ...]]) -> tuple[Rule, ...]:
    """Returns the rules of the transformer.

    Args:
        img_in: what the projection of the image's tokens is called.
        final: what the last norm and projection are called.
        attention: from a block's name and our stack to the rules of its attention.
    """
    return (
        Rule(f"{img_in}.weight", "img_in.kernel", pack_columns),
        Rule(f"{img_in}.bias", "img_in.bias"),
        Rule("cap_embedder.0.weight", "txt_norm.scale"),
        *_linear("cap_embedder.1", "txt_in"),
        Rule("x_pad_token", "img_pad"),
        Rule("cap_pad_token", "txt_pad"),
        *_linear("t_embedder.mlp.0", "time_in.up"),
        *_linear("t_embedder.mlp.2", "time_in.down"),
        *(rule for blocks, stack in _STACKS.items() for rule in _stack(blocks, stack, attention)),
        *_linear(f"{final}.adaLN_modulation.1", "final.mod"),
        *_linear(f"{final}.linear", "final.proj", pack_rows),
    )


ZIMAGE_DIFFUSERS = _table(f"all_x_embedder.{_PATCH}", f"all_final_layer.{_PATCH}", _attention)
"""diffusers' `ZImageTransformer2DModel`."""
ZIMAGE_ORIGINAL = _table("x_embedder", "final_layer", _original_attention)
"""The names of the original release, which LoRAs go by too."""
_ALLOWED = AllowList(
    component="Z-Image transformer",
    # Absent attributes that have a default here have it in diffusers' constructor too.
    read={
        "in_channels": REQUIRED,
        "dim": REQUIRED,
        "n_layers": REQUIRED,
        "n_refiner_layers": REQUIRED,
        "n_heads": REQUIRED,
        "n_kv_heads": REQUIRED,
        "cap_feat_dim": REQUIRED,
        "rope_theta": 256.0,
        "axes_dims": (32, 48, 48),
    },
    fixed={
        "_class_name": (CLASS,),
        "all_patch_size": ((PATCH,), [PATCH]),
        "all_f_patch_size": ((1,), [1]),
        "norm_eps": (NORM_EPS,),
        "qk_norm": (True,),
        "siglip_feat_dim": (None,),
        "t_scale": (1000.0,),
    },
    inert=frozenset(("_diffusers_version", "_name_or_path", "axes_lens")),
)


def zimage_config_from_diffusers(attributes: Mapping[str, object]) -> ZImageConfig:
    """Reads the configuration of a `ZImageTransformer2DModel`.

    Args:
        attributes: the contents of its `config.json`.

    Raises:
        UserError: naming every attribute that is missing, not understood, or has an unsupported value; or if sizes do
            not fit one another.
    """
    read: dict[str, Any] = read_attributes(attributes, _ALLOWED)
    heads, width, axes = read["n_heads"], read["dim"], tuple(read["axes_dims"])
    three = len(axes) == 3 and not any(axis % 2 for axis in axes)
    if not heads or width % heads or not three or sum(axes) != width // heads:
        raise UserError(
            f"The Z-Image transformer has dim={width}, n_heads={heads} and axes_dims={list(axes)}, which must be three "
            "even numbers that add up to dim over n_heads; correct its config.json."
        )
    if read["n_kv_heads"] != heads:
        raise UserError(
            f"The Z-Image transformer has n_kv_heads={read['n_kv_heads']}, but only as many as n_heads={heads} are "
            "supported, as in the release."
        )
    channels = PATCH**2 * read["in_channels"]
    return ZImageConfig(
        depth=read["n_layers"],
        depth_refiner=read["n_refiner_layers"],
        heads=heads,
        head_dim=width // heads,
        rope_axes=axes,
        in_channels=channels,
        out_channels=channels,
        text_width=read["cap_feat_dim"] + 1,
        rope_theta=float(read["rope_theta"]),
    )


def zimage_config_to_diffusers(config: ZImageConfig) -> dict[str, Any]:
    """Returns the `config.json` that diffusers would write for this transformer."""
    return {
        "_class_name": CLASS,
        "all_f_patch_size": [1],
        "all_patch_size": [PATCH],
        "axes_dims": list(config.rope_axes),
        "axes_lens": [1536, 512, 512],
        "cap_feat_dim": config.text_width - 1,
        "dim": config.d_model,
        "in_channels": config.in_channels // PATCH**2,
        "n_heads": config.heads,
        "n_kv_heads": config.heads,
        "n_layers": config.depth,
        "n_refiner_layers": config.depth_refiner,
        "norm_eps": NORM_EPS,
        "qk_norm": True,
        "rope_theta": config.rope_theta,
        "t_scale": 1000.0,
    }
