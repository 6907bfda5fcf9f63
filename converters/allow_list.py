"""Reading a component's `config.json` by an allow-list: what is not understood is refused, not skipped.

1. An `AllowList` names every attribute of a configuration: *read* ones carry numbers that our own configuration takes,
   *fixed* ones may only have values that our modules compute, *inert* ones have no effect on a forward pass.
2. `read_attributes` compares a configuration with it and collects all that is wrong: missing, unknown, unsupported.
3. If anything is, one error names all of it; else the read attributes come back, absent ones with their default.

An attribute that a later version of a library adds is unknown here, and stops the conversion until someone has decided
whether it changes the numbers.
"""

from collections.abc import Mapping
from typing import NamedTuple

from converters.quantised import BF16_FILES
from difffract_jax.config import UserError

REQUIRED, REQUIRED_LIST = object(), object()
"""Mark a read attribute without a default: a size, which is a whole number, and a list."""


class AllowList(NamedTuple):
    """The attributes of one kind of configuration.

    Attributes:
        component: what is configured, as the error shall call it.
        read: attribute to default, `REQUIRED` or `REQUIRED_LIST` where there is none.
        fixed: attribute to the values our modules support.
        inert: attributes without effect on a forward pass.
    """

    component: str
    read: Mapping[str, object]
    fixed: Mapping[str, tuple[object, ...]]
    inert: frozenset[str]


def read_attributes(attributes: Mapping[str, object], allow: AllowList) -> dict[str, object]:
    """Returns the read attributes of a configuration, if all of it is understood.

    Args:
        attributes: the contents of a `config.json`.
        allow: what is understood.

    Returns:
        Every attribute of `allow.read`, with its value or its default.

    Raises:
        UserError: naming every missing, unknown and unsupported attribute.
    """
    if attributes.get("quantization_config"):
        raise UserError(
            f"The {allow.component} is quantised ({_quantisation(attributes['quantization_config'])}), as its "
            f"config.json says; only files of full precision and fp8 can be read: {BF16_FILES}."
        )
    required = [name for name, default in allow.read.items() if default in (REQUIRED, REQUIRED_LIST)]
    missing = [name for name in required if name not in attributes]
    unknown = [name for name in attributes if name not in {*allow.read, *allow.fixed, *allow.inert}]
    unsupported = [
        f"{name}={attributes[name]!r} (supported: {', '.join(map(repr, values))})"
        for name, values in allow.fixed.items()
        if name in attributes and attributes[name] not in values
    ]
    unsupported += [
        f"{name}={attributes[name]!r} ({needed} is needed)"
        for name, default in allow.read.items()
        if name in attributes and (needed := _needed_instead(attributes[name], default)) is not None
    ]
    found = {"missing": missing, "not understood": unknown, "unsupported": unsupported}
    problems = [f"{kind}: {', '.join(names)}" for kind, names in found.items() if names]
    if problems:
        raise UserError(
            f"The configuration of the {allow.component} cannot be converted; {'; '.join(problems)}. "
            "Give the release's own files, whose configuration has only what is supported."
        )
    return {name: attributes.get(name, default) for name, default in allow.read.items()}


def _needed_instead(value: object, default: object) -> str | None:
    """Says what is needed in place of a value, if it is not of a type that its attribute may have."""
    if default is REQUIRED:
        return None if type(value) is int and value >= 0 else "a whole number"
    if default is REQUIRED_LIST:
        return None if isinstance(value, list | tuple) else "a list"
    if isinstance(default, tuple):
        sizes = isinstance(value, list | tuple) and all(type(size) is int for size in value)
        return None if sizes else "a list of whole numbers"
    if isinstance(default, float):
        return None if type(value) in (int, float) else "a number"
    return None


def _quantisation(config: object) -> str:
    """Names the method of a `quantization_config`, with what is set of its number of bits."""
    if not isinstance(config, Mapping):
        return str(config)
    bits = [
        name for name in ("load_in_4bit", "load_in_8bit", "bits", "weights_dtype", "quant_type") if config.get(name)
    ]
    named = [name if config[name] is True else f"{name}={config[name]}" for name in bits]
    return ", ".join([str(config.get("quant_method", "unknown method")), *named])
