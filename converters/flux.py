"""The MM-DiT of FLUX.1: two tables of rules, one for each layout it is published in, and its configuration.

1. `FLUX_DIFFUSERS` is diffusers' `FluxTransformer2DModel`: q, k and v are separate, and the last modulation is ordered
   scale, shift.
2. `FLUX_SINGLE_FILE` is the original release: q, k and v are fused, in single-stream blocks together with the MLP's
   first matrix; the last modulation is ordered shift, scale, as ours.
3. `flux_config_from_diffusers` reads diffusers' `config.json` by an allow-list; `flux_config_from_shapes` reads the
   sizes off a single file, which has no configuration. Single files come in both layouts: a `Layout` says by which
   keys one is known, and where it has the sizes.

`{layer}` becomes the leading axis of the stacked leaves. A model without guidance has no `guidance_in` leaves, so the
rows for them do not apply to it.
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from converters.allow_list import REQUIRED, AllowList, read_attributes
from converters.mapping import Rule, fuse_qkv, split_attention_mlp, split_qkv_up, swap_scale_shift, transpose
from difffract_jax.config import UserError
from difffract_jax.models.mmdit import FluxConfig


def _linear(source: str, target: str) -> tuple[Rule, Rule]:
    return Rule(f"{source}.weight", f"{target}.kernel", transpose), Rule(f"{source}.bias", f"{target}.bias")


def _fused_qkv(sources: tuple[str, str, str], target: str) -> tuple[Rule, Rule]:
    kernels, biases = tuple(f"{s}.weight" for s in sources), tuple(f"{s}.bias" for s in sources)
    return Rule(kernels, f"{target}.kernel", fuse_qkv), Rule(biases, f"{target}.bias", fuse_qkv)


_BLOCK, _SINGLE = "transformer_blocks.{layer}", "single_transformer_blocks.{layer}"

FLUX_DIFFUSERS = (
    *_linear("x_embedder", "img_in"),
    *_linear("context_embedder", "txt_in"),
    *_linear("time_text_embed.timestep_embedder.linear_1", "time_in.up"),
    *_linear("time_text_embed.timestep_embedder.linear_2", "time_in.down"),
    *_linear("time_text_embed.text_embedder.linear_1", "vector_in.up"),
    *_linear("time_text_embed.text_embedder.linear_2", "vector_in.down"),
    *_linear("time_text_embed.guidance_embedder.linear_1", "guidance_in.up"),
    *_linear("time_text_embed.guidance_embedder.linear_2", "guidance_in.down"),
    # double-stream blocks, image
    *_linear(f"{_BLOCK}.norm1.linear", "double.img.mod"),
    *_fused_qkv((f"{_BLOCK}.attn.to_q", f"{_BLOCK}.attn.to_k", f"{_BLOCK}.attn.to_v"), "double.img.attn.qkv"),
    Rule(f"{_BLOCK}.attn.norm_q.weight", "double.img.attn.q_norm.scale"),
    Rule(f"{_BLOCK}.attn.norm_k.weight", "double.img.attn.k_norm.scale"),
    *_linear(f"{_BLOCK}.attn.to_out.0", "double.img.attn.proj"),
    *_linear(f"{_BLOCK}.ff.net.0.proj", "double.img.mlp.up"),
    *_linear(f"{_BLOCK}.ff.net.2", "double.img.mlp.down"),
    # double-stream blocks, text
    *_linear(f"{_BLOCK}.norm1_context.linear", "double.txt.mod"),
    *_fused_qkv(
        (f"{_BLOCK}.attn.add_q_proj", f"{_BLOCK}.attn.add_k_proj", f"{_BLOCK}.attn.add_v_proj"), "double.txt.attn.qkv"
    ),
    Rule(f"{_BLOCK}.attn.norm_added_q.weight", "double.txt.attn.q_norm.scale"),
    Rule(f"{_BLOCK}.attn.norm_added_k.weight", "double.txt.attn.k_norm.scale"),
    *_linear(f"{_BLOCK}.attn.to_add_out", "double.txt.attn.proj"),
    *_linear(f"{_BLOCK}.ff_context.net.0.proj", "double.txt.mlp.up"),
    *_linear(f"{_BLOCK}.ff_context.net.2", "double.txt.mlp.down"),
    # single-stream blocks
    *_linear(f"{_SINGLE}.norm.linear", "single.mod"),
    *_fused_qkv((f"{_SINGLE}.attn.to_q", f"{_SINGLE}.attn.to_k", f"{_SINGLE}.attn.to_v"), "single.qkv"),
    Rule(f"{_SINGLE}.attn.norm_q.weight", "single.q_norm.scale"),
    Rule(f"{_SINGLE}.attn.norm_k.weight", "single.k_norm.scale"),
    *_linear(f"{_SINGLE}.proj_mlp", "single.up"),
    Rule(f"{_SINGLE}.proj_out.weight", ("single.attn_out.kernel", "single.mlp_out.kernel"), split_attention_mlp),
    Rule(f"{_SINGLE}.proj_out.bias", "single.mlp_out.bias"),
    # the trap: diffusers' last layer has scale before shift, every other modulation shift before scale
    Rule("norm_out.linear.weight", "final.mod.kernel", swap_scale_shift),
    Rule("norm_out.linear.bias", "final.mod.bias", swap_scale_shift),
    *_linear("proj_out", "final.proj"),
)
"""diffusers' `FluxTransformer2DModel`."""


