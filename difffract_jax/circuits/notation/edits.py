"""How edits are written, and where they act (docs/method.md, section 7): one feature, several, a site, a stream.

    img/2/f401=zero                  a feature's code becomes 0, at every position and step
    img/2/f401@12#0,1=scale:-2       -2 times itself at image position 12 in steps 0 and 1
    red:img/1/f3+single/0/f9=add:.5  a supernode: several features under one name, each edited alike
    img/2@0-15=invert                every feature of one MLP sublayer at 16 positions
    txt=zero                         every feature of every text-stream block that has a transcoder
    img/2/f401~negative=zero         with guidance by two branches, in the negative one alone

Modes, all affine in the code, z' = scale * z + offset: `zero` (0, 0), `scale:a` (a, 0), `invert` (-1, 0), `set:a`
(0, a), `add:a` (1, a). Edits of one feature follow one another in the order given; two that set it to different values
at the same place contradict each other and are refused.

Where an edit names no positions it acts on all image tokens and on the prompt's own text tokens; padding is edited only
where a position is named, or where the caller counts padding in. A `region` confines it to some image tokens.
"""

import dataclasses
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from difffract_jax.address import LABELS
from difffract_jax.circuits.notation.feature import Feature
from difffract_jax.config import UserError

MODES = ("zero", "scale", "invert", "set", "add")
WITH_AMOUNT = ("scale", "set", "add")
FORM = "FEATURE=zero|invert|scale:2|set:1.5|add:.5"
_SITE = re.compile(rf"(?P<stream>{'|'.join(LABELS)})(?:/(?P<block>\d+))?(?P<rest>[@#~].*)?")
_NAMED = re.compile(r"(?P<name>[A-Za-z][\w -]*):(?P<features>.+)")


class WholeSite(NamedTuple):
    """An MLP sublayer as a whole, every feature of its transcoder; or a whole stream.

    Attributes:
        stream: label of the site: "img", "txt" or, for single-stream blocks, "single".
        block: number of the site; None for every one with a transcoder.
        positions: positions within the stream; None for all.
        steps: denoising steps; None for all.
        side: of sites of several streams, whose positions are meant, "img" or "txt"; None for both.
        branch: of guidance by two branches; None for both.
    """

    stream: str
    block: int | None
    positions: tuple[int, ...] | None = None
    steps: tuple[int, ...] | None = None
    side: str | None = None
    branch: str | None = None

    def __str__(self) -> str:
        where = Feature("img", 0, 0, self.positions, self.steps, None, self.branch)
        block = "" if self.block is None else f"/{self.block}"
        return f"{self.stream}{block}{str(where).removeprefix('img/0/f0').replace('@', f'@{self.side or str()}')}"


class Supernode(NamedTuple):
    """Several features under one name.

    Attributes:
        name: what they stand for; "" for none.
        features: the features.
    """

    name: str
    features: tuple[Feature, ...]

    def __str__(self) -> str:
        return (f"{self.name}:" if self.name else "") + "+".join(map(str, self.features))


class Part(NamedTuple):
    """One feature, or all of a site, of an edit; `feature` is -1 for all, the rest as in `Feature`."""

    stream: str
    block: int | None
    feature: int
    positions: tuple[int, ...] | None
    steps: tuple[int, ...] | None
    side: str | None
    branch: str | None


