"""The autoencoder from a diffusers directory (`AutoencoderKL`, or FLUX.2's): tables of rules and allow-lists.

1. `autoencoder_config_from_diffusers` reads its `config.json`.
2. `AUTOENCODER_DIFFUSERS` maps its keys. The placeholders `{level}` and `{resnet}` stand in key and leaf alike, so one
   table serves any number of levels; rows for parts that a checkpoint does not have match nothing.
3. `AUTOENCODER_FLUX2` has the batch norm's statistics of `AutoencoderKLFlux2` as well.
4. The engine applies them: convolutions from [out in rows cols] to [rows cols in out], matrices transposed.

Early checkpoints name the attention's matrices `query`, `key`, `value` and `proj_attn`, or store them as 1x1
convolutions; the engine refuses these keys, or shapes, by name.
"""

from collections.abc import Mapping
from typing import Any

from converters.allow_list import REQUIRED_LIST, AllowList, read_attributes
from converters.mapping import Ignored, Rule, conv, transpose
from difffract_jax.config import UserError
from difffract_jax.models.autoencoder import AutoencoderConfig, Flux2AutoencoderConfig


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
AUTOENCODER_FLUX2 = (
    *AUTOENCODER_DIFFUSERS,
    Rule("bn.running_mean", "latents.mean"),
    Rule("bn.running_var", "latents.variance"),
)
"""`AutoencoderKLFlux2`."""
FLUX2_IGNORED = (Ignored("bn.num_batches_tracked", "counts batches of training"),)
"""Its keys that no rule uses."""

_SHAPE = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "block_out_channels": REQUIRED_LIST,
    "down_block_types": REQUIRED_LIST,
    "up_block_types": REQUIRED_LIST,
    "layers_per_block": 1,
    "norm_num_groups": 32,
    # Absent from the files of older versions, which always had all three.
    "use_quant_conv": True,
    "use_post_quant_conv": True,
    "mid_block_add_attention": True,
}
# `sample_size` sizes the tiles of tiled decoding; `force_upcast` is about float16, which we do not offer.
_INERT = frozenset(("_diffusers_version", "_name_or_path", "sample_size", "force_upcast"))
_ALLOWED = AllowList(
    component="autoencoder",
    read=_SHAPE | {"scaling_factor": 0.18215, "shift_factor": None},
    fixed={
        "_class_name": ("AutoencoderKL",),
        "act_fn": ("silu",),
        # Per-channel statistics would replace the scaling factor.
        "latents_mean": (None,),
        "latents_std": (None,),
    },
    inert=_INERT,
)
_FLUX2_ALLOWED = AllowList(
    component="FLUX.2 autoencoder",
    read=_SHAPE | {"latent_channels": 32, "layers_per_block": 2, "batch_norm_eps": 1e-4},
    fixed={
        "_class_name": ("AutoencoderKLFlux2",),
        "act_fn": ("silu",),
        "decoder_block_out_channels": (None,),
        "patch_size": ([2, 2], (2, 2)),
    },
    inert=_INERT | {"batch_norm_momentum"},
)


def autoencoder_config_from_diffusers(attributes: Mapping[str, object]) -> AutoencoderConfig:
    """Reads the configuration of an `AutoencoderKL`, or of an `AutoencoderKLFlux2`.

    Args:
        attributes: the contents of its `config.json`.

    Returns:
        Our configuration; a shift factor that is absent or null is 0.

    Raises:
        UserError: naming every attribute that is missing, not understood, or has an unsupported value.
    """
    if attributes.get("_class_name") == "AutoencoderKLFlux2":
        read: dict[str, Any] = read_attributes(attributes, _FLUX2_ALLOWED)
        return Flux2AutoencoderConfig(**_shape(read), batch_norm_eps=read["batch_norm_eps"])
    read = read_attributes(attributes, _ALLOWED)
    scales = {"scaling_factor": read["scaling_factor"], "shift_factor": read["shift_factor"] or 0.0}
    return AutoencoderConfig(**_shape(read), **scales)


def _shape(read: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what both kinds of autoencoders have; refuses other blocks."""
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
    return {
        "in_channels": read["in_channels"],
        "latent_channels": read["latent_channels"],
        "widths": widths,
        "layers_per_block": read["layers_per_block"],
        "norm_groups": read["norm_num_groups"],
        "quant_conv": read["use_quant_conv"],
        "post_quant_conv": read["use_post_quant_conv"],
        "mid_attention": read["mid_block_add_attention"],
    }
