"""The MM-DiT of Stable Diffusion 3 and 3.5: a table of rules for each layout, and its configuration.

1. `SD3_DIFFUSERS` maps the keys of diffusers' `SD3Transformer2DModel`. All blocks are numbered in one row there, and
   here those of each stack alone: the placeholders `{dual}`, `{double}` and `{last}` stand for the blocks that
   `sd3_labels` names. The text of the last block has a norm ordered scale, shift, as the last norm of all; every other
   shift, scale.
2. `SD3_RELEASE` maps the original release, one file: q, k and v are fused, and every norm is ordered shift, scale,
   as ours.
3. Patches are convolved there, and packed tokens multiplied here; what comes out for a patch is in another order there.
4. `sd3_config_from_diffusers` reads diffusers' `config.json` by an allow-list, and `sd3_config_to_diffusers` writes it;
   `sd3_config_from_shapes` reads the sizes off a single file, which has no configuration.
"""

import math
from collections.abc import Mapping
from typing import Any

from converters.allow_list import REQUIRED, AllowList, read_attributes
from converters.flux import Layout, depth_told, sizes_told
from converters.mapping import (
    Labels,
    Rule,
    fuse_qkv,
    join_patch,
    pack_rows,
    square,
    swap_scale_shift,
    transpose,
)
from difffract_jax.config import UserError
from difffract_jax.models.sampler import PATCH
from difffract_jax.models.sd3 import STACKS, Sd3Config

CLASS = "SD3Transformer2DModel"
Names = tuple[tuple[str, str, str], tuple[str, str], str]
"""What diffusers calls the projections to q, k and v, the norms of q and k, and the output."""


def _linear(source: str, target: str, transform: Any = transpose) -> tuple[Rule, Rule]:
    weight, bias = (f"{source}.weight", f"{target}.kernel"), (f"{source}.bias", f"{target}.bias")
    return Rule(*weight, transform), Rule(*bias, transform)


def _attention(source: str, target: str, names: Names) -> tuple[Rule, ...]:
    qkv, norms, out = names
    return (
        Rule(tuple(f"{source}.{name}.weight" for name in qkv), f"{target}.qkv.kernel", fuse_qkv),
        Rule(tuple(f"{source}.{name}.bias" for name in qkv), f"{target}.qkv.bias", fuse_qkv),
        Rule(f"{source}.{norms[0]}.weight", f"{target}.q_norm.scale"),
        Rule(f"{source}.{norms[1]}.weight", f"{target}.k_norm.scale"),
        *_linear(f"{source}.{out}", f"{target}.proj"),
    )


def _stream(block: str, stream: str, norm: str, attention: Names, mlp: str, order: Any) -> tuple[Rule, ...]:
    """Returns the rules of one stream; those of what it lacks match no leaf."""
    return (
        *_linear(f"{block}.{norm}.linear", f"{stream}.mod", order),
        *_attention(f"{block}.attn", f"{stream}.attn", attention),
        *_linear(f"{block}.{mlp}.net.0.proj", f"{stream}.mlp.up"),
        *_linear(f"{block}.{mlp}.net.2", f"{stream}.mlp.down"),
    )


_IMAGE: Names = ("to_q", "to_k", "to_v"), ("norm_q", "norm_k"), "to_out.0"
_TEXT: Names = ("add_q_proj", "add_k_proj", "add_v_proj"), ("norm_added_q", "norm_added_k"), "to_add_out"


def _stack(name: str) -> tuple[Rule, ...]:
    """Returns the rules of a stack's blocks."""
    block = f"transformer_blocks.{{{name}}}"
    order = swap_scale_shift if name == "last" else transpose
    return (
        *_stream(block, f"{name}.img", "norm1", _IMAGE, "ff", transpose),
        *_attention(f"{block}.attn2", f"{name}.img.attn2", _IMAGE),
        *_stream(block, f"{name}.txt", "norm1_context", _TEXT, "ff_context", order),
    )


SD3_DIFFUSERS = (
    Rule("pos_embed.proj.weight", "img_in.kernel", join_patch),
    Rule("pos_embed.proj.bias", "img_in.bias"),
    Rule("pos_embed.pos_embed", "positions", square),
    *_linear("context_embedder", "txt_in"),
    *_linear("time_text_embed.timestep_embedder.linear_1", "time_in.up"),
    *_linear("time_text_embed.timestep_embedder.linear_2", "time_in.down"),
    *_linear("time_text_embed.text_embedder.linear_1", "vector_in.up"),
    *_linear("time_text_embed.text_embedder.linear_2", "vector_in.down"),
    *(rule for name in STACKS for rule in _stack(name)),
    *_linear("norm_out.linear", "final.mod", swap_scale_shift),
    *_linear("proj_out", "final.proj", pack_rows),
)
"""diffusers' `SD3Transformer2DModel`."""


