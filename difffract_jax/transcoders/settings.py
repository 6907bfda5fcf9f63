"""Settings of `difffract harvest`, `train` and `evaluate`; see `config.py` for what all settings share.

Each knob names where it comes from. [DF]: the reference, DifFRACT (arXiv 2606.15796). [Gao]: arXiv 2406.04093.
[Bussmann]: BatchTopK, arXiv 2412.06410. [JumpReLU]: arXiv 2407.14435. [skip]: arXiv 2501.18823. [Towards]: Anthropic's
dictionary-learning updates. `SAME_RUN` lists the fields that a resumed run may change.
"""

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from difffract_jax.config import ORGANISMS, LoraSettings, Seed, Settings

SAME_RUN = (
    *("out", "checkpoint_every", "keep", "log_every", "tensorboard", "wandb", "profile"),
    *("mesh", "parallel", "sparse_code", "sites_at_once", "buffer", "overlap", "text_encoders", "weights"),
    "max_minutes",
)
"""Fields that change how a run is executed or watched, but not what it computes beyond rounding."""


SUPERVISED = "DIFFRACT_SUPERVISED"
"""Environment variable in which a supervising process tells the run that it has started how many went before."""
TRY_AGAIN = 75
"""Exit status, told to a supervising process alone, of a run that another process's death has ended."""
WORLD = "world"
"""What `prompts` says for the endless captions of a model's own world, as the organism's."""


class RowSettings(LoraSettings):
    """Which rows: model, prompts, schedule, sites."""

    model: str | None = None
    """Model whose MLPs are read: `organism`, a converted or diffusers directory, a repository on the hub,
    hf:OWNER/NAME[@REVISION][/FOLDER], or `tiny`, random weights."""
    prompts: str | None = None
    """Prompts: a `.txt`, `.jsonl[:FIELD]` or `.parquet[:COLUMN]` file, a data set on the hub,
    `hf:OWNER/NAME[:SPLIT[:COLUMN]]`, or `world`, the organism's captions, which it gets when left out."""
    sites: tuple[str, ...] = ("*/*",)
    """MLP sublayers, as in img/3, txt/0-5, `single/*`, or `*/*` for all."""
    validation_share: float = Field(0.05, gt=0, lt=1)
    """Share of prompts, by the hash of their text, that training never sees; of a directory of arrays, the share at the
    end of each."""
    include_padding: bool = False
    """Also take rows of the text's padding, as [DF] does."""
    tokens_per_step: int | None = Field(None, ge=1)
    """Most tokens of a prompt that a site reports at a step, drawn at random: fewer, and the buffer holds more prompts.
    All when left out."""
    prompts_at_once: int = Field(8, ge=1)
    """Prompts that run through the model together."""
    steps_per_image: int | None = Field(None, ge=1)
    """Denoising steps; the model's own default when left out."""
    height: int | None = Field(None, ge=1)
    """Image height in pixels; the model's own default when left out."""
    width: int | None = Field(None, ge=1)
    """Image width in pixels; the model's own default when left out."""
    text_tokens: int | None = Field(None, ge=1)
    """Length of the text sequence in tokens, padding included; the model's own default when left out."""
    guidance: float | None = Field(None, ge=0, allow_inf_nan=False)
    """Guidance scale: fed to models that were distilled for it (FLUX.1-dev), or between the two evaluations of a step
    (FLUX.2-klein's base model), which both give rows then; the model's own default when left out."""
    negative_prompt: str | None = None
    """What guidance by two evaluations a step leads away from; the empty prompt when left out."""
    model_dtype: Literal["f32", "bf16"] = "f32"
    """Precision of the model while it is read, and of the rows that are kept."""
    weights: Literal["device", "host", "disk"] = "device"
    """Where the model's blocks stay: on the device; or in host memory or on disk, each fetched for its turn. That needs
    memory for two of them, and makes rows more slowly."""
    seed: Seed = 0
    """Seed of prompts' order, noise, choice of tokens, weights and batches."""

    @model_validator(mode="before")
    @classmethod
    def _organism_has_captions(cls, given: Any) -> Any:
        mine = isinstance(given, dict) and given.get("model") in ORGANISMS and given.get("prompts") is None
        return {**given, "prompts": WORLD} if mine else given


class HarvestConfig(RowSettings):
    """Settings of `difffract harvest`: rows on disk, for training to read."""

    out: Path
    """Directory to write; it must not exist yet."""
    train_prompts: int = Field(1024, ge=1)
    """Prompts whose rows go into the training split; rounded up to whole chunks."""
    validation_prompts: int = Field(64, ge=1)
    """The same for the validation split."""


