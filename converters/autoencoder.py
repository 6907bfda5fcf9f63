"""The autoencoder from a diffusers directory (`AutoencoderKL`): one table of rules and an allow-list.

1. `autoencoder_config_from_diffusers` reads its `config.json`.
2. `AUTOENCODER_DIFFUSERS` maps its keys. The placeholders `{level}` and `{resnet}` stand in key and leaf alike, so one
   table serves any number of levels; rows for parts that a checkpoint does not have match nothing.
3. The engine applies it: convolutions from [out in rows cols] to [rows cols in out], matrices transposed.

Early checkpoints name the attention's matrices `query`, `key`, `value` and `proj_attn`, or store them as 1x1
convolutions; the engine refuses these keys, or shapes, by name.
"""

from collections.abc import Mapping
from typing import Any

from converters.allow_list import REQUIRED, AllowList, read_attributes
from converters.mapping import Rule, conv, transpose
from difffract_jax.config import UserError
from difffract_jax.models.autoencoder import AutoencoderConfig


def _conv(source: str, target: str) -> tuple[Rule, Rule]:
    return Rule(f"{source}.weight", f"{target}.kernel", conv), Rule(f"{source}.bias", f"{target}.bias")


def _linear(source: str, target: str) -> tuple[Rule, Rule]:
    return Rule(f"{source}.weight", f"{target}.kernel", transpose), Rule(f"{source}.bias", f"{target}.bias")


def _norm(source: str, target: str) -> tuple[Rule, Rule]:
    return Rule(f"{source}.weight", f"{target}.scale"), Rule(f"{source}.bias", f"{target}.bias")


def _resnet(source: str, target: str) -> tuple[Rule, ...]:
    return (
        *_norm(f"{source}.norm1", f"{target}.norm1"),
        *_conv(f"{source}.conv1", f"{target}.conv1"),
        *_norm(f"{source}.norm2", f"{target}.norm2"),
        *_conv(f"{source}.conv2", f"{target}.conv2"),
        *_conv(f"{source}.conv_shortcut", f"{target}.shortcut"),
    )


def _ends_and_middle(side: str) -> tuple[Rule, ...]:
    """What encoder and decoder have in common: first and last convolution, and the innermost level."""
    attention = f"{side}.mid_block.attentions.0"
    return (
        *_conv(f"{side}.conv_in", f"{side}.conv_in"),
        *_resnet(f"{side}.mid_block.resnets.0", f"{side}.mid.first"),
        *_norm(f"{attention}.group_norm", f"{side}.mid.attn.norm"),
        *_linear(f"{attention}.to_q", f"{side}.mid.attn.q"),
        *_linear(f"{attention}.to_k", f"{side}.mid.attn.k"),
        *_linear(f"{attention}.to_v", f"{side}.mid.attn.v"),
        *_linear(f"{attention}.to_out.0", f"{side}.mid.attn.out"),
        *_resnet(f"{side}.mid_block.resnets.1", f"{side}.mid.second"),
        *_norm(f"{side}.conv_norm_out", f"{side}.norm_out"),
        *_conv(f"{side}.conv_out", f"{side}.conv_out"),
    )


AUTOENCODER_DIFFUSERS = (
    *_ends_and_middle("encoder"),
    *_resnet("encoder.down_blocks.{level}.resnets.{resnet}", "encoder.levels.{level}.resnets.{resnet}"),
    *_conv("encoder.down_blocks.{level}.downsamplers.0.conv", "encoder.levels.{level}.halve"),
    *_ends_and_middle("decoder"),
    *_resnet("decoder.up_blocks.{level}.resnets.{resnet}", "decoder.levels.{level}.resnets.{resnet}"),
    *_conv("decoder.up_blocks.{level}.upsamplers.0.conv", "decoder.levels.{level}.double"),
    *_conv("quant_conv", "quant_conv"),
    *_conv("post_quant_conv", "post_quant_conv"),
)
"""`AutoencoderKL`."""

_ALLOWED = AllowList(
    component="autoencoder",
    read={
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": 4,
        "block_out_channels": REQUIRED,
        "down_block_types": REQUIRED,
        "up_block_types": REQUIRED,
        "layers_per_block": 1,
        "norm_num_groups": 32,
        "scaling_factor": 0.18215,
        "shift_factor": None,
        # Absent from the files of older versions, which always had all three.
        "use_quant_conv": True,
        "use_post_quant_conv": True,
        "mid_block_add_attention": True,
    },
    fixed={
        "_class_name": ("AutoencoderKL",),
        "act_fn": ("silu",),
        # Per-channel statistics would replace the scaling factor.
        "latents_mean": (None,),
        "latents_std": (None,),
    },
    # `sample_size` sizes the tiles of tiled decoding; `force_upcast` is about float16, which we do not offer.
    inert=frozenset(("_diffusers_version", "_name_or_path", "sample_size", "force_upcast")),
)


def autoencoder_config_from_diffusers(attributes: Mapping[str, object]) -> AutoencoderConfig:
    """Reads the configuration of an `AutoencoderKL`.

    Args:
        attributes: the contents of its `config.json`.

    Returns:
        Our configuration; a shift factor that is absent or null is 0.

    Raises:
        UserError: naming every attribute that is missing, not understood, or has an unsupported value.
    """
    read: dict[str, Any] = read_attributes(attributes, _ALLOWED)
    widths = tuple(read["block_out_channels"])
    expected = {
        "out_channels": read["in_channels"],
        "down_block_types": ["DownEncoderBlock2D"] * len(widths),
        "up_block_types": ["UpDecoderBlock2D"] * len(widths),
    }
    given = {name: list(read[name]) if isinstance(want, list) else read[name] for name, want in expected.items()}
    wrong = [f"{name}={given[name]!r} instead of {want!r}" for name, want in expected.items() if given[name] != want]
    if wrong:
        raise UserError(
            f"The configuration of the autoencoder cannot be converted; unsupported: {'; '.join(wrong)}. "
            "Only plain convolutional levels, and as many channels out as in, are."
        )
    return AutoencoderConfig(
        in_channels=read["in_channels"],
        latent_channels=read["latent_channels"],
        widths=widths,
        layers_per_block=read["layers_per_block"],
        norm_groups=read["norm_num_groups"],
        scaling_factor=read["scaling_factor"],
        shift_factor=read["shift_factor"] or 0.0,
        quant_conv=read["use_quant_conv"],
        post_quant_conv=read["use_post_quant_conv"],
        mid_attention=read["mid_block_add_attention"],
    )
