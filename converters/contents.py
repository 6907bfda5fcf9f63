"""What a checkpoint's keys say it is: a transformer of a known model under some prefix, or another, which is named.

1. `find_transformer` looks for the one key that each layout begins with, whatever stands before it: ComfyUI's
   `model.diffusion_model.`, the trainers' `transformer.` and `module.`, or nothing. Keys of other parts, the text
   encoders and the autoencoder of an all-in-one file, are left aside.
2. `check_weights` refuses what no table can read, wherever it stands: quantised weights, and adapters that are not
   merged into them.
3. `describe` names the models that are given in place of a transformer by mistake.
"""

import logging
import re
from pathlib import Path

from converters.flux import LAYOUTS, Layout
from converters.flux2 import FLUX2_LAYOUTS
from converters.kinds import TABLED
from converters.quantised import BF16_FILES, kind_of
from converters.sd3 import SD3_LAYOUTS
from converters.source import Source
from difffract_jax.config import UserError
from difffract_jax.storage.files import TensorFile

_log = logging.getLogger(__name__)

OTHER_PARTS = (
    *("vae.", "first_stage_model.", "text_encoder.", "text_encoder_2.", "text_encoders.", "cond_stage_model."),
    *("conditioner.", "clip_l.", "t5xxl.", "model_ema.", "ema.", "logit_scale", "scaled_fp8"),
)
"""What keys begin with that do not belong to the transformer, in files that hold several parts."""

_ADAPTER = re.compile(
    r"(^|[._])lora_(A|B|up|down|unet|te\d?|transformer)([._]|$)|_lora\.(up|down)\.|\.(hada_w\d|lokr_w\d)"
)
_MERGED = "pipe.fuse_lora(), pipe.unload_lora_weights(), pipe.save_pretrained(DIR)"
_SIMILAR = (
    (re.compile(r"(^|\.)(controlnet_|control_model\.|input_hint_block)"), "a ControlNet, which steers a model"),
    *(
        (
            re.compile(rf"(^|\.){kind.tables.anchor}\.(weight|bias)$"),  # and no LoRA's change of it
            f"a {kind.models} transformer in one file, but {kind.models} is read from diffusers' whole directory",
        )
        for kind in TABLED.values()
        if kind.tables and not kind.completed
    ),
)
"""Patterns of keys that stand beside those of a transformer, and what a file with such a key is."""
_TABLED_LAYOUTS = tuple(layout for kind in TABLED.values() if kind.tables for layout in kind.tables.layouts)
KNOWN = (*LAYOUTS, *FLUX2_LAYOUTS, *_TABLED_LAYOUTS, *SD3_LAYOUTS)
"""All layouts that transformers are published in."""
_OTHERS = (
    (
        _ADAPTER,
        "a LoRA, changes to a model's weights and not a model; name its model, and beside it this file as --lora FILE",
    ),
    (re.compile(r"(^|\.)(redux_up|image_proj|ip_adapter|ip-adapter)"), "an image adapter, which steers a FLUX model"),
    (re.compile(r"(^|\.)joint_blocks\."), "a part of a Stable Diffusion 3 transformer, which lacks its first layers"),
    (re.compile(r"(^|\.)(input_blocks|down_blocks\.\d+\.attentions)\."), "a U-Net of Stable Diffusion"),
    (re.compile(r"(^|\.)encoder\.block\.\d+\.layer\."), "a T5 text encoder"),
    (re.compile(r"(^|\.)text_model\.encoder\."), "a CLIP text encoder"),
    (re.compile(r"(^|\.)decoder\.(conv_in|mid|mid_block|up|up_blocks)\."), "an autoencoder (VAE)"),
    (re.compile(r"^(img_in|time_in\.up)\.kernel$"), "one file of a directory that difffract wrote; give the directory"),
)
"""The same for files without FLUX's keys; the first that fits counts."""


def find_transformer(source: Source, *, quiet: bool = False) -> tuple[Source, Layout] | None:
    """Finds the transformer in a checkpoint.

    Args:
        source: the checkpoint, as its file has it.
        quiet: whether the log says nothing of what is left aside, as where nothing is loaded yet.

    Returns:
        The transformer's part of it, without prefix, and its layout; None where there is no such part.

    Raises:
        UserError: if there are several.
    """
    places = [(prefix, layout) for layout in KNOWN for prefix in _prefixes(list(source), layout)]
    own = [place for place in places if not place[0].startswith(OTHER_PARTS)] or places
    if len(own) > 1:
        prefixes = " and ".join(repr(prefix) for prefix, _ in own)
        raise UserError(f"{source.name} holds several transformers, under {prefixes}; save the wanted one alone.")
    if not own:
        return None
    prefix, layout = own[0]
    part = source.under(prefix, aside=tuple(item for item in OTHER_PARTS if not prefix.startswith(item)))
    if not quiet:
        _tell_rest(source, part)
    return part, layout


