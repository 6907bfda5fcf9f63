"""`difffract study`: the paper's questions as experiments on the organism, each ending in a table and a figure."""

import sys
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from difffract_jax import options as opt
from difffract_jax.config import UserError, nearest, provenance
from difffract_jax.studies.settings import QUESTIONS, StudyConfig

_LIST = "\n\n".join(f"`{name}` {question}" for name, question in QUESTIONS.items())


def register(app: typer.Typer) -> None:
    """Adds the command to the command line."""
    app.command(help=f"{study.__doc__}\n\n{_LIST}")(study)


def study(
    name: Annotated[str | None, opt.argument(StudyConfig, "name")] = None,
    size: Annotated[int | None, opt.option(StudyConfig, "size")] = None,
    round: Annotated[int | None, opt.option(StudyConfig, "round")] = None,
    transcoders: Annotated[str | None, opt.option(StudyConfig, "transcoders")] = None,
    saes: Annotated[str | None, opt.option(StudyConfig, "saes")] = None,
    out: Annotated[Path | None, opt.option(StudyConfig, "out")] = None,
    config: opt.Config = None,
    sets: opt.Sets = None,
    json: opt.Json = False,
) -> None:
    """Ask one of the paper's questions of the organism: features chosen by rule, images read by its scorer.

    Cases, ways and measures are registered in docs/studies.md. A study takes minutes; --size 10 tries it out.

    Example: `difffract study colour-prior --size 10`
    """
    settings = opt.settings_of(StudyConfig, locals())
    if settings.name not in QUESTIONS:
        raise UserError(f"There is no study `{settings.name}`{nearest(settings.name, list(QUESTIONS))}")
    if settings.round is not None and settings.name != "precision":
        raise UserError(f"Only `precision` was run in rounds; leave out --round for `{settings.name}`.")
    if settings.out.exists() and not settings.out.is_dir():
        raise UserError(f"{settings.out} is a file, but the results go to a directory; give another --out.")
    if not settings.out.parent.is_dir():
        raise UserError(f"The folder {settings.out.parent} of the output directory does not exist; create it first.")
    from difffract_jax.loading import load_pipeline, load_transcoders
    from difffract_jax.report import emit, stages
    from difffract_jax.studies.registry import STUDIES
    from difffract_jax.studies.results import write_result

    pipe, sets_of = load_pipeline("organism"), (settings.transcoders, settings.saes)
    tcs, compared = (load_transcoders(name) for name in sets_of)
    with stages() as show:
        run = STUDIES[settings.name]
        more = {} if settings.round is None else {"round": settings.round}
        result = run(pipe, tcs, compared, size=settings.size, advance=lambda stage: partial(show, stage), **more)
    record = provenance("study", settings, model=pipe.source, transcoders=tcs.source, saes=compared.source)
    files = write_result(result, settings.out, record)
    first = next(iter(result.tables.values()))
    if not json:
        sys.stdout.write(f"{result.verdict}\n")
    emit(files | ({"verdict": result.verdict, "tables": result.tables} if json else {"result": first}), as_json=json)
