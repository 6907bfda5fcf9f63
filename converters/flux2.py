"""The MM-DiT of FLUX.2: two tables of rules, one for each layout it is published in, and its configuration.

1. `FLUX2_DIFFUSERS` is diffusers' `Flux2Transformer2DModel`. Double-stream blocks have q, k and v apart and the MLP's
   gate and up fused; single-stream blocks have all five fused. The last modulation is ordered scale, shift, every
   other shift, scale.
2. `FLUX2_SINGLE_FILE` is the original release: q, k and v are fused in double-stream blocks too, and the last
   modulation is ordered shift, scale, as ours.
3. `flux2_config_from_diffusers` reads diffusers' `config.json` by an allow-list. The class has defaults of another
   model (FLUX.2-dev), so that the sizes must be there. `flux2_config_from_shapes` reads them off a single file, which
   has no configuration.

`{layer}` becomes the leading axis of the stacked leaves.
"""

from collections.abc import Mapping
from typing import Any

from converters.allow_list import REQUIRED, AllowList, read_attributes
from converters.flux import Layout, depth_told, sizes_read, sizes_told, sizes_written
from converters.mapping import (
    Rule,
    fuse_qkv,
    split_attention_mlp,
    split_gate_up,
    split_qkv_gate_up,
    swap_scale_shift,
    transpose,
)
from difffract_jax.config import UserError
from difffract_jax.models.flux2 import Flux2Config
from difffract_jax.models.mmdit import TIME_CHANNELS

_BLOCK, _SINGLE = "transformer_blocks.{layer}", "single_transformer_blocks.{layer}"


def _matrix(source: str, target: str) -> Rule:
    return Rule(f"{source}.weight", f"{target}.kernel", transpose)


def _stream(stream: str, qkv: tuple[str, str, str], norms: tuple[str, str], out: str, mlp: str) -> tuple[Rule, ...]:
    """Returns the rules of one stream of the double-stream blocks."""
    attn, leaf = f"{_BLOCK}.attn", f"double.{stream}"
    return (
        Rule(tuple(f"{attn}.{name}.weight" for name in qkv), f"{leaf}.attn.qkv.kernel", fuse_qkv),
        Rule(f"{attn}.{norms[0]}.weight", f"{leaf}.attn.q_norm.scale"),
        Rule(f"{attn}.{norms[1]}.weight", f"{leaf}.attn.k_norm.scale"),
        _matrix(f"{attn}.{out}", f"{leaf}.attn.proj"),
        Rule(
            f"{_BLOCK}.{mlp}.linear_in.weight",
            (f"{leaf}.mlp.gate.kernel", f"{leaf}.mlp.up.kernel"),
            split_gate_up,
        ),
        _matrix(f"{_BLOCK}.{mlp}.linear_out", f"{leaf}.mlp.down"),
    )


FLUX2_DIFFUSERS = (
    _matrix("x_embedder", "img_in"),
    _matrix("context_embedder", "txt_in"),
    _matrix("time_guidance_embed.timestep_embedder.linear_1", "time_in.up"),
    _matrix("time_guidance_embed.timestep_embedder.linear_2", "time_in.down"),
    _matrix("double_stream_modulation_img.linear", "shared.img"),
    _matrix("double_stream_modulation_txt.linear", "shared.txt"),
    _matrix("single_stream_modulation.linear", "shared.joint"),
    *_stream("img", ("to_q", "to_k", "to_v"), ("norm_q", "norm_k"), "to_out.0", "ff"),
    *_stream(
        "txt",
        ("add_q_proj", "add_k_proj", "add_v_proj"),
        ("norm_added_q", "norm_added_k"),
        "to_add_out",
        "ff_context",
    ),
    Rule(
        f"{_SINGLE}.attn.to_qkv_mlp_proj.weight",
        ("single.qkv.kernel", "single.gate.kernel", "single.up.kernel"),
        split_qkv_gate_up,
    ),
    Rule(f"{_SINGLE}.attn.norm_q.weight", "single.q_norm.scale"),
    Rule(f"{_SINGLE}.attn.norm_k.weight", "single.k_norm.scale"),
    Rule(f"{_SINGLE}.attn.to_out.weight", ("single.attn_out.kernel", "single.mlp_out.kernel"), split_attention_mlp),
    Rule("norm_out.linear.weight", "final.mod.kernel", swap_scale_shift),
    _matrix("proj_out", "final.proj"),
)
"""diffusers' `Flux2Transformer2DModel`."""


