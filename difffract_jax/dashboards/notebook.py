"""Pages in notebooks: `Graph.show`, and the frame that any page lies in (NumPy; JAX only to make an image).

1. The page of `difffract view` goes into the output as HTML, in a frame whose `srcdoc` is the whole page. It is there
   in every front end that shows HTML, and in a notebook that was saved, without a kernel and without a network.
2. The frame is sandboxed: it runs its own script, and reaches neither the notebook nor the network.
3. With anywidget, groups made in the page come back to Python while a kernel runs (`widget`).
"""

import html
import uuid
from collections.abc import Mapping
from functools import cached_property
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from difffract_jax.circuits.notation.labels import Labels
from difffract_jax.config import UserError
from difffract_jax.dashboards.image_files import KeptImages, read_image, shown, shown_images
from difffract_jax.dashboards.page_data import Limits, check_difference, leads_forward, shown_graph
from difffract_jax.dashboards.page_groups import grouped
from difffract_jax.dashboards.page_labels import known_labels, texts_by_feature
from difffract_jax.dashboards.render import write_report
from difffract_jax.dashboards.viewer_page import PageParts, ShownImage, viewer_page
from difffract_jax.display import one_line
from difffract_jax.graphs.combine import difference
from difffract_jax.graphs.files.viewer_groups import read_any_groups
from difffract_jax.graphs.files.viewer_image import image_bytes
from difffract_jax.graphs.graph import Graph
from difffract_jax.graphs.groups import Groups, check_about, identity
from difffract_jax.graphs.names import node_name, node_names

HEIGHT = 720
"""Pixels of a page in a notebook."""
NO_IMAGE = "Give the pipeline, graph.show(pipe), or an image, graph.show(image=...), to see the image beside the graph."
NO_WIDGET = (
    "Without the package anywidget a page cannot send anything back to Python: pip install 'difffract_jax[notebook]', "
    "and show it again. Until then save the groups in the page, and read the file with `read_groups`."
)


class Page:
    """A page that shows itself in a notebook.

    Attributes:
        title: what it shows.
        height: in pixels, in a notebook.
    """

    def __init__(self, title: str, content: str, height: int = HEIGHT):
        """Makes the page.

        Args:
            title: what it shows.
            content: the whole page as HTML, which needs no other file.
            height: in pixels, in a notebook.
        """
        self.title, self.height, self._content = title, height, content

    @property
    def html(self) -> str:
        """The whole page."""
        return self._content

    def save(self, path: str | Path) -> None:
        """Writes the page to a file that a browser opens from disk.

        Args:
            path: the file; it appears only when it is complete.
        """
        write_report(Path(path), self.html)

    def __repr__(self) -> str:
        return f"Page of {one_line(self.title, 60)}: a notebook shows it; save('page.html') writes it to a file."

    def _repr_html_(self) -> str:
        return frame(self.html, self.title, self.height)


class GraphPage(Page):
    """The page of a graph, and what was made in it; made by `Graph.show`."""

    def __init__(self, graph: Graph, parts: PageParts, whole: Graph, height: int = HEIGHT):
        """Makes the page.

        Args:
            graph: as the page shows it, from `page_data.shown_graph`.
            parts: what is shown beside it.
            whole: the graph that groups are about.
            height: in pixels, in a notebook.
        """
        self.title, self.height = parts.title, height
        self._shown, self._parts, self._whole, self._key = graph, parts, whole, uuid.uuid4().hex
        self._widget: Any = None
        if find_spec("anywidget") is not None:
            made = import_module("difffract_jax.dashboards.widget")
            groups = made.as_json(parts.groups or supernode_groups(graph))
            known = dict(key=self._key, title=self.title, height=height, groups=groups)
            self._widget = made.PageWidget(whole, _shown_nodes(graph, parts), **known)

    @property
    def html(self) -> str:
        """The whole page, with the groups as they are now; it does not send them to this notebook."""
        return viewer_page(self._shown, self._parts._replace(groups=self._current))

    def _repr_html_(self) -> str:
        parts = self._parts._replace(groups=self._current, notebook=self._key)
        return frame(viewer_page(self._shown, parts), self.title, self.height, self._key)

    @property
    def _current(self) -> Groups | None:
        return self._parts.groups if self._widget is None else Groups.model_validate(self._widget.groups)

    @property
    def groups(self) -> Groups:
        """Groups, names, notes and pins as they stand in the page; what is set here is shown there.

        Raises:
            UserError: without anywidget; when set, if they are of another graph.
        """
        return Groups.model_validate(self._linked.groups)

    @groups.setter
    def groups(self, groups: Groups) -> None:
        """Shows other groups in the page."""
        check_about(groups, self._whole, "What `groups` is set to")
        self._linked.groups = groups.model_dump(mode="json")

    @property
    def selected(self) -> str | None:
        """Name of the node that is selected in the page; None for none. Raises `UserError` without anywidget."""
        return self._linked.selected

    @property
    def pruning(self) -> dict[str, Any]:
        """Where the page's sliders stand: `prune(graph, **page.pruning)` keeps what is seen.

        Empty until a slider, or anything else in the page, was moved. Raises `UserError` without anywidget.
        """
        return dict(self._linked.pruning)

    @property
    def widget(self) -> Any:
        """The page as a widget, to lay out among others; its traits `groups`, `selected`, `pruning` can be observed.

        Raises:
            UserError: without anywidget.
        """
        parts = self._parts._replace(groups=self._current, notebook=self._key)
        self._linked.page = viewer_page(self._shown, parts)
        return self._linked

    @cached_property
    def _linked(self) -> Any:
        if self._widget is None:
            raise UserError(NO_WIDGET)
        return self._widget


