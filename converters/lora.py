"""LoRAs: which leaves of a pipeline the changes of a file fall on, and by how much.

`match` finds every module of a file (`lora_files`) in the tables that convert the weights themselves, of each layout
that a part is published in: a change is transformed exactly as the tensor that it changes. All that does not fit is
refused.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

import numpy as np

from converters.flux import LAYOUTS
from converters.flux2 import FLUX2_LAYOUTS
from converters.kinds import LORA_TABLES
from converters.lora_bases import model_of, other_base
from converters.lora_files import Module, bare, clip_of, more
from converters.mapping import Assignment, Rule, expand, tensor_shapes
from converters.sd3 import SD3_LAYOUTS, sd3_labels
from converters.text_encoders import CLIP_TRANSFORMERS, T5_TRANSFORMERS, two_clip_tables
from difffract_jax.config import UserError
from difffract_jax.models.absent import Absent
from difffract_jax.models.clip import CLIPTextEncoder
from difffract_jax.models.flux2 import Flux2MMDiT
from difffract_jax.models.mmdit import MMDiT
from difffract_jax.models.sd3 import Sd3MMDiT
from difffract_jax.models.sd3_text import NoText, TwoClips
from difffract_jax.models.t5 import T5Encoder
from difffract_jax.storage.checkpoint import leaf_paths

TABLES: Mapping[type, tuple[tuple[Rule, ...], ...]] = {
    MMDiT: tuple(layout.rules for layout in LAYOUTS),
    Flux2MMDiT: tuple(layout.rules for layout in FLUX2_LAYOUTS),
    Sd3MMDiT: tuple(layout.rules for layout in SD3_LAYOUTS),
    TwoClips: (two_clip_tables({"first": (), "second": ()}).rules,),
    CLIPTextEncoder: (CLIP_TRANSFORMERS,),
    T5Encoder: (T5_TRANSFORMERS,),
    **LORA_TABLES,
}
"""Class of a part -> the tables that modules are looked up in; parts of other classes are not changed."""
_ENDINGS = (".kernel", ".bias", ".scale")
"""Leaves that can be changed."""
_OF_T5 = re.compile(r"encoder[._]block[._]\d+[._]layer|text_encoders\.t5xxl\.")
_OF_CLIP = re.compile(r"encoder[._]layers[._]\d+[._](self_attn|mlp)|text_projection")


class Change(NamedTuple):
    """What changes one slice of the leaves that an assignment makes.

    Attributes:
        assignment: the row of a table that the tensor is converted by.
        number: of the slice.
        shapes: of the source tensors.
        place: which of the source tensors is changed.
        module: by what.
        scale: of the change, beside the module's own.
    """

    assignment: Assignment
    number: int
    shapes: tuple[tuple[int, ...], ...]
    place: int
    module: Module
    scale: float

    @property
    def targets(self) -> tuple[str, ...]:
        """Paths of the leaves that change: matrices by a matrix, vectors by a vector, which one row may both make."""
        of_matrix = len(self.shapes[self.place]) > 1
        return tuple(path for path in self.assignment.targets if path.endswith(".kernel") == of_matrix)

    def slices(self, dtype: Any) -> dict[str, np.ndarray]:
        """Returns what is added to a slice of each leaf, by path.

        Args:
            dtype: of the product.
        """
        zero = np.zeros((), dtype)
        given = [np.broadcast_to(zero, shape) for shape in self.shapes]
        given[self.place] = self.module.change(dtype, self.scale)
        return dict(zip(self.assignment.targets, self.assignment.rule.transform.forward(tuple(given)), strict=True))


class _Slot(NamedTuple):
    """Where a tensor of the model is made."""

    part: str
    assignment: Assignment
    number: int
    shapes: tuple[tuple[int, ...], ...]
    place: int


def match(name: str, modules: Sequence[Module], scale: float, abstract: Mapping[str, Any]) -> dict[str, list[Change]]:
    """Finds what every module changes.

    Args:
        name: of the file, for messages.
        modules: of it.
        scale: factor of all changes.
        abstract: part of the pipeline -> its module's shapes.

    Returns:
        Part -> its changes.

    Raises:
        UserError: if a module is none of this model's, or of another size, in one sentence that names both models.
    """
    slots = {key: slot for part, tree in abstract.items() for key, slot in _slots(part, tree)}
    placed = [(module, _slot_of(module, slots)) for module in modules]
    unknown = [module for module, slot in placed if slot is None]
    if unknown:
        _refuse_unknown(name, modules, unknown, abstract)
    changes: dict[str, list[Change]] = {}
    for module, slot in placed:
        assert slot is not None
        wanted = slot.shapes[slot.place]
        if module.shape != wanted:
            other, model = _models(modules, abstract)
            raise UserError(
                f"{name} is a LoRA of {other}: it changes {_shown(module)} of shape {module.shape}, but {model}'s is "
                f"{wanted}; give a LoRA that was trained on {model}."
            )
        changes.setdefault(slot.part, []).append(
            Change(slot.assignment, slot.number, slot.shapes, slot.place, module, scale)
        )
    return changes


def _slot_of(module: Module, slots: Mapping[tuple[str, str], _Slot]) -> _Slot | None:
    """Returns where the tensor of a module is made; of two CLIPs, in the one that its name stands for."""
    name, clip = bare(module.name), clip_of(module.name)
    names = (name,) if clip is None else (name, f"{clip}.{name}", f"{clip}_{name}")
    return next((slots[one, module.changed] for one in names if (one, module.changed) in slots), None)


def _models(modules: Sequence[Module], abstract: Mapping[str, Any]) -> tuple[str, str]:
    """Says which model a LoRA was made for, and what the one at hand is called."""
    model = model_of(abstract.get("transformer"))
    other = other_base(modules, model)
    return "another model" if other is None else f"another model, {other}", model


def _refuse_unknown(
    name: str, modules: Sequence[Module], unknown: Sequence[Module], abstract: Mapping[str, Any]
) -> NoReturn:
    """Says of a file some of whose modules are not there whose they are."""
    shown = f"{_shown(unknown[0])}{more([module.name for module in unknown])}"
    if isinstance(abstract.get("t5"), NoText) and all(_OF_T5.search(module.name) for module in unknown):
        raise UserError(
            f"{name} changes T5 ({shown}), but the model was saved without it; give the directory with text_encoder_3, "
            "or a LoRA that leaves T5 as it is."
        )
    of_text = all(_OF_T5.search(module.name) or _OF_CLIP.search(module.name) for module in unknown)
    if isinstance(abstract.get("t5"), Absent) and of_text:
        raise UserError(
            f"{name} changes text encoders ({shown}), but the model has none; give a directory that has them, or a "
            "LoRA that leaves them as they are."
        )
    nameless = all(_OF_CLIP.search(module.name) and clip_of(module.name) is None for module in unknown)
    if isinstance(abstract.get("clip"), TwoClips) and nameless:
        raise UserError(
            f"{name} changes a CLIP ({shown}) without saying which of two; name its modules text_encoder. or lora_te1_ "
            "for the first, text_encoder_2. or lora_te2_ for the second."
        )
    other, model = _models(modules, abstract)
    what = "none" if len(unknown) == len(modules) else f"only {len(modules) - len(unknown)}"
    raise UserError(
        f"{name} is a LoRA of {other}: {what} of its {len(modules)} modules can be found in {model}, which has no "
        f"{shown}; give a LoRA that was trained on {model}."
    )


def _shown(module: Module) -> str:
    return module.name if module.changed == "weight" else f"{module.name}.bias"


def _slots(part: str, abstract: Any) -> Iterator[tuple[tuple[str, str], _Slot]]:
    """Yields every tensor of a part, by the names that files may call its module, parts joined by dots or by `_`."""
    leaves, labels = leaf_paths(abstract), sd3_labels(abstract.config) if isinstance(abstract, Sd3MMDiT) else None
    for rules in TABLES.get(type(abstract), ()):
        for assignment in expand(rules, abstract, labels):
            if not assignment.targets[0].endswith(_ENDINGS):
                continue
            shapes = tensor_shapes(assignment, leaves)
            for number, keys in enumerate(assignment.sources):
                for place, key in enumerate(keys):
                    slot = _Slot(part, assignment, number, shapes, place)
                    module, _, tensor = key.rpartition(".")
                    # A tensor of another name, as a norm's `scale`, is named itself.
                    named, changed = (module, tensor) if tensor in ("weight", "bias") else (key, "weight")
                    yield (named, changed), slot
                    yield (named.replace(".", "_"), changed), slot
