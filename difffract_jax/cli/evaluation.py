"""`difffract evaluate`: how faithful transcoders are; of one set, of two side by side, or of a sweep.

1. A name is that of a run, which knows its model and prompts, or of a directory of transcoders, which may say what it
   was trained on. `_opened` reads either; the name of a model may stand before them.
2. One set gets a report. Two are measured on the same rows, those that neither saw in training, and laid side by side.
3. Transcoders of foreign rows are measured on rows alone.
"""

from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from difffract_jax.cli import options as opt
from difffract_jax.cli.hosts import Join, as_one_of
from difffract_jax.cli.models import pipeline_of, rows_in
from difffract_jax.cli.training import run_training
from difffract_jax.config import ORGANISMS, UserError, provenance, resolve
from difffract_jax.storage.remote.addresses import is_remote
from difffract_jax.transcoders.settings import EvaluateConfig, TrainConfig

Ks = Annotated[
    str | None,
    typer.Option(
        "--k",
        help="Active features to sweep, as in 2,4,8,16: trains what is missing of `--pareto CONFIG` into `--out`, and "
        "draws it; `--set` then overrides settings of the training.",
    ),
]
Others = Annotated[
    list[Path] | None,
    typer.Argument(
        metavar="OTHER",
        help="A second run or directory of transcoders, to compare the first with. Before both may stand a model.",
    ),
]


class Opened(NamedTuple):
    """A set of transcoders that shall be measured.

    Attributes:
        name: as it was given.
        trained: settings of its training; None if it does not say.
        tcs: the transcoders.
    """

    name: str
    trained: TrainConfig | None
    tcs: Any

    @property
    def foreign(self) -> bool:
        """Whether it belongs to rows that no model of ours gave."""
        from difffract_jax.transcoders.sites import ROWS

        return ROWS.name in self.tcs.stacks


def register(app: typer.Typer) -> None:
    """Adds the command to the command line."""
    app.command()(evaluate)


def _swept(given: dict[str, Any]) -> dict[str, Any]:
    """Trains the sweep that --k asks for, and puts its runs in place of the file of settings."""
    if given["k"] is None:
        return given
    if given["run"] is not None:
        raise UserError(f"--k trains the runs that it measures, so that {given['run']} has no place; leave it out.")
    first, *others = _sweep(given["k"], given["pareto"] or [], given["out"], given["sets"])
    return given | {"run": first, "pareto": others, "out": Path(given["out"]) / "report", "sets": None}


@opt.command(EvaluateConfig, arguments=("run",), layers=("sets",), prepare=_swept)
def evaluate(settings: EvaluateConfig, *, others: Others = None, k: Ks = None, join: Join = None, json: bool) -> None:
    """Measure how faithful trained transcoders are, on prompts that training never saw, and write a report.

    Given two, compare them site by site: FVU, L0, dead features, velocity recovered, and the differences; a report is
    then written with --out alone, and no images are made.

    Example: `difffract evaluate run --images 8`; `difffract evaluate run-a run-b`; `difffract evaluate organism run-a
    transcoders`; `difffract evaluate --pareto smoke.yaml --k 2,4,8 --out sweep`
    """
    if join is not None and k is not None:
        raise UserError("--k trains one run after another in one process; leave --join out.")
    with as_one_of(join, settings):
        _evaluate(settings, others, k, json)


def _evaluate(settings: EvaluateConfig, others: list[Path] | None, k: str | None, json: bool) -> None:
    from difffract_jax.cli.output import emit
    from difffract_jax.transcoders.comparison import comparison_table
    from difffract_jax.transcoders.evaluation_report import check_place, points, write_evaluation_report
    from difffract_jax.transcoders.processes import is_first, together
    from difffract_jax.transcoders.run_place import has

    def written(results: dict[str, Any], out: Path, record: dict[str, Any]) -> str:
        made: list[Path] = []
        together(lambda: made.append(write_evaluation_report(results, out, record)))
        return str(made[0]) if made else ""

    if settings.out is not None:
        check_place(settings.out)
    model, names = _split([settings.run, *(others or ())])
    if len(names) == 2:
        if settings.pareto:
            raise UserError("Compare two sets of transcoders, or draw several with --pareto, not both at once.")
        result, results = _compare(settings, model, names)
        if settings.out is not None:
            record = provenance("evaluate", settings, a=str(names[0]), b=str(names[1]))
            result["report"] = written(results, settings.out, record)
        if not json:
            result["sites: A, B, B - A"] = comparison_table(result.pop("sites"))
        return emit(result, as_json=json) if is_first() else None
    opened = [_opened(path) for path in (names[0], *settings.pareto)]
    _check_kinds(settings, opened)
    results, sources = _measured(settings, model, opened)
    out = settings.out or (names[0] / "report" if has(names[0], "train.json") else None)
    report = {}
    if out is not None:
        report["report"] = written(results, out, provenance("evaluate", settings, **sources))
    more = {"points": points(results)} if k is not None else results[opened[0].name].summary()
    if is_first():
        emit(report | more, as_json=json)


