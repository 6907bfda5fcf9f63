"""Settings of the commands that find and edit features, and explain and check circuits.

They are `demo`, `steer`, `features`, `effects`, `heads`, `validate`, `view` and `report`; and what `plan` takes for
granted of a command.
"""

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, field_validator

from difffract_jax.config import SEEDS, SamplingSettings, Seed, Settings, UserError

_SEEDS = re.compile(r"\d+(?:\.\.\d+)?(?:,\d+(?:\.\.\d+)?)*")
_NUMBERS = re.compile(r"-?\d*\.?\d+(?:e-?\d+)?(?:,-?\d*\.?\d+(?:e-?\d+)?)*", re.IGNORECASE)
_STEPS = re.compile(r"\d+(?:,\d+)*")
MOST_SEEDS = 100_000
"""Seeds of one call; more are a slip of the keyboard, and would fill the memory before anything is drawn."""


class RunSettings(SamplingSettings):
    """What both commands share: a model, its transcoders, a prompt, seeds and sizes."""

    transcoders: str
    """Transcoders or SAEs of its MLPs: `organism`, `organism-saes`, a converted directory, one of `.pt` files, or
    hf:OWNER/NAME[@REVISION][/FOLDER]."""
    seeds: str = "0"
    """Seeds of the starting noise, each given once, as in 0..9 or 0,3,7; results are averaged over them."""
    box: str | None = None
    """Region of the image, X0,Y0,X1,Y1 in pixels; X1 and Y1 lie outside."""
    mask: Path | None = None
    """Region of the image, as a black and white picture of its size; white lies inside."""
    batch: int = Field(32, ge=1)
    """Images computed together; 1 for a large model."""

    @field_validator("seeds")
    @classmethod
    def _are_seeds(cls, seeds: str) -> str:
        ranges = _ranges(seeds) if _SEEDS.fullmatch(seeds) else []
        if not ranges:
            raise ValueError("seeds are numbers and ranges, as in 0..9 or 0,3,7")
        backwards = [(first, last) for first, last in ranges if first > last]
        if backwards:
            raise ValueError("{1}..{0} is how a range is written: it counts up".format(*backwards[0]))
        if max(last for _, last in ranges) >= SEEDS:
            raise ValueError(f"a seed lies in 0..{SEEDS - 1}")
        if sum(last - first + 1 for first, last in ranges) > MOST_SEEDS:
            raise ValueError(f"at most {MOST_SEEDS} seeds can be given")
        twice = [seed for seed, times in Counter(_numbers(ranges)).items() if times > 1]
        if twice:
            raise ValueError(f"every seed counts once, and {', '.join(map(str, twice[:3]))} occurs more than once")
        return seeds

    @property
    def seed_list(self) -> tuple[int, ...]:
        """The seeds, in the order given."""
        return _numbers(_ranges(self.seeds))


class DemoConfig(Settings):
    """Settings of `difffract demo`."""

    out: Path = Path("difffract-demo")
    """Directory for report.html, the image, the graphs and a page to explore them, and the directories of the edit and
    the validation; those that exist are replaced, with a note."""
    seed: Seed = 0
    """Seed of the noise, and of the features that are drawn at random to compare with."""


class SteerConfig(RunSettings):
    """Settings of `difffract steer`: edits in the running model, over seeds and strengths."""

    prompt: str
    """What the images shall show."""
    edit: tuple[str, ...] = Field(min_length=1)
    """An edit, FEATURE=zero|invert|scale:2|set:1.5|add:.5, as in img/2/f401@12#0,1=zero; A+B=zero or NAME:A+B=zero
    edits several features, img/2=zero a whole MLP, img=zero a whole stream. Give it as often as wanted."""
    groups: Path | None = None
    """`.groups.json` that the viewer saved, or a document that another viewer saved: an --edit may then name a group of
    it, as in "the circle=zero"."""
    sweep: str | None = None
    """Strengths, as in 0,-1,-2, one column each. zero, scale and invert all become scale:STRENGTH (1: no edit, 0: off,
    -1 inverted); set and add take STRENGTH times their amount. Left out: the edits as they are."""
    form: Literal["delta", "replace"] = "delta"
    """`delta` adds what the edit changes to the MLP's true output; `replace` puts the edited reconstruction there."""
    step: str | None = None
    """Denoising steps to edit in, as in 0,1, for edits that name none; all when left out."""
    threshold: float | None = Field(None, ge=0, lt=1)
    """Edit only positions where the feature exceeds this share of its maximum, as in 0.2."""
    expect: str | None = None
    """Caption that edited images of the organism shall show; the prompt when left out."""
    include_padding: bool = False
    """Let edits without positions act on padded text positions too, as the reference does."""
    latents: Path | None = None
    """`.npy` file of packed starting noise, [image tokens, channels], or [seeds, image tokens, channels]."""
    noise: Literal["jax", "torch"] = "jax"
    """Who draws the starting noise: `torch` repeats diffusers' noise of each seed (needs the extra `torch`)."""
    out: Path = Path("steer")
    """Directory for grid.png, metrics.md and metrics.json; those that exist are replaced, with a note."""

    @field_validator("sweep")
    @classmethod
    def _are_numbers(cls, sweep: str | None) -> str | None:
        if sweep is not None and not _NUMBERS.fullmatch(sweep):
            raise ValueError("strengths are numbers, as in 0,-1,-2")
        return sweep

    @field_validator("step")
    @classmethod
    def _are_steps(cls, steps: str | None) -> str | None:
        if steps is not None and not _STEPS.fullmatch(steps):
            raise ValueError("steps are numbers, as in 0,1")
        return steps

    @property
    def amounts(self) -> tuple[float, ...]:
        """The strengths; none if there is no sweep."""
        return tuple(map(float, self.sweep.split(","))) if self.sweep else ()

    @property
    def edited_steps(self) -> tuple[int, ...] | None:
        """Steps of the edits that name none; None for all."""
        return tuple(map(int, self.step.split(","))) if self.step else None