def _stream_single_file(stream: str) -> tuple[Rule, ...]:
    """Returns the rules of one stream of the double-stream blocks in the original release."""
    block, leaf = f"double_blocks.{{layer}}.{stream}", f"double.{stream}"
    return (
        _matrix(f"{block}_attn.qkv", f"{leaf}.attn.qkv"),
        Rule(f"{block}_attn.norm.query_norm.scale", f"{leaf}.attn.q_norm.scale"),
        Rule(f"{block}_attn.norm.key_norm.scale", f"{leaf}.attn.k_norm.scale"),
        _matrix(f"{block}_attn.proj", f"{leaf}.attn.proj"),
        Rule(f"{block}_mlp.0.weight", (f"{leaf}.mlp.gate.kernel", f"{leaf}.mlp.up.kernel"), split_gate_up),
        _matrix(f"{block}_mlp.2", f"{leaf}.mlp.down"),
    )


FLUX2_SINGLE_FILE = (
    _matrix("img_in", "img_in"),
    _matrix("txt_in", "txt_in"),
    _matrix("time_in.in_layer", "time_in.up"),
    _matrix("time_in.out_layer", "time_in.down"),
    _matrix("double_stream_modulation_img.lin", "shared.img"),
    _matrix("double_stream_modulation_txt.lin", "shared.txt"),
    _matrix("single_stream_modulation.lin", "shared.joint"),
    *_stream_single_file("img"),
    *_stream_single_file("txt"),
    Rule(
        "single_blocks.{layer}.linear1.weight",
        ("single.qkv.kernel", "single.gate.kernel", "single.up.kernel"),
        split_qkv_gate_up,
    ),
    Rule("single_blocks.{layer}.norm.query_norm.scale", "single.q_norm.scale"),
    Rule("single_blocks.{layer}.norm.key_norm.scale", "single.k_norm.scale"),
    Rule(
        "single_blocks.{layer}.linear2.weight", ("single.attn_out.kernel", "single.mlp_out.kernel"), split_attention_mlp
    ),
    _matrix("final_layer.adaLN_modulation.1", "final.mod"),  # shift, scale
    _matrix("final_layer.linear", "final.proj"),
)
"""The original release, one file."""

FLUX2_ORIGINAL = Layout(
    anchor="double_stream_modulation_img.lin.weight",
    blocks=("double_blocks", "single_blocks"),
    rules=FLUX2_SINGLE_FILE,
    sizes=(
        *("img_in.weight", "txt_in.weight", "final_layer.linear.weight"),
        *("double_blocks.0.img_attn.norm.query_norm.scale", "double_blocks.0.img_mlp.2.weight"),
    ),
    guidance="guidance_in.in_layer.weight",
)
FLUX2_OF_DIFFUSERS = Layout(
    anchor="double_stream_modulation_img.linear.weight",
    blocks=("transformer_blocks", "single_transformer_blocks"),
    rules=FLUX2_DIFFUSERS,
    sizes=(
        *("x_embedder.weight", "context_embedder.weight", "proj_out.weight"),
        *("transformer_blocks.0.attn.norm_q.weight", "transformer_blocks.0.ff.linear_out.weight"),
    ),
    guidance="time_guidance_embed.guidance_embedder.linear_1.weight",
)
FLUX2_LAYOUTS = (FLUX2_ORIGINAL, FLUX2_OF_DIFFUSERS)
_GUIDED = "The FLUX.2 transformer takes a guidance scale ({}), as FLUX.2-dev does; of FLUX.2, klein can be converted."

