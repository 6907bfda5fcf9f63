"""Where a graph comes from: the run it explains, and everything that was done to it since (pure Python).

1. `Provenance` is what a graph says of itself, one typed field per fact. Graphs that several runs went into, or that
   other tools wrote, lack some of the facts: these are None, or empty.
2. `to_json` returns the JSON values that files hold; a fact that is not known has no key.
3. `from_json` reads them back, and refuses what is not of its type. Keys that no field has are kept in `extra`, at
   whatever depth they stand, so that loading and saving a file of a later release loses nothing.
"""

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from typing import Any

from difffract_jax.address import PROMPT, Layout, Tokens, flux_layout
from difffract_jax.config import UserError
from difffract_jax.display import hash_text, record_text, text_of
from difffract_jax.graphs.grade import Grade, stored_grade
from difffract_jax.graphs.held_paths import ExplainedAttention, ExplainedPooled, PooledPath
from difffract_jax.graphs.json_values import beyond, merge_json, to_json_values, typed
from difffract_jax.graphs.loras import MergedLora, texts_of
from difffract_jax.graphs.reduction import GroupingSettings, PruningScores, PruningSettings
from difffract_jax.graphs.unclear_links import UnclearLinks


@dataclass(frozen=True, kw_only=True, repr=False)
class TraceInfo:
    """Where a trace comes from.

    Attributes:
        prompt: of the run.
        cut: the end of the prompt that did not fit; "" if all did.
        seed: of the starting noise; not what it started from if latents were given.
        step: the step, from 0.
        sigmas: noise level entering every step, and the final 0.
        grid: rows and columns of image tokens.
        text_tokens: length of the text sequence.
        tokens: the text sequence's tokens, padding included.
        guidance: guidance scale; None for models that take none, or where it is not known.
        recorded: the model's block of every recorded layer, ascending without a gap.
        layout: the order of the model's stacks, blocks and sites.
        include_padding: whether padded text positions are replaced like any other.
        latents_given: whether the run started from given latents.
        model: content hash of the pipeline.
        model_origin: the repository on the hub that the pipeline came from, commit included; None if it did not.
        base_model: content hash of the pipeline before LoRAs were merged into it; None if none were.
        loras: that were merged.
        negative_prompt: of the second branch, with guidance by two branches; None where a step is one evaluation.
        negative_tokens: the negative prompt's tokens, padding included; none likewise.
        branch: of the evaluation, 0 prompt or 1 negative; of several evaluations, 0.
    """

    prompt: str
    cut: str
    seed: int
    step: int
    sigmas: tuple[float, ...]
    grid: tuple[int, int]
    text_tokens: int
    tokens: tuple[str, ...]
    guidance: float | None
    recorded: tuple[int, ...]
    layout: Layout
    include_padding: bool
    latents_given: bool
    model: str
    model_origin: str | None = None
    base_model: str | None = None
    loras: tuple[MergedLora, ...] = ()
    negative_prompt: str | None = None
    negative_tokens: tuple[str, ...] = ()
    branch: int = 0

    __repr__ = record_text

    @property
    def tokens_of(self) -> Tokens:
        """How many tokens each stream has."""
        return Tokens(self.grid[0] * self.grid[1], self.text_tokens)

    @property
    def text(self) -> str:
        """The text that this evaluation's branch reads: the prompt or the negative prompt."""
        return self.prompt if self.branch == PROMPT or self.negative_prompt is None else self.negative_prompt

    @property
    def branches(self) -> int:
        """Evaluations of a step: 2 with guidance by two branches, else 1."""
        return 1 if self.negative_prompt is None else 2

    @property
    def velocity_weight(self) -> float:
        """Factor of this evaluation's velocity in that of its step: s or 1 - s of its branch; 1 where it is alone."""
        if self.negative_prompt is None:
            return 1.0
        assert self.guidance is not None
        return self.guidance if self.branch == PROMPT else 1 - self.guidance

    @property
    def taken(self) -> float:
        """Factor of this evaluation's velocity in the change of the latents: the step of sigma times its weight."""
        return (self.sigmas[self.step + 1] - self.sigmas[self.step]) * self.velocity_weight


