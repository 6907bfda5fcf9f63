"""Settings of `difffract trace`, and of what `difffract plan --trace` assumes; see `config`."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from difffract_jax.config import SamplingSettings, Seed, Settings


class PlannedTrace(Settings):
    """What `difffract plan --trace` takes for granted of transcoders that need not be there, and of their codes."""

    sites: tuple[str, ...] = ("img/*", "txt/*")
    """MLPs that have a transcoder, as in img/3-18, txt/*, single/*."""
    expansion: float = Field(default=16.0, gt=0)
    """Features of a transcoder over channels of the model."""
    active: int = Field(default=256, ge=1)
    """Places for features per position: the most that are active at any position; a trace counts them."""


class TraceConfig(SamplingSettings):
    """Settings of `difffract trace`: the circuit of one or several targets, at one denoising step or over several."""

    transcoders: str
    """Transcoders of its MLPs: `organism`, a converted directory, a directory of `.pt` files, or
    hf:OWNER/NAME[@REVISION][/FOLDER]."""
    prompt: str | None = None
    """Prompt of the run that is traced; with --prompts it is left out."""
    target: str | tuple[str, ...]
    """What is explained: a feature, STREAM/BLOCK/fN[@POSITION][#STEP][~BRANCH], as in img/2/f401@12,
    single/1/f9@txt3 or img/2/f401~negative, where it is strongest unless told otherwise;
    velocity:contrast="other prompt"[,box=X0,Y0,X1,Y1|mask=FILE.png]; or
    pixels:color=NAME[,minus=NAME][,box=...|mask=...]. May be given several times."""
    sites: str | None = None
    """MLPs that are replaced by their transcoders, as in img/16-18,txt/16-18; when left out, all that have one and can
    bear on the target. Only these transcoders are loaded; all other MLPs are held as they ran."""
    weight: tuple[float, ...] | None = None
    """Share of a target in the influence, one per target in their order; equal when left out."""
    step: Annotated[str, BeforeValidator(lambda value: str(value) if isinstance(value, int) else value)] = Field(
        "0", pattern=r"^\d+(-\d+)?$"
    )
    """Denoising step that is traced, counted from 0; or steps, as in 0-3: one graph over all of them, whose inputs are
    the text embedding and the latents entering the first, and whose targets lie in the last unless they name a step."""
    seed: Seed = 0
    """Seed of the starting noise."""
    prompts: str | None = None
    """Prompts of many runs, a graph each in the directory --out; goes on where it stopped. A `.txt`, `.jsonl` or
    `.parquet` file, or hf:OWNER/NAME[:SPLIT[:COLUMN]]."""
    seeds: str | None = Field(None, pattern=r"^\d+(\s*(-|\.\.|,)\s*\d+)*$")
    """Seeds of many runs, as in 0-9 or 0,3,7: every prompt is run with each, into the directory --out."""
    max_nodes: int = Field(1000, ge=1)
    """Feature nodes to expand, the target included."""
    expansion_batch: int = Field(50, ge=1)
    """Nodes expanded between two computations of influence."""
    min_attribution: float = Field(1e-3, ge=0)
    """Smallest absolute edge that is kept, in units of the target's pre-activation; also the smallest feature value."""
    include_padding: bool = False
    """Trace padded text positions like any other token, as the reference does, instead of keeping their true MLP."""
    attention: Literal["frozen", "explained"] = "frozen"
    """Whether attention patterns are taken as they were, or the scores that bear most on the target become nodes too,
    each driven by what makes its query and its keys."""
    max_scores: int = Field(50, ge=0)
    """Attention scores that become nodes at most, with --attention explained, of all steps; the others are one node per
    block and step."""
    pooled: Literal["frozen", "explained"] = "frozen"
    """Whether shifts, scales and gates are taken as they were, or become nodes too: what each brings to the target when
    the empty prompt's pooled embedding becomes the prompt's, and the words behind that; with all blocks in
    memory."""
    latents: Path | None = None
    """`.npy` file of packed starting noise, [image tokens, channels], instead of noise drawn from the seed."""
    noise: Literal["jax", "torch"] = "jax"
    """Who draws the starting noise: `torch` repeats diffusers' noise of that seed (needs the extra `torch`)."""
    model_dtype: Literal["f32", "bf16"] | None = None
    """Type of the model's weights in memory, that of the files when left out; what is traced is float32 either way."""
    transcoder_dtype: Literal["f32", "bf16"] = "f32"
    """Type of the transcoders' weights in memory; bf16 rounds them, and takes half the memory."""
    base: Path | None = None
    """For a MODEL that is a transformer alone: diffusers directory with the other parts, or hf:OWNER/NAME."""
    variant: str | None = None
    """Which weights to take where a diffusers directory has several, as in fp16 for `model.fp16.safetensors`."""
    precision: Literal["f32", "bf16"] = "f32"
    """Products of the pull-back: full float32, or factors rounded to bfloat16 and sums in float32; then the error is
    measured on the first target, printed, and kept in the graph."""
    mesh: str | None = None
    """Devices by axis, as in data=2,feature=4; one when left out. `data` shares targets out, `feature` (or `site`, or
    both together) splits weights, transcoders and records between the devices of each share."""
    plan: PlannedTrace = PlannedTrace()
    """For `difffract plan --trace` alone."""
    activations: Path | None = None
    """`.npz` file of a PyTorch run's activations, from `python -m converters.torch_trace`, to trace instead of a run of
    ours; step, seed and sizes are the file's, and the prompt must be."""
    out: Path = Path("graph.npz")
    """Graph file to write, one that exists is replaced; of many runs a directory, `graphs` when left out."""
    export_json: Path | None = None
    """Also write the graph, summed over positions, as the reference's JSON version 2 to this file."""
