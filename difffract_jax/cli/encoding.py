"""The command `encode`: prompt embeddings in a file, so that later runs need no text encoders."""

from pathlib import Path
from typing import Literal

import typer
from pydantic import Field

from difffract_jax.cli import options as opt
from difffract_jax.cli.preflight import check_fits
from difffract_jax.config import ModelSettings, provenance


class EncodeConfig(ModelSettings):
    """Settings of `difffract encode`: prompts to embeddings."""

    prompt: tuple[str, ...] = Field(min_length=1)
    """Prompt to encode; give it as often as wanted. The empty prompt is always added, which `trace` needs."""
    text_tokens: int | None = Field(None, ge=1)
    """Length of the text sequence in tokens, padding included; the model's own default when left out."""
    dtype: Literal["f32", "bf16"] | None = None
    """Precision of the text encoders; that of the files when left out."""
    out: Path = Path("embeddings.npz")
    """File to write; one that exists is replaced, with a note."""


def register(app: typer.Typer) -> None:
    """Adds the command to the command line."""
    app.command()(encode)


@opt.command(EncodeConfig, arguments=("model",), without=("embeddings",))
def encode(settings: EncodeConfig, *, dry_run: bool, json: bool) -> None:
    """Write the embeddings of prompts to a file, for --embeddings of `generate`, `trace`, `steer` and `features`.

    The text encoder is 9.5 of FLUX.1's 34 GB (T5), 6.2 of FLUX.2-klein's 14 (Qwen3): encode once, and later runs
    neither load nor run it.

    Example: `difffract encode organism --prompt "a red circle" --prompt "a blue circle" --out embeddings.npz`
    """
    opt.check_out(settings.out, ".npz")
    from difffract_jax.cli.bars import progress
    from difffract_jax.cli.opening import open_model
    from difffract_jax.cli.output import emit, replacing
    from difffract_jax.models.embeddings import embed_prompts, write_embeddings

    record = provenance("encode", settings)
    if dry_run:
        return emit(record, as_json=json)
    check_fits("encode", settings)
    pipe = open_model("encode", settings).pipe
    tokens = pipe.plan(text_tokens=settings.text_tokens).text_tokens
    with progress("Encoding") as advance:
        made = embed_prompts(pipe, settings.prompt, tokens, advance)
    record |= {"sources": opt.sources(model=pipe)}
    with replacing(settings.out):
        write_embeddings(made, settings.out, record)
    emit({"embeddings": str(settings.out), "prompts": len(made.prompts), "text tokens": tokens}, as_json=json)
