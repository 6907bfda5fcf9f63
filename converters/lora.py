"""LoRAs: which weights of a FLUX.1 pipeline a file of low-rank factors changes, and by how much.

1. A LoRA changes a matrix W [out in] by scale x alpha / rank x up @ down; up is [out rank], down [rank in]. Without an
   alpha it is the rank, so that the factor is the scale alone.
2. `read_lora` sorts a file's tensors into modules: a name, both factors, alpha. Layouts differ in what stands before a
   module's name, whether its parts are joined by dots or by `_`, and how the factors are called:
   - diffusers and PEFT: `transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight`, alpha in the header or in
     the `adapter_config.json` beside it;
   - kohya: `lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight` with `.alpha` beside it, text encoders as
     `lora_te1_` (CLIP) and `lora_te3_` (T5);
   - ComfyUI and ai-toolkit: `diffusion_model.` before the names of either release.
3. `match` finds every module in the tables that convert the weights themselves, of both releases and both text
   encoders: a change is transformed exactly as the tensor that it changes. All that does not fit is refused.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from converters.contents import transformer_files
from converters.flux import LAYOUTS
from converters.mapping import Assignment, Rule, expand, tensor_shapes
from converters.source import Source
from converters.text_encoders import CLIP_TRANSFORMERS, T5_TRANSFORMERS
from difffract_jax.config import UserError
from difffract_jax.storage.checkpoint import cap, leaf_paths
from difffract_jax.storage.files import TensorFile

TABLES: Mapping[str, tuple[tuple[Rule, ...], ...]] = {
    "transformer": tuple(layout.rules for layout in LAYOUTS),
    "clip": (CLIP_TRANSFORMERS,),
    "t5": (T5_TRANSFORMERS,),
}
"""Part of a pipeline -> the tables that its modules are looked up in."""
PREFIXES = (
    *("base_model.model.", "model.diffusion_model.", "diffusion_model.", "transformer.", "lora_unet_"),
    *("lora_transformer_", "text_encoder.", "text_encoder_2.", "text_encoders.clip_l.transformer."),
    *("text_encoders.t5xxl.transformer.", "lora_te_", "lora_te1_", "lora_te2_", "lora_te3_", "text_model."),
    "text_model_",
)
"""What stands before a module's name; which part it is of, the name itself tells."""
_FACTOR = re.compile(r"(.+?)\.(?:lora_|lora\.|lora_linear_layer\.)(A|B|down|up)(?:\.\w+)?\.weight")
_OTHERS = (
    (r"\.(dora_scale|lora_magnitude_vector)", "the magnitudes of a DoRA"),
    (r"\.hada_w\d|\.hada_t\d", "factors of a LoHa"),
    (r"\.lokr_w\d|\.lokr_t\d", "factors of a LoKr"),
    (r"\.lora_mid\.|\.oft_|\.boft_|\.diag", "an adapter of another kind"),
    (r"\.processor\.", "a LoRA in the layout of XLabs"),
    (r"\.(diff|diff_b)$|\.lora_(B|up)\.bias$|norm\.\w+\.(scale|weight)$", "changes of biases or norms"),
)
"""Pattern of a key -> what it belongs to, of adapters that are no plain LoRAs."""
PLAIN = "only plain LoRAs of matrices can be merged: load it in diffusers, fuse_lora() and save_pretrained(DIR)"


class Module(NamedTuple):
    """What a file says of one matrix.

    Attributes:
        name: of the module, as the file has it.
        down: the first factor, [rank in].
        up: the second, [out rank].
        alpha: as the file says; None for the rank.
    """

    name: str
    down: np.ndarray
    up: np.ndarray
    alpha: float | None


class Change(NamedTuple):
    """What changes one slice of the leaves that an assignment makes.

    Attributes:
        assignment: the row of a table that the tensor is converted by.
        number: of the slice.
        shapes: of the source tensors.
        place: which of the source tensors is changed.
        module: by what.
        scale: of the change, alpha / rank included.
    """

    assignment: Assignment
    number: int
    shapes: tuple[tuple[int, ...], ...]
    place: int
    module: Module
    scale: float

    def slices(self, dtype: Any) -> dict[str, np.ndarray]:
        """Returns what is added to a slice of each leaf, by path.

        Args:
            dtype: of the product.
        """
        up, down = (factor.astype(dtype) for factor in (self.module.up, self.module.down))
        product = (up @ down) * np.asarray(self.scale, dtype)
        zero = np.zeros((), dtype)
        given = [np.broadcast_to(zero, shape) for shape in self.shapes]
        given[self.place] = product
        return dict(zip(self.assignment.targets, self.assignment.rule.transform.forward(tuple(given)), strict=True))