def frame(content: str, title: str, height: int, key: str = "") -> str:
    """Returns a page as HTML for a notebook's output: a frame that holds it whole.

    Args:
        content: the page.
        title: what it shows, for screen readers.
        height: in pixels.
        key: by which a widget knows the frame; "" for none.
    """
    known = f' data-difffract="{html.escape(key)}"' if key else ""
    # The frame covers the sentence; a notebook that is not trusted drops frames, and the sentence is seen.
    return (
        f'<div style="position:relative;width:100%;height:{height:d}px">'
        "<p>The page is shown once this notebook is trusted: File, Trust Notebook.</p>"
        f'<iframe{known} title="{html.escape(one_line(title))}" sandbox="allow-scripts allow-downloads" '
        'style="position:absolute;top:0;left:0;width:100%;height:100%;border:0;background:#fff" '
        f'srcdoc="{html.escape(content)}"></iframe></div>'
    )


def _shown_nodes(graph: Graph, parts: PageParts) -> set[str]:
    """Returns the names of the nodes that a page shows, of two graphs and their difference too."""
    shown = (graph, parts.other, parts.difference)
    return {name for one in shown if one is not None for name in node_names(one)}


def supernode_groups(graph: Graph) -> Groups:
    """Returns the supernodes of a graph as groups of a file.

    Args:
        graph: as a page shows it.
    """
    names = node_names(graph)
    groups = {title: tuple(names[node] for node in members) for title, members in graph.supernodes.items()}
    return Groups(graph=identity(graph), groups=groups)


def show_graph(
    graph: Graph,
    pipe: Any = None,
    *,
    image: Any = None,
    labels: Labels | Mapping[str, str] | None = None,
    groups: Groups | str | Path | None = None,
    compare: Graph | None = None,
    by_position: bool = False,
    limits: Limits | None = None,
    height: int = HEIGHT,
) -> GraphPage:
    """Returns the page of a graph, which a notebook shows; `Graph.show` calls it.

    Args:
        graph: any graph.
        pipe: the pipeline of its run, which makes the image beside it, and what each traced step predicted.
        image: that image instead: of Pillow, pixels [height, width, rgb] from 0 to 255, or the path of a file. With
            neither, the one in the document of another tool that the graph was read from.
        labels: what features stand for: of `load_labels`, or text by name; the organism's own are known, and those of
            the document that the graph was read from.
        groups: to open with: `Groups`, or the path of a .groups.json, or of what circuit-tracer's viewer or Neuronpedia
            saved.
        compare: a second graph, shown beside it, with their difference.
        by_position: show single positions.
        limits: the largest graph that a page may hold.
        height: in pixels.

    Raises:
        UserError: if the graph is too large, the groups, labels or pipeline belong to another, or the image cannot be
            read.
    """
    texts = _labels(graph, labels)
    sums = {"by_position": by_position, "limits": limits}
    page = grouped(shown_graph(graph, **sums))
    opened = read_any_groups(Path(groups), graph) if isinstance(groups, str | Path) else groups
    if opened is not None:
        check_about(opened, graph, "`groups`")
    images, note = _images(graph, pipe, image)
    parts = PageParts(
        title=node_name(page, page.target),
        labels=texts,
        images=images,
        image_note=note,
        groups=opened,
    )
    if compare is not None:
        if by_position:
            raise UserError("Two graphs are compared as sums over positions; leave by_position out.")
        between = difference(graph, compare)
        between = between if leads_forward(between) else None  # of sums over positions, which may run in circles
        if between is not None:
            check_difference(between, limits or Limits(), "`limits`")
        parts = parts._replace(
            labels=_labels(compare, labels) | texts,
            other=shown_graph(compare, **sums),
            other_title=f"Second: {node_name(compare, compare.target)}",
            difference=between,
        )
    return GraphPage(page, parts, graph, height)


def _labels(graph: Graph, labels: Labels | Mapping[str, str] | None) -> dict[str, str]:
    if labels is None:
        return known_labels(graph, None)
    given = (
        texts_by_feature(graph, labels) if isinstance(labels, Labels) else {str(k): str(v) for k, v in labels.items()}
    )
    return dict(graph.provenance.labels or {}) | given


def _images(graph: Graph, pipe: Any, image: Any) -> tuple[list[ShownImage], str]:
    """Returns the images beside a graph, the finished one first; and a sentence, where there is none."""
    if image is not None:
        return [shown(_picture(image))], NO_IMAGE
    run = graph.provenance.run
    if pipe is None:
        return _document_image(graph)
    if run is None:
        raise UserError("The graph does not tell a run of one prompt, so that no image can be made; give image=.")
    steps = tuple(graph.provenance.steps or (run.step,))
    made = import_module("difffract_jax.dashboards.run_images").run_images(pipe, run, steps)
    return list(shown_images(KeptImages(made, steps))), NO_IMAGE


def _document_image(graph: Graph) -> tuple[list[ShownImage], str]:
    """Returns the image that the document of another tool holds; and a sentence, where it holds none to be shown."""
    try:
        data = image_bytes(graph.provenance.viewer)
        return ([] if data is None else [shown(read_image(Path("The document's image"), data))]), NO_IMAGE
    except UserError as error:
        return [], str(error).replace("--image FILE", "image=")


def _picture(image: Any) -> Image.Image:
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    if isinstance(image, str | Path):
        return read_image(Path(image))
    pixels = np.asarray(image)
    if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.dtype != np.uint8:
        raise UserError(
            f"`image` has shape {pixels.shape} and type {pixels.dtype}; give pixels of shape (height, width, 3) as "
            "uint8 from 0 to 255, an image of Pillow, or the path of a file."
        )
    return Image.fromarray(pixels)
