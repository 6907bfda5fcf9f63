"""The file of activations of one denoising step, recorded elsewhere: `activations.npz` (docs/cross-check.md).

1. `ARRAYS` declares every array and its axes; `array_shapes` gives their lengths for a model and a run.
2. `write_activations` and `read_activations` hold both sides to that declaration: the recorder in
   `converters/torch_trace.py`, and `circuits/trace/imported.py`, which makes a trace of the file.

3. `records_of` sorts the arrays by stack and group.

Values are float32, which holds those of a bfloat16 run exactly.
"""

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from difffract_jax.config import UserError
from difffract_jax.models.blocks import FluxConfig, Streams
from difffract_jax.models.double import Frozen
from difffract_jax.models.single import SingleFrozen
from difffract_jax.storage.files import atomic_file
from difffract_jax.storage.remote.cache import local_file

FORMAT_VERSION = 1
ARRAYS: dict[str, str] = {
    "latents": "img channels",
    "text": "txt text_width",
    "pooled": "pooled_width",
    "cond": "d_model",
    "residual_img": "img d_model",
    "residual_txt": "txt d_model",
    "double_q": "double seq heads head_dim",
    "double_k": "double seq heads head_dim",
    "double_inv_std1_img": "double img",
    "double_inv_std1_txt": "double txt",
    "double_inv_std2_img": "double img",
    "double_inv_std2_txt": "double txt",
    "double_mlp_in_img": "double img d_model",
    "double_mlp_in_txt": "double txt d_model",
    "double_mlp_out_img": "double img d_model",
    "double_mlp_out_txt": "double txt d_model",
    "single_q": "single seq heads head_dim",
    "single_k": "single seq heads head_dim",
    "single_inv_std": "single seq",
    "single_mlp_in": "single seq d_model",
    "single_mlp_out": "single seq d_model",
    "final_inv_std": "img",
    "velocity": "img outputs",
}
"""Arrays of a file, and their axes; `double` and `single` count blocks, and the joint sequence has the text first."""
_ABOUT = ("prompt", "seed", "step", "t", "sigmas", "grid", "text_mask", "latents_given", "dtype")


class Activations(NamedTuple):
    """What one denoising step computed.

    Attributes:
        prompt: of the run.
        seed: of the starting noise; not what it started from if latents were given.
        step: the step, from 0.
        t: denoising time the transformer was fed, in [0, 1]; rounded, in a bfloat16 run.
        sigmas: noise level entering every step, and the final 0.
        grid: rows and columns of image tokens.
        text_mask: True for the prompt's own tokens, the closing one included; False for padding.
        latents_given: whether the run started from given latents.
        dtype: type that the run computed in, `f32` or `bf16`.
        arrays: float32, by the names in `ARRAYS`.
        guidance: guidance scale; None for a model that takes none, and in files that do not say.
    """

    prompt: str
    seed: int
    step: int
    t: float
    sigmas: tuple[float, ...]
    grid: tuple[int, int]
    text_mask: np.ndarray
    latents_given: bool
    dtype: str
    arrays: dict[str, np.ndarray]
    guidance: float | None = None


def array_shapes(config: FluxConfig, grid: tuple[int, int], text_tokens: int) -> dict[str, tuple[int, ...]]:
    """Returns the shape of every array of a file.

    Args:
        config: of the model.
        grid: rows and columns of image tokens.
        text_tokens: length of the text sequence.
    """
    img = grid[0] * grid[1]
    lengths = {
        "img": img,
        "txt": text_tokens,
        "seq": text_tokens + img,
        "double": config.depth_double,
        "single": config.depth_single,
        "channels": config.in_channels,
        "outputs": config.out_channels,
    }
    names = ("text_width", "pooled_width", "d_model", "heads", "head_dim")
    lengths |= {name: getattr(config, name) for name in names}
    return {name: tuple(lengths[axis] for axis in axes.split()) for name, axes in ARRAYS.items()}


def write_activations(path: str | Path, activations: Activations) -> None:
    """Writes a file, whole or not at all.

    Args:
        path: the file, `.npz`.
        activations: what to write.

    Raises:
        UserError: if the name does not end in .npz, or a value is not finite.
    """
    if Path(path).suffix != ".npz":
        raise UserError(f"The output file must end in .npz, but got {path}.")
    check_finite(activations, "The run")
    about: dict[str, Any] = {name: np.asarray(getattr(activations, name)) for name in _ABOUT}
    about |= {"sigmas": about["sigmas"].astype(np.float64), "format_version": np.asarray(FORMAT_VERSION)}
    if activations.guidance is not None:
        about["guidance"] = np.asarray(activations.guidance, np.float64)
    with atomic_file(path) as partial:
        np.savez(partial, allow_pickle=False, **about, **activations.arrays)


