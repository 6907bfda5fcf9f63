"""Files of LoRAs: which changes of weights one holds, by the names that the file has for them.

1. A LoRA changes a matrix W [out in] by alpha / rank x up @ down; up is [out rank], down [rank in]. Without an alpha it
   is the rank, so that the factor is 1. A file may hold whole differences besides, which are added as they are: of a
   weight (`.diff`), or of a bias (`.diff_b`).
2. `read_lora` sorts a file's tensors into modules: a name, the factors or the difference, their scale. Layouts differ
   in what stands before a module's name, whether its parts are joined by dots or by `_`, and how factors are called:
   - diffusers and PEFT: `transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight`, alpha in the header or in
     the `adapter_config.json` beside it;
   - kohya: `lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight` with `.alpha` beside it, text encoders as
     `lora_te1_` (CLIP), `lora_te2_` (the second CLIP of Stable Diffusion 3) and `lora_te3_` (T5);
   - ComfyUI and ai-toolkit: `diffusion_model.` before the names of either release;
   - XLabs: `double_blocks.0.processor.qkv_lora1.down.weight`, its processors named after what they stand beside.
3. `bare` takes away what stands before a name. Which matrix of which model it is, `lora` finds; of two CLIPs, whose
   modules have the same names, `clip_of` tells the one by what stands before.
4. A convolution's factors are those of its matrix: down is [rank in rows columns], up [out rank 1 1].
"""

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from converters.contents import transformer_files
from converters.source import Source
from difffract_jax.config import UserError
from difffract_jax.storage.checkpoint import cap
from difffract_jax.storage.files import TensorFile

PREFIXES = (
    *("base_model.model.", "model.diffusion_model.", "diffusion_model.", "transformer.", "lora_unet_"),
    *("lora_transformer_", "text_encoder.", "text_encoder_2.", "text_encoder_3."),
    *("text_encoders.clip_l.transformer.", "text_encoders.clip_g.transformer.", "text_encoders.t5xxl.transformer."),
    *("lora_te_", "lora_te1_", "lora_te2_", "lora_te3_", "text_model.", "text_model_"),
)
"""What stands before a module's name; which part it is of, the name itself tells."""
_CLIPS = {
    "first": ("text_encoder.", "text_encoders.clip_l.", "lora_te1_"),
    "second": ("text_encoder_2.", "text_encoders.clip_g.", "lora_te2_"),
}
"""Which of two CLIPs -> what stands before its modules' names."""
_FACTOR = re.compile(r"(.+?)\.(?:lora_|lora\.|lora_linear_layer\.)(A|B|down|up)(?:\.\w+)?\.weight")
_PROCESSOR_FACTOR = re.compile(r"(.+\.processor\.\w+_lora\d?)\.(down|up)\.weight")
_DIFFERENCE = re.compile(r"(.+)\.(diff|diff_b)")
_PROCESSORS: tuple[tuple[re.Pattern[str], tuple[str, ...]], ...] = (
    (re.compile(r"double_blocks\.(\d+)\.processor\.qkv_lora1"), (r"double_blocks.\1.img_attn.qkv",)),
    (re.compile(r"double_blocks\.(\d+)\.processor\.qkv_lora2"), (r"double_blocks.\1.txt_attn.qkv",)),
    (re.compile(r"double_blocks\.(\d+)\.processor\.proj_lora1"), (r"double_blocks.\1.img_attn.proj",)),
    (re.compile(r"double_blocks\.(\d+)\.processor\.proj_lora2"), (r"double_blocks.\1.txt_attn.proj",)),
    (re.compile(r"single_blocks\.(\d+)\.processor\.proj_lora"), (r"single_blocks.\1.linear2",)),
    (  # q, k and v, which the original release has in one matrix with the MLP's
        re.compile(r"single_blocks\.(\d+)\.processor\.qkv_lora"),
        tuple(rf"single_transformer_blocks.\1.attn.to_{one}" for one in "qkv"),
    ),
)
"""XLabs' name of a module -> those of the matrices that it changes, one below the other."""
_OTHERS = (
    (r"\.(dora_scale|lora_magnitude_vector)", "the magnitudes of a DoRA"),
    (r"\.hada_w\d|\.hada_t\d", "factors of a LoHa"),
    (r"\.lokr_w\d|\.lokr_t\d", "factors of a LoKr"),
    (r"\.lora_mid\.|\.oft_|\.boft_|\.diag", "an adapter of another kind"),
    (r"\.set_weight$|\.reshape_weight$", "weights that replace those of the model"),
    (r"\.lora_(B|up)\.bias$", "factors with biases"),
    (r"\.ip_adapter|\.processor\.", "an image adapter"),
    (r"norm\.\w+\.(scale|weight)$", "weights of norms"),
)
"""Pattern of a key -> what it belongs to, of adapters that are no plain LoRAs."""
PLAIN = (
    "only plain LoRAs of matrices, and differences of weights and biases, can be merged: load it in diffusers, "
    "fuse_lora() and save_pretrained(DIR)"
)