@dataclass(frozen=True, kw_only=True, repr=False)
class KnownRun:
    """As much of a run as is known, or what several runs have in common; the fields are those of `TraceInfo`.

    Attributes:
        prompt: this and the other fields are None where they are not known, or differ from run to run.
        cut: the end of the prompt that did not fit.
        seed: of the starting noise.
        step: from 0.
        sigmas: noise levels.
        grid: rows and columns of image tokens.
        text_tokens: length of the text sequence.
        tokens: of the text sequence.
        guidance: guidance scale.
        recorded: the model's block of every recorded layer.
        layout: the order of the model's stacks, blocks and sites.
        include_padding: whether padded text positions are replaced.
        latents_given: whether the run started from given latents.
        model: content hash of the pipeline.
        base_model: content hash of the pipeline before LoRAs were merged into it.
        loras: that were merged; none where they are not known.
        negative_prompt: of the second branch.
        negative_tokens: of the negative prompt; none where they are not known.
    """

    prompt: str | None = None
    cut: str | None = None
    seed: int | None = None
    step: int | None = None
    sigmas: tuple[float, ...] | None = None
    grid: tuple[int, int] | None = None
    text_tokens: int | None = None
    tokens: tuple[str, ...] | None = None
    guidance: float | None = None
    recorded: tuple[int, ...] | None = None
    layout: Layout | None = None
    include_padding: bool | None = None
    latents_given: bool | None = None
    model: str | None = None
    base_model: str | None = None
    loras: tuple[MergedLora, ...] = ()
    negative_prompt: str | None = None
    negative_tokens: tuple[str, ...] = ()

    __repr__ = record_text


@dataclass(frozen=True, kw_only=True)
class AttributionSettings:
    """How a graph was traced.

    Attributes:
        target: what it explains, as written on the command line; several in their order.
        max_nodes: features and outputs that were to be expanded.
        expansion_batch: features expanded between two computations of influence.
        min_attribution: smallest absolute edge kept.
        max_scores: attention scores that were to be nodes; None where attention was frozen.
    """

    target: str | tuple[str, ...]
    max_nodes: int
    expansion_batch: int
    min_attribution: float
    max_scores: int | None = None

    @property
    def targets(self) -> tuple[str, ...]:
        """What the graph explains, one or several."""
        return (self.target,) if isinstance(self.target, str) else self.target


@dataclass(frozen=True, kw_only=True)
class Rounding:
    """What products in low precision cost, measured on the graph's first target.

    Attributes:
        products: type of the factors, as in "bf16".
        edge_error: largest difference of an edge from float32's, over the largest edge.
        conservation_error: of the target, as `graph.conservation_error` defines it.
    """

    products: str
    edge_error: float
    conservation_error: float


@dataclass(frozen=True, kw_only=True)
class Origin:
    """One of the graphs that were combined; what it did not say is None.

    Attributes:
        prompt: of its run.
        seed: of its run.
        step: of its run.
        pruning: how it was pruned.
        file: name of its file.
        loras: that were merged into its model.
    """

    prompt: str | None = None
    seed: int | None = None
    step: int | None = None
    pruning: PruningSettings | None = None
    file: str | None = None
    loras: tuple[MergedLora, ...] = ()


@dataclass(frozen=True, kw_only=True, repr=False)
class Combined:
    """What a graph of several runs was made of.

    Attributes:
        operation: "average" or "difference".
        graphs: those that went in.
        occurs_in: share of them that each node, by name, occurs in.
    """

    operation: str
    graphs: tuple[Origin, ...]
    occurs_in: Mapping[str, float]

    __repr__ = record_text