def read_activations(path: str | Path) -> Activations:
    """Reads a file; what it holds is complete, but not held against any model yet.

    Args:
        path: the file, `.npz`.

    Raises:
        UserError: if it is absent, broken, of another version, incomplete, or not finite.
    """
    file_here = local_file(path)
    if not file_here.is_file():
        raise UserError(f"{path} does not exist; make it with python -m converters.torch_trace.")
    try:
        # NumPy leaves a file open that it cannot read.
        with file_here.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            found = {name: file[name] for name in file.files}
    except (ValueError, EOFError, OSError, zipfile.BadZipFile, AttributeError):
        raise UserError(f"{path} is damaged or no .npz file of activations; make it again.") from None
    version = found.get("format_version")
    if version is None or version.shape != () or version != FORMAT_VERSION:
        told = "has none" if version is None else f"says {version}"
        raise UserError(f"{path} must be of format_version {FORMAT_VERSION}, but {told}; record it again.")
    absent = [name for name in (*_ABOUT, *ARRAYS) if name not in found]
    if absent:
        raise UserError(f"{path} lacks {', '.join(absent)}; record it again.")
    try:
        activations = _from_arrays(found)
    except (ValueError, TypeError):
        raise UserError(f"{path} says things about its run that cannot be read; record it again.") from None
    if not 0 <= activations.step < len(activations.sigmas) - 1:
        raise UserError(
            f"{path} holds step {activations.step} of a run of {len(activations.sigmas) - 1}; record it again."
        )
    check_finite(activations, str(path))
    return activations


class Records(NamedTuple):
    """What a file says of the blocks, as a trace holds it.

    Attributes:
        frozen: queries, keys and norm scales of each stack's blocks.
        mlp_in: inputs x of the MLP sublayers, [layer rows d_model] per group.
        mlp_out: their outputs y, alike.
        names: of each group's outputs in the file.
    """

    frozen: tuple[Any, ...]
    mlp_in: tuple[Any, ...]
    mlp_out: tuple[Any, ...]
    names: tuple[str, ...]


def records_of(arrays: Mapping[str, Any]) -> Records:
    """Sorts a file's arrays by stack and group.

    Args:
        arrays: by the names in `ARRAYS`.
    """

    def streams(name: str) -> Streams:
        return Streams(arrays[f"{name}_img"], arrays[f"{name}_txt"])

    double = Frozen(arrays["double_q"], arrays["double_k"], streams("double_inv_std1"), streams("double_inv_std2"))
    single = SingleFrozen(arrays["single_q"], arrays["single_k"], arrays["single_inv_std"])
    names = ("double_mlp_out_img", "double_mlp_out_txt", "single_mlp_out")
    mlp_in = (*streams("double_mlp_in"), arrays["single_mlp_in"])
    return Records((double, single), mlp_in, tuple(arrays[name] for name in names), names)


def check_finite(activations: Activations, holder: str) -> None:
    """Refuses activations with NaN or infinity.

    Args:
        activations: of a run.
        holder: what holds them, the subject of the error.

    Raises:
        UserError: naming the arrays that are not finite.
    """
    numbers = activations.arrays | {"t": np.asarray(activations.t), "sigmas": np.asarray(activations.sigmas)}
    wrong = [name for name, array in numbers.items() if not np.isfinite(array).all()]
    if wrong:
        raise UserError(
            f"{holder} holds values that are not finite (NaN or infinity) in {', '.join(wrong)}; check that the model "
            "generates sound images in this type."
        )


def _from_arrays(found: dict[str, np.ndarray]) -> Activations:
    rows, columns = found["grid"].astype(int).tolist()
    return Activations(
        prompt=str(found["prompt"].item()),
        seed=int(found["seed"].item()),
        step=int(found["step"].item()),
        t=float(found["t"].item()),
        sigmas=tuple(found["sigmas"].astype(float).tolist()),
        grid=(rows, columns),
        text_mask=found["text_mask"].astype(bool).reshape(-1),
        latents_given=bool(found["latents_given"].item()),
        dtype=str(found["dtype"].item()),
        arrays={name: found[name].astype(np.float32, copy=False) for name in ARRAYS},
        guidance=float(found["guidance"].item()) if "guidance" in found else None,
    )