def _split(names: list[Path]) -> tuple[str | None, list[Path]]:
    """Returns the model, if the first name is one that stands before transcoders, and the names of transcoders."""
    if len(names) > 3:
        raise UserError(f"Two sets of transcoders can be compared at a time, but {len(names)} names were given.")
    if len(names) == 3 and not _is_model(names[0]):
        raise UserError(f"Of three names the first must be a model, but {names[0]} is not one; give MODEL A B.")
    if len(names) > 1 and _is_model(names[0]):
        return str(names[0]), names[1:]
    return None, names


def _is_model(path: Path) -> bool:
    from difffract_jax.transcoders.run_place import has

    if str(path) in (*ORGANISMS, "tiny") or has(path, "model_index.json") or _kind(path) == "pipeline":
        return True
    from difffract_jax.directories import is_whole_pipeline

    return not is_remote(path) and is_whole_pipeline(path)


def _kind(path: Path) -> str | None:
    """Returns what a directory of ours holds, as its `config.json` says."""
    from difffract_jax.storage.checkpoint import read_config
    from difffract_jax.storage.remote.cache import local_directory
    from difffract_jax.transcoders.run_place import has

    return read_config(local_directory(path, ["config.json"])).get("kind") if has(path, "config.json") else None


def _opened(path: Path) -> Opened:
    """Reads a run, or a directory of transcoders and what it says of its training."""
    from converters.repositories import is_reference_listing
    from difffract_jax.directories import SHIPPED, transcoder_directory
    from difffract_jax.hub.names import parse_hub_name
    from difffract_jax.loading import load_transcoders
    from difffract_jax.storage.checkpoint import read_config
    from difffract_jax.transcoders.evaluation import read_run
    from difffract_jax.transcoders.run_place import SETTINGS, has

    named = str(path) in SHIPPED or parse_hub_name(str(path)) is not None
    is_run = not named and has(path, SETTINGS)
    if named or ((is_remote(path) or path.is_dir()) and not is_run):
        place = transcoder_directory(path).path
        if _kind(place) == "transcoders":
            record = read_config(place).get("provenance") or {}
            known = resolve(TrainConfig, record["settings"]) if record.get("command") == "train" else None
            return Opened(str(path), known, load_transcoders(path))
        if is_reference_listing([file.name for file in place.iterdir()]):
            return Opened(str(path), None, load_transcoders(path))
    if not is_run:
        raise UserError(
            f"{path} holds neither a training run nor transcoders; give the `out` of difffract train, or a directory "
            "of transcoders."
        )
    trained = read_run(path)
    return Opened(str(path), trained, load_transcoders(path / "transcoders"))


def _measured(
    settings: EvaluateConfig, model: str | None, opened: list[Opened]
) -> tuple[dict[str, Any], dict[str, str]]:
    """Measures sets that belong together, each on what it was held out of; returns the results and their sources."""
    from difffract_jax.cli.bars import progress
    from difffract_jax.organism.scored import accuracies
    from difffract_jax.organism.vocabulary import reads_world
    from difffract_jax.transcoders.evaluation import evaluate as measure

    if opened[0].foreign:
        return {one.name: _on_rows(settings, one) for one in opened}, {}
    first = _on_model(settings, model, opened[:1])
    pipe, caption = pipeline_of(first)
    judge = accuracies if reads_world(pipe.tokenizers) else None
    results = {}
    for one in opened:
        trained = _on_model(settings, model or first.model, [one])
        with progress(f"Measuring {one.name}") as advance:
            results[one.name] = measure(
                settings, trained, pipe, one.tcs, caption=caption, judge=judge, progress=advance
            )
    return results, opt.sources(model=pipe)


