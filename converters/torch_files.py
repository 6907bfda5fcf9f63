"""PyTorch's side: `.pt` files, the noise of a seed, and the activations that `convert check` compares with.

1. torch and diffusers are optional and take seconds to import, so `load_module` imports one on first use; a missing
   one is a clear sentence. Of the package's other files the other `torch_*` alone touch them, by the same function.
2. `read_state` and `write_state` take a `.pt` state dict to NumPy arrays and back. Files are unpickled with
   `weights_only`, so that nothing in them is executed, and memory-mapped where their format allows. A state dict may
   lie in a record of training (`state_dicts`).
3. `torch_noise` draws the starting latents that diffusers draws for a seed.
4. `record_*` run one PyTorch component of a diffusers directory in float32 and return its inputs and outputs; forward
   hooks catch every block's. The large ones, T5 and the transformer, have their blocks' weights in memory only while
   the block runs.
"""

import importlib
import json
import pickle
import re
import struct
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from jaxtyping import Float32

from converters.source import Source
from converters.state_dicts import NotFound, find_state
from difffract_jax.config import UserError
from difffract_jax.generators import LOW_HALF, check_seed

DAMAGED = (
    pickle.UnpicklingError,
    RuntimeError,
    EOFError,
    ValueError,
    LookupError,
    AssertionError,
    TypeError,
    struct.error,
)
"""What PyTorch raises for files that are damaged, or are no pickles at all."""


class TransformerInputs(NamedTuple):
    """One call of a transformer.

    Attributes:
        latents: packed noisy latents.
        text: T5's last hidden state.
        pooled: CLIP's pooled vector.
        t: denoising time in [0, 1], 1 = noise.
        guidance: guidance scale, None for a model without.
        grid: rows and columns of image tokens.
    """

    latents: Float32[np.ndarray, "img channels"]
    text: Float32[np.ndarray, "txt t5_width"]
    pooled: Float32[np.ndarray, "clip_width"]
    t: float
    guidance: float | None
    grid: tuple[int, int]


class BlockRecord(NamedTuple):
    """What went into and came out of one block.

    Attributes:
        img: image stream before the block.
        txt: text stream before the block.
        cond: conditioning vector; where blocks compute no modulations, those of the block, one behind the other.
        img_out: image stream after the block.
        txt_out: text stream after the block.
    """

    img: Float32[np.ndarray, "img d_model"]
    txt: Float32[np.ndarray, "txt d_model"]
    cond: Float32[np.ndarray, "conditions"]
    img_out: Float32[np.ndarray, "img d_model"]
    txt_out: Float32[np.ndarray, "txt d_model"]


class TransformerRecord(NamedTuple):
    """One forward pass of PyTorch's transformer.

    Attributes:
        double: its double-stream blocks, in order; of a model without single-stream blocks, all.
        single: its single-stream blocks, in order.
        velocity: its output.
    """

    double: list[BlockRecord]
    single: list[BlockRecord]
    velocity: Float32[np.ndarray, "img channels"]

    @property
    def blocks(self) -> list[BlockRecord]:
        """All blocks, in order."""
        return [*self.double, *self.single]


def read_state(path: str | Path, wanted: str = "") -> dict[str, np.ndarray]:
    """Reads a `.pt` state dict; the arrays are views of the file where possible.

    Args:
        path: the file.
        wanted: key of the module, that tells its state dict from others in the file.

    Returns:
        Its tensors as they are named there; those of eight bits as float32, which holds their numbers exactly.

    Raises:
        UserError: when the file is damaged, holds no tensors by name or objects of other classes, or torch is not
            installed.
    """
    torch = load_module("torch")
    try:
        with torch.serialization.safe_globals(_numbers()), warnings.catch_warnings():
            # Of TorchScript and of pickles of later protocols it warns; what cannot be read is an error below.
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=_is_zip(Path(path)))
    except DAMAGED as error:
        raise UserError(_unreadable(path, str(error) or type(error).__name__)) from None
    try:
        state = find_state(content, lambda value: isinstance(value, torch.Tensor), wanted)
    except NotFound as error:
        raise UserError(f"{path} {error}; save one with torch.save(module.state_dict(), path).") from None
    try:
        return {key: _array(torch, value.detach()) for key, value in state.items()}
    except (TypeError, RuntimeError) as error:
        raise UserError(
            f"{path} holds tensors that are not plain arrays, as sparse or quantised ones ({_first_line(error)}); "
            "save dense floating point weights."
        ) from None


def _numbers() -> list[Any]:
    """Returns what makes NumPy's numbers in a pickle, and nothing else: losses in records of training are such."""
    make = np.float64(0).__reduce__()[0]
    named = [(make, f"{home}.multiarray.scalar") for home in ("numpy.core", "numpy._core")]
    return [*named, np.dtype, *(type(np.dtype(kind)) for kind in "efdbhilqBHILQ?")]