class TrainConfig(RowSettings):
    """Settings of `difffract train`: transcoders or SAEs of a model's MLPs."""

    out: Path = Path("run")
    """Directory of the run, here or in a bucket: checkpoints, metrics, settings and, at the end, `transcoders`."""
    rows: Path | None = None
    """Rows to train on instead of running a model: what `difffract harvest` wrote, or a directory of your own arrays x,
    y and t as `.npy`, `.npz` or `.safetensors` files; sites, prompts and sizes are then its own."""
    role: Literal["transcoder", "sae"] = "transcoder"
    """`transcoder` maps an MLP's input to its output; `sae` its output to itself."""
    activation: Literal["relu", "topk", "batchtopk", "jumprelu"] = "batchtopk"
    """What makes the code sparse: `relu` with an L1 penalty [DF], `topk` [Gao], `batchtopk` [Bussmann], which is
    exported with a threshold, `jumprelu` [JumpReLU] with a penalty towards a target L0."""
    expansion: float = Field(16.0, gt=0)
    """Features over the model's width. [DF]: 16."""
    conditioning: Literal["film", "film_raw_t", "none"] = "film"
    """How time enters: by scale and shift of the input, from 1000 t (`film`) or from t itself (`film_raw_t`, [DF])."""
    time_embed: int = Field(256, ge=0)
    """Channels of the time embedding. [DF]: 256."""
    skip: bool = False
    """Add an affine path around the code [skip]; attribution stays exact with it."""
    k: int = Field(32, ge=1)
    """Active features per row of topk, and on average of batchtopk."""
    l1: float = Field(3e-4, ge=0)
    """Weight of relu's L1 penalty at img and single-stream sites. [DF]: 3e-4."""
    l1_txt: float = Field(5e-5, ge=0)
    """The same at txt sites. [DF]: 5e-5."""
    target_l0: float = Field(32.0, gt=0)
    """Active features per row that jumprelu is drawn to."""
    l0_weight: float = Field(1.0, ge=0)
    """Weight of jumprelu's penalty (L0 / target_l0 - 1)^2."""
    bandwidth: float = Field(0.05, gt=0)
    """Width over which jumprelu's step is smeared for its gradient [JumpReLU], in units of pre-activations."""
    sparsity_warmup: int = Field(0, ge=0)
    """Steps over which the penalty for active features rises from 0 [Towards]."""
    aux_weight: float = Field(1 / 32, ge=0)
    """Weight of the loss that revives dead features of topk and batchtopk [Gao]: 1/32; 0 leaves it out."""
    lift_weight: float = Field(0.0, ge=0)
    """Weight of the penalty that raises the pre-activations of dead features of topk and batchtopk until they fire; the
    pre-activation loss of [Towards], January 2025, for dead features alone. Their 3e-6 is a good start."""
    aux_k: int = Field(64, ge=1)
    """Dead features per row that this loss may use. [Gao]: about half the width."""
    dead_after: int = Field(1_000_000, ge=1)
    """Rows after which a feature that was never active counts as dead."""
    init: Literal["tied", "reference"] = "tied"
    """First weights: encoder = unit decoder vectors transposed, biases from the rows' means; or those of [DF]."""
    scale_rows: bool = True
    """Divide x and y by their root mean square, one number per site each; undone exactly in what is exported."""
    project_decoder: bool = True
    """Remove the part of the gradient along each decoder vector, which keeps unit norm. [DF]: not."""
    lr: float = Field(2e-4, gt=0)
    """Learning rate. [DF]: 2e-4."""
    b1: float = Field(0.9, ge=0, lt=1)
    """Decay of Adam's first moment."""
    b2: float = Field(0.999, ge=0, lt=1)
    """Decay of Adam's second moment."""
    weight_decay: float = Field(0.0, ge=0)
    """AdamW's weight decay. [DF]: 0."""
    schedule: Literal["constant", "linear", "cosine_cycles"] = "linear"
    """Learning rate over time: `linear` falls to 0 over the last `decay` of the steps [Towards]; `cosine_cycles` is
    [DF]'s, a half cosine that moves on whenever the buffer is refreshed."""
    warmup: int = Field(100, ge=0)
    """Steps over which the learning rate rises from 0. [DF]: 0."""
    decay: float = Field(0.2, gt=0, le=1)
    """Share of the steps over which `linear` falls."""
    clip: float = Field(1.0, ge=0)
    """Largest norm of a site's gradient; 0 for any. [DF]: 0."""
    batch: int = Field(4096, ge=1)
    """Rows of every site per step. [DF]: 4096."""
    steps: int = Field(10_000, ge=1)
    """Steps to train. [DF]: about 62,000."""
    max_minutes: float | None = Field(None, gt=0)
    """Minutes of training after which to stop as Ctrl-C does: the step is finished and saved, to go on or to export."""
    matmul: Literal["f32", "bf16"] = "f32"
    """Precision of the matrix products' factors; weights, optimiser and sums are float32 in any case. A TPU takes six
    times as long for `f32`."""
    sparse_code: Literal["auto", "on", "off"] = "auto"
    """Multiply codes of topk and batchtopk at their active features alone, not by dense products; the numbers are the
    same up to rounding. Needs a single device. `auto`: on a CPU where k is at most 1/64 of the features."""
    sites_at_once: Literal["auto", "one", "all"] = "auto"
    """Sites of a device that take their step together: `all` makes fewer and larger operations of it, `one` needs what
    lies between two steps for a single site. `auto`: one, where a site's pre-activations take more than 64 MiB."""
    buffer_rows: int = Field(65_536, ge=1)
    """Rows of every site in the shuffle buffer. [DF]: 1,000,000."""
    buffer: Literal["device", "host", "disk"] = "device"
    """Where the shuffle buffer lies: on the devices, spread over all of them; in this machine's memory, from where
    batches are sent while the step before runs; or in a file in the run's directory. The rows served are the same."""
    text_encoders: Literal["auto", "device", "host"] = "auto"
    """Where the text encoders lie between refreshes of the buffer: `host` moves them to the devices only while prompts
    are encoded, many at a time. `auto`: host, beside an accelerator, and device on a CPU."""
    overlap: Literal["auto", "on", "off"] = "auto"
    """Whether rows of the next refresh are made while steps run, in places of the buffer that were served already.
    `auto`: beside an accelerator with room for two chunks of rows more. The rows served are the same in any case."""
    refresh: float = Field(0.25, gt=0, le=1)
    """Share of the buffer that is served, and then replaced by new rows, at a time. [DF]: 1."""
    mesh: str = "data=1"
    """Devices, as in data=4,site=2,feature=1: rows, sites and features are spread over these axes."""
    parallel: Literal["jit", "pmap"] = "jit"
    """`jit` over the mesh, or `pmap` over its `data` axis alone."""
    checkpoint_every: int = Field(1000, ge=1)
    """Steps between checkpoints; the last step and an interruption are saved in any case."""
    keep: int = Field(2, ge=1)
    """Newest checkpoints to keep."""
    log_every: int = Field(50, ge=1)
    """Steps between lines of `metrics.jsonl`."""
    tensorboard: bool = False
    """Also write TensorBoard events (needs the extra `tensorboard`)."""
    wandb: str | None = None
    """Also log to this Weights & Biases project (needs the extra `wandb`)."""
    profile: bool = False
    """Write a profiler trace of a few steps into the run's directory."""

    @field_validator("sparse_code", "overlap", mode="before")
    @classmethod
    def _is_a_word(cls, given: Any) -> Any:
        """Takes back what YAML makes of the words `on` and `off`."""
        return ("on" if given else "off") if isinstance(given, bool) else given

    @model_validator(mode="after")
    def _fit_together(self) -> "TrainConfig":
        if (self.time_embed == 0) != (self.conditioning == "none"):
            raise ValueError("time_embed must be 0 exactly where conditioning is none")
        if self.buffer_rows < self.batch:
            raise ValueError(f"buffer_rows must be at least batch, {self.batch}")
        if self.sparse_code == "on" and "topk" not in self.activation:
            raise ValueError(f"sparse_code: on is for topk and batchtopk, but activation is {self.activation}")
        return self


