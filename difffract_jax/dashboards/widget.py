"""The link between a page in a notebook and Python: an anywidget, whose traits the page sets and follows.

The page itself lies in the notebook's output as HTML (`notebook`), so that it is there without a kernel; the widget's
front end listens to it from the moment the widget is made, with or without a view of its own. Needs anywidget, as
nothing else here does.
"""

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import anywidget
import traitlets

from difffract_jax.config import UserError
from difffract_jax.display import one_line
from difffract_jax.graphs.graph import Graph
from difffract_jax.graphs.groups import Groups, check_about, parse_groups
from difffract_jax.graphs.pruning import check_pruning

THRESHOLDS = ("node_threshold", "edge_threshold")
FRONT_END = Path(__file__).parent / "templates" / "notebook.js"


class PageWidget(anywidget.AnyWidget):
    """A page in a notebook, and what was made in it.

    Attributes:
        key: by which pages are known to be this widget's.
        page: HTML that a view shows.
        title: of a view, for screen readers.
        height: of a view, in pixels.
        groups: as a .groups.json holds them; set by the page, and followed by it.
        selected: name of the node in hand, or None; set by the page.
        pruning: mode, node_threshold and edge_threshold of the page's sliders, as `prune` takes them; set by the page.
    """

    _esm = FRONT_END.read_text(encoding="utf-8")
    key = traitlets.Unicode().tag(sync=True)
    page = traitlets.Unicode().tag(sync=True)
    title = traitlets.Unicode().tag(sync=True)
    height = traitlets.Int(720).tag(sync=True)
    groups = traitlets.Dict().tag(sync=True)
    selected = traitlets.Unicode(None, allow_none=True).tag(sync=True)
    pruning = traitlets.Dict().tag(sync=True)

    def __init__(self, graph: Graph, nodes: Collection[str], **traits: Any):
        """Makes the widget of a graph's page.

        Args:
            graph: that groups must be about.
            nodes: names of those that the page shows.
            traits: to start with.
        """
        self._graph, self._nodes = graph, frozenset(nodes)
        super().__init__(**traits)

    @traitlets.validate("groups")
    def _groups_are_of_this_graph(self, proposal: Any) -> dict[str, Any]:
        source = "What `groups` is set to"
        groups = parse_groups(json.dumps(proposal["value"]), source)
        check_about(groups, self._graph, source)
        return as_json(groups)

    @traitlets.validate("selected")
    def _selected_is_a_node_of_the_page(self, proposal: Any) -> str | None:
        name = proposal["value"]
        if name is not None and name not in self._nodes:
            raise UserError(f"The page shows no node {one_line(name, 60)!r}, which `selected` is set to.")
        return name

    @traitlets.validate("pruning")
    def _pruning_is_what_prune_takes(self, proposal: Any) -> dict[str, Any]:
        given = dict(proposal["value"])
        if not given:
            return given
        numbers = [given.get(name) for name in THRESHOLDS]
        if set(given) != {"mode", *THRESHOLDS} or not all(type(number) in (int, float) for number in numbers):
            raise UserError(
                f"`pruning` is a mode and two numbers, {' and '.join(THRESHOLDS)}, as `prune` takes them, but it is "
                f"set to {one_line(repr(given), 120)}."
            )
        check_pruning(**given)
        return given


def as_json(groups: Groups) -> dict[str, Any]:
    """Returns groups as their file holds them.

    Args:
        groups: of a graph.
    """
    return groups.model_dump(mode="json")
