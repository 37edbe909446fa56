"""What is to be done with the layers of a disk: small cases by hand, and any tree to its end."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mullion.services.checkpoint.layers import (
    Drop,
    Merge,
    begin_merge,
    chain_of,
    children_of,
    end_copy,
    end_merge,
    plan_layers,
    with_child,
    without,
)
from mullion.services.partition.record import DiskLayers, PartitionRecord

pytestmark = pytest.mark.unit

CHAIN = DiskLayers("c", {"base": None, "a": "base", "b": "a", "c": "b"})


def test_nothing_is_done_when_every_layer_is_needed() -> None:
    assert plan_layers(CHAIN, {"base", "a", "b"}) is None


def test_a_layer_that_only_one_other_needs_takes_it_in() -> None:
    assert plan_layers(CHAIN, {"base", "b"}) == Merge("b", "a")


def test_the_head_is_merged_when_its_parent_is_not_needed() -> None:
    assert plan_layers(CHAIN, {"base", "a"}) == Merge("c", "b")


def test_a_layer_with_two_children_stays() -> None:
    forked = with_child(CHAIN, "d", "a")
    assert plan_layers(forked, {"base", "b", "d"}) is None
    assert plan_layers(forked, {"base", "b"}) == Drop("d")


def test_what_is_read_neither_changes_nor_goes() -> None:
    assert plan_layers(CHAIN, {"base", "b"}, in_use={"a"}) is None
    abandoned = msgspec.structs.replace(with_child(CHAIN, "d", "b"), head="d")
    assert plan_layers(abandoned, {"base", "a", "b"}) == Drop("c")
    assert plan_layers(abandoned, {"base", "a", "b"}, in_use={"c"}) is None


def test_the_definitions_file_is_never_dropped() -> None:
    alone = DiskLayers("x", {"base": None, "x": None})
    assert plan_layers(alone, ()) is None


def test_a_merge_that_was_begun_comes_first() -> None:
    begun = begin_merge(with_child(CHAIN, "d", "c"), Merge("b", "a"))
    assert plan_layers(begun, {"base", "b"}) == Merge("b", "a")
    assert plan_layers(end_copy(begun), {"base", "b"}) == Merge("b", "a")


def test_after_a_merge_what_lay_on_the_upper_layer_lies_on_the_lower_one() -> None:
    merged = end_merge(end_copy(begin_merge(with_child(CHAIN, "d", "b"), Merge("b", "a"))))
    assert merged.parents == {"base": None, "a": "base", "b": "a", "c": "a", "d": "a"}
    assert plan_layers(merged, {"base", "a", "d"}) == Drop("b")
    assert chain_of(merged, "c") == ("c", "a", "base")


def test_the_record_keeps_layers() -> None:
    encoded = msgspec.json.encode(begin_merge(CHAIN, Merge("b", "a")))
    assert msgspec.json.decode(encoded, type=DiskLayers).merging is not None
    assert PartitionRecord.__struct_fields__.index("layers")


@st.composite
def _trees(draw: st.DrawFn) -> tuple[DiskLayers, set[str]]:
    count = draw(st.integers(1, 8))
    parents: dict[str, str | None] = {"n0": None}
    for number in range(1, count):
        parents[f"n{number}"] = f"n{draw(st.integers(0, number - 1))}"
    leaves = [path for path, below in children_of(parents).items() if not below]
    head = draw(st.sampled_from(leaves))
    others = [path for path in parents if path != head]
    pinned = draw(st.sets(st.sampled_from(others))) if others else set()
    return DiskLayers(head, parents), pinned


@given(_trees())
def test_any_tree_comes_to_an_end_with_the_same_content(tree: tuple[DiskLayers, set[str]]) -> None:
    """Content is modelled as the set of writes below a node: layers are named by the writes that they hold."""
    layers, pinned = tree
    held = {path: frozenset((path,)) for path in layers.parents}

    def content(path: str) -> frozenset[str]:
        return frozenset().union(*(held[one] for one in chain_of(layers, path)))

    before = {path: content(path) for path in (*pinned, layers.head)}
    names = {path: path for path in before}  # which layer stands for it now
    for _ in range(64):
        act = plan_layers(layers, {names[path] for path in pinned})
        if act is None:
            break
        if isinstance(act, Drop):
            assert act.path not in {names[path] for path in before}
            layers = without(layers, act.path)
            continue
        held[act.lower] |= held[act.upper]
        layers = end_merge(end_copy(begin_merge(layers, act)))
        names = {path: act.lower if now == act.upper else now for path, now in names.items()}
    assert act is None, "it does not come to an end"
    assert {path: content(names[path]) for path in before} == before
    children = children_of(layers.parents)
    needed = {names[path] for path in before}
    assert all(path in needed or len(children[path]) > 1 or layers.parents[path] is None for path in layers.parents)