class EvaluateConfig(Settings):
    """Settings of `difffract evaluate`: how faithful transcoders are, on prompts that training never saw."""

    run: Path
    """Directory of a finished `difffract train` run, or of transcoders."""
    prompts: str | None = None
    """Prompts to measure on, where the transcoders do not say what they were trained on."""
    rows: Path | None = None
    """Directory of arrays to measure on, for transcoders that were trained on such; all of its rows count."""
    out: Path | None = None
    """Directory of the report, `report` inside the run when left out; an earlier report there is replaced."""
    prompts_count: int = Field(256, ge=1)
    """Validation prompts whose rows are measured; the more there are, the fewer rare features look dead."""
    velocity_count: int = Field(32, ge=1)
    """Validation prompts along whose runs the velocity recovered is measured."""
    images: int = Field(8, ge=0)
    """Validation prompts whose images are made again with replaced MLPs."""
    scored: int = Field(500, ge=0)
    """On the organism: held-out captions drawn with all MLPs replaced and without, for its scorer to judge."""
    weights: Literal["device", "host", "disk"] | None = None
    """Where the model's blocks stay, as for `train`; as in the run's training when left out."""
    guidance: float | None = Field(None, ge=0, allow_inf_nan=False)
    """Guidance scale fed to the model; as in the run's training when left out."""
    lora: tuple[str, ...] = ()
    """LoRA to merge into the model's weights, FILE or FILE:SCALE; those of the run's training when left out. May be
    given several times."""
    pareto: tuple[Path, ...] = ()
    """Further runs on the same model, to be drawn into one figure: FVU and velocity recovered against L0. With --k, a
    YAML file of training settings instead, of which a transcoder and an SAE are trained for every k."""


def changed_fields(before: dict, after: dict) -> list[str]:
    """Returns the fields of a run's settings that differ and may not, as `name: old -> new`."""
    names = [name for name in after if name not in SAME_RUN and before.get(name) != after[name]]
    return [f"{name}: {before.get(name)} -> {after[name]}" for name in names]