class FeaturesConfig(RunSettings):
    """Settings of `difffract features`: which features stand out."""

    prompt: str | None = None
    """The prompt; left out with --scan."""
    contrast: str | None = None
    """Another prompt to compare with, from the same noise."""
    by: Literal["contrast", "region", "trend", "activation"] | None = None
    """What to rank by: contrast between prompts, region against the rest, rise or fall over steps, activation; when
    left out, contrast or region if one is given, else activation."""
    step: int | None = Field(None, ge=0)
    """Denoising step; each feature's best when left out."""
    top: int = Field(20, ge=1)
    """Features per stream."""
    sites: str = "*/*"
    """Sites to rank, as in img/0-3,single/*."""
    captions: int = Field(3000, ge=200)
    """Captions that --scan samples."""
    out: Path | None = None
    """With --scan, the labels file to write; one that exists is replaced, with a note."""


class EffectsConfig(SamplingSettings):
    """Settings of `difffract effects`: what every source of a run adds to an output."""

    transcoders: str
    """Transcoders of its MLPs: `organism`, a converted directory, one of `.pt` files, or
    hf:OWNER/NAME[@REVISION][/FOLDER]."""
    prompt: str
    """Prompt of the run."""
    target: str
    """Output that is explained: pixels:color=NAME[,minus=NAME][,box=X0,Y0,X1,Y1|mask=FILE.png], or
    velocity:[contrast="other prompt"][,box=...|mask=...]."""
    step: int | None = Field(None, ge=0)
    """Denoising step of the target, from 0; the run's last when left out. Sources are those of all steps up to it."""
    box: str | None = None
    """Region whose image tokens are counted, X0,Y0,X1,Y1 in pixels, X1 and Y1 outside; text tokens all are."""
    mask: Path | None = None
    """The same as a black and white picture of the image's size; white lies inside."""
    top: int = Field(20, ge=1)
    """Features to list."""
    seed: Seed = 0
    """Seed of the starting noise."""
    include_padding: bool = False
    """Replace the MLPs of padded text positions too, as the reference does, instead of keeping them."""
    latents: Path | None = None
    """`.npy` file of packed starting noise, [image tokens, channels], instead of noise drawn from the seed."""
    noise: Literal["jax", "torch"] = "jax"
    """Who draws the starting noise: `torch` repeats diffusers' noise of that seed (needs the extra `torch`)."""
    model_dtype: Literal["f32", "bf16"] | None = None
    """Type of the model's weights in memory; that of its files when left out. Results are in float32 either way."""
    transcoder_dtype: Literal["f32", "bf16"] = "f32"
    """Type of the transcoders' weights in memory."""


