"""One feature by its name, with its page: `feature("img/1/f159").show()`.

The page comes from a folder that `difffract dashboards` wrote; or from a scan of some prompts, made when the page is
first wanted, and kept for as long as the object is.
"""

import tempfile
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from difffract_jax.circuits.notation.feature import Feature
from difffract_jax.config import UserError
from difffract_jax.dashboards.features.alone import feature_page
from difffract_jax.dashboards.features.build import build_dashboards
from difffract_jax.dashboards.features.corpus import Corpus
from difffract_jax.dashboards.features.record import FeatureScan, load_scan
from difffract_jax.dashboards.features.request import CORPUS_SEED, DashboardOptions
from difffract_jax.dashboards.features.texts import texts_of
from difffract_jax.dashboards.notebook import HEIGHT, Page
from difffract_jax.display import text_of
from difffract_jax.loading import load_labels, load_pipeline, load_transcoders
from difffract_jax.models.pipeline import Pipeline, Run
from difffract_jax.organism.world import scenes
from difffract_jax.transcoders.transcoder import TranscoderSet

PROMPTS = 64
"""Captions of the organism's world that a feature is scanned on."""
BATCH = 16
"""Prompts computed together."""


class Scanned(NamedTuple):
    """What is known of a feature.

    Attributes:
        page: HTML.
        scan: figures and examples.
    """

    page: str
    scan: FeatureScan


class FeatureView:
    """A feature, and where what is known of it comes from; made by `feature`.

    Attributes:
        feature: its name.
        pages: folder of `difffract dashboards`; None if it is scanned.
    """

    def __init__(
        self,
        feature: Feature,
        pages: Path | None,
        pipe: Pipeline | None,
        tcs: TranscoderSet | None,
        prompts: int | Sequence[str],
        run: Run | None = None,
    ):
        self.feature, self.pages = feature, pages
        self._pipe, self._tcs, self._prompts, self._run = pipe, tcs, prompts, run

    @cached_property
    def _scanned(self) -> Scanned:
        if self.pages is not None:
            return Scanned(feature_page(self.pages, self.feature), load_scan(self.pages).of(self.feature))
        ours = self._pipe is None
        pipe = load_pipeline("organism") if self._pipe is None else self._pipe
        tcs = load_transcoders("organism") if self._tcs is None else self._tcs
        count = self._prompts
        prompts = scenes(CORPUS_SEED, 0, count).captions if isinstance(count, int) else count
        names = ("organism", "organism") if ours else ("MODEL", "TRANSCODERS")
        texts = texts_of(load_labels("organism")) if ours else None
        options = DashboardOptions(features=(self.feature,), names=names, texts=texts)
        corpus = Corpus(pipe, self._run or pipe.plan(), tuple(prompts), 0, min(BATCH, len(prompts)), None)
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "pages"
            build_dashboards(corpus, tcs, out, options)
            return Scanned(feature_page(out, self.feature), load_scan(out).of(self.feature))

    @property
    def scan(self) -> FeatureScan:
        """How often the feature is active, how strongly, and its examples; scanned when first asked for."""
        return self._scanned.scan

    def show(self, *, height: int = HEIGHT) -> Page:
        """Returns the feature's page, as `difffract dashboards` makes it: a notebook shows it, `save` writes it.

        Args:
            height: in pixels, in a notebook.

        Raises:
            UserError: if the folder has no page of the feature, or the scan is refused, as by `build_dashboards`.
        """
        return Page(f"feature {self.feature}", self._scanned.page, height)

    def __repr__(self) -> str:
        if "_scanned" in self.__dict__:
            return repr(self.scan)
        counted = self._prompts if isinstance(self._prompts, int) else len(self._prompts)
        source = (
            f"pages in {self.pages}" if self.pages is not None else f"a scan of {counted} prompts, when it is shown"
        )
        return text_of(f"Feature {self.feature}", {"from": source})


def feature(
    name: str | Feature,
    pipe: Pipeline | None = None,
    tcs: TranscoderSet | None = None,
    *,
    pages: str | Path | None = None,
    prompts: int | Sequence[str] | None = None,
    run: Run | None = None,
) -> FeatureView:
    """Returns a feature by its name; `show()` gives its page: top examples, weaker ones, how often it is active, links.

    Without further arguments it is one of the organism's. For many features, or a large model, make a folder with
    `difffract dashboards` and name it in `pages`.

    Args:
        name: as in img/1/f159.
        pipe: the model to scan; the organism if left out.
        tcs: its transcoders; the organism's if left out.
        pages: folder that `difffract dashboards` wrote, to read instead of scanning, with none of the other arguments.
        prompts: to scan; or how many captions of the organism's world, `PROMPTS` if left out.
        run: sizes and schedule of the scan; `pipe.plan()` if left out.

    Raises:
        UserError: if the name is not one of a feature, or the arguments do not go together.

    Example:
        >>> feature("img/1/f159", prompts=32)
        Feature img/1/f159
          from  a scan of 32 prompts, when it is shown
    """
    named = Feature.parse(name) if isinstance(name, str) else name
    named = Feature(named.stream, named.block, named.feature)
    if pages is not None:
        given = {"pipe": pipe, "tcs": tcs, "prompts": prompts, "run": run}
        others = [f"`{key}`" for key, value in given.items() if value is not None]
        if others:
            raise UserError(
                f"A feature's page comes from `pages` or from a scan, and {' and '.join(others)} would be for a scan; "
                "give one of them."
            )
        load_scan(pages)
        return FeatureView(named, Path(pages), None, None, ())
    if (pipe is None) != (tcs is None):
        raise UserError(
            "A scan needs a model and its transcoders; give both `pipe` and `tcs`, or neither for the organism."
        )
    prompts = PROMPTS if prompts is None else prompts
    if pipe is not None and isinstance(prompts, int):
        raise UserError("Captions that are counted are those of the organism; give `prompts` as texts for this model.")
    if isinstance(prompts, str) or (prompts < 1 if isinstance(prompts, int) else not len(prompts)):
        raise UserError(f"`prompts` is {prompts!r}, but a scan needs prompts: texts in a list, or how many captions.")
    return FeatureView(named, None, pipe, tcs, prompts, run)