def _unreadable(path: str | Path, reason: str) -> str:
    """Says why PyTorch did not read a file."""
    classes = re.search(r"GLOBAL (\S+) (?:was not an allowed|whose module)", reason)
    if classes:
        return (
            f"{path} holds an object of class {classes[1]}, which is not opened, as that could run any program; save "
            "the tensors alone with torch.save(module.state_dict(), path)."
        )
    if "TorchScript" in reason:
        return (
            f"{path} is a program of TorchScript, which is not opened; save the tensors alone with "
            "torch.save(module.state_dict(), path)."
        )
    if f"Unsupported operand {pickle.FRAME[0]}" in reason:
        return (
            f"{path} is pickled by protocol 4 or later, which PyTorch does not open safely; save it with torch.save "
            "and without pickle_protocol."
        )
    # PyTorch puts advice before the reason, to open the file in an unsafe way.
    own = re.search(r"WeightsUnpickler error:\s*(.+)", reason)
    first = _first_line(own[1] if own else reason)
    return f"{path} is truncated or not a state dict of tensors ({first}); download or copy it again."


def _first_line(reason: object) -> str:
    return (str(reason).splitlines() or [""])[0][:120]


def write_state(path: str | Path, state: Mapping[str, np.ndarray]) -> None:
    """Writes arrays as a `.pt` state dict."""
    torch = load_module("torch")
    torch.save({key: _tensor(torch, value) for key, value in state.items()}, path)


def torch_noise(seed: int, channels: int, height: int, width: int) -> Float32[np.ndarray, "1 channels height width"]:
    """Draws the standard normal latents that diffusers draws for a seed, with PyTorch's CPU generator.

    Args:
        seed: seed of the generator, in [0, 2**64), of which PyTorch reads the lower 32 bits, see `torch_seed`.
        channels: latent channels of the autoencoder, before packing.
        height: latent height, before packing: the image's over the autoencoder's factor.
        width: latent width, likewise.
    """
    torch = load_module("torch")
    generator = torch.Generator("cpu").manual_seed(check_seed(seed))
    return torch.randn((1, channels, height, width), generator=generator, dtype=torch.float32).numpy()


def torch_seed(seed: int) -> int:
    """Returns the seed below 2**32 whose noise PyTorch's CPU generator draws for a seed: it drops the upper half."""
    return check_seed(seed) & LOW_HALF


def load_module(name: str) -> Any:
    """Imports torch, diffusers or transformers when it is first needed: the one hidden import outside the CLI.

    Args:
        name: of the module.

    Raises:
        UserError: if it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise UserError(
            f"This needs {name}, which is not installed; run: pip install 'difffract_jax[torch]'."
        ) from None


def _is_zip(path: Path) -> bool:
    """Says whether a file is in the zip format of PyTorch 1.6 and later, the only one that can be memory-mapped."""
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def _array(torch: Any, tensor: Any) -> np.ndarray:
    """Returns a tensor's array without a copy; NumPy gets bfloat16 by way of its bits."""
    if tensor.dtype.is_floating_point and tensor.dtype.itemsize == 1:
        return tensor.float().numpy()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def _tensor(torch: Any, value: np.ndarray) -> Any:
    array = np.array(value, order="C")
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def record_decoding(directory: Path, latent: Float32[np.ndarray, "h w latent"]) -> Float32[np.ndarray, "H W rgb"]:
    """Runs the PyTorch autoencoder's decoder on one unscaled latent."""
    torch, diffusers = load_module("torch"), load_module("diffusers")
    kind = _class_of(diffusers, directory / "vae")
    vae = kind.from_pretrained(directory / "vae", torch_dtype=torch.float32, low_cpu_mem_usage=False).eval()
    with torch.no_grad():
        image = vae.decode(torch.from_numpy(latent.transpose(2, 0, 1)[None].copy())).sample
    return image[0].permute(1, 2, 0).numpy()


def record_transformer(directory: Path, inputs: TransformerInputs) -> TransformerRecord:
    """Runs the PyTorch transformer once and returns what went into and came out of every block."""
    torch, diffusers = load_module("torch"), load_module("diffusers")
    path = directory / "transformer"
    kind = _class_of(diffusers, path)
    model = load_blockwise(torch, lambda: kind.from_config(kind.load_config(path)), path)
    given = _arguments(torch, inputs, pooled=kind is diffusers.FluxTransformer2DModel)
    return record_model(torch, model, given, len(inputs.text))


def record_model(torch: Any, model: Any, given: Mapping[str, Any], words: int) -> TransformerRecord:
    """Runs a transformer with two kinds of blocks once; arguments as for `record_blocks`."""
    modules, depth = [*model.transformer_blocks, *model.single_transformer_blocks], len(model.transformer_blocks)
    blocks, velocity = record_blocks(torch, model, modules, given, words)
    return TransformerRecord(blocks[:depth], blocks[depth:], velocity[0].numpy())


