"""How many bytes a corpus scan keeps on the device and on disk, counted from shapes.

On the device a scan keeps of every feature `feature_bytes`, whatever the number of prompts. On disk, what is exact is
told as such; pages are text, and are counted with what features of the embedded model come to.
"""

from typing import NamedTuple

WIDE = 4
"""Bytes of a number of the state."""
PEAK = 2 * WIDE
"""Bytes of a feature's peak in a prompt that is running."""
BINS = 32
"""Bins of the histogram of values; `dashboards.features.state.BINS`."""
PAGE = 900
"""Bytes of a feature's page beside its examples, steps and links; of the embedded model: 800."""
EXAMPLE = 45
"""Bytes of an example on a page beside its map."""
LINK = 24
"""Bytes of a link on a page."""
PICTURE = 900
"""Bytes of the picture of an effect on pixels in its sheet; 24 x 24 pixels of the embedded model: 700."""
SPARSE = 0.5
"""Share of an example's cells, in base64, that its map takes on a page: maps with few active cells list these alone."""


class ScanSizes(NamedTuple):
    """What the bytes of a scan follow from.

    Attributes:
        features: of a site.
        sites: of each, cells of a map, and whether it works on image tokens.
        evaluations: of all denoising steps.
        prompts: of the corpus.
        text_tokens: of a prompt.
        thumb: bytes of an image made small.
        top: prompts of the largest peaks that are kept.
        sample: prompts of the uniform sample.
        shown: examples of a feature.
        links: partners by weights, in each direction, and neighbours.
        pages: features that get a page; None for all.
    """

    features: int
    sites: tuple[tuple[int, bool], ...]
    evaluations: int
    prompts: int
    text_tokens: int
    thumb: int
    top: int = 10
    sample: int = 32
    shown: int = 16
    links: int = 8
    pages: int | None = None

    @property
    def all_features(self) -> int:
        """Features of all sites."""
        return self.features * len(self.sites)


class DiskBytes(NamedTuple):
    """What a scan takes on disk.

    Attributes:
        state: of the first pass, kept while it runs; twice while it is replaced.
        maps: of examples, kept until pages are written; the most, as files with holes take less.
        record: `scan/`, which `load_scan` reads.
        pages: script files.
        pictures: sprite sheets of images and of effects.
    """

    state: int
    maps: int
    record: int
    pages: int
    pictures: int

    @property
    def total(self) -> int:
        """The most that lies on the disk at a time."""
        return max(2 * self.state, self.state + self.maps + self.record + self.pages + self.pictures)

    @property
    def final(self) -> int:
        """What stays."""
        return self.record + self.pages + self.pictures


def feature_bytes(evaluations: int, top: int = 10, sample: int = 32) -> int:
    """Returns the bytes of a feature's state on the device.

    Args:
        evaluations: of all denoising steps.
        top: prompts of the largest peaks.
        sample: prompts of the uniform sample.
    """
    return WIDE * (3 * top + 4 * sample + 2 * evaluations + BINS + 2)


def state_bytes(sizes: ScanSizes) -> int:
    """Returns the bytes of the state on all devices together."""
    return sizes.all_features * feature_bytes(sizes.evaluations, sizes.top, sizes.sample) + WIDE * len(sizes.sites)


def disk_bytes(sizes: ScanSizes) -> DiskBytes:
    """Returns what a scan takes on disk."""
    features, shown = sizes.all_features, min(sizes.shown, sizes.prompts)
    share = 1.0 if sizes.pages is None else sizes.pages / max(features, 1)
    cells = sum(one for one, _ in sizes.sites)
    maps = sizes.features * sizes.shown * cells
    record = features * (WIDE * (2 * sizes.evaluations + BINS + 3) + 13 * sizes.shown)
    examples = features * shown * EXAMPLE + SPARSE * 4 / 3 * sizes.features * shown * cells
    written = share * (features * (PAGE + 3 * sizes.links * LINK) + examples)
    chosen = min(sizes.prompts, round(share * features * shown))
    images = sum(sizes.features for _, works_on_image in sizes.sites if works_on_image)
    return DiskBytes(
        state=state_bytes(sizes),
        maps=round(share * maps),
        record=record,
        pages=round(written) + chosen * (60 + 12 * sizes.text_tokens),
        pictures=round(share * images * PICTURE) + round(0.4 * chosen * sizes.thumb),
    )