def _attention_of_release(source: str, target: str) -> tuple[Rule, ...]:
    return (
        *_linear(f"{source}.qkv", f"{target}.qkv"),
        Rule(f"{source}.ln_q.weight", f"{target}.q_norm.scale"),
        Rule(f"{source}.ln_k.weight", f"{target}.k_norm.scale"),
        *_linear(f"{source}.proj", f"{target}.proj"),
    )


def _stream_of_release(block: str, stream: str) -> tuple[Rule, ...]:
    """Returns the rules of one stream of the original release; those of what it lacks match no leaf."""
    return (
        *_linear(f"{block}.adaLN_modulation.1", f"{stream}.mod"),
        *_attention_of_release(f"{block}.attn", f"{stream}.attn"),
        *_attention_of_release(f"{block}.attn2", f"{stream}.attn2"),
        *_linear(f"{block}.mlp.fc1", f"{stream}.mlp.up"),
        *_linear(f"{block}.mlp.fc2", f"{stream}.mlp.down"),
    )


SD3_RELEASE = (
    Rule("x_embedder.proj.weight", "img_in.kernel", join_patch),
    Rule("x_embedder.proj.bias", "img_in.bias"),
    Rule("pos_embed", "positions", square),
    *_linear("context_embedder", "txt_in"),
    *_linear("t_embedder.mlp.0", "time_in.up"),
    *_linear("t_embedder.mlp.2", "time_in.down"),
    *_linear("y_embedder.mlp.0", "vector_in.up"),
    *_linear("y_embedder.mlp.2", "vector_in.down"),
    *(
        rule
        for name in STACKS
        for stream, block in (("img", "x_block"), ("txt", "context_block"))
        for rule in _stream_of_release(f"joint_blocks.{{{name}}}.{block}", f"{name}.{stream}")
    ),
    *_linear("final_layer.adaLN_modulation.1", "final.mod"),  # shift, scale
    *_linear("final_layer.linear", "final.proj", pack_rows),
)
"""The original release, one file."""

SD3_ORIGINAL = Layout(
    anchor="x_embedder.proj.weight",
    blocks=("joint_blocks",),
    rules=SD3_RELEASE,
    sizes=(
        *("x_embedder.proj.weight", "context_embedder.weight", "y_embedder.mlp.0.weight"),
        *("final_layer.linear.weight", "pos_embed"),
    ),
    guidance="",
)
SD3_OF_DIFFUSERS = Layout(
    anchor="pos_embed.proj.weight",
    blocks=("transformer_blocks",),
    rules=SD3_DIFFUSERS,
    sizes=(
        *("pos_embed.proj.weight", "context_embedder.weight", "time_text_embed.text_embedder.linear_1.weight"),
        *("proj_out.weight", "pos_embed.pos_embed"),
    ),
    guidance="",
)
SD3_LAYOUTS = (SD3_ORIGINAL, SD3_OF_DIFFUSERS)
_MEMBERS = {
    SD3_ORIGINAL.anchor: ("x_block.attn2.qkv.weight", "x_block.attn.ln_q.weight"),
    SD3_OF_DIFFUSERS.anchor: ("attn2.to_q.weight", "attn.norm_q.weight"),
}
"""Anchor of a layout -> keys of a block that tell that the image attends twice, and that queries are normalised."""
HEAD_DIM = 64
"""Columns of a head in every release."""


def sd3_labels(config: Sd3Config) -> Labels:
    """Returns which of the model's blocks are those of each stack, as its keys number them.

    Args:
        config: shape of the transformer.
    """
    layout = config.layout
    return {stack.name: tuple(map(str, layout.blocks_of_stack(number))) for number, stack in enumerate(layout.stacks)}


_ALLOWED = AllowList(
    component="SD3 transformer",
    # Absent attributes that have a default here have it in diffusers' constructor too.
    read={
        "num_layers": REQUIRED,
        "num_attention_heads": REQUIRED,
        "attention_head_dim": REQUIRED,
        "in_channels": 16,
        "out_channels": 16,
        "joint_attention_dim": 4096,
        "caption_projection_dim": REQUIRED,
        "pooled_projection_dim": 2048,
        "pos_embed_max_size": 96,
        "dual_attention_layers": (),
        "qk_norm": None,
    },
    fixed={
        "_class_name": (CLASS,),
        "patch_size": (PATCH,),
        "qk_norm": (None, "rms_norm"),
    },
    inert=frozenset(("_diffusers_version", "_name_or_path", "sample_size")),
)