def _double_single_file(stream: str) -> tuple[Rule, ...]:
    block, leaf = "double_blocks.{layer}", f"double.{stream}"
    return (
        *_linear(f"{block}.{stream}_mod.lin", f"{leaf}.mod"),
        *_linear(f"{block}.{stream}_attn.qkv", f"{leaf}.attn.qkv"),
        Rule(f"{block}.{stream}_attn.norm.query_norm.scale", f"{leaf}.attn.q_norm.scale"),
        Rule(f"{block}.{stream}_attn.norm.key_norm.scale", f"{leaf}.attn.k_norm.scale"),
        *_linear(f"{block}.{stream}_attn.proj", f"{leaf}.attn.proj"),
        *_linear(f"{block}.{stream}_mlp.0", f"{leaf}.mlp.up"),
        *_linear(f"{block}.{stream}_mlp.2", f"{leaf}.mlp.down"),
    )


FLUX_SINGLE_FILE = (
    *_linear("img_in", "img_in"),
    *_linear("txt_in", "txt_in"),
    *_linear("time_in.in_layer", "time_in.up"),
    *_linear("time_in.out_layer", "time_in.down"),
    *_linear("vector_in.in_layer", "vector_in.up"),
    *_linear("vector_in.out_layer", "vector_in.down"),
    *_linear("guidance_in.in_layer", "guidance_in.up"),
    *_linear("guidance_in.out_layer", "guidance_in.down"),
    *_double_single_file("img"),
    *_double_single_file("txt"),
    *_linear("single_blocks.{layer}.modulation.lin", "single.mod"),
    Rule(
        ("single_blocks.{layer}.linear1.weight", "single_blocks.{layer}.linear1.bias"),
        ("single.qkv.kernel", "single.up.kernel", "single.qkv.bias", "single.up.bias"),
        split_qkv_up,
    ),
    Rule("single_blocks.{layer}.norm.query_norm.scale", "single.q_norm.scale"),
    Rule("single_blocks.{layer}.norm.key_norm.scale", "single.k_norm.scale"),
    Rule(
        "single_blocks.{layer}.linear2.weight", ("single.attn_out.kernel", "single.mlp_out.kernel"), split_attention_mlp
    ),
    Rule("single_blocks.{layer}.linear2.bias", "single.mlp_out.bias"),
    *_linear("final_layer.adaLN_modulation.1", "final.mod"),  # shift, scale
    *_linear("final_layer.linear", "final.proj"),
)
"""The original release, one file."""


class Layout(NamedTuple):
    """One way in which the transformer is published.

    Attributes:
        anchor: key that tells the layout, and by its place a prefix.
        blocks: what keys of double-stream and of single-stream blocks begin with; of SD3, those of all blocks.
        rules: its table.
        sizes: key that tells the width and the channels in, the width of the text, the width of the pooled vector, the
            channels out, the dimensions of a head; of FLUX.2, in place of the pooled vector's, last that of the MLP; of
            SD3, last the positions.
        guidance: key that only a model with guidance has; "" where none has it.
        unlike: keys that only another layout with the same anchor has.
    """

    anchor: str
    blocks: tuple[str, ...]
    rules: tuple[Rule, ...]
    sizes: tuple[str, str, str, str, str]
    guidance: str
    unlike: tuple[str, ...] = ()