def record_blocks(
    torch: Any, model: Any, modules: Sequence[Any], given: Mapping[str, Any], words: int
) -> tuple[list[BlockRecord], Any]:
    """Runs a transformer once.

    Args:
        torch: the module.
        model: the transformer.
        modules: its blocks, in order.
        given: its arguments.
        words: text tokens.

    Returns:
        What went into and came out of every block, and the transformer's output.
    """
    blocks: dict[int, BlockRecord] = {}

    def keep(module: Any, args: Any, kwargs: Mapping[str, Any], output: Any) -> None:
        def arrays(img: Any, txt: Any) -> tuple[np.ndarray, np.ndarray]:
            return img[0].numpy().copy(), txt[0].numpy().copy()

        img, txt = kwargs["hidden_states"], kwargs.get("encoder_hidden_states")
        if txt is None:  # single-stream blocks of FLUX.2 and Chroma take and give the joint sequence
            txt, img = img[:, :words], img[:, words:]
            output = output[:, :words], output[:, words:]
        txt_out, img_out = output
        cond = torch.cat([value.flatten() for name, value in kwargs.items() if name.startswith("temb")])
        # Stable Diffusion 3's last block writes nothing to the text.
        after = arrays(img_out, txt if txt_out is None else txt_out)
        blocks[id(module)] = BlockRecord(*arrays(img, txt), cond.numpy().copy(), *after)

    for module in modules:
        module.register_forward_hook(keep, with_kwargs=True)
    with torch.no_grad():
        made = model(**given).sample
    return [blocks[id(module)] for module in modules], made


def _class_of(diffusers: Any, folder: Path) -> Any:
    """Returns diffusers' class of a part, which its configuration names."""
    return getattr(diffusers, json.loads((folder / "config.json").read_text(encoding="utf-8-sig"))["_class_name"])


def load_blockwise(torch: Any, build: Callable[[], Any], folder: Path) -> Any:
    """Returns a model whose blocks have weights while they run alone; the rest has them from the beginning.

    Args:
        torch: the module.
        build: makes the model.
        folder: holds its weights.
    """
    source = Source(folder)
    with torch.device("meta"):  # no memory for weights
        model = build().eval()
    lists = (name for name, module in model.named_modules() if isinstance(module, torch.nn.ModuleList))
    stacks = [name for name in lists if not any(part.isdigit() for part in name.split("."))]

    def tensor(key: str) -> Any:
        alike = {"encoder.embed_tokens.weight": "shared.weight", "shared.weight": "encoder.embed_tokens.weight"}
        alike |= {"lm_head.weight": "model.embed_tokens.weight"}
        held = key if source.readable(key) else alike.get(key, key)
        if not source.readable(held):
            raise UserError(f"{folder} lacks {key}; download it again.")
        return _tensor(torch, source.read(held).astype(np.float32, copy=False))

    def fill(module: Any, prefix: str, keys: Iterable[str]) -> None:
        module.load_state_dict({key: tensor(prefix + key) for key in keys}, assign=True, strict=False)

    def enter(module: Any, arguments: Any, prefix: str = "") -> None:
        fill(module, prefix, module.state_dict())

    for stack in stacks:
        for number, block in enumerate(model.get_submodule(stack)):
            block.register_forward_pre_hook(partial(enter, prefix=f"{stack}.{number}."))
            block.register_forward_hook(lambda module, arguments, output: module.to("meta") and None)
    within = tuple(f"{stack}." for stack in stacks)
    fill(model, "", [key for key in model.state_dict() if not key.startswith(within)])
    return model


def _arguments(torch: Any, inputs: TransformerInputs, *, pooled: bool) -> dict[str, Any]:
    """Returns the arguments of diffusers' forward pass.

    Image positions are (0, row, column), text positions 0; without pooled text (FLUX.2) there is a fourth axis, along
    which the text is counted.
    """
    rows, columns = inputs.grid
    ids = np.stack(np.broadcast_arrays(0.0, np.arange(rows)[:, None], np.arange(columns)[None]), axis=-1)
    given = {
        "hidden_states": torch.from_numpy(inputs.latents[None]),
        "encoder_hidden_states": torch.from_numpy(inputs.text[None]),
        "timestep": torch.tensor([inputs.t]),
    }
    if not pooled:
        image = np.pad(ids.reshape(1, -1, 3), ((0, 0), (0, 0), (0, 1))).astype(np.float32)
        words = np.zeros((1, len(inputs.text), 4), np.float32)
        words[..., 3] = np.arange(len(inputs.text))
        return given | {"img_ids": torch.from_numpy(image), "txt_ids": torch.from_numpy(words)}
    return given | {
        "pooled_projections": torch.from_numpy(inputs.pooled[None]),
        "guidance": None if inputs.guidance is None else torch.tensor([inputs.guidance]),
        "img_ids": torch.from_numpy(ids.reshape(-1, 3).astype(np.float32)),
        "txt_ids": torch.zeros(inputs.text.shape[0], 3),
    }