class Module(NamedTuple):
    """What a file says of one weight, or of one bias.

    Attributes:
        name: of the module, as the file has it; of a tensor that is not called `weight`, that tensor's own.
        changed: which tensor of the module it changes.
        factors: up [out rank] and down [rank in], of a convolution [rank in rows columns], whose product is added; or
            what is added itself.
        scale: of the product: alpha / rank.
    """

    name: str
    changed: Literal["weight", "bias"]
    factors: tuple[np.ndarray, ...]
    scale: float

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor that it changes."""
        return (*self.factors[0].shape[:1], *self.factors[-1].shape[1:])

    def change(self, dtype: Any, scale: float = 1.0) -> np.ndarray:
        """Returns what is added to the tensor.

        Args:
            dtype: of the product.
            scale: besides the module's own.
        """
        wide = [factor.astype(dtype) for factor in self.factors]
        product = wide[0] @ wide[1].reshape(len(wide[1]), -1) if len(wide) == 2 else wide[0]
        return product.reshape(self.shape) * np.asarray(scale * self.scale, dtype)


def read_lora(path: Path) -> tuple[Module, ...]:
    """Reads the changes of a file into memory.

    Args:
        path: a `.safetensors` file, or PEFT's directory with one.

    Raises:
        UserError: if it is not there, damaged, or no LoRA, or holds more than LoRAs and differences; in one sentence.
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
    differences: dict[str, re.Match[str]] = {}
    rest: list[str] = []
    for key in source:
        match = _FACTOR.fullmatch(key) or _PROCESSOR_FACTOR.fullmatch(key)
        difference = _DIFFERENCE.fullmatch(key)
        if match is not None:
            factors.setdefault(match[1], {})["down" if match[2] in ("A", "down") else "up"] = key
        elif difference is not None:
            differences[key] = difference
        elif key.endswith(".alpha"):
            alphas[key.removesuffix(".alpha")] = key
        else:
            rest.append(key)
    _check_kinds(file, factors, differences, rest)
    told = _told_beside(file)
    modules = [
        one
        for name, keys in factors.items()
        for one in _renamed(file, _module(file, source, name, keys, alphas.get(name), told))
    ]
    modules += [_difference(file, source, key, match) for key, match in differences.items()]
    return tuple(modules)


def bare(name: str) -> str:
    """Returns a module's name without what stands before it.

    Args:
        name: as a file has it.

    Example:
        >>> bare("diffusion_model.double_blocks.0.img_attn.qkv")
        'double_blocks.0.img_attn.qkv'
    """
    stripped = name
    while (prefix := next((one for one in PREFIXES if stripped.startswith(one)), None)) is not None:
        stripped = stripped.removeprefix(prefix)
    return stripped


def clip_of(name: str) -> str | None:
    """Returns which of two CLIPs a module's name stands for, "first" or "second"; None where it does not say.

    Args:
        name: as a file has it.

    Example:
        >>> clip_of("text_encoder_2.text_model.encoder.layers.0.mlp.fc1"), clip_of("lora_te1_text_projection")
        ('second', 'first')
    """
    inner = name.removeprefix("base_model.model.")
    return next((one for one, prefixes in _CLIPS.items() if inner.startswith(prefixes)), None)


