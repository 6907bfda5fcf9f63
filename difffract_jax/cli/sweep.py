"""`difffract plan --sweep`: a training on slices of many sizes, as a table, as JSON, as Markdown and as a figure.

The slices are modelled, which takes seconds; `--compile N` also compiles the smallest that fits, then the next.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer

from difffract_jax.config import UserError
from difffract_jax.transcoders.settings import TrainConfig

TABLES = (".json", ".md")


def sweep_training(
    settings: TrainConfig, slices: str, compiled: int, table: Path | None, figure: Path | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Models a training on slices and writes the files that are asked for.

    Args:
        settings: of the training.
        slices: as `--sweep` is written.
        compiled: how many slices to compile besides, the smallest that fit first.
        table: file to write, `.json` or `.md`.
        figure: file to write, `.png`, `.svg` or `.pdf`.

    Returns:
        The sweep as tables for people, and as JSON values.

    Raises:
        UserError: if something is not as it must be; nothing is written then.
    """
    from difffract_jax.cli.models import work_of
    from difffract_jax.estimate.sweep import parse_sweep, sweep
    from difffract_jax.estimate.sweep_report import (
        check_picture,
        draw_sweep,
        sweep_markdown,
        sweep_values,
        sweep_words,
    )
    from difffract_jax.storage.files import atomic_file

    if table is not None and table.suffix not in TABLES:
        raise UserError(f"--table {table} must end in one of {', '.join(TABLES)}, which says its format.")
    if figure is not None:
        check_picture(figure)
    asked, work = parse_sweep(slices), work_of(settings)
    points, left_out = sweep(work, asked)
    points = _compiled(points, work, compiled)
    values = sweep_values(points, left_out)
    if table is not None:
        text = sweep_markdown(points) if table.suffix == ".md" else json.dumps(values, indent=2) + "\n"
        with atomic_file(table) as partial:
            partial.write_text(text, encoding="utf-8")
    if figure is not None:
        draw_sweep({f"{len(work.sites.names)} sites": points}, figure)
    return sweep_words(points, left_out), values


def _compiled(points: Sequence[Any], work: Any, count: int) -> list[Any]:
    """Returns the points, those with the fewest chips that fit compiled: one of each kind of chip, then the next."""
    from difffract_jax.estimate.sweep import with_compiled
    from difffract_jax.transcoders.plan import open_topology, plan

    kinds: dict[str, int] = {}
    ranks = {}
    for point in sorted((p for p in points if p.fits), key=lambda p: p.chips):
        kind = point.topology.partition(":")[0]
        ranks[point.topology] = (kinds.setdefault(kind, 0), point.chips)
        kinds[kind] += 1
    chosen = sorted(ranks, key=lambda name: ranks[name])[:count]
    done = []
    for point in points:
        if point.topology in chosen:
            update = {"prompts_at_once": point.prompts, "sites_at_once": point.sites_at_once}
            same = work._replace(settings=work.settings.model_copy(update=update))
            place = open_topology(point.topology)
            point = with_compiled(point, plan(same, place, point.mesh, lambda text: typer.echo(text, err=True)))
        done.append(point)
    return done