def read_lora(path: Path) -> tuple[Module, ...]:
    """Reads the factors of a file into memory.

    Args:
        path: a `.safetensors` file, or PEFT's directory with one.

    Raises:
        UserError: if it is not there, damaged, or no LoRA, or holds more than plain LoRAs do; in one sentence.
    """
    file = path / "adapter_model.safetensors" if path.is_dir() else path
    if not file.is_file():
        raise UserError(
            f"There is no LoRA {file}; give a .safetensors file as FILE or FILE:SCALE, as in style.safetensors:0.8."
        )
    source = Source(file)
    if source.problems:
        raise UserError(f"{file} cannot be read: {'; '.join(cap(source.problems))}.")
    factors: dict[str, dict[str, str]] = {}
    alphas: dict[str, str] = {}
    rest: list[str] = []
    for key in source:
        match = _FACTOR.fullmatch(key)
        if match is not None:
            factors.setdefault(match[1], {})["down" if match[2] in ("A", "down") else "up"] = key
        elif key.endswith(".alpha"):
            alphas[key.removesuffix(".alpha")] = key
        else:
            rest.append(key)
    _check_kinds(file, factors, rest)
    told = _told_beside(file)
    return tuple(_module(file, source, name, keys, alphas.get(name), told) for name, keys in factors.items())


def _check_kinds(file: Path, factors: Mapping[str, Mapping[str, str]], rest: Sequence[str]) -> None:
    """Refuses keys that are no factors, and factors without their other half."""
    for pattern, what in _OTHERS:
        foreign = next((key for key in rest if re.search(pattern, key)), None)
        if foreign is not None and (factors or "norm" not in foreign):
            raise UserError(f"{file} holds {what} ({foreign}), but {PLAIN}.")
    if not factors:
        what = "a whole model, which is given as MODEL" if file in transformer_files(file.parent) else "no LoRA"
        begin = ", ".join(sorted({key.split(".")[0] for key in rest})[:5]) or "nothing"
        raise UserError(
            f"{file} is {what}: none of its keys ends in lora_A.weight or lora_down.weight (they begin with {begin})."
        )
    if rest:
        raise UserError(f"{file} holds {rest[0]}{_more(rest)}, which belongs to no LoRA; {PLAIN}.")
    halves = sorted(keys[half] for keys in factors.values() if len(keys) == 1 for half in keys)
    if halves:
        raise UserError(f"{file} holds {halves[0]}{_more(halves)} without its other factor; download or save it again.")


def _module(
    file: Path, source: Source, name: str, keys: Mapping[str, str], alpha_key: str | None, told: Mapping[str, Any]
) -> Module:
    """Reads the factors of a matrix, and how they are scaled."""
    down, up = (source.read(keys[half]) for half in ("down", "up"))
    if down.ndim != 2 or up.ndim != 2 or up.shape[1] != down.shape[0]:
        raise UserError(
            f"{file} holds factors of {name} that do not multiply: {keys['up']} of shape {up.shape} and {keys['down']} "
            f"of shape {down.shape} have no rank in common; download or save it again."
        )
    alpha = (
        _told_alpha(file, told, name, down.shape[0])
        if alpha_key is None
        else float(source.read(alpha_key).reshape(-1)[0])
    )
    values = {keys["down"]: down, keys["up"]: up, alpha_key or f"the alpha of {name}": np.asarray(alpha or 0.0)}
    bad = next((key for key, array in values.items() if not np.isfinite(array).all()), None)
    if bad is not None:
        raise UserError(f"{file} holds values that are not finite in {bad}; download or save it again.")
    return Module(name, down, up, alpha)


def _told_beside(file: Path) -> dict[str, Any]:
    """Returns the settings that diffusers writes into the header, by part; or PEFT into a file beside its own."""
    config = file.parent / "adapter_config.json"
    text = TensorFile(file).metadata.get("lora_adapter_metadata")
    try:
        if text is None and file.name.startswith("adapter_model") and config.is_file():
            text = config.read_text(encoding="utf-8")
        told = json.loads(text or "{}")
    except (ValueError, TypeError) as error:
        raise UserError(f"{file} has settings that are not valid JSON ({error}); download or save it again.") from None
    return told if isinstance(told, dict) else {}