class PlanConfig(Settings):
    """Settings of `difffract plan COMMAND --device ...`: what the command shall do, as far as memory depends on it."""

    model: str = "flux-schnell"
    """Model: a published one by its name in docs/models.md, such as `flux-schnell` or `sd3.5-medium`, of which nothing
    need be here, or what the command takes."""
    base: Path | None = None
    """For a model that is a transformer alone: diffusers directory with the other parts, or hf:OWNER/NAME."""
    variant: str | None = None
    """Which weights to take where a diffusers directory has several."""
    transcoders: str | None = None
    """Transcoders, a converted directory or `organism`; left out, those that `sites` and `expansion` describe."""
    sites: tuple[str, ...] = ("img/*", "txt/*")
    """MLPs that have a transcoder, or are used of those in `transcoders`, as in img/3-18, txt/*, single/*."""
    expansion: float = Field(16.0, gt=0)
    """Features of a transcoder over channels of the model."""
    active: int = Field(256, ge=1)
    """Places for features per position: the most that are active at any position; a trace counts them."""
    height: int | None = Field(None, ge=1)
    """Image height in pixels; the model's own default when left out."""
    width: int | None = Field(None, ge=1)
    """Image width in pixels, as the height."""
    text_tokens: int | None = Field(None, ge=1)
    """Length of the text sequence in tokens, padding included; the model's own default when left out."""
    steps: int | None = Field(None, ge=1)
    """Denoising steps of a run; the model's own default when left out. `harvest` and `evaluate` hold rows of all of
    them, and `dashboards` statistics of each."""
    guidance: float | None = Field(None, ge=0, allow_inf_nan=False)
    """Guidance scale, which takes no memory; refused for a model that takes none."""
    step: Annotated[str, BeforeValidator(str)] = Field("0", pattern=r"^\d+(-\d+)?$")
    """Denoising step that is recorded, or steps, as in 0-3."""
    tokens_per_step: int | None = Field(None, ge=1)
    """Most tokens of a prompt that a site reports at a step of `harvest`; all when left out."""
    dtype: Literal["f32", "bf16"] = "bf16"
    """Type of the model's weights in memory."""
    transcoder_dtype: Literal["f32", "bf16"] = "f32"
    """Type of the transcoders' weights in memory."""
    batch: int = Field(1, ge=1)
    """Images, or prompts, computed together."""
    expansion_batch: int = Field(50, ge=1)
    """Targets pulled back together."""
    max_nodes: int = Field(1000, ge=1)
    """Features expanded; no more targets are pulled back together."""
    embeddings: bool = False
    """Whether prompt embeddings come from a file, so that no text encoder is loaded."""
    output: bool = False
    """Whether an output is traced, so that all blocks up to the last are recorded."""


class RerunSettings(Settings):
    """What commands share that capture a graph's run anew: the graph, and what it was traced from."""

    model: str
    """Model that the graph was traced in: `organism`, `organism-sd3` or `organism-flux2` (embedded), a converted
    directory, a diffusers directory, or hf:OWNER/NAME[@REVISION][/FOLDER]."""
    transcoders: str
    """Transcoders that it was traced with: `organism`, a converted directory, one of `.pt` files, or
    hf:OWNER/NAME[@REVISION][/FOLDER]."""
    graph: Path
    """Graph file that `difffract trace` wrote, or one that was pruned with --by-position."""
    latents: Path | None = None
    """`.npy` file of packed starting noise, for a graph whose run started from one."""
    noise: Literal["jax", "torch"] | None = None
    """Who draws the starting noise; as the graph was traced, when left out."""
    activations: Path | None = None
    """`.npz` file of activations, for a graph that was traced from one."""
    lora: tuple[str, ...] = ()
    """LoRA to merge into the model's weights, FILE or FILE:SCALE; those that the graph was traced with, where they
    were, when left out. May be given several times."""
    weights: Literal["auto", "device", "host", "disk"] = "auto"
    """Where blocks stay: on the device; or in host memory or on disk, each fetched for its turn; auto tells which."""
    memory: str | None = None
    """Most memory to use, as in 16GB; what there is when left out."""


class HeadsConfig(RerunSettings):
    """Settings of `difffract heads`: which attention heads carry a circuit, and why they attend."""

    target: str | None = None
    """Feature or output of the graph whose edges are split by head, as tables show it, as in img/2/f401@12; the graph's
    first target when left out."""
    score: str | None = None
    """Attention score to take apart too, BLOCK/hHEAD@QUERY,KEY, as in double/1/h1@img12,txt4 or single/0/h1@img3,img4:
    the token that attends, and the one attended to."""
    centred: bool = False
    """Take the score of --score apart as a node of a graph has it, minus its query's mean: the key is then the key
    minus the mean of all keys, weighted by the pattern."""
    top: int = Field(10, ge=1)
    """Rows of each table."""