ORIGINAL = Layout(
    anchor="img_in.weight",
    blocks=("double_blocks", "single_blocks"),
    rules=FLUX_SINGLE_FILE,
    sizes=(
        *("img_in.weight", "txt_in.weight", "vector_in.in_layer.weight", "final_layer.linear.weight"),
        "double_blocks.0.img_attn.norm.query_norm.scale",
    ),
    guidance="guidance_in.in_layer.weight",
    unlike=("double_stream_modulation_img.lin.weight", "distilled_guidance_layer.in_proj.weight"),
)
DIFFUSERS = Layout(
    anchor="x_embedder.weight",
    blocks=("transformer_blocks", "single_transformer_blocks"),
    rules=FLUX_DIFFUSERS,
    sizes=(
        *("x_embedder.weight", "context_embedder.weight", "time_text_embed.text_embedder.linear_1.weight"),
        *("proj_out.weight", "transformer_blocks.0.attn.norm_q.weight"),
    ),
    guidance="time_text_embed.guidance_embedder.linear_1.weight",
    unlike=("double_stream_modulation_img.linear.weight", "distilled_guidance_layer.in_proj.weight"),
)
LAYOUTS = (ORIGINAL, DIFFUSERS)

_ALLOWED = AllowList(
    component="FLUX transformer",
    # Absent attributes have the defaults of diffusers' constructor.
    read={
        "num_layers": REQUIRED,
        "num_single_layers": REQUIRED,
        "num_attention_heads": REQUIRED,
        "attention_head_dim": REQUIRED,
        "in_channels": REQUIRED,
        "out_channels": None,
        "joint_attention_dim": REQUIRED,
        "pooled_projection_dim": REQUIRED,
        "guidance_embeds": False,
        "axes_dims_rope": (16, 56, 56),
    },
    fixed={"_class_name": ("FluxTransformer2DModel",), "patch_size": (1,)},
    inert=frozenset(("_diffusers_version", "_name_or_path")),
)


def flux_config_from_diffusers(attributes: Mapping[str, object]) -> FluxConfig:
    """Reads the configuration of a `FluxTransformer2DModel`.

    Args:
        attributes: the contents of its `config.json`.

    Raises:
        UserError: naming every attribute that is missing, not understood, or has an unsupported value.
    """
    read: dict[str, Any] = read_attributes(attributes, _ALLOWED)
    return FluxConfig(
        **sizes_read(read, "FLUX transformer"),
        pooled_width=read["pooled_projection_dim"],
        guidance=read["guidance_embeds"],
    )


def sizes_read(read: Mapping[str, Any], component: str) -> dict[str, Any]:
    """Returns the sizes that FLUX.1 and FLUX.2 have in common, by our names.

    Args:
        read: attributes of a transformer's `config.json`.
        component: what to call it in messages.

    Raises:
        UserError: if the axes of position do not divide a head.
    """
    axes = tuple(read["axes_dims_rope"])
    if sum(axes) != read["attention_head_dim"]:
        raise UserError(
            f"The {component} has axes_dims_rope={list(axes)}, which must add up to "
            f"attention_head_dim={read['attention_head_dim']}; correct its config.json."
        )
    return {
        "depth_double": read["num_layers"],
        "depth_single": read["num_single_layers"],
        "heads": read["num_attention_heads"],
        "head_dim": read["attention_head_dim"],
        "rope_axes": axes,
        "in_channels": read["in_channels"],
        "out_channels": read["in_channels"] if read["out_channels"] is None else read["out_channels"],
        "text_width": read["joint_attention_dim"],
    }


def flux_config_to_diffusers(config: FluxConfig) -> dict[str, Any]:
    """Returns the `config.json` that diffusers would write for this transformer."""
    return sizes_written(config) | {
        "_class_name": "FluxTransformer2DModel",
        "guidance_embeds": config.guidance,
        "pooled_projection_dim": config.pooled_width,
    }