@dataclass(frozen=True, kw_only=True, repr=False)
class Provenance:
    """Where a graph comes from; None or empty where it does not say.

    Attributes:
        run: the run that was traced, of several steps the last; under `trace` in files.
        shared: instead of `run`, what is known of a run that is not told completely, or common to the runs of combined
            graphs; likewise under `trace`.
        attribution: how it was traced.
        transcoders: content hash of the transcoders.
        steps: denoising steps that it spans.
        pooled_path: how much of each target goes through the pooled embedding.
        attention: what attention's scores add to each target, where they are nodes.
        pooled: what modulations add to each target, where they are nodes.
        words: the prompt's tokens as CLIP reads them, by place, where they are nodes; "" where they are those of the
            empty prompt.
        negative_words: those of the negative prompt, with guidance by two branches.
        precision: what low precision cost; None for float32.
        target_weights: weights of the targets, positive, one each.
        pruning: how it was pruned; None if it was not.
        scores: before and after pruning.
        grouping: how supernodes were found; under `supernodes` in files.
        grade: what its predictions of edits are worth, from `difffract validate --grade`; None if it was not graded.
        combined: the graphs that were combined into it; None for the graph of one run.
        file: name of the file that it was read from, for combining.
        reference_config: the settings in a document of the reference, as they stand there.
        viewer: the metadata in a document of circuit-tracer's viewer, as they stand there.
        labels: what that document calls features, by their names; None where it says no more than these.
        unclear_links: links of that document that could not be taken as they stand; None if all could.
        command: command that made it.
        settings: the command's resolved settings, JSON values.
        versions: of Python and packages, by name.
        sources: content hashes of model and transcoders, by role, and where on the hub they came from, by ROLE_origin.
        extra: JSON values that a file holds beyond these fields, by key; written back when it is saved.
    """

    run: TraceInfo | None = None
    shared: KnownRun | None = None
    attribution: AttributionSettings | None = None
    transcoders: str | None = None
    steps: tuple[int, ...] = ()
    pooled_path: tuple[PooledPath, ...] = ()
    attention: tuple[ExplainedAttention, ...] = ()
    pooled: tuple[ExplainedPooled, ...] = ()
    words: tuple[str, ...] = ()
    negative_words: tuple[str, ...] = ()
    precision: Rounding | None = None
    target_weights: tuple[float, ...] = (1.0,)
    pruning: PruningSettings | None = None
    scores: PruningScores | None = None
    grouping: GroupingSettings | None = None
    grade: Grade | None = None
    combined: Combined | None = None
    file: str | None = None
    reference_config: Mapping[str, Any] | None = None
    viewer: Mapping[str, Any] | None = None
    labels: Mapping[str, str] | None = None
    unclear_links: UnclearLinks | None = None
    command: str | None = None
    settings: Mapping[str, Any] | None = None
    versions: Mapping[str, str] | None = None
    sources: Mapping[str, str] | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.run is not None and self.shared is not None:
            raise ValueError("A graph has one run, or what several runs share; give `run` or `shared`, not both.")

    def __repr__(self) -> str:
        run = self.known
        facts = {
            "prompt": run.prompt and f'"{run.prompt}", seed {run.seed}, step {run.step}',
            "model": run.model and hash_text(run.model),
            "LoRA": texts_of(run.loras),
            "transcoders": self.transcoders and hash_text(self.transcoders),
            "steps": ", ".join(map(str, self.steps)),
            "attribution": self.attribution,
            "precision": self.precision,
            "pruning": self.pruning,
            "grouping": self.grouping,
            "grade": self.grade and str(self.grade),
            "combined": self.combined and f"{self.combined.operation} of {len(self.combined.graphs)} graphs",
            "file": self.file,
            "made by": self.command,
            "extra": ", ".join(self.extra),
        }
        return text_of("Provenance", facts)

    @property
    def known(self) -> KnownRun:
        """Whatever is known of the run or runs."""
        if self.run is not None:
            return KnownRun(**{one.name: getattr(self.run, one.name) for one in fields(KnownRun)})
        return self.shared or KnownRun()

    @property
    def traced_run(self) -> TraceInfo:
        """The run; raises `UserError` if the graph does not say, or explains several."""
        if self.run is None:
            raise UserError(
                "The graph does not tell the run that it explains; give an .npz that `difffract trace` wrote."
            )
        return self.run

    @property
    def layout(self) -> Layout:
        """The order of the model's blocks; raises `UserError` if the graph does not say."""
        if (layout := self.known.layout) is None:
            raise UserError(
                "The graph does not say which blocks its model has; give one that `difffract trace` wrote, or that was "
                "made of such graphs."
            )
        return layout

    def to_json(self) -> dict[str, Any]:
        """Returns the JSON values that a file holds."""
        facts = {_KEYS.get(name, name): value for name, value in to_json_values(self).items() if name != "extra"}
        depths = self.known.layout and self.known.layout.flux_depths
        if depths is not None:
            facts["trace"] = {k: v for k, v in facts["trace"].items() if k != "layout"} | {"depths": list(depths)}
        return merge_json(facts, dict(self.extra))

    @staticmethod
    def from_json(record: Mapping[str, Any], source: str = "The graph") -> "Provenance":
        """Reads JSON values.

        Args:
            record: from `to_json`, of this release or another.
            source: what the values were read from, to be named if they are wrong.

        Raises:
            UserError: naming the first value that is not of its field's type; those of a document of the reference
                are kept in `extra` instead.
        """
        record = {key: stored_grade(value) if key == "grade" else value for key, value in record.items()}
        trace = _with_layout(record.get("trace"))
        whole = isinstance(trace, Mapping) and {f.name for f in fields(TraceInfo) if f.default is MISSING} <= {*trace}
        names = FILE_KEYS | {"trace": "run" if whole and "combined" not in record else "shared"}
        kinds, facts = Provenance.__annotations__, {}
        for key, name in names.items():
            value = trace if key == "trace" else record.get(key)
            if value is None:
                continue
            try:
                facts[name] = typed(kinds[name], value, key)
            except ValueError as error:
                if "reference_config" in record:
                    continue  # the reference has words of its own, such as `pruning`, that mean something else
                raise UserError(
                    f"{source} is damaged: in its metadata, {error}; give the file as it was written, or trace it "
                    "again."
                ) from None
        provenance = Provenance(**facts)
        return replace(provenance, extra=beyond(dict(record), provenance.to_json()))


def _with_layout(trace: Any) -> Any:
    """Returns a run's values with its model's layout; of FLUX's, files hold the two depths alone."""
    match trace:
        case {"depths": [int(first), int(second)], **rest}:
            return {**rest, "layout": to_json_values(flux_layout(first, second))}
    return trace


_KEYS = {"run": "trace", "shared": "trace", "grouping": "supernodes"}
"""Keys in files of the fields that are called otherwise here."""
FILE_KEYS = {_KEYS.get(one.name, one.name): one.name for one in fields(Provenance) if one.name != "extra"}
"""Every key in files that has a field, and the field."""