_ALLOWED = AllowList(
    component="FLUX.2 transformer",
    # Absent attributes that have a default here have it in diffusers' constructor too.
    read={
        "num_layers": REQUIRED,
        "num_single_layers": REQUIRED,
        "num_attention_heads": REQUIRED,
        "attention_head_dim": REQUIRED,
        "in_channels": REQUIRED,
        "out_channels": None,
        "joint_attention_dim": REQUIRED,
        "mlp_ratio": 3.0,
        "axes_dims_rope": (32, 32, 32, 32),
        "rope_theta": 2000,
    },
    fixed={
        "_class_name": ("Flux2Transformer2DModel",),
        "patch_size": (1,),
        "eps": (1e-6,),
        "timestep_guidance_channels": (TIME_CHANNELS,),
        "guidance_embeds": (True, False),
    },
    inert=frozenset(("_diffusers_version", "_name_or_path")),
)


def flux2_config_from_diffusers(attributes: Mapping[str, object]) -> Flux2Config:
    """Reads the configuration of a `Flux2Transformer2DModel`.

    Args:
        attributes: the contents of its `config.json`.

    Raises:
        UserError: naming every attribute that is missing, not understood, or has an unsupported value.
    """
    read: dict[str, Any] = read_attributes(attributes, _ALLOWED)
    if attributes.get("guidance_embeds", True):
        raise UserError(_GUIDED.format("guidance_embeds"))
    axes = read["axes_dims_rope"]
    if len(axes) != 4:
        raise UserError(
            f"The FLUX.2 transformer has axes_dims_rope={list(axes)}, which must be four numbers that add up to "
            f"attention_head_dim={read['attention_head_dim']}; correct its config.json."
        )
    return Flux2Config(
        **sizes_read(read, "FLUX.2 transformer"),
        mlp_ratio=float(read["mlp_ratio"]),
        rope_theta=float(read["rope_theta"]),
    )


def flux2_config_from_shapes(shapes: Mapping[str, tuple[int, ...] | None]) -> Flux2Config:
    """Reads the sizes off a single file.

    A head is divided into four equal axes of position, and wavelengths have the base of FLUX.2: no tensor tells either.

    Args:
        shapes: key -> shape, prefix stripped, in either layout.

    Raises:
        UserError: when a tensor that tells a size is missing, the model takes guidance, or a head has no four axes.
    """
    layout = FLUX2_OF_DIFFUSERS if FLUX2_OF_DIFFUSERS.anchor in shapes else FLUX2_ORIGINAL
    if layout.guidance in shapes:
        raise UserError(_GUIDED.format(layout.guidance))
    kinds = {"width and channels": 2, "text width": 2, "channels out": 2, "heads": 1, "MLP": 2}
    (width, inputs), (_, text), (outputs, _), (head_dim,), (_, hidden) = sizes_told(shapes, layout, kinds, "FLUX.2")
    if head_dim % 8:
        raise UserError(
            f"The file has heads of {head_dim} dimensions, which four equal axes of position do not divide; give "
            "diffusers' folder of this transformer, whose config.json says how they are divided."
        )
    return Flux2Config(
        depth_double=depth_told(shapes, layout.blocks[0]),
        depth_single=depth_told(shapes, layout.blocks[1]),
        heads=width // head_dim,
        head_dim=head_dim,
        rope_axes=(head_dim // 4,) * 4,
        in_channels=inputs,
        out_channels=outputs,
        text_width=text,
        mlp_ratio=hidden / width,
    )


def flux2_config_to_diffusers(config: Flux2Config) -> dict[str, Any]:
    """Returns the `config.json` that diffusers would write for this transformer."""
    return sizes_written(config) | {
        "_class_name": "Flux2Transformer2DModel",
        "eps": 1e-6,
        "guidance_embeds": False,
        "mlp_ratio": config.mlp_ratio,
        "rope_theta": int(config.rope_theta),
        "timestep_guidance_channels": TIME_CHANNELS,
    }