def more(keys: Sequence[str]) -> str:
    """Says how many there are beside the first of several keys, as it follows the first; "" for one alone."""
    return f" (and {len(keys) - 1} more)" if len(keys) > 1 else ""


def _check_kinds(
    file: Path, factors: Mapping[str, Mapping[str, str]], differences: Mapping[str, Any], rest: Sequence[str]
) -> None:
    """Refuses keys that are no factors, and factors without their other half."""
    any_change = bool(factors or differences)
    for pattern, what in _OTHERS:
        foreign = next((key for key in rest if re.search(pattern, key)), None)
        if foreign is not None and (any_change or "norm" not in foreign):
            raise UserError(f"{file} holds {what} ({foreign}), but {PLAIN}.")
    if not any_change:
        what = "a whole model, which is given as MODEL" if file in transformer_files(file.parent) else "no LoRA"
        begin = ", ".join(sorted({key.split(".")[0] for key in rest})[:5]) or "nothing"
        raise UserError(
            f"{file} is {what}: none of its keys ends in lora_A.weight or lora_down.weight (they begin with {begin})."
        )
    if rest:
        raise UserError(f"{file} holds {rest[0]}{more(rest)}, which belongs to no LoRA; {PLAIN}.")
    halves = sorted(keys[half] for keys in factors.values() if len(keys) == 1 for half in keys)
    if halves:
        raise UserError(f"{file} holds {halves[0]}{more(halves)} without its other factor; download or save it again.")


def _module(
    file: Path, source: Source, name: str, keys: Mapping[str, str], alpha_key: str | None, told: Mapping[str, Any]
) -> Module:
    """Reads the factors of a matrix, and how they are scaled."""
    down, up = (source.read(keys[half]) for half in ("down", "up"))
    if down.ndim == 4 and up.ndim == 4 and up.shape[2:] == (1, 1):
        up = up[:, :, 0, 0]
    if down.ndim not in (2, 4) or up.ndim != 2 or up.shape[1] != down.shape[0]:
        raise UserError(
            f"{file} holds factors of {name} that do not multiply: {keys['up']} of shape {up.shape} and {keys['down']} "
            f"of shape {down.shape} have no rank in common; download or save it again."
        )
    rank = down.shape[0]
    alpha = _told_alpha(file, told, name, rank) if alpha_key is None else float(source.read(alpha_key).reshape(-1)[0])
    _check_finite(
        file,
        {keys["down"]: down, keys["up"]: up, alpha_key or f"the alpha of {name}": np.asarray(alpha or 0.0)},
    )
    return Module(name, "weight", (up, down), 1.0 if alpha is None else alpha / rank)


def _difference(file: Path, source: Source, key: str, match: re.Match[str]) -> Module:
    """Reads what is added to a weight or a bias as it is."""
    values = source.read(key)
    _check_finite(file, {key: values})
    return Module(match[1], "weight" if match[2] == "diff" else "bias", (values,), 1.0)


def _check_finite(file: Path, arrays: Mapping[str, np.ndarray]) -> None:
    bad = next((key for key, array in arrays.items() if not np.isfinite(array).all()), None)
    if bad is not None:
        raise UserError(f"{file} holds values that are not finite in {bad}; download or save it again.")


def _renamed(file: Path, module: Module) -> Iterator[Module]:
    """Yields a module under the names of the matrices that it changes; XLabs' alone have other ones."""
    pairs = ((pattern.fullmatch(bare(module.name)), names) for pattern, names in _PROCESSORS)
    match, names = next(((match, names) for match, names in pairs if match is not None), (None, ()))
    if match is None:
        yield module
        return
    up, down = module.factors
    if up.shape[0] % len(names):
        raise UserError(
            f"{file} holds {module.name} for {up.shape[0]} channels, which are not q, k and v of one width; download "
            "or save it again."
        )
    for name, part in zip(names, np.split(up, len(names)), strict=True):
        yield module._replace(name=match.expand(name), factors=(part, down))


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
    parts = ("transformer", "text_encoder", "text_encoder_2", "text_encoder_3")
    part = next((f"{one}." for one in parts if name.startswith(f"{one}.")), "")
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
