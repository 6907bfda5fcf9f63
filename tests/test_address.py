"""Every mapping of a layout undoes its opposite, for FLUX and for models of other stacks."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from difffract_jax.address import (
    GROUPS,
    IMAGE,
    IMG,
    JOINT,
    LATENT,
    STREAMS,
    TEXT,
    TXT,
    Layout,
    Stack,
    Tokens,
    flux_layout,
)
from difffract_jax.config import UserError
from difffract_jax.graphs.provenance import KnownRun, Provenance
from difffract_jax.transcoders.sites import parse_sites, sites_of

FLUX = flux_layout(3, 2)
OTHER = Layout((Stack("pairs", 2, (IMAGE, TEXT)), Stack("alone", 3, (IMAGE,)), Stack("single", 2, (JOINT,))))
"""A model with blocks of the image stream alone between the others."""


KINDS = ((IMAGE, TEXT), (IMAGE,), (TEXT,), (JOINT,))
STACKS = st.lists(st.tuples(st.integers(0, 3), st.integers(0, len(KINDS) - 1)), min_size=1, max_size=4)
STACKS = STACKS.filter(lambda stacks: any(depth for depth, _ in stacks))
"""Models of up to four stacks, some of them without a block: depth and kind of each."""
TOKENS = st.tuples(st.integers(1, 6), st.integers(0, 5))


def layout_of(stacks):
    return Layout(tuple(Stack(f"s{i}", depth, KINDS[kind]) for i, (depth, kind) in enumerate(stacks)))


def test_flux_has_the_groups_in_the_order_of_its_files():
    assert FLUX.groups == GROUPS and FLUX.names == ("img", "txt", "joint")
    assert (FLUX.depth, FLUX.firsts, FLUX.stack_of_group) == (5, (0, 3), (0, 0, 1))
    assert FLUX.labels == {"img": (0, 1, 2), "txt": (0, 1, 2), "single": (3, 4)}
    assert [FLUX.depth_of(name) for name in FLUX.names] == [3, 3, 2]


def test_flux_puts_text_before_the_image_in_its_single_stream_blocks():
    codes, positions = FLUX.sequence(2, Tokens(img=3, txt=2))
    assert codes.tolist() == [TXT, TXT, IMG, IMG, IMG] and positions.tolist() == [0, 1, 0, 1, 2]
    assert JOINT.rows(Tokens(img=3, txt=2)) == 5 and IMAGE.rows(Tokens(img=3, txt=2)) == 3


def test_sites_of_a_group_count_on_through_the_stacks():
    assert OTHER.groups == (IMAGE, TEXT, IMAGE, JOINT) and OTHER.names == ("img", "txt", "joint")
    assert OTHER.labels == {"img": (0, 1, 2, 3, 4), "txt": (0, 1), "single": (5, 6)}
    assert (OTHER.block_name(2), OTHER.site_name(2, IMG), OTHER.site_name(5, TXT)) == ("alone/0", "img/2", "single/0")
    assert OTHER.groups_at([0, 0, 2, 2, 6, 6], [IMG, TXT, IMG, TXT, IMG, TXT]).tolist() == [0, 1, 2, -1, 3, 3]
    slots = sites_of({"img": (4, 1, 2), "joint": (1,)}, OTHER.groups).slots(OTHER)
    assert slots == ({1: 0}, {}, {2: 1, 4: 2}, {6: 0})
    assert parse_sites(["img/*"], OTHER).names == ("img/0", "img/1", "img/2", "img/3", "img/4")


@given(STACKS, TOKENS)
def test_rows_are_where_the_sequence_has_their_positions(stacks, tokens):
    layout, tokens = layout_of(stacks), Tokens(*tokens)
    for number, group in enumerate(layout.groups):
        codes, positions = layout.sequence(number, tokens)
        rows = layout.rows_at(np.full(len(codes), number), codes, positions, tokens)
        assert rows.tolist() == list(range(group.rows(tokens)))
        for block in layout.blocks_of(number):
            assert set(layout.groups_at(np.full(len(codes), block), codes)) <= {number}


@given(STACKS, TOKENS)
def test_what_lies_outside_the_blocks_has_no_group_and_keeps_its_position(stacks, tokens):
    layout, tokens = layout_of(stacks), Tokens(*tokens)
    blocks = [-1, -1, layout.depth, layout.depth]
    group = layout.groups_at(blocks, [IMG, LATENT, IMG, LATENT])
    assert group.tolist() == [-1] * 4
    assert layout.rows_at(group, [IMG, LATENT, IMG, LATENT], [0, 1, 2, 3], tokens).tolist() == [0, 1, 2, 3]
    inside = range(layout.depth)
    assert all(layout.groups_at(block, LATENT) == -1 for block in inside)


@given(STACKS)
def test_names_of_blocks_and_sites_lead_back_to_them(stacks):
    layout = layout_of(stacks)
    names = [layout.block_name(block) for block in range(layout.depth)]
    assert len(set(names)) == layout.depth
    for block, name in enumerate(names):
        stack, _, number = name.partition("/")
        assert layout.block_number(stack, int(number)) == block
        for stream in (IMG, TXT):
            group = int(layout.groups_at(block, stream))
            if group < 0:
                stack_groups = next(one.groups for one in layout.stacks if one.name == stack)
                assert all(STREAMS[stream] not in one.streams for one in stack_groups)
                continue
            label, site = layout.site_number(block, stream)
            assert layout.block_of(label, site) == block and block in layout.blocks_of(group)
            assert layout.site_name(block, stream) == f"{label}/{site}"
            assert STREAMS[stream] in layout.streams_of(label)
            assert layout.side(block, stream) == (STREAMS[stream] if len(layout.groups[group].streams) > 1 else None)


@given(STACKS)
def test_every_block_belongs_to_one_stack_and_every_site_to_one_group(stacks):
    layout = layout_of(stacks)
    parts = [list(layout.blocks_of_stack(number)) for number in range(len(layout.stacks))]
    assert [block for blocks in parts for block in blocks] == list(range(layout.depth))
    sites = [(group.label, block) for n, group in enumerate(layout.groups) for block in layout.blocks_of(n)]
    assert len(set(sites)) == len(sites) == sum(map(len, layout.labels.values()))
    for name in layout.names:
        assert layout.depth_of(name) == len(layout.labels[layout.named(name).label])


@given(STACKS)
def test_json_holds_the_whole_layout(stacks):
    layout = layout_of(stacks)
    told = Provenance(shared=KnownRun(layout=layout)).to_json()
    assert Provenance.from_json(json.loads(json.dumps(told))).layout == layout
    assert ("depths" in told["trace"]) == (layout.flux_depths is not None)


@given(STACKS, st.data())
def test_slots_place_every_site_once_in_its_stack(stacks, data):
    layout = layout_of(stacks)
    numbers = {
        name: data.draw(st.sets(st.integers(0, layout.depth_of(name) - 1)))
        for name in layout.names
        if layout.depth_of(name)
    }
    sites = sites_of({name: tuple(chosen) for name, chosen in numbers.items()}, layout.groups)
    placed = {
        (*layout.site_number(block, STREAMS.index(group.streams[0])), place)
        for group, slots in zip(layout.groups, sites.slots(layout), strict=True)
        for block, place in slots.items()
    }
    assert placed == {
        (layout.named(name).label, number, place)
        for name, chosen in sites.groups.items()
        for place, number in enumerate(chosen)
    }
    if sites.names:
        assert parse_sites(sites.names, layout) == sites


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            lambda: FLUX.block_number("double", 3),
            "no block double/3; the model has double/0 to double/2 and single/0 to single/1",
        ),
        (lambda: FLUX.block_number("triple", 0), "no block triple/0"),
        (lambda: FLUX.block_of("txt", 3), "txt/3 does not exist: the model has img/0 to img/2 and txt/0 to txt/2"),
        (lambda: FLUX.block_of("img", -1), "img/-1 does not exist"),
        (lambda: FLUX.block_of("mlp", 0), "mlp/0 does not exist"),
        (lambda: sites_of({"single": (0,)}), "no sites called 'single'; the model has img, txt, joint"),
    ],
)
def test_what_a_model_does_not_have_is_told_with_what_it_has(wrong, message):
    with pytest.raises(UserError, match=message):
        wrong()