class ValidateConfig(RerunSettings):
    """Settings of `difffract validate`: a graph held against its model."""

    edges: int = Field(200, ge=0)
    """Edges to hold against their direct interventions, drawn by --seed; 0 for all."""
    ablations: int = Field(50, ge=1)
    """Features, the most influential ones, to take off in the real model."""
    ablation: Literal["mean", "zero"] = "mean"
    """What features outside a circuit become: their mean over the positions of their stream in the same step of the
    same run, which keeps what a site writes on average; or zero."""
    draws: int = Field(5, ge=1)
    """Random circuits of each size, to compare with."""
    readings: str = "propagated,live,full"
    """Readings in which circuits are kept and removed, from the frozen map to the real model; each runs the model once
    for every circuit, so that fewer take less time."""
    seed: Seed = 0
    """Seed of the edges and of the random circuits that are drawn; the run's own seed is the graph's."""
    grade: Path | None = None
    """Grade the graph too: edits of its features are tried in the real model, alone and in groups, beside random ones
    and with other seeds. The graph is written with its grade to this `.npz`, which may be the graph's own file."""
    out: Path | None = None
    """Directory for report.md, validation.json and figures, which are replaced, with a note, if they exist; none are
    written when left out."""

    @field_validator("readings")
    @classmethod
    def _are_readings(cls, readings: str) -> str:
        named = tuple(dict.fromkeys(part.strip() for part in readings.split(",")))
        for one in named:
            if one not in ("propagated", "live", "full"):
                raise UserError(f"{one!r} is not a reading; --readings takes some of propagated,live,full.")
        return ",".join(named)


class ShownGraph(Settings):
    """What commands share that show a graph."""

    graph: Path
    """Graph file to show: `.npz`, the reference's JSON, or circuit-tracer's and Neuronpedia's."""
    labels: Path | None = None
    """What features stand for: a YAML file of `img/3/f401: red`, or the `labels.json` of `features --scan`; when left
    out, those of the organism's own transcoders."""
    image: Path | None = None
    """The generated image; when left out it is made once where the graph's model is at hand, and kept beside the graph
    as NAME.images.png."""
    model: str | None = None
    """Model to make the image with, if it is not the embedded one: a converted or diffusers directory, or
    hf:OWNER/NAME[@REVISION][/FOLDER]."""
    lora: tuple[str, ...] = ()
    """LoRA to merge into that model, FILE or FILE:SCALE; those that the graph was traced with, where they were, when
    left out. May be given several times."""
    groups: Path | None = None
    """`.groups.json` that the viewer saved of this graph: groups, names, notes and pins; or what circuit-tracer's
    viewer or Neuronpedia saved of it."""


class ViewConfig(ShownGraph):
    """Settings of `difffract view`: a page that shows a graph."""

    out: Path | None = None
    """Page to write, `.html`; beside the graph when left out. One that exists is replaced, with a note."""
    compare: Path | None = None
    """A second graph, to be shown beside the first, and as the difference of the two."""
    by_position: bool = False
    """Show single positions instead of sums over them; fit for small graphs alone."""
    pages: Path | None = None
    """Folder of feature pages that `difffract dashboards` wrote; a node then opens its feature's page."""
    serve: bool = False
    """Serve the page on this machine, 127.0.0.1 alone, instead of writing it; Save then writes groups beside the graph,
    or to --groups, and what was saved there before is opened."""
    port: int | None = Field(None, ge=0, le=65535)
    """Port to serve on, with --serve; a free one when left out."""
    max_nodes: int = Field(10_000, ge=1)
    """Most nodes in a page; a larger graph is refused, with the pruning that would make it fit."""
    max_links: int = Field(100_000, ge=1)
    """Most edges in a page."""


class ReportConfig(ShownGraph):
    """Settings of `difffract report`: image, circuit and features of a graph in one file to send and to print."""

    top: int = Field(12, ge=1)
    """Features to show, the most influential ones."""
    validation: Path | None = None
    """Directory that `difffract validate --out` wrote for this graph, to be shown too."""
    edit: Path | None = None
    """Directory that `difffract steer` wrote, an edit of this circuit's features, to be shown too."""
    out: Path = Path("report.html")
    """File to write, `.html`; one that exists is replaced, with a note."""


def _ranges(text: str) -> list[tuple[int, int]]:
    """Reads `0..3,7` as the first and the last number of every item."""
    items = (item.partition("..") for item in text.split(","))
    return [(int(first), int(last or first)) for first, _, last in items]


def _numbers(ranges: Sequence[tuple[int, int]]) -> tuple[int, ...]:
    return tuple(number for first, last in ranges for number in range(first, last + 1))


class SupernodesConfig(Settings):
    """Settings of `difffract supernodes`: which features of a graph are grouped."""

    graph: Path
    """Graph file to group the features of."""
    threshold: float = Field(0.5, gt=0, le=1)
    """Least similarity of any two features in a group, in (0, 1]: the cosine of their edges and activation maps."""
    map_weight: float = Field(0.25, ge=0, le=1)
    """Share of the activation maps in the similarity, in [0, 1]; the rest are the edges in and out."""
    keep: bool = False
    """Change the groups that the file has, instead of finding new ones."""
    out: Path = Path("supernodes.npz")
    """Graph file to write; one that exists is replaced, with a note."""