def transformer_of(source: Source, *, quiet: bool = False) -> tuple[Source, Layout]:
    """Does what `find_transformer` does, and refuses what holds none, or none that can be read.

    Args:
        source: the checkpoint.
        quiet: see `find_transformer`.

    Raises:
        UserError: in one sentence that says what it is instead.
    """
    part_and_layout = find_transformer(source, quiet=quiet)
    has_transformer = part_and_layout is not None
    check_weights(part_and_layout[0] if part_and_layout else source, adapters=has_transformer)
    what = describe(list(source), beside_transformer=has_transformer)
    if what is not None:
        raise UserError(
            f"{source.name} is {what}; a transformer of FLUX.1, FLUX.2, Stable Diffusion 3 or Chroma is wanted here."
        )
    if part_and_layout is None:
        beginnings = sorted({key.split(".")[0] for key in source})[:5]
        raise UserError(
            f"{source.name} is no transformer of a known model: it holds neither "
            f"{', '.join(dict.fromkeys(layout.anchor for layout in KNOWN[:-1]))} nor {KNOWN[-1].anchor}, under any "
            f"prefix (its keys begin with {', '.join(beginnings) or 'nothing'}); give the file of FLUX.1, FLUX.2, "
            "Stable Diffusion 3 or Chroma."
        )
    return part_and_layout


def without_prefix(source: Source, *anchors: str) -> Source:
    """Strips what stands before the keys of a text encoder or an autoencoder, as in files that hold several parts.

    Args:
        source: the checkpoint.
        anchors: a key that the part has, as its table calls it; several for several tables.

    Returns:
        The part whose first anchor stands at one place; the checkpoint itself where none does.
    """
    for anchor in anchors:
        prefixes = [key.removesuffix(anchor) for key in source if key == anchor or key.endswith(f".{anchor}")]
        if len(prefixes) == 1:
            part = source.under(prefixes[0])
            _tell_rest(source, part)
            return part
    return source


def check_weights(source: Source, *, adapters: bool = True) -> None:
    """Refuses weights that are quantised, other than as fp8, and such that adapters have still to be merged into.

    Args:
        source: the checkpoint, or the part of it that is wanted.
        adapters: look for adapters too.

    Raises:
        UserError: naming the kind, the first tensor that shows it, and what to take instead.
    """
    quantised = kind_of(source.all_dtypes())
    if quantised:
        kind, key = quantised
        raise UserError(
            f"{source.name} is quantised as {kind} ({key}); only F32, F16, BF16 and fp8 can be read: {BF16_FILES}."
        )
    unmerged = next((key for key in source if ".base_layer." in key or _ADAPTER.search(key)), None)
    if adapters and unmerged is not None:
        raise UserError(
            f"{source.name} holds LoRA adapters ({unmerged}) that are not merged into the weights; merge them first: "
            f"{_MERGED}."
        )


def check_autoencoder(source: Source) -> None:
    """Refuses an autoencoder in the original layout, of which there is no table, in one sentence."""
    original = next((key for key in source if key.startswith("decoder.mid.")), None)
    if original is not None:
        raise UserError(
            f"{source.name} holds the autoencoder in the original layout ({original}), but diffusers' is wanted: "
            "vae/diffusion_pytorch_model.safetensors of the same release."
        )


def describe(keys: list[str], *, beside_transformer: bool = False) -> str | None:
    """Says what a checkpoint is, by its keys, where it is a known one and not FLUX's transformer.

    Args:
        keys: all keys.
        beside_transformer: whether they hold what looks like FLUX's transformer, so that only what resembles it is
            named.

    Example:
        >>> describe(["text_model.encoder.layers.0.mlp.fc1.weight"])
        'a CLIP text encoder'
    """
    table = _SIMILAR if beside_transformer else (*_SIMILAR, *_OTHERS)
    return next((what for pattern, what in table if any(pattern.search(key) for key in keys)), None)


def transformer_files(directory: Path) -> list[Path]:
    """Returns the files of a directory that hold a transformer each, by their headers.

    Args:
        directory: any.
    """
    files = []
    for path in sorted(directory.glob("[!.]*.safetensors")):
        try:
            keys = list(TensorFile(path).tensors)
        except UserError:
            continue
        if any(_prefixes(keys, layout) for layout in KNOWN):
            files.append(path)
    return files


def _prefixes(keys: list[str], layout: Layout) -> list[str]:
    """Returns what stands before a layout's anchor, where blocks of that layout stand behind it too."""
    ends = {key.removesuffix(layout.anchor) for key in keys if key.endswith(layout.anchor)}
    prefixes = sorted(prefix for prefix in ends if prefix == "" or prefix.endswith("."))
    return [
        prefix
        for prefix in prefixes
        if any(key.startswith(tuple(f"{prefix}{stack}." for stack in layout.blocks)) for key in keys)
        and not any(f"{prefix}{key}" in keys for key in layout.unlike)
    ]


def _tell_rest(source: Source, part: Source) -> None:
    """Logs in one line what is left aside."""
    rest = set(source.names()) - set(part.names())
    named = sorted({name.split(".")[0] for name in rest} - {"scaled_fp8"})
    if named:
        _log.info("%s holds other parts too, which are left aside (%s).", source.name, ", ".join(named))
