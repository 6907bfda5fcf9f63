"""`difffract study`: the paper's questions as experiments on the organism, each ending in a table and a figure."""

import sys
from functools import partial
from inspect import getdoc
from pathlib import Path

import typer

from difffract_jax.cli import options as opt
from difffract_jax.cli.feature_pages import MOST_LISTED, Pages, named_features, page_table, pages_at_hand
from difffract_jax.config import UserError, nearest, provenance
from difffract_jax.studies.settings import ON_SIBLINGS, QUESTIONS, ROUNDS, StudyConfig

_LIST = "\n\n".join(f"`{name}` {question}" for name, question in QUESTIONS.items())


def register(app: typer.Typer) -> None:
    """Adds the command to the command line."""
    app.command(help=f"{getdoc(study)}\n\n{_LIST}")(study)


@opt.command(StudyConfig, arguments=("name",), fills="out")
def study(settings: StudyConfig, *, pages: Pages = None, json: bool) -> None:
    """Ask one of the paper's questions of the organism: features chosen by rule, images read by its scorer.

    Cases, ways and measures are registered in docs/studies.md. A study takes minutes; --size 10 tries it out.

    Example: `difffract study colour-prior --size 10`
    """
    _check(settings)
    from difffract_jax.cli.bars import stages
    from difffract_jax.cli.output import emit, replacing
    from difffract_jax.loading import load_labels, load_pipeline, load_transcoders
    from difffract_jax.storage.remote.outputs import working_folder
    from difffract_jax.studies.registry import STUDIES, Given
    from difffract_jax.studies.results import write_result

    lines = None if settings.prompts is None else _lines(settings.prompts)
    pipe, tcs = load_pipeline(settings.model, lora=settings.lora), load_transcoders(settings.transcoders)
    at_hand = pages_at_hand(pages, tcs.source)
    compared = load_transcoders(settings.saes) if settings.name == "precision" else None
    labels = load_labels("organism") if settings.transcoders == "organism" else None
    with stages() as show, working_folder(settings.out) as folder:
        given = Given(
            pipe,
            tcs,
            compared,
            labels,
            settings.size,
            settings.round,
            lines,
            settings.attention,
            folder / "circuits",
        )
        result = STUDIES[settings.name](given, lambda stage: partial(show, stage))
    sources = opt.sources(model=pipe, transcoders=tcs) | ({} if compared is None else opt.sources(saes=compared))
    with replacing(settings.out):
        files = write_result(result, settings.out, provenance("study", settings, **sources))
    if not json:
        sys.stdout.write(f"{result.verdict}\n")
    told = (
        {"verdict": result.verdict, "tables": result.tables} if json else {"result": next(iter(result.tables.values()))}
    )
    named = named_features([result.verdict, result.tables])
    emit(files | told | page_table(named, at_hand, None if json else MOST_LISTED), as_json=json)


def _check(settings: StudyConfig) -> None:
    """Refuses what can be refused before anything is read."""
    if settings.name not in QUESTIONS:
        raise UserError(f"There is no study `{settings.name}`{nearest(settings.name, list(QUESTIONS))}")
    explained = settings.attention == "explained"
    if explained and settings.name != "binding":
        raise UserError(f"Only `binding` explains attention; leave out --attention for `{settings.name}`.")
    if settings.round is not None:
        _check_round(settings.name, settings.round, explained)
    if settings.prompts is not None and settings.name != "flow":
        raise UserError(f"`{settings.name}` draws its own scenes; only `flow` takes --prompts.")
    if settings.model != "organism" and settings.prompts is None:
        _check_sibling(settings)
    from difffract_jax.cli.steer import check_directory

    check_directory(settings.out)


def _check_sibling(settings: StudyConfig) -> None:
    """Refuses a pipeline whose images the organism's scorer cannot read, and studies that siblings do not take."""
    from difffract_jax.directories import refuse_mistyped
    from difffract_jax.organism.vocabulary import is_of_the_world

    refuse_mistyped(settings.model)
    if not is_of_the_world(settings.model):
        raise UserError(
            f"`{settings.name}` reads what images show with the organism's scorer, and {settings.model} has none; only "
            "`flow` runs on other pipelines, with --prompts, and on the organism's siblings `flow` and `precision`."
        )
    if settings.name not in ON_SIBLINGS:
        raise UserError(
            f"`{settings.name}` is a study of the organism alone; on its siblings of other architectures run "
            f"{' and '.join(f'`{name}`' for name in ON_SIBLINGS)}."
        )
    for name, given in (("transcoders", settings.transcoders), ("saes", settings.saes)):
        used = name == "transcoders" or settings.name == "precision"
        if used and given == StudyConfig.model_fields[name].default:
            raise UserError(
                f"{given} belongs to the organism, but the study is of {settings.model}; give what is its own, with "
                f"--{name} DIR."
            )


def _check_round(name: str, number: int, explained: bool) -> None:
    """Refuses rounds of studies without them, and those that there are not."""
    if name != "precision" and not explained:
        raise UserError(
            "Only `precision`, and `binding` with --attention explained, were run in rounds; leave out --round for "
            f"`{name}`."
        )
    last = ROUNDS[name]
    if number > last:
        raise UserError(f"`{name}` was run in {last} rounds; give a --round of 1 to {last}.")


def _lines(path: Path) -> tuple[str, ...]:
    """Returns the prompts of a text file."""
    from difffract_jax.transcoders.prompts import read_prompts

    return tuple(read_prompts(str(path)))
