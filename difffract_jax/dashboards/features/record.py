"""The result of a scan, on disk and in Python (NumPy only): what every feature does over a corpus.

    scan/config.json            format version, kind "scan", model, transcoders, prompts, seed, run, sites, settings
    scan/SITE.safetensors       img-1 and the like: the arrays of `SiteScan`, one row per feature
    scan/prompts.jsonl          prompts by number, as JSON strings, a line each

`load_scan(DIR)` reads the folder of dashboards that holds them; arrays stay in their files until they are read.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int, UInt8

from difffract_jax.address import BRANCHES
from difffract_jax.circuits.notation.feature import Feature
from difffract_jax.config import UserError
from difffract_jax.display import hash_text, one_line, text_of
from difffract_jax.storage.files import TensorFile, atomic_file, write_tensors

FORMAT_VERSION = 1
KIND = "scan"
FOLDER = "scan"
RARE = 1e-4
"""Share of the tokens below which a feature that is active at all counts as rare."""
TIERS = ("strongest", "upper third", "middle third", "lower third")
"""Where an example comes from, by code: the largest peaks, or a third of the sample of all others."""

_RECORD = {"model": str, "transcoders": str, "seed": int, "prompts": int, "features": int, "run": dict, "sites": dict}
_RUN = {"steps": int, "grid": list, "text_tokens": int}
_SITE = {"streams": list, "tokens": int}
"""What readers need of `config.json`, of its run, and of each of its sites, with their types."""


class SiteScan(NamedTuple):
    """What a scan found at one site.

    Attributes:
        active: tokens above 0, by evaluation: by step, or with guidance by two branches by step and branch.
        total: sum of values, by evaluation.
        histogram: tokens above 0, by value; `edges` are the inner edges of its bins.
        edges: of the histogram, ascending.
        prompts: prompts with any token above 0.
        text: tokens above 0 that are of the text; the others are of the image.
        peak: largest value.
        example_prompt: number of an example's prompt; -1 for an empty place.
        example_place: evaluation * rows + row of its peak; rows are those of the site's sequence.
        example_value: its peak.
        example_tier: code in `TIERS`.
    """

    active: Int[np.ndarray, "feat evaluation"]
    total: Float[np.ndarray, "feat evaluation"]
    histogram: Int[np.ndarray, "feat bins"]
    edges: Float[np.ndarray, "edges"]
    prompts: Int[np.ndarray, "feat"]
    text: Int[np.ndarray, "feat"]
    peak: Float[np.ndarray, "feat"]
    example_prompt: Int[np.ndarray, "feat shown"]
    example_place: Int[np.ndarray, "feat shown"]
    example_value: Float[np.ndarray, "feat shown"]
    example_tier: UInt8[np.ndarray, "feat shown"]

    @property
    def usual(self) -> Float[np.ndarray, "feat"]:
        """Mean value of every feature where it is active; 0 for one that never is."""
        return (self.total.sum(axis=1) / np.maximum(self.active.sum(axis=1), 1)).astype(np.float32)

    @property
    def sides(self) -> Float[np.ndarray, "feat side"]:
        """Shares of the tokens at which each feature is active that are of the text, and of the image."""
        active = np.maximum(self.active.sum(axis=1), 1)
        return np.stack([self.text / active, (self.active.sum(axis=1) - self.text) / active], axis=1).astype(np.float32)

    def __repr__(self) -> str:
        dead = int((self.prompts == 0).sum())
        return f"SiteScan of {len(self.prompts):,} features, {dead:,} of them never active"


class ScanExample(NamedTuple):
    """Where a feature is active.

    Attributes:
        prompt: of the run.
        seed: of its starting noise.
        feature: with the position and the step of the largest value, of two branches also its branch.
        value: there.
        tier: where the example comes from, one of `TIERS`.
    """

    prompt: str
    seed: int
    feature: Feature
    value: float
    tier: str

    def __repr__(self) -> str:
        return f"{self.value:.4g} at {self.feature}, {one_line(self.prompt, 60)!r}, seed {self.seed} ({self.tier})"


class FeatureScan(NamedTuple):
    """What a scan found of one feature.

    Attributes:
        feature: its name.
        density: share of the tokens at which it is active.
        frequency: the same, by step; of two branches by evaluation, the prompt's of each step first.
        mean: mean value where it is active, alike.
        prompts: share of the prompts in which it is active.
        text: share of the tokens at which it is active that are of the text.
        l0_share: share of the active features of its site's tokens that are this one.
        peak: largest value.
        flag: "dead" if it is never active, "rare" below `RARE` of the tokens, else "".
        examples: the strongest first.
    """

    feature: Feature
    density: float
    frequency: tuple[float, ...]
    mean: tuple[float, ...]
    prompts: float
    text: float
    l0_share: float
    peak: float
    flag: str
    examples: tuple[ScanExample, ...]

    def __repr__(self) -> str:
        facts = {
            "active": f"at {self.density:.3%} of the tokens, in {self.prompts:.1%} of the prompts",
            "of them text": f"{self.text:.1%}",
            "share of L0": f"{self.l0_share:.3%}",
            "largest value": f"{self.peak:.4g}",
            "by step": ", ".join(f"{share:.3%}" for share in self.frequency),
            "flag": self.flag,
            "strongest": repr(self.examples[0]) if self.examples else "never active in these prompts",
        }
        return text_of(f"Feature {self.feature}", facts)


@dataclass(frozen=True)
class Scan:
    """The result of a scan.

    Attributes:
        directory: of the dashboards.
        config: what `scan/config.json` says.
        prompts: all prompts that were run.
    """

    directory: Path
    config: Mapping[str, Any]
    prompts: tuple[str, ...]

    @property
    def sites(self) -> tuple[str, ...]:
        """Names of the sites, as in img/1."""
        return tuple(self.config["sites"])

    def site(self, name: str) -> SiteScan:
        """Returns what was found at a site.

        Raises:
            UserError: if it was not scanned, or its file is damaged.
        """
        if name not in self.sites:
            raise UserError(f"The scan in {self.directory} has no site {name}; it has {', '.join(self.sites)}.")
        path = self.directory / FOLDER / f"{name.replace('/', '-')}.safetensors"
        try:
            file = TensorFile(path)
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error.strerror}); make the dashboards again.") from None
        if file.missing_bytes:
            raise UserError(f"{path} is cut off by {file.missing_bytes} bytes; make the dashboards again.")
        absent = [field for field in SiteScan._fields if field not in file.tensors]
        if absent:
            raise UserError(f"{path} is damaged: it has no {absent[0]}; make the dashboards again.")
        return SiteScan(**{field: file[field] for field in SiteScan._fields})

    def of(self, feature: str | Feature) -> FeatureScan:
        """Returns what was found of a feature.

        Args:
            feature: as in img/1/f159; a position or step is not read.

        Raises:
            UserError: if it is no feature, or was not scanned.
        """
        named = Feature.parse(feature) if isinstance(feature, str) else feature
        name = f"{named.stream}/{named.block}"
        site = self.site(name)
        if named.feature >= len(site.prompts):
            raise UserError(f"{name} has {len(site.prompts)} features, but {named} was asked for.")
        return feature_scan(self.config, self.prompts, name, site, named.feature)

    def __iter__(self) -> Iterator[tuple[str, SiteScan]]:
        return ((name, self.site(name)) for name in self.sites)

    def __repr__(self) -> str:
        run = self.config["run"]
        facts = {
            "sites": ", ".join(self.sites),
            "features": f"{self.config['features']:,} each",
            "prompts": f"{len(self.prompts):,}, {run['steps']} steps, seeds from {self.config['seed']}",
            "model": hash_text(self.config["model"]),
            "transcoders": hash_text(self.config["transcoders"]),
            "pages": str(self.directory / "index.html"),
        }
        return text_of(f"Scan of {len(self.sites)} sites", facts)


def feature_scan(
    config: Mapping[str, Any], prompts: tuple[str, ...], name: str, site: SiteScan, number: int
) -> FeatureScan:
    """Returns what was found of one feature of a site.

    Args:
        config: of the scan.
        prompts: of the scan.
        name: of the site.
        site: what was found there.
        number: of the feature.
    """
    active = site.active[number].astype(np.float64)
    tokens, count = tokens_of(config, name), float(active.sum())
    density = count / max(float(tokens.sum()), 1)
    return FeatureScan(
        Feature(*_label(name), number),
        density,
        tuple((active / np.maximum(tokens, 1)).tolist()),
        tuple((site.total[number] / np.maximum(active, 1)).astype(float).tolist()),
        float(site.prompts[number]) / len(prompts),
        float(site.text[number]) / max(count, 1.0),
        count / max(float(site.active.sum(dtype=np.int64)), 1.0),
        float(site.peak[number]),
        flag_of(count, density),
        tuple(_examples(config, prompts, name, site, number)),
    )


def flag_of(active: float, density: float) -> str:
    """Returns "dead" for a feature that is never active, "rare" for one below `RARE` of the tokens, else ""."""
    return "dead" if active == 0 else "rare" if density < RARE else ""


def _label(name: str) -> tuple[str, int]:
    label, _, number = name.partition("/")
    return label, int(number)


def _examples(
    config: Mapping[str, Any], prompts: tuple[str, ...], name: str, site: SiteScan, number: int
) -> Iterator[ScanExample]:
    for slot in np.flatnonzero(site.example_prompt[number] >= 0):
        prompt, place = int(site.example_prompt[number, slot]), int(site.example_place[number, slot])
        step, branch, side, position = place_of(config, name, place)
        feature = Feature(*_label(name), number, (position,), (step,), side, branch)
        yield ScanExample(
            prompts[prompt],
            (config["seed"] + prompt) % 2**64,
            feature,
            float(site.example_value[number, slot]),
            TIERS[site.example_tier[number, slot]],
        )


def tokens_of(config: Mapping[str, Any], name: str) -> Float[np.ndarray, "evaluation"]:
    """Returns how many tokens of a site counted in every evaluation of the runs.

    Args:
        config: of the scan.
        name: of the site.
    """
    site = config["sites"][name]
    of_branches = [site["tokens"], *([site["negative_tokens"]] if "negative_tokens" in site else [])]
    return np.tile(np.asarray(of_branches, np.float64), config["run"]["steps"])


class Place(NamedTuple):
    """Where a feature has its peak.

    Attributes:
        step: denoising step.
        branch: of guidance by two branches, "prompt" or "negative"; None where a step is one evaluation.
        side: stream of the token; None where a site has but one.
        position: of the token within its stream.
    """

    step: int
    branch: str | None
    side: str | None
    position: int


def place_of(config: Mapping[str, Any], name: str, place: int) -> Place:
    """Returns where a place in a site's runs is.

    Args:
        config: of the scan.
        name: of the site.
        place: evaluation * rows + row.
    """
    run, streams = config["run"], config["sites"][name]["streams"]
    sizes = {"img": run["grid"][0] * run["grid"][1], "txt": run["text_tokens"]}
    number, row = divmod(place, sum(sizes[stream] for stream in streams))
    branches = run.get("branches", 1)
    step, branch = divmod(number, branches)
    for stream in streams:
        if row < sizes[stream]:
            side = stream if len(streams) > 1 else None
            return Place(step, BRANCHES[branch] if branches > 1 else None, side, row)
        row -= sizes[stream]
    raise AssertionError("a row lies in one of its sequence's streams")


def write_site(folder: Path, name: str, site: SiteScan) -> None:
    """Writes the arrays of a site into the folder of a scan."""
    arrays = {field: np.ascontiguousarray(array) for field, array in site._asdict().items()}
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_file(folder / f"{name.replace('/', '-')}.safetensors") as partial:
        write_tensors(partial, [(field, a.dtype, a.shape) for field, a in arrays.items()], arrays.values())


def write_record(folder: Path, config: Mapping[str, Any], prompts: tuple[str, ...]) -> None:
    """Writes what a scan was of, and its prompts, into the folder of the scan."""
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_file(folder / "prompts.jsonl") as partial:
        partial.write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts), encoding="utf-8")
    with atomic_file(folder / "config.json") as partial:
        partial.write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def load_scan(directory: str | Path) -> Scan:
    """Opens what `difffract dashboards` found.

    Args:
        directory: that it wrote.

    Raises:
        UserError: if it holds no scan, or one that is damaged or of another format version.
    """
    directory = Path(directory)
    try:
        config = json.loads((directory / FOLDER / "config.json").read_text(encoding="utf-8"))
        kind, version = config["kind"], config["format_version"]
        lines = (directory / FOLDER / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(
            f"{directory} holds no scan of features; make one with `difffract dashboards MODEL TRANSCODERS --prompts "
            f"FILE --out {directory}`."
        ) from None
    if kind != KIND or version != FORMAT_VERSION:
        raise UserError(
            f"{directory} holds {kind} of format version {version}, but a {KIND} of version {FORMAT_VERSION} is "
            "wanted; make the dashboards again."
        )
    again = "make the dashboards again, or copy them anew."
    damage = _damage(config)
    if damage:
        raise UserError(f"{directory / FOLDER / 'config.json'} is damaged at {damage}; {again}")
    try:
        prompts = tuple(json.loads(line) for line in lines)
    except ValueError:
        prompts = ()
    if len(prompts) != config["prompts"] or not all(isinstance(prompt, str) for prompt in prompts):
        raise UserError(
            f"{directory / FOLDER / 'prompts.jsonl'} is damaged: the scan is of {config['prompts']} prompts; {again}"
        )
    return Scan(directory, config, prompts)


def _damage(config: Mapping[str, Any]) -> str:
    """Returns where a scan's record lacks what its readers need, as in "run: grid"; "" if nowhere."""
    parts = [("", config, _RECORD), ("run: ", config.get("run"), _RUN)]
    sites = config.get("sites")
    parts += [(f"sites: {name}: ", site, _SITE) for name, site in sites.items()] if isinstance(sites, dict) else []
    for where, part, wanted in parts:
        for key, kind in wanted.items():
            if not isinstance(part, dict) or not isinstance(part.get(key), kind):
                return where + key
    return ""