def sd3_config_from_diffusers(attributes: Mapping[str, object]) -> Sd3Config:
    """Reads the configuration of an `SD3Transformer2DModel`.

    Args:
        attributes: the contents of its `config.json`.

    Raises:
        UserError: naming every attribute that is missing, not understood, or has an unsupported value.
    """
    read: dict[str, Any] = read_attributes(attributes, _ALLOWED)
    width = read["num_attention_heads"] * read["attention_head_dim"]
    dual, layers = tuple(read["dual_attention_layers"]), read["num_layers"]
    wrong = []
    if read["caption_projection_dim"] != width:
        wrong.append(f"caption_projection_dim={read['caption_projection_dim']}, which must be heads x columns, {width}")
    if dual != tuple(range(len(dual))) or len(dual) >= layers:
        wrong.append(f"dual_attention_layers={list(dual)}, which must be the first blocks, and not the last")
    if not layers:
        wrong.append("num_layers=0, but there must be a last block")
    if wrong:
        raise UserError(f"The SD3 transformer has {'; '.join(wrong)}; correct its config.json.")
    outputs = read["in_channels"] if read["out_channels"] is None else read["out_channels"]
    return Sd3Config.of_blocks(
        layers,
        heads=read["num_attention_heads"],
        head_dim=read["attention_head_dim"],
        in_channels=PATCH**2 * read["in_channels"],
        out_channels=PATCH**2 * outputs,
        text_width=read["joint_attention_dim"],
        pooled_width=read["pooled_projection_dim"],
        depth_dual=len(dual),
        qk_norm=read["qk_norm"] is not None,
        table=read["pos_embed_max_size"],
    )


def sd3_config_from_shapes(shapes: Mapping[str, tuple[int, ...] | None], head_dim: int | None = None) -> Sd3Config:
    """Reads the sizes off a single file.

    Args:
        shapes: key -> shape, prefix stripped, in either layout.
        head_dim: columns of a head, which norms of queries tell and nothing else does; where there are none and this is
            left out, as in the releases.

    Raises:
        UserError: when a tensor that tells a size is missing, or sizes contradict one another.
    """
    layout = SD3_OF_DIFFUSERS if SD3_OF_DIFFUSERS.anchor in shapes else SD3_ORIGINAL
    kinds = {"width and channels": 4, "text width": 2, "pooled width": 2, "channels out": 2, "positions": 3}
    sizes = sizes_told(shapes, layout, kinds, "Stable Diffusion 3")
    (width, inputs, *patch), (_, text), (_, pooled), (outputs, _), (_, places, _) = sizes
    blocks, layers = layout.blocks[0], depth_told(shapes, layout.blocks[0])
    twice, norm = _MEMBERS[layout.anchor]
    told = shapes.get(f"{blocks}.0.{norm}")
    columns = told[0] if told else head_dim or HEAD_DIM
    dual = [number for number in range(layers) if f"{blocks}.{number}.{twice}" in shapes]
    side = math.isqrt(places)
    wrong = [
        message
        for message, fits in (
            (f"patches of {patch[0]} x {patch[1]}, which must be {PATCH} x {PATCH}", tuple(patch) == (PATCH, PATCH)),
            (f"{places} positions, which must be a square", side * side == places),
            (f"a width of {width}, which heads of {columns} do not divide", width % columns == 0),
            (f"a second attention in the blocks {dual}, which must be the first", dual == list(range(len(dual)))),
            ("a second attention in the last block", len(dual) < layers),
        )
        if not fits
    ]
    if wrong:
        raise UserError(
            f"The file is not a Stable Diffusion 3 transformer that can be converted: it has {'; '.join(wrong)}; give "
            "SD3-medium, SD3.5-medium or SD3.5-large."
        )
    return Sd3Config.of_blocks(
        layers,
        heads=width // columns,
        head_dim=columns,
        in_channels=PATCH**2 * inputs,
        out_channels=outputs,
        text_width=text,
        pooled_width=pooled,
        depth_dual=len(dual),
        qk_norm=told is not None,
        table=side,
    )


def sd3_config_to_diffusers(config: Sd3Config, sample_size: int) -> dict[str, Any]:
    """Returns the `config.json` that diffusers would write for this transformer.

    Args:
        config: shape of the transformer.
        sample_size: side of the images that it makes if nothing else is said, in latents.
    """
    return {
        "_class_name": CLASS,
        "attention_head_dim": config.head_dim,
        "caption_projection_dim": config.d_model,
        "dual_attention_layers": list(range(config.depth_dual)),
        "in_channels": config.in_channels // PATCH**2,
        "joint_attention_dim": config.text_width,
        "num_attention_heads": config.heads,
        "num_layers": config.layout.depth,
        "out_channels": config.out_channels // PATCH**2,
        "patch_size": PATCH,
        "pooled_projection_dim": config.pooled_width,
        "pos_embed_max_size": config.table,
        "qk_norm": "rms_norm" if config.qk_norm else None,
        "sample_size": sample_size,
    }
