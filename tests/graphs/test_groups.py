"""Groups made by hand: which graph they are about, what their names stand for, and what is refused."""

import json
from dataclasses import replace

import numpy as np
import pytest

from difffract_jax.config import UserError
from difffract_jax.graphs.aggregation import aggregate
from difffract_jax.graphs.graph import FEATURE
from difffract_jax.graphs.groups import (
    Groups,
    given_names,
    identity,
    nodes_of,
    parse_groups,
    read_groups,
    with_groups,
    without_position,
    write_groups,
)
from difffract_jax.graphs.names import feature_names, node_names
from difffract_jax.graphs.pruning import prune
from difffract_jax.text_files import unicode_replaced
from random_graphs import random_output_graph
from shown_circuits import circuit


@pytest.mark.parametrize("graph", [circuit(), random_output_graph(0)])
def test_a_graph_keeps_its_identity_when_it_is_pruned(graph):
    assert identity(graph) == identity(prune(graph, node_threshold=0.4)) == identity(aggregate(graph))


def test_other_runs_and_targets_have_another_identity():
    ours = identity(circuit())
    assert len({ours.fingerprint, *(identity(g).fingerprint for g in (circuit(1), circuit(model="n")))}) == 3
    assert identity(circuit(prompt="a blue square")).fingerprint != ours.fingerprint
    assert identity(circuit().with_provenance(transcoders="u")).fingerprint != ours.fingerprint


def test_a_name_stands_for_a_feature_at_every_position():
    graph = circuit()
    summed = aggregate(graph)
    for node in np.flatnonzero(summed.node_kind == FEATURE):
        name = node_names(summed)[node]
        found = nodes_of(graph, [name])
        assert found.size and {feature_names(graph)[n] for n in found} == {feature_names(summed)[node]}
        assert nodes_of(summed, [name]).tolist() == [node]
    one = node_names(graph)[int(found[0])]
    assert nodes_of(graph, [one]).tolist() == [found[0]]


def test_names_of_single_positions_stand_for_the_sum_where_positions_are_summed_over():
    graph = circuit()
    summed = aggregate(graph)
    names, sums = node_names(graph), node_names(summed)
    found = [name for name in names if without_position(name) != name]
    assert found and {without_position(name) for name in found} <= {*sums}
    for name in found:
        assert [sums[n] for n in nodes_of(summed, [name])] == [without_position(name)]
    named = Groups(graph=identity(graph), names={found[-1]: "round"})
    assert given_names(summed, named) == {without_position(found[-1]): "round"}
    assert [without_position(name) for name in ("single/0/f7@img3#1", "error img/2@5", "pixels:box=0,0,2,2")] == [
        *("single/0/f7@img#1", "error img/2", "pixels:box=0,0,2,2")
    ]


def test_groups_become_supernodes_of_features(tmp_path):
    graph = aggregate(circuit())
    names = node_names(graph)
    features = [names[n] for n in np.flatnonzero(graph.node_kind == FEATURE)[1:4]]
    errors = [names[n] for n in np.flatnonzero(graph.node_kind != FEATURE)[:2]]
    made = Groups(graph=identity(graph), groups={"a": (*features, *errors), "gone": ("img/9/f9",)}, names={})
    write_groups(made, tmp_path / "g.groups.json")
    read = read_groups(tmp_path / "g.groups.json", graph)
    assert read == made
    assert with_groups(graph, read).supernodes == {"a": nodes_of(graph, features).tolist()}
    named = made.model_copy(update={"names": {features[0]: "round"}})
    assert given_names(graph, named) == {features[0]: "round"}
    assert {*given_names(circuit(), named).values()} == {"round"}


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        (f'{{"format": "difffract-groups", "format_version": {"1" * 5000}}}', "is not JSON"),
        ("[]", "is not a file of groups"),
        ('{"format": "other"}', "is not a file of groups"),
        (
            '{"format": "difffract-groups", "format_version": 2, "graph": {"fingerprint": "x"}}',
            "damaged at `format_version`",
        ),
        ('{"format": "difffract-groups", "graph": {"fingerprint": "x"}, "groups": {"a": 3}}', "damaged at `groups.a`"),
        ('{"format": "difffract-groups"}', "damaged at `graph`"),
    ],
)
def test_what_is_no_groups_file_is_one_sentence(tmp_path, content, told):
    path = tmp_path / "g.groups.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=told) as caught:
        read_groups(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_halves_of_characters_are_taken_out():
    read = parse_groups(
        '{"format": "difffract-groups", "graph": {"fingerprint": "x"}, "groups": {"a\\ud800": []}}', "It"
    )
    (name,) = read.groups
    assert name == unicode_replaced("a\ud800") and name.encode()


def test_groups_of_another_graph_are_refused(tmp_path):
    path = tmp_path / "g.groups.json"
    write_groups(Groups(graph=identity(circuit(prompt="a blue square"))), path)
    with pytest.raises(UserError, match='groups of another graph, of velocity:norm on "a blue square"'):
        read_groups(path, circuit())
    with pytest.raises(UserError, match="does not exist"):
        read_groups(tmp_path / "none.json")
    path.write_bytes(b"\xff\xfe\xff")
    with pytest.raises(UserError, match="is not"):
        read_groups(path)


def test_an_identity_is_json_whatever_the_prompt():
    told = identity(circuit(prompt="half a \ud83d character"))
    assert json.loads(told.model_dump_json())["prompt"] == "half a \ufffd character"
    assert identity(replace(circuit(), supernodes={"a": [1]})) == identity(circuit())
