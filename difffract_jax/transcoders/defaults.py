"""What a training run is told that nobody set: settings that depend on the rows, for a run without a file of settings.

    k, target_l0        32, but at most a quarter of the narrower width: few of a row's directions
    lr                  2e-4 / sqrt(features / 2^14), the law that EleutherAI's sparsify follows
    tokens_per_step     64, so that the buffer holds many prompts
    model_dtype         bf16 for a large model, as FLUX's own files are
    conditioning        none, where rows have no times

All others are those of `settings.TrainConfig`, whatever is trained. A file of settings is complete: beside it nothing
is chosen here, so that it means the same whatever it is used on.
"""

from collections.abc import Mapping
from typing import Any

from difffract_jax.transcoders.arrays import width_text
from difffract_jax.transcoders.objective import Width, widths
from difffract_jax.transcoders.settings import TrainConfig

ACTIVE = 32
RATE, RATE_FEATURES = 2e-4, 2**14
TOKENS = 64
RESUMED = "the run"
"""Where settings come from that a resumed run was begun with: all of them, of which `shown` names the usual ones."""


def choose(
    settings: TrainConfig, width: Width, *, timed: bool, large: bool = False
) -> tuple[TrainConfig, dict[str, str]]:
    """Fills in what nobody set.

    Args:
        settings: as they were given; what was set stays.
        width: channels of a row.
        timed: whether rows have times.
        large: whether the model that is read is one that would hardly fit in float32.

    Returns:
        The settings, and for each that was chosen why.
    """
    narrow, features = min(widths(width)), settings.expansion * widths(width)[0]
    fits = f"default for a width of {width_text(width)}"
    active = max(1, min(ACTIVE, narrow // 4, int(features)))
    changes: dict[str, tuple[Any, str]] = {
        "k": (active, fits),
        "target_l0": (float(active), fits),
        "lr": (float(f"{RATE / max(features / RATE_FEATURES, 1e-9) ** 0.5:.2g}"), fits),
    }
    if settings.rows is None and settings.model is not None:
        changes["tokens_per_step"] = TOKENS, "default"
    if large:
        changes["model_dtype"] = "bf16", "default for a large model"
    if not timed and not settings.model_fields_set & {"conditioning", "time_embed"}:
        changes |= {"conditioning": ("none", "rows have no t"), "time_embed": (0, "rows have no t")}
    left = {name: value for name, value in changes.items() if name not in settings.model_fields_set}
    # `model_copy` does not ask the validators again; nothing chosen here can go against them.
    made = settings.model_copy(update={name: value for name, (value, _) in left.items()})
    return made, {name: why for name, (_, why) in left.items()}


def shown(settings: TrainConfig, width: Width, origins: Mapping[str, str]) -> list[dict[str, Any]]:
    """Returns the settings that one looks at before a run, each with its value and where that came from.

    Args:
        settings: of the run.
        width: channels of a row.
        origins: name -> where its value came from; the others are defaults.
    """
    features = round(settings.expansion * widths(width)[0])
    sparsity = {"relu": ("l1", "l1_txt"), "jumprelu": ("target_l0",)}.get(settings.activation, ("k",))
    source = ("rows",) if settings.rows is not None else ("model", "prompts", "sites", "tokens_per_step")
    names = (
        *source,
        "role",
        "activation",
        "expansion",
        *sparsity,
        "time_embed",
        "lr",
        "batch",
        "steps",
        "buffer_rows",
        "model_dtype",
    )
    unread = {"k", "target_l0", "l1", "l1_txt"} - {*sparsity}
    others = [name for name, origin in origins.items() if origin != RESUMED and name not in {*names, *unread, "out"}]
    rows = []
    for name in (*names, *others):
        value = getattr(settings, name)
        text = " ".join(map(str, value)) if isinstance(value, tuple) else "-" if value is None else str(value)
        more = f" ({features} features)" if name == "expansion" else ""
        rows.append({"setting": name, "value": f"{text}{more}", "from": origins.get(name, "default")})
    return rows
