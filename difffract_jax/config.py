"""Settings of a run: frozen, documented, validated, and free of anything heavy.

1. A command's settings are one frozen pydantic model below; a field's meaning stands under it and is its `--help`.
2. Values come in layers, later ones winning: the field's default, a YAML file, the options given, `--set a.b=c`.
3. A key that no field has is refused with the nearest name that exists; a value that no field takes is refused with the
   reason. All such problems of one call are told together, in one `UserError`.
4. `provenance` turns the settings back into plain JSON values, with the versions and the sources that a result came
   from; every artefact carries it.

Architecture numbers are facts about checkpoints and live in `models/presets.py`; here are choices only.
"""

import difflib
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, cast

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from difffract_jax.text_files import decoded, unicode_problem

ORGANISMS: tuple[str, ...] = ("organism", "organism-sd3", "organism-flux2")
"""Names of the embedded models: the organism, and those of its siblings of other architectures that ship with it."""
SEEDS = 2**64
"""Seeds are whole numbers from 0 to below this, as PyTorch's are."""


class UserError(ValueError):
    """A mistake the user can mend. Its message is one clear sentence: what was passed, expected, and what to do."""


class SharedError(UserError):
    """A mistake that ends all processes of a run; one of them tells it.

    Attributes:
        speaks: whether this process does.
    """

    def __init__(self, sentence: str, *, speaks: bool) -> None:
        super().__init__(sentence)
        self.speaks = speaks


def sentence_of(error: Exception) -> str:
    """Returns what to tell of an error that ends a command: its own words, or the file and what the system says."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}."
    return str(error) or type(error).__name__


class Settings(BaseModel):
    """What all settings share: frozen, no unknown keys, a docstring under every field."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=True, defer_build=True
    )

    @field_validator("prompt", "contrast", "expect", "target", check_fields=False)
    @classmethod
    def _is_unicode(cls, value: str | tuple[str, ...] | None) -> str | tuple[str, ...] | None:
        """Refuses what no tokenizer takes before a model is loaded; paths may hold bytes that the locale lacks."""
        for text in (value,) if isinstance(value, str) else value or ():
            problem = unicode_problem(text)
            if problem:
                raise ValueError(f"it {problem}")
        return value


Seed = Annotated[int, Field(ge=0, lt=SEEDS)]
"""A seed of random numbers, in [0, 2**64)."""


class LoraSettings(Settings):
    """What commands share that load a model: what is merged into it."""

    lora: tuple[str, ...] = ()
    """LoRA to merge into the model's weights, FILE or FILE:SCALE, as in style.safetensors:0.8: a `.safetensors` file of
    diffusers, PEFT, kohya, ComfyUI or XLabs, or hf:OWNER/NAME/FILE. May be given several times."""


class ModelSettings(LoraSettings):
    """What commands share that run a model."""

    model: str
    """Model to run: `organism` or a sibling of it, `organism-sd3` or `organism-flux2` (embedded), a converted
    directory, a diffusers directory (converted in memory), or a repository on the hub,
    hf:OWNER/NAME[@REVISION][/FOLDER]."""
    weights: Literal["auto", "device", "host", "disk"] = "auto"
    """Where blocks stay: on the device; or in host memory or on disk, each fetched for its turn; auto tells which."""
    memory: str | None = None
    """Most memory to use, as in 16GB; what there is when left out."""
    embeddings: Path | None = None
    """File of prompt embeddings, from `difffract encode`, to take instead of running the text encoders."""


class SamplingSettings(ModelSettings):
    """What commands share that sample an image, or a part of its run."""

    steps: int | None = Field(None, ge=1)
    """Denoising steps; the model's own default when left out."""
    height: int | None = Field(None, ge=1)
    """Image height in pixels, a multiple of twice the autoencoder's factor; the model's own default when left out."""
    width: int | None = Field(None, ge=1)
    """Image width in pixels, as the height."""
    text_tokens: int | None = Field(None, ge=1)
    """Length of the text sequence in tokens, padding included; the model's own default when left out."""
    guidance: float | None = Field(None, ge=0, allow_inf_nan=False)
    """Guidance scale: fed to models that were distilled for it (FLUX.1-dev), or between the two evaluations of a step
    (FLUX.2-klein's base model; 1 makes it one). The model's own default when left out."""
    negative_prompt: str | None = None
    """What guidance by two evaluations a step leads away from; the empty prompt when left out."""


class GenerateConfig(SamplingSettings):
    """Settings of `difffract generate`: prompt to image."""

    prompt: str
    """What the image shall show."""
    out: Path = Path("image.png")
    """Image file to write; its metadata carry these settings. One that exists is replaced, with a note."""
    seed: Seed = 0
    """Seed of the starting noise."""
    latents: Path | None = None
    """`.npy` file of packed starting noise, [image tokens, channels], instead of noise drawn from the seed."""
    noise: Literal["jax", "torch"] = "jax"
    """Who draws the starting noise: `torch` repeats diffusers' noise of that seed (needs the extra `torch`)."""
    dtype: Literal["f32", "bf16"] | None = None
    """Precision of weights and activations; that of the files when left out."""
    base: Path | None = None
    """For a MODEL that is a transformer alone: diffusers directory with the other parts, or hf:OWNER/NAME."""
    variant: str | None = None
    """Which weights to take where a diffusers directory has several, as in fp16 for `model.fp16.safetensors`."""
    mesh: str | None = None
    """Devices that split the weights between them, as in feature=8; one when left out."""


