"""Activations of one denoising step of a PyTorch run, as a file that `difffract trace --activations` reads.

    python -m converters.torch_trace FLUX "a red fox" --step 1 --steps 4 --dtype bf16 --out activations.npz

1. Load a diffusers `FluxPipeline` directory in the type asked for, and put hooks on its transformer.
2. Run the pipeline itself: its text encoders, its noise, its scheduler. Hooks record at one step, and then it stops.
3. Write what `difffract_jax.models.activations` declares, as float32, which holds bfloat16 values exactly.

Queries and keys are caught behind their norms and rotated by diffusers' own function. The MLP of a single-stream block
has no output of its own in diffusers, where one projection takes attention and MLP together: y is formed in float32
from the projection's input and weight, without the bias that both share.
"""

import argparse
import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from converters.configurations import is_diffusers_directory, pipeline_config
from converters.torch_files import load_module
from difffract_jax.config import UserError
from difffract_jax.generators import check_seed
from difffract_jax.models.activations import Activations, array_shapes, write_activations
from difffract_jax.models.pipeline import plan_run
from difffract_jax.models.sampler import PATCH
from difffract_jax.storage.files import read_array
from difffract_jax.text_files import unicode_problem

DTYPES = {"f32": "float32", "bf16": "bfloat16"}


def record_activations(
    directory: str | Path,
    prompt: str,
    *,
    step: int = 0,
    seed: int = 0,
    steps: int | None = None,
    height: int | None = None,
    width: int | None = None,
    text_tokens: int | None = None,
    guidance: float | None = None,
    dtype: str = "f32",
    latents: np.ndarray | None = None,
) -> Activations:
    """Runs a diffusers pipeline up to one step, and returns what its transformer computed there.

    Args:
        directory: of the pipeline.
        prompt: of the run.
        step: step to record, from 0.
        seed: of PyTorch's generator.
        steps: denoising steps; this and the sizes below: our defaults for the pipeline if left out.
        height: image height in pixels.
        width: image width in pixels.
        text_tokens: length of the text sequence.
        guidance: guidance scale, for models that take one.
        dtype: `f32` or `bf16`, the type of weights and computation.
        latents: packed starting noise, [img channels], instead of the seed's.

    Raises:
        UserError: if the directory is not a diffusers pipeline, the prompt is not valid Unicode, a step or size is out
            of range, or a value not finite.
    """
    directory = Path(directory)
    problem = unicode_problem(prompt)
    if problem:
        raise UserError(f"The prompt is not valid Unicode: it {problem}.")
    if not is_diffusers_directory(directory):
        raise UserError(f"{directory} is not a diffusers directory; give one of a FluxPipeline.")
    config = pipeline_config(directory)
    run = plan_run(config, steps=steps, height=height, width=width, text_tokens=text_tokens, guidance=guidance)
    count = len(run.sigmas) - 1
    if not 0 <= step < count:
        raise UserError(f"step must lie in [0, {count}), as the run has {count} steps counted from 0, but got {step}.")
    shape = run.grid[0] * run.grid[1], config.transformer.in_channels
    if latents is not None and latents.shape != shape:
        raise UserError(f"Starting latents must be packed, of shape {shape}, but got {latents.shape}.")
    torch, pipe = load_module("torch"), _load(directory, dtype)
    recorder = _Recorder(pipe.transformer, array_shapes(config.transformer, run.grid, run.text_tokens), step)
    unit = PATCH * config.vae.factor
    with torch.no_grad():
        pipe(
            prompt,
            height=run.grid[0] * unit,
            width=run.grid[1] * unit,
            num_inference_steps=count,
            max_sequence_length=run.text_tokens,
            guidance_scale=run.guidance or 0.0,
            generator=torch.Generator("cpu").manual_seed(check_seed(seed)),
            latents=None if latents is None else torch.from_numpy(np.array(latents, np.float32)[None]),
            output_type="latent",
            callback_on_step_end=partial(_stop, step),
        )
    mask = pipe.tokenizer_2(prompt, padding="max_length", max_length=run.text_tokens, truncation=True).attention_mask
    sigmas = tuple(map(float, pipe.scheduler.sigmas))
    about = (prompt, seed, step, recorder.t, sigmas, run.grid, np.array(mask, bool), latents is not None, dtype)
    return Activations(*about, recorder.arrays, run.guidance)


