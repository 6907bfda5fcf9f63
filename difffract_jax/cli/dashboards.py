"""The command `dashboards`: a corpus scan, and a page for every feature; registered by `main`.

It follows the rules there: settings in, artefacts and a short table out; progress on stderr; imports when a command
runs.
"""

import sys
from pathlib import Path
from typing import Any, Literal

import typer
from pydantic import Field, field_validator

from difffract_jax.circuits.notation.feature import Feature
from difffract_jax.cli import options as opt
from difffract_jax.cli.preflight import check_fits
from difffract_jax.config import SamplingSettings, Seed, UserError, provenance


class DashboardsConfig(SamplingSettings):
    """Settings of `difffract dashboards`: a page for every feature, from many prompts."""

    transcoders: str
    """Transcoders or SAEs of its MLPs: `organism`, `organism-saes`, a converted directory, one of `.pt` files, or
    hf:OWNER/NAME[@REVISION][/FOLDER]."""
    prompts: str
    """Prompts to run: a .txt, .jsonl or .parquet file, or hf:OWNER/NAME[:SPLIT[:COLUMN]]; for the organism also a
    number, of captions of its world."""
    out: Path = Path("dashboards")
    """Folder to write; open its index.html, index.html#img/1/f159 for a feature. An interrupted scan goes on where it
    was."""
    sites: str = "*/*"
    """Sites to scan, as in img/0-3,single/*."""
    features: tuple[str, ...] = ()
    """Features that get a page, as in img/1/f159,img/1/f7; all of the sites when left out. May be given several
    times."""
    top: int = Field(10, ge=1)
    """Strongest examples of a feature."""
    per_third: int = Field(2, ge=1)
    """Examples of each third of the other prompts in which it is active."""
    links: int = Field(8, ge=1)
    """Features up- and downstream by weights, and neighbours, that a page lists."""
    labels: Path | None = None
    """File of labels: JSON, {"img/1/f159": "red"}; a .csv with the columns feature and label; or one of `features
    --scan`. The organism's own are known."""
    graph: Path | None = None
    """Graph file of these transcoders, whose edges pages list too."""
    seed: Seed = 0
    """Seed of the first prompt's noise; prompt number n has seed + n, and N captions are drawn by it."""
    batch: int = Field(32, ge=1)
    """Prompts computed together; 1 for a large model."""
    dtype: Literal["f32", "bf16"] | None = None
    """Precision of the model's weights and activations; that of the files when left out."""
    transcoder_dtype: Literal["f32", "bf16"] = "f32"
    """Type of the transcoders' weights in memory; bf16 rounds them, and takes half the memory."""
    mesh: str | None = None
    """Devices by axis, as in data=4,feature=2; one when left out. `data` shares prompts out, `feature` splits features
    and weights."""
    overwrite: bool = False
    """Replace an existing folder of dashboards once the new one is complete."""

    @field_validator("features")
    @classmethod
    def _are_features(cls, features: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(str(Feature.parse(name)) for given in features for name in given.split(",") if name.strip())

    @property
    def patterns(self) -> tuple[str, ...]:
        """The sites to scan: those that are named, or those of the features."""
        if self.features and "sites" not in self.model_fields_set:
            asked = map(Feature.parse, self.features)
            return tuple(dict.fromkeys(f"{one.stream}/{one.block}" for one in asked))
        return tuple(part.strip() for part in self.sites.split(","))


def register(app: typer.Typer) -> None:
    """Adds the command to the command line."""
    app.command()(dashboards)


@opt.command(
    DashboardsConfig,
    arguments=("model", "transcoders"),
    before={"batch": ("steps", "height", "width", "text_tokens", "guidance", "negative_prompt")},
)
def dashboards(settings: DashboardsConfig, *, dry_run: bool, json: bool) -> None:
    """Scan many prompts and write a page for every feature, as a folder that opens in a browser from the disk.

    A page shows the images and prompts in which the feature is strongest, and weaker ones, with heat where it is
    active; how often it is active, by value and by step; what it does to the image directly; and which features feed
    it or read it. The first pass over the prompts keeps statistics on the device, the second draws the examples.
    --dry-run says what memory and disk that takes.

    Example: `difffract dashboards organism organism --prompts 256 --out dashboards`
    """
    _check(settings)
    record, prompts = provenance("dashboards", settings), _prompts(settings)
    needs = _needs(settings, len(prompts))
    from difffract_jax.cli.output import emit

    if dry_run:
        return emit(record | needs, as_json=json)
    sys.stderr.write(_told(needs))
    check_fits("dashboards", settings)
    built, site_names = _build(settings, prompts, record)
    empty = "" if built.dead < built.pages else " (all of them: no feature fires on these prompts)"
    found = {"pages": str(settings.out / "index.html"), "sites": ", ".join(site_names), "features": built.pages}
    found |= {"never active": f"{built.dead}{empty}", "rare": built.rare, "prompts shown": built.prompts}
    emit(found, as_json=json)


def _check(settings: DashboardsConfig) -> None:
    """Refuses what can be refused before anything is read."""
    from difffract_jax.storage.remote.addresses import is_remote
    from difffract_jax.storage.remote.cache import local_file

    if settings.out.exists() and not settings.out.is_dir():
        raise UserError(f"{settings.out} is a file, but the pages go to a folder; give another --out.")
    if not (is_remote(settings.out) or settings.out.parent.is_dir()):
        raise UserError(f"The folder {settings.out.parent} of the output does not exist; create it first.")
    for file in (settings.labels, settings.graph):
        if file is not None and not local_file(file).is_file():
            raise UserError(f"{file} is not a file that can be read; give another, or leave it out.")
    from difffract_jax.dashboards.features.request import check_output

    check_output(settings.out, overwrite=settings.overwrite)


def _prompts(settings: DashboardsConfig) -> tuple[str, ...]:
    """Returns the prompts that the settings name."""
    if not settings.prompts.isdecimal():
        from difffract_jax.transcoders.prompts import read_prompts

        return tuple(read_prompts(settings.prompts))
    count = int(settings.prompts)
    from difffract_jax.organism.vocabulary import is_of_the_world

    if not is_of_the_world(settings.model):
        raise UserError(
            f"--prompts {count} asks for captions of the model's own world, which the organism and its siblings have; "
            "give a .txt, .jsonl or .parquet file of prompts, or hf:OWNER/NAME."
        )
    if count < 1:
        raise UserError("A scan needs prompts, but --prompts is 0; write how many, as in --prompts 256.")
    from difffract_jax.dashboards.features.request import CORPUS_SEED
    from difffract_jax.organism.world import scenes

    return tuple(scenes(CORPUS_SEED, settings.seed % 2**31, count).captions)


def _options(settings: DashboardsConfig, **more: Any) -> Any:
    """Returns what the pages shall hold."""
    from difffract_jax.dashboards.features.request import DashboardOptions

    features = tuple(map(Feature.parse, settings.features)) or None
    kept = settings.model_dump(include={"top", "per_third", "links", "lora"})
    names = settings.model, settings.transcoders
    return DashboardOptions(**kept, features=features, names=names, sample=max(32, 6 * settings.per_third), **more)


def _needs(settings: DashboardsConfig, prompts: int) -> dict[str, Any]:
    """Returns what memory and disk the scan takes, counted; nothing where the model or transcoders are not here yet."""
    from difffract_jax.cli.workloads import asked_of, type_of, workload
    from difffract_jax.dashboards.features.request import sizes_of
    from difffract_jax.estimate.counts import count
    from difffract_jax.estimate.scanning import disk_bytes, state_bytes
    from difffract_jax.loading import described_pipeline
    from difffract_jax.memory import text_of_bytes
    from difffract_jax.models.pipeline import plan_run

    given = {name: value for name, value in settings.model_dump().items() if value is not None}
    try:
        asked = asked_of("dashboards", given | {"sites": settings.patterns, "dtype": type_of(given)})
        work = workload("dashboards", asked, host=_computes_on_host(), streamed=settings.weights in ("host", "disk"))
        config = described_pipeline(settings.model)
        names = {"steps", "height", "width", "text_tokens", "guidance", "negative_prompt"}
        run = plan_run(config, **settings.model_dump(include=names))
    except UserError:
        return {}  # loading tells it better
    assert work.tcs is not None
    sizes = sizes_of(config, run, work.tcs.sites, work.tcs.config.features, prompts, _options(settings))
    disk = disk_bytes(sizes)
    return {
        "runs": f"{prompts:,} prompts of {run.steps} steps{' of two evaluations' * (run.branches - 1)}, twice",
        "features scanned": f"{sizes.all_features:,} of {len(sizes.sites)} sites",
        "memory for statistics": text_of_bytes(state_bytes(sizes)),
        "memory in all, about": text_of_bytes(count(work).needed),
        "disk while it runs, at most": text_of_bytes(disk.total),
        "disk in the end, about": text_of_bytes(disk.final),
    }


def _computes_on_host() -> bool:
    import jax

    return jax.devices()[0].platform == "cpu"


def _told(needs: dict[str, Any]) -> str:
    """Returns a sentence of what a scan takes."""
    if not needs:
        return ""
    said = "; ".join(f"{name} {value}" for name, value in needs.items() if name.startswith(("memory", "disk")))
    return f"Scan of {needs['runs']}; features scanned: {needs['features scanned']}; {said}.\n"


def _build(settings: DashboardsConfig, prompts: tuple[str, ...], record: dict[str, Any]) -> tuple[Any, tuple[str, ...]]:
    """Loads the parts and makes the dashboards."""
    from difffract_jax.cli.bars import stages
    from difffract_jax.cli.models import dtype_named, mesh_for, spread_model
    from difffract_jax.cli.opening import open_model
    from difffract_jax.cli.runs import run_of
    from difffract_jax.cli.steer import labels_of
    from difffract_jax.cli.used import load_used, matching
    from difffract_jax.dashboards.features.build import build_dashboards
    from difffract_jax.dashboards.features.corpus import Corpus
    from difffract_jax.dashboards.features.texts import merged, read_texts, texts_of
    from difffract_jax.sharding import traced_transcoders
    from difffract_jax.transcoders.sites import parse_sites, some_sites

    mesh = mesh_for(settings.mesh)
    pipe, place = open_model("dashboards", settings, sharding=spread_model(mesh))
    parse_sites(settings.patterns, pipe.config.transformer.layout)  # what is no site is told before more is loaded
    options = {"dtype": dtype_named(settings.transcoder_dtype), "weights": place}
    options |= {} if mesh is None else {"sharding": traced_transcoders(mesh)}
    tcs = load_used(settings.transcoders, matching(settings.patterns), **options)
    some_sites(tcs.sites, settings.patterns, settings.transcoders)
    own = labels_of(settings.transcoders, tcs.source)
    given = {} if settings.labels is None else read_texts(settings.labels, tcs.source)
    texts = merged({} if own is None else texts_of(own), given)
    record |= {"sources": opt.sources(model=pipe, transcoders=tcs)}
    corpus = Corpus(pipe, run_of(pipe, settings), prompts, settings.seed, settings.batch, mesh)
    with stages() as show:
        built = build_dashboards(
            corpus,
            tcs,
            settings.out,
            _options(settings, texts=texts, **_graph(settings, tcs.source)),
            overwrite=settings.overwrite,
            provenance=record,
            progress=show,
        )
    return built, tcs.sites.names


def _graph(settings: DashboardsConfig, source: str) -> dict[str, Any]:
    """Returns the edges of the graph at hand, by feature, and its name."""
    if settings.graph is None:
        return {}
    from difffract_jax.cli.graph_files import read
    from difffract_jax.dashboards.features.texts import edges_by_feature

    graph = read(settings.graph)
    traced = graph.provenance.transcoders
    if traced is not None and traced != source:
        raise UserError(
            f"{settings.graph} was traced with the transcoders {traced[:12]}, but these are {source[:12]}; "
            "give a graph of these transcoders."
        )
    return {"edges": edges_by_feature(graph), "graph": settings.graph.name}