class PruneConfig(Settings):
    """Settings of `difffract prune`: which nodes and edges of a graph are kept."""

    graph: Path
    """Graph file to prune, `.npz` or JSON."""
    mode: Literal["standard", "difffract"] = "standard"
    """Whose rule: `standard` cuts all nodes in one list, errors too, and drops what dangles, as circuit-tracer does;
    `difffract` cuts features and edges per stream and keeps all errors, as the reference does."""
    node_threshold: float = Field(0.8, gt=0, le=1)
    """Share of the influence that the kept nodes hold, in (0, 1]; 1 keeps all. `difffract`: of a stream's features."""
    edge_threshold: float = Field(0.98, gt=0, le=1)
    """Share of the edge scores that the kept edges hold, in (0, 1]; 1 keeps all. `difffract`: of a stream's edges."""
    by_position: bool = False
    """Prune single positions instead of sums over positions."""
    groups: Path | None = None
    """`.groups.json`, or what another viewer saved of this graph: what is pinned stays, groups become supernodes."""
    out: Path = Path("pruned.npz")
    """Graph file to write; one that exists is replaced, with a note."""


class ViewerOptions(Settings):
    """How a graph is shown by circuit-tracer's viewer and by Neuronpedia."""

    slug: str | None = None
    """Name of the graph in the viewer, letters, digits, dot, dash and underscore; the output file's when left out."""
    scan: str | None = None
    """Where the viewer finds features: for circuit-tracer a folder of their files, by default SLUG-features beside the
    graph, which is written too; for Neuronpedia the id of a model that it knows."""
    by_position: bool = False
    """Show single positions instead of sums over them; fit for small graphs alone."""
    feature_url: str | None = None
    """Address under which the files in SLUG-features, written beside the graph, will lie; for Neuronpedia."""
    dashboard: str | None = None
    """Address of dashboards, to which features link as ADDRESS/img_3/401."""
    labels: dict[str, str] = {}
    """What to call features, by their names as in img/3/f401."""
    tokens: list[str] = []
    """Text tokens, to head the columns of text positions; the graph's own, if it knows them, when left out."""
    max_nodes: int = Field(10_000, ge=1)
    """Most nodes to write: viewers stop responding well beyond."""
    max_links: int = Field(100_000, ge=1)
    """Most edges to write."""


class ExportConfig(ViewerOptions):
    """Settings of `difffract export`: a graph for other tools; most are for the two viewers alone."""

    graph: Path
    """Graph file to export, `.npz` or JSON."""
    groups: Path | None = None
    """`.groups.json` that the viewer saved of this graph, or what circuit-tracer's viewer or Neuronpedia saved: its
    groups become supernodes, its names labels, its pins pins."""
    image: Path | None = None
    """Image of the run, to go into the document; the one that `view` kept beside the graph, if any, when left out."""
    pages: Path | None = None
    """Folder of feature pages that `difffract dashboards` wrote, whose examples go into the files of features."""
    format: Literal["difffract-v2", "circuit-tracer", "neuronpedia", "graphml", "csv"] = "difffract-v2"
    """What to write: `difffract-v2`, the reference's JSON, summed over positions; `circuit-tracer` and `neuronpedia`,
    for their viewers; `graphml`, for programs that draw networks; `csv`, a directory with nodes.csv and edges.csv."""
    out: Path
    """File to write, for `csv` a directory. A file that exists is replaced, with a note; a directory, if --overwrite is
    given."""
    overwrite: bool = False
    """For `csv`: replace the directory if it exists."""


class ConvertConfig(LoraSettings):
    """Settings of `difffract convert`: a checkpoint of another library into ours."""

    source: Path
    """Checkpoint to read: a diffusers directory, a safetensors file of a transformer in the original layout or
    diffusers', or a directory of `.pt` transcoders; or one on the hub, hf:OWNER/NAME[@REVISION][/FOLDER or /FILE]."""
    out: Path
    """Directory to write; it must not exist yet, unless --overwrite is given."""
    base: Path | None = None
    """For a transformer alone, as in a single file: diffusers directory with the other parts of the pipeline, which may
    lack the transformer, or hf:OWNER/NAME."""
    sites: str | None = None
    """Sites to convert, as in img/0-3,txt/0; all when left out. From the hub, files of others are not downloaded."""
    variant: str | None = None
    """Which weights to take where a diffusers directory has several, as in fp16 for `model.fp16.safetensors`."""
    dtype: Literal["f32", "bf16"] | None = None
    """Precision of the weights that are written; when left out, bf16 for parts whose weights all are, else f32."""
    overwrite: bool = False
    """Replace the output directory if it exists; the old one stays until the new one is complete."""