def sizes_written(config: Any) -> dict[str, Any]:
    """Returns the attributes that both transformers' `config.json` have in common, by diffusers' names."""
    return {
        "attention_head_dim": config.head_dim,
        "axes_dims_rope": list(config.rope_axes),
        "in_channels": config.in_channels,
        "joint_attention_dim": config.text_width,
        "num_attention_heads": config.heads,
        "num_layers": config.depth_double,
        "num_single_layers": config.depth_single,
        "out_channels": config.out_channels,
        "patch_size": 1,
    }


def flux_config_from_shapes(
    shapes: Mapping[str, tuple[int, ...] | None], rope_axes: tuple[int, ...] = (16, 56, 56)
) -> FluxConfig:
    """Reads the sizes off a single file.

    Args:
        shapes: key -> shape, prefix stripped, in either layout.
        rope_axes: how a head's dimensions are divided among the axes of position; no tensor tells.

    Raises:
        UserError: when a tensor that tells a size is missing, or `rope_axes` do not fit the heads.
    """
    layout = DIFFUSERS if DIFFUSERS.anchor in shapes else ORIGINAL
    sizes, (_, pooled) = blocks_told(shapes, layout, rope_axes, "FLUX.1", "pooled width")
    return FluxConfig(**sizes, pooled_width=pooled, guidance=layout.guidance in shapes)


def blocks_told(
    shapes: Mapping[str, tuple[int, ...] | None], layout: Layout, rope_axes: tuple[int, ...], model: str, own: str
) -> tuple[dict[str, Any], tuple[int, int]]:
    """Reads the sizes off a single file that FLUX.1 and Chroma have in common, by our names.

    Args:
        shapes: key -> shape, prefix stripped.
        layout: of the file.
        rope_axes: how a head's dimensions are divided among the axes of position; no tensor tells.
        model: what to call it in messages.
        own: what the third of the layout's keys of sizes tells, which is the model's own.

    Returns:
        The sizes, and the shape of the model's own tensor.

    Raises:
        UserError: when a tensor that tells a size is missing, or `rope_axes` do not fit the heads.
    """
    kinds = {"width and channels": 2, "text width": 2, own: 2, "channels out": 2, "heads": 1}
    (width, inputs), (_, text), told, (outputs, _), (head_dim,) = sizes_told(shapes, layout, kinds, model)
    if sum(rope_axes) != head_dim:
        raise UserError(
            f"The file has heads of {head_dim} dimensions, which the axes {rope_axes} do not divide; "
            "pass --base with a diffusers directory that has this transformer's own transformer/config.json."
        )
    sizes = {
        "depth_double": depth_told(shapes, layout.blocks[0]),
        "depth_single": depth_told(shapes, layout.blocks[1]),
        "heads": width // head_dim,
        "head_dim": head_dim,
        "rope_axes": rope_axes,
        "in_channels": inputs,
        "out_channels": outputs,
        "text_width": text,
    }
    return sizes, told


def sizes_told(
    shapes: Mapping[str, tuple[int, ...] | None], layout: Layout, kinds: Mapping[str, int], model: str
) -> list[Any]:
    """Returns the shapes that tell a transformer's sizes.

    Args:
        shapes: key -> shape.
        layout: names their keys.
        kinds: what each tells -> how many axes it has.
        model: what to call it in messages.

    Raises:
        UserError: naming those that are missing.
    """
    missing = [
        f"{key} ({what})"
        for key, (what, rank) in zip(layout.sizes, kinds.items(), strict=True)
        if len(shapes.get(key) or ()) != rank
    ]
    if missing:
        raise UserError(
            f"The file is not a {model} transformer: it lacks {', '.join(missing)}; "
            f"give {model}'s original release, one file of diffusers' keys, or a diffusers directory."
        )
    return [shapes[key] for key in layout.sizes]


def depth_told(shapes: Mapping[str, Any], stack: str) -> int:
    """Returns how many blocks the highest number implies; a gap in between is then a missing key.

    Args:
        shapes: by key.
        stack: what keys of the blocks begin with.
    """
    numbers = [int(match[1]) for key in shapes if (match := re.match(rf"{stack}\.(\d+)\.", key))]
    return max(numbers, default=-1) + 1