def _told_alpha(file: Path, told: Mapping[str, Any], name: str, rank: int) -> float | None:
    """Returns the alpha of a module by such settings; None if they do not say."""
    part = next(
        (f"{one}." for one in ("transformer", "text_encoder", "text_encoder_2") if name.startswith(f"{one}.")), ""
    )
    part = part if told.get(f"{part}lora_alpha") is not None else ""  # PEFT's settings are of one model
    if told.get(f"{part}lora_alpha") is None:
        return None
    try:
        patterns = told.get(f"{part}alpha_pattern") or {}
        own = (value for pattern, value in patterns.items() if re.fullmatch(rf"(.*\.)?({pattern})", name))
        alpha = float(next(own, told[f"{part}lora_alpha"]))
    except (AttributeError, TypeError, ValueError, re.error):
        raise UserError(
            f"{file} has settings that give {name} an alpha that is not a number; download or save it again."
        ) from None
    # A rank-stabilised LoRA is divided by the root of its rank.
    return alpha * math.sqrt(rank) if told.get(f"{part}use_rslora") else alpha


class _Slot(NamedTuple):
    """Where a matrix of the model is made."""

    part: str
    assignment: Assignment
    number: int
    shapes: tuple[tuple[int, ...], ...]
    place: int


def match(name: str, modules: Sequence[Module], scale: float, abstract: Mapping[str, Any]) -> dict[str, list[Change]]:
    """Finds what every module changes.

    Args:
        name: of the file, for messages.
        modules: of it.
        scale: factor of all changes.
        abstract: part of the pipeline -> its module's shapes.

    Returns:
        Part -> its changes.

    Raises:
        UserError: if a module is none of this model's, or of another size, in one sentence.
    """
    slots = {key: slot for part, tree in abstract.items() for key, slot in _slots(part, tree)}
    placed = [(module, slots.get(_bare(module.name))) for module in modules]
    unknown = [module.name for module, slot in placed if slot is None]
    if unknown:
        what = "none" if len(unknown) == len(modules) else f"only {len(modules) - len(unknown)}"
        raise UserError(
            f"{name} is a LoRA of another model: {what} of its {len(modules)} modules can be found in this one, which "
            f"has no {unknown[0]}{_more(unknown)}; give a LoRA that was trained on this model."
        )
    changes: dict[str, list[Change]] = {}
    for module, slot in placed:
        assert slot is not None
        wanted = slot.shapes[slot.place]
        shape = module.up.shape[0], module.down.shape[1]
        if shape != wanted:
            raise UserError(
                f"{name} is a LoRA of another model: it changes {module.name} of shape {shape}, but this model's is "
                f"{wanted}; give a LoRA that was trained on this model."
            )
        rank = module.down.shape[0]
        factor = scale * (1.0 if module.alpha is None else module.alpha / rank)
        changes.setdefault(slot.part, []).append(
            Change(slot.assignment, slot.number, slot.shapes, slot.place, module, factor)
        )
    return changes


def _slots(part: str, abstract: Any) -> Iterator[tuple[str, _Slot]]:
    """Yields every matrix of a part, by the names that LoRAs may call it, parts joined by dots or by `_`."""
    leaves = leaf_paths(abstract)
    for rules in TABLES.get(part, ()):
        for assignment in expand(rules, abstract):
            shapes = tensor_shapes(assignment, leaves)
            for number, keys in enumerate(assignment.sources):
                for place, key in enumerate(keys):
                    if key.endswith(".weight") and assignment.targets[0].endswith(".kernel"):
                        slot, named = _Slot(part, assignment, number, shapes, place), key.removesuffix(".weight")
                        yield named, slot
                        yield named.replace(".", "_"), slot


def _bare(name: str) -> str:
    """Returns a module's name without what stands before it."""
    stripped = name
    while (prefix := next((one for one in PREFIXES if stripped.startswith(one)), None)) is not None:
        stripped = stripped.removeprefix(prefix)
    return stripped


def _more(keys: Sequence[str]) -> str:
    return f" (and {len(keys) - 1} more)" if len(keys) > 1 else ""