S = TypeVar("S", bound=Settings)


def resolve(
    cls: type[S], options: Mapping[str, object] | None = None, *, file: Path | None = None, sets: Sequence[str] = ()
) -> S:
    """Merges the layers of settings and validates the result.

    Args:
        cls: the settings wanted, one of the classes above.
        options: values given on the command line; those that are None count as not given.
        file: YAML file of settings.
        sets: overrides `a.b=c`, c in YAML's notation; they win over everything else.

    Returns:
        The settings, frozen.

    Raises:
        UserError: naming every unknown key, missing key and refused value.
    """
    merged: dict[str, Any] = {} if file is None else read_yaml(file)
    merged |= {key: value for key, value in (options or {}).items() if value is not None}
    for override in sets:
        _override(merged, override)
    try:
        return cls.model_validate(merged)
    except ValidationError as error:
        raise UserError(_sentence(cls, error)) from None


def read_yaml(file: Path) -> dict[str, Any]:
    """Reads a YAML file of settings; an empty file has none."""
    try:
        content: object = yaml.safe_load(decoded(file.read_bytes()))
    except UnicodeDecodeError:
        raise UserError(f"{file} is not text in UTF-8; save it in that encoding.") from None
    except yaml.YAMLError as error:
        said = " ".join(str(error).replace(' in "<unicode string>"', "").split())
        raise UserError(f"{file} is not valid YAML: {said}.") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"{file} must hold `key: value` lines, but holds a {type(content).__name__}.")
    return {str(key): value for key, value in cast(dict[object, Any], content).items()}


def provenance(command: str, settings: Settings, **sources: str) -> dict[str, Any]:
    """Returns what a result must carry to be made again: command, settings with the seed, versions, source hashes."""
    packages = ("difffract_jax", "jax", "flax", "numpy", "transformers")
    return {
        "command": command,
        "settings": settings.model_dump(mode="json"),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in packages},
        "sources": sources,
    }


def nearest(name: str, known: Sequence[str]) -> str:
    """Returns "; did you mean `x`?" for the known name closest to `name`, or the list of all when none is close."""
    matches = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean `{matches[0]}`?" if matches else f"; known are {', '.join(f'`{key}`' for key in known)}."


def told_together(problems: Sequence[str]) -> str:
    """Joins problems that are told in one message, and closes it; one that ends in a question keeps its mark.

    Example:
        >>> told_together(["`cirkle`; did you mean `circle`?", "`steps` is missing."])
        '`cirkle`; did you mean `circle`? `steps` is missing.'
    """
    told = " ".join(one if one.endswith("?") else f"{one.rstrip('.')};" for one in problems)
    return f"{told[:-1]}." if told.endswith(";") else told


def _override(values: dict[str, Any], override: str) -> None:
    """Applies one `a.b=c` to the nested dictionary `values`."""
    path, separator, text = override.partition("=")
    if not separator or not all(path.split(".")):
        raise UserError(f"`--set {override}` is not of the form key=value; write for example --set max_nodes=200.")
    *parents, last = path.split(".")
    for parent in parents:
        child = values.setdefault(parent, {})
        if not isinstance(child, dict):
            raise UserError(f"`--set {override}` reaches into `{parent}`, which is a value and has no keys of its own.")
        values = cast(dict[str, Any], child)
    try:
        values[last] = yaml.safe_load(text)
    except yaml.YAMLError:
        raise UserError(f"`--set {override}` has a value that is not valid YAML; quote it.") from None


def _keys(cls: type[Settings]) -> list[str]:
    """Returns the names of all settings, those within others by their path."""
    keys: list[str] = []
    for name, info in cls.model_fields.items():
        inner = info.annotation
        keys.append(name)
        if isinstance(inner, type) and issubclass(inner, Settings):
            keys += [f"{name}.{key}" for key in _keys(inner)]
    return keys


def _sentence(cls: type[Settings], error: ValidationError) -> str:
    """Turns pydantic's report into one sentence that names every problem."""
    problems: list[str] = []
    for item in error.errors():
        key = ".".join(str(part) for part in item["loc"] if isinstance(part, str))
        if item["type"] == "extra_forbidden":
            problems.append(f"`{key}` is not a setting{nearest(key, _keys(cls))}")
        elif item["type"] == "missing":
            problems.append(f"`{key}` is missing")
        elif not key:
            problems.append(item["msg"].removeprefix("Value error, "))  # of several settings together
        else:
            # pydantic says this before the words of a validator of ours.
            reason = item["msg"].removeprefix("Value error, ")
            problems.append(f"`{key}` was {item['input']!r}, but {_lower(reason)}")
    return f"The settings are not valid ({cls.__name__}): {told_together(problems)}"


def _lower(text: str) -> str:
    return text[:1].lower() + text[1:]