def _load(directory: Path, dtype: str) -> Any:
    torch, diffusers = load_module("torch"), load_module("diffusers")
    pipe = diffusers.FluxPipeline.from_pretrained(
        directory,
        dtype=getattr(torch, DTYPES[dtype]),
        # Without accelerate diffusers would warn that it cannot spare memory.
        low_cpu_mem_usage=importlib.util.find_spec("accelerate") is not None,
        local_files_only=True,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _stop(last: int, pipe: Any, step: int, t: Any, kept: Mapping[str, Any]) -> dict[str, Any]:
    """Ends a pipeline's run after a step: diffusers skips the steps that remain."""
    del t, kept
    pipe._interrupt = step >= last
    return {}


class _Recorder:
    """Hooks on a transformer that fill the arrays of a file while one of its calls runs."""

    def __init__(self, model: Any, shapes: Mapping[str, tuple[int, ...]], step: int) -> None:
        # What no hook fills stays NaN, and is refused when the file is written.
        self.arrays = {name: np.full(shape, np.nan, np.float32) for name, shape in shapes.items()}
        self.t = float("nan")
        self.left = step + 1
        self.parts: dict[str, Any] = {}
        self.rotate = load_module("diffusers.models.embeddings").apply_rotary_emb
        model.register_forward_pre_hook(self._begin, with_kwargs=True)
        model.register_forward_hook(self._when_on(self._end), with_kwargs=True)
        for number, block in enumerate(model.transformer_blocks):
            self._watch_double(number, block)
        for number, block in enumerate(model.single_transformer_blocks):
            self._watch_single(number, block)
        self._watch_norm(model.norm_out.norm, "final_inv_std", ...)

    def put(self, name: str, number: Any, value: Any) -> None:
        """Keeps the one example of a batch, in float32."""
        target = self.arrays[name]
        # `np.copyto` would broadcast, and hide a tensor of another shape.
        assert target[number].shape == tuple(value.shape[1:]), f"{name} has shape {tuple(value.shape[1:])}"
        target[number] = value[0].float().cpu().numpy()

    def _when_on(self, hook: Callable[..., None]) -> Callable[..., None]:
        def checked(module: Any, args: Any, kwargs: Mapping[str, Any], output: Any) -> None:
            if self.left == 0:
                hook(module, args, kwargs, output)

        return checked

    def _watch(self, module: Any, hook: Callable[..., None]) -> None:
        module.register_forward_hook(self._when_on(hook), with_kwargs=True)

    def _begin(self, module: Any, args: Any, kwargs: Mapping[str, Any]) -> None:
        self.left -= 1
        if self.left == 0:
            self.t = float(kwargs["timestep"][0])
            self.put("latents", ..., kwargs["hidden_states"])
            self.put("text", ..., kwargs["encoder_hidden_states"])
            self.put("pooled", ..., kwargs["pooled_projections"])

    def _end(self, module: Any, args: Any, kwargs: Mapping[str, Any], output: Any) -> None:
        self.put("velocity", ..., output[0])

    def _watch_norm(self, norm: Any, name: str, number: Any) -> None:
        def keep(module: Any, args: Any, kwargs: Any, output: Any) -> None:
            x = args[0].float()
            self.put(name, number, (x.var(dim=-1, unbiased=False) + module.eps).rsqrt())

        self._watch(norm, keep)

    def _watch_part(self, norm: Any, part: str) -> None:
        def keep(module: Any, args: Any, kwargs: Any, output: Any) -> None:
            self.parts[part] = output

        self._watch(norm, keep)

    def _rotated(self, names: Sequence[str], kwargs: Mapping[str, Any]) -> Any:
        """Returns queries or keys of the joint sequence, rotated by diffusers itself."""
        joint = load_module("torch").cat([self.parts.pop(name) for name in names], dim=1)
        return self.rotate(joint, kwargs["image_rotary_emb"], sequence_dim=1)

    def _watch_double(self, number: int, block: Any) -> None:
        for stream, suffix, added in (("img", "", ""), ("txt", "_context", "added_")):
            for letter in "qk":
                self._watch_part(getattr(block.attn, f"norm_{added}{letter}"), f"{stream}_{letter}")
            self._watch_norm(getattr(block, f"norm1{suffix}").norm, f"double_inv_std1_{stream}", number)
            self._watch_norm(getattr(block, f"norm2{suffix}"), f"double_inv_std2_{stream}", number)
            self._watch(getattr(block, f"ff{suffix}"), partial(self._keep_mlp, number, stream))

        def keep(module: Any, args: Any, kwargs: Mapping[str, Any], output: Any) -> None:
            for letter in "qk":
                self.put(f"double_{letter}", number, self._rotated([f"txt_{letter}", f"img_{letter}"], kwargs))
            if number == 0:
                self.put("cond", ..., kwargs["temb"])
                self.put("residual_img", ..., kwargs["hidden_states"])
                self.put("residual_txt", ..., kwargs["encoder_hidden_states"])

        self._watch(block, keep)

    def _keep_mlp(self, number: int, stream: str, module: Any, args: Any, kwargs: Any, output: Any) -> None:
        self.put(f"double_mlp_in_{stream}", number, args[0])
        self.put(f"double_mlp_out_{stream}", number, output)

    def _watch_single(self, number: int, block: Any) -> None:
        for letter in "qk":
            self._watch_part(getattr(block.attn, f"norm_{letter}"), letter)
        self._watch_norm(block.norm.norm, "single_inv_std", number)

        def keep_input(module: Any, args: Any, kwargs: Any, output: Any) -> None:
            self.put("single_mlp_in", number, output[0])

        def keep_output(module: Any, args: Any, kwargs: Any, output: Any) -> None:
            width = output.shape[-1]  # the projection takes attention's columns first
            y = args[0][..., width:].float() @ module.weight[:, width:].float().T
            self.put("single_mlp_out", number, y)

        def keep(module: Any, args: Any, kwargs: Mapping[str, Any], output: Any) -> None:
            for letter in "qk":
                self.put(f"single_{letter}", number, self._rotated([letter], kwargs))

        self._watch(block.norm, keep_input)
        self._watch(block.proj_out, keep_output)
        self._watch(block, keep)


def main(arguments: Sequence[str] | None = None) -> None:
    """Records a step from the command line.

    Args:
        arguments: those of the command line if left out.
    """
    parser = argparse.ArgumentParser(
        prog="python -m converters.torch_trace",
        description="Record the activations of one denoising step of a PyTorch run, for difffract trace --activations.",
    )
    parser.add_argument("directory", type=Path, help="diffusers directory of a FluxPipeline")
    parser.add_argument("prompt", help="prompt of the run")
    parser.add_argument("--step", type=int, default=0, help="step to record, from 0")
    parser.add_argument("--seed", type=int, default=0, help="seed of PyTorch's generator")
    for name in ("steps", "height", "width", "text-tokens"):
        parser.add_argument(f"--{name}", type=int, help="the pipeline's default if left out")
    parser.add_argument("--guidance", type=float, help="guidance scale, for models that take one")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="f32", help="type of weights and computation")
    parser.add_argument("--latents", type=Path, help=".npy file of packed starting noise, [image tokens, channels]")
    parser.add_argument("--out", type=Path, default=Path("activations.npz"), help="file to write, .npz")
    given = vars(parser.parse_args(arguments))
    out, latents = given.pop("out"), given.pop("latents")
    try:
        noise = None if latents is None else read_array(latents)
        write_activations(out, record_activations(**given, latents=noise))
    except (UserError, OSError) as error:
        sys.exit(str(error))
    sys.stdout.write(f"{out}\n")


if __name__ == "__main__":
    main()