def _compare(settings: EvaluateConfig, model: str | None, names: list[Path]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Measures two sets on the same rows; returns the table, and all that was measured."""
    from difffract_jax.cli.bars import progress
    from difffract_jax.transcoders.comparison import side_by_side, unshared
    from difffract_jax.transcoders.evaluation import evaluate as measure

    opened = [_opened(path) for path in names]
    _check_kinds(settings, opened)
    results = []
    if opened[0].foreign:
        held_out = _held_out(opened)
        results = [_on_rows(settings, one._replace(trained=held_out)) for one in opened]
        where = {"rows": str(settings.rows or (held_out and held_out.rows))}  # one is there, else it was refused
    else:
        trained = _on_model(settings, model, opened)
        pipe, caption = pipeline_of(trained)
        few = settings.model_copy(update={"images": 0, "scored": 0})
        where = {"model": str(trained.model), "prompts": str(trained.prompts)}
        for one in opened:
            with progress(f"Measuring {one.name}") as advance:
                results.append(measure(few, trained, pipe, one.tcs, caption=caption, progress=advance))
    a, b = results
    only = dict(zip(("only in A", "only in B"), unshared(a, b), strict=True))
    result: dict[str, Any] = {"A": opened[0].name, "B": opened[1].name, **where, "sites": side_by_side(a, b)}
    apart = {title: sites for title, sites in only.items() if sites}
    names_apart = ("A", "B") if opened[0].name == opened[1].name else (opened[0].name, opened[1].name)
    return result | apart, dict(zip(names_apart, results, strict=True))


def _check_kinds(settings: EvaluateConfig, opened: list[Opened]) -> None:
    """Refuses sets of which some belong to rows and some to a model, and what one kind or the other does not take."""
    apart = sorted(opened, key=lambda one: not one.foreign)
    if apart[0].foreign != apart[-1].foreign:
        raise UserError(
            f"{apart[0].name} belongs to rows and {apart[-1].name} to a model's sites; they cannot be compared."
        )
    if apart[0].foreign and settings.prompts is not None:
        raise UserError(f"{apart[0].name} belongs to rows, which have no prompts; leave --prompts out.")
    if apart[0].foreign and settings.weights is not None:
        raise UserError(f"{apart[0].name} belongs to rows, for which no model is loaded; leave --weights out.")
    if not apart[0].foreign and settings.rows is not None:
        raise UserError(f"{apart[0].name} belongs to a model's sites and is measured on prompts; leave --rows out.")


def _held_out(opened: list[Opened]) -> TrainConfig | None:
    """Returns the training whose held-out rows no set has seen; None if none names its rows.

    They are the ends of the shards: those of the smaller share are of the larger one, too.
    """
    known = [one.trained for one in opened if one.trained is not None and one.trained.rows is not None]
    return min(known, key=lambda one: one.validation_share, default=None)


def _on_rows(settings: EvaluateConfig, one: Opened) -> Any:
    """Measures transcoders of foreign rows on those that are given, or those that their training never saw."""
    from difffract_jax.cli.bars import progress
    from difffract_jax.transcoders.own_rows import open_rows
    from difffract_jax.transcoders.row_evaluation import evaluate_rows

    sae = one.tcs.config.role == "sae"
    if settings.rows is not None:
        rows = open_rows(settings.rows, None, 0.5, 0, sae=sae)
    elif one.trained is not None and one.trained.rows is not None:
        rows = rows_in(one.trained, "validation")
    else:
        raise UserError(f"{one.name} was trained on rows from Python; give some to measure on with --rows DIR.")
    with progress(f"Measuring {one.name}") as advance:
        return evaluate_rows(one.tcs, rows, progress=advance)


def _on_model(settings: EvaluateConfig, model: str | None, opened: list[Opened]) -> TrainConfig:
    """Returns settings that say which model and prompts to measure on: such as no set was trained on."""
    known = [one.trained for one in opened if one.trained is not None and one.trained.model is not None]
    models = {str(one.model) for one in known}
    if model is None and len(models) != 1:
        said = f"were trained on {' and '.join(sorted(models))}" if models else "do not say what they were trained on"
        names = " ".join(one.name for one in opened)
        raise UserError(f"The transcoders {said}; name the model to measure on: difffract evaluate MODEL {names}.")
    # Which prompts are validation follows from their text: those of the smaller share are of the larger one, too.
    base = min(known, key=lambda one: one.validation_share).model_dump(exclude_unset=True) if known else {}
    changes = {"model": model or models.pop(), "sites": ("*/*",), "weights": settings.weights or base.get("weights")}
    changes |= {name: _agreed(name, getattr(settings, name), known) for name in ("guidance", "lora")}
    if changes["guidance"] == 1:  # one evaluation a step, which reads no negative prompt
        base.pop("negative_prompt", None)
    if settings.prompts is not None or (base.get("model") != changes["model"] and base.get("prompts") == "world"):
        changes["prompts"] = settings.prompts
    return resolve(TrainConfig, {name: value for name, value in (base | changes).items() if value is not None})


def _agreed(name: str, given: Any, known: list[TrainConfig]) -> Any:
    """Returns what is given, or else what all trainings had."""
    had = list(dict.fromkeys(getattr(one, name) for one in known))
    if not given and len(had) > 1:
        told = " and ".join("none" if not one else str(one) for one in had)
        raise UserError(f"The transcoders were trained with another {name} each ({told}); name one with --{name}.")
    return given or (had[0] if had else None)


def _sweep(k: str, configs: list[Path], out: Path | None, sets: list[str] | None) -> list[Path]:
    """Trains the runs of a sweep that are missing, and returns the directories of all."""
    if len(configs) != 1 or out is None:
        raise typer.BadParameter("--k needs one `--pareto CONFIG`, a YAML file of training settings, and `--out`.")
    from difffract_jax.transcoders.sweep import is_begun, is_done, parse_ks, sweep_settings

    base = resolve(TrainConfig, file=configs[0], sets=[*(sets or ()), f"out={out}"])
    runs = sweep_settings(base, parse_ks(k))
    for settings in [run for run in runs if not is_done(run)]:
        if run_training(settings, is_begun(settings)).transcoders is None:
            raise UserError(f"The sweep was stopped during {settings.out}; give the command again to go on.")
    return [run.out for run in runs]