@dataclass(frozen=True)
class Edit:
    """One edit.

    Attributes:
        feature: what to edit: a `Feature`, a `Supernode`, a `WholeSite`, or the text of one, as in the module.
            Its positions and steps say where and when; everywhere and always if it names none.
        mode: `zero`; `scale` and `set`, to `amount` times or to `amount`; `invert`, the sign; `add`, `amount`.
        amount: see `mode`; in units of the code.
        steps: denoising steps, from 0, instead of the feature's own; all if left out.
        threshold: edit only positions whose value exceeds this share of the feature's maximum over the positions that
            the edit names; at least 0, below 1.
        region: image tokens that the edit is confined to in the image stream and in single-stream blocks, where it
            then leaves text alone; from `region.tokens_in`. It does not bear on text-stream features.

    Example:
        >>> Edit("img/2/f401", "scale", 3.0, threshold=0.2).mode
        'scale'
    """

    feature: Feature | WholeSite | Supernode | str
    mode: str
    amount: float | int = 1.0
    steps: Iterable[int] | None = None
    threshold: float | None = None
    region: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise UserError(f"An edit's mode must be one of {', '.join(MODES)}, but got {self.mode!r}.")
        if not math.isfinite(self.amount):
            raise UserError(f"An edit's amount must be a finite number, but got {self.amount}.")
        if isinstance(self.feature, str):
            object.__setattr__(self, "feature", parse_what(self.feature))
        if self.steps is not None:
            object.__setattr__(self, "steps", frozenset(self.steps))
        if self.threshold is not None and not 0 <= self.threshold < 1:
            raise UserError(
                f"A threshold is a share of a feature's maximum, at least 0 and below 1, but got {self.threshold}; "
                "from 1 on nothing would be edited."
            )
        if self.threshold is not None and isinstance(self.feature, WholeSite):
            raise UserError(
                "A threshold is a share of one feature's maximum; leave it out where a whole site is edited."
            )

    @staticmethod
    def parse(text: str) -> "Edit":
        """Reads an edit.

        Args:
            text: in the form of the module docstring.

        Raises:
            UserError: if it is not of that form.

        Example:
            >>> str(Edit.parse("img/2/f4@0-2#1=set:1.5"))
            'img/2/f4@0-2#1=set:1.5'
        """
        what, equals, how = text.strip().rpartition("=")
        mode, colon, amount = how.partition(":")
        if not equals:
            raise UserError(f"{text!r} is not an edit; write {FORM}.")
        if mode not in MODES or bool(colon) != (mode in WITH_AMOUNT):
            raise UserError(
                f"{text!r} does {how!r} to a feature, but edits are {FORM.partition('=')[2]}; write {FORM}."
            )
        try:
            return Edit(parse_what(what), mode, float(amount) if colon else 1.0)
        except ValueError as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"The amount in {text!r} must be a number, but is {amount!r}; write {FORM}.") from None

    def __str__(self) -> str:
        return f"{self.feature}={self.mode}" + (f":{self.amount:g}" if self.mode in WITH_AMOUNT else "")

    @property
    def affine(self) -> tuple[float, float]:
        """Scale and offset of the code."""
        return {
            "zero": (0.0, 0.0),
            "scale": (float(self.amount), 0.0),
            "invert": (-1.0, 0.0),
            "set": (0.0, float(self.amount)),
            "add": (1.0, float(self.amount)),
        }[self.mode]

    @property
    def parts(self) -> tuple[Part, ...]:
        """The features or sites that it edits, each with its own places."""
        assert not isinstance(self.feature, str)  # parsed when the edit was made
        steps = None if self.steps is None else tuple(sorted(self.steps))
        if isinstance(self.feature, WholeSite):
            site = self.feature
            return (site_part(site)._replace(steps=site.steps if steps is None else steps),)
        features = self.feature.features if isinstance(self.feature, Supernode) else (self.feature,)
        return tuple(
            Part(f.stream, f.block, f.feature, f.positions, f.steps if steps is None else steps, f.side, f.branch)
            for f in features
        )

    def swept(self, amount: float) -> "Edit":
        """Returns this edit at another strength, for a sweep.

        Args:
            amount: a. `zero`, `scale` and `invert` all become `scale:a`: 1 is not an edit, 0 switches off, -1 inverts.
                `set` and `add` take `a` times their own amount.
        """
        if self.mode in ("set", "add"):
            return dataclasses.replace(self, amount=amount * self.amount)
        return dataclasses.replace(self, mode="scale", amount=amount)

    def within(self, region: tuple[int, ...], steps: Iterable[int] | None = None) -> "Edit":
        """Returns this edit confined to image tokens, and to steps if it names none of its own.

        Args:
            region: image tokens; from `region.tokens_in`.
            steps: denoising steps.
        """
        return dataclasses.replace(self, region=region).during(steps)

    def during(self, steps: Iterable[int] | None) -> "Edit":
        """Returns this edit confined to denoising steps, unless it names its own."""
        named = self.steps is not None or any(part.steps is not None for part in self.parts)
        return self if named or steps is None else dataclasses.replace(self, steps=steps)


def parse_what(text: str) -> Feature | WholeSite | Supernode:
    """Reads what an edit is of: a feature, a supernode, a site or a stream; see the module.

    Args:
        text: the part of an edit before `=`.

    Raises:
        UserError: if it is none of these.
    """
    text = text.strip()
    named = _NAMED.fullmatch(text)
    if named or "+" in text:
        name, features = (named["name"], named["features"]) if named else ("", text)
        return Supernode(name, tuple(Feature.parse(item) for item in features.split("+")))
    whole = _SITE.fullmatch(text)
    if whole is None:
        return Feature.parse(text)
    block = None if whole["block"] is None else int(whole["block"])
    # The places of a site are written as those of a feature.
    places = Feature.parse(f"{whole['stream']}/0/f0{whole['rest'] or ''}")
    return WholeSite(whole["stream"], block, places.positions, places.steps, places.side, places.branch)


def site_part(site: WholeSite) -> Part:
    """Returns a whole site as the part of an edit."""
    return Part(site.stream, site.block, -1, site.positions, site.steps, site.side, site.branch)


def refuse_contradictions(edits: Iterable[Edit]) -> None:
    """Raises `UserError` if two edits set the same feature, or the same whole site, to different values at one place.

    An edit of a whole site and one of a feature of it do not contradict each other: the second acts on the first.
    """
    seen: dict[tuple[str, int | None, int], list[tuple[Edit, Part]]] = {}
    for edit in edits:
        scale, value = edit.affine
        if scale:
            continue
        for part in edit.parts:
            before = seen.setdefault(part[:3], [])
            for other, theirs in before:
                if other.affine[1] != value and _meet(edit, part, other, theirs):
                    raise UserError(
                        f"Edits contradict each other: {other} and {edit} set the same feature to different values at "
                        "the same place; leave one out, or give them different positions or steps."
                    )
            before.append((edit, part))


def _meet(edit: Edit, part: Part, other: Edit, theirs: Part) -> bool:
    """Says whether two parts of one feature share a position and a step."""

    def overlap(a: tuple[int, ...] | None, b: tuple[int, ...] | None) -> bool:
        return a is None or b is None or bool(set(a) & set(b))

    sides, branches = ({*pair} - {None} for pair in ((part.side, theirs.side), (part.branch, theirs.branch)))
    if len(sides) == 2 or len(branches) == 2 or not overlap(part.steps, theirs.steps):
        return False
    if part.side != theirs.side:  # one of them is at every position of the sequence
        return True
    image = part.side != "txt" and "img" in LABELS[part.stream].streams
    regions = overlap(edit.region, other.region) if image else True
    return regions and overlap(part.positions, theirs.positions)


def check_stream(stream: str) -> None:
    """Raises `UserError` if there is no such stream."""
    if stream not in LABELS:
        raise UserError(f"A site's stream must be one of {', '.join(LABELS)}, but got {stream!r}.")
