"""The tree of modules, with repeated blocks as one."""

import dataclasses

import pytest
from reports import MIB, transformer

from lightning_mpt.profiler import Category, MemoryReport
from lightning_mpt.profiler.recording import Recording
from lightning_mpt.profiler.show.tree import Node, largest, module_tree, subtree_bytes


def tree_of(modules: dict[str, int]) -> Node:
    empty = MemoryReport.from_recording(Recording("cpu", 0))
    own = {path: {Category.WEIGHTS: size} for path, size in modules.items()}
    return module_tree(dataclasses.replace(empty, modules=own))


def patterns(root: Node) -> dict[str, tuple[int, int]]:
    """Pattern -> how many modules, and the bytes in them and beneath."""
    return {node.pattern: (len(node.paths), node.bytes) for node in root.walk()}


def test_repeated_blocks_are_one_with_the_sum() -> None:
    found = patterns(module_tree(transformer(12)))
    assert found["net.h.*"][0] == found["net.h.*.attn"][0] == 12
    assert found["net.h.*"][1] == found[""][1] - MIB
    assert [node.name for node in module_tree(transformer(12)).walk() if node.repeated] == ["net.h.*"]


def test_the_root_holds_everything() -> None:
    report = transformer()
    total = module_tree(report).total
    for category in Category:
        assert total.get(category, 0) == sum(own.get(category, 0) for own in report.modules.values())


def test_blocks_are_in_the_order_of_their_numbers_and_children_largest_first() -> None:
    root = tree_of({**{f"h.{i}.fc": 10 for i in range(11)}, "head": 1000})
    assert [child.name for child in root.children] == ["head", "h.*"]
    assert root.children[1].paths == tuple(f"h.{i}" for i in range(11))


def test_layers_of_a_sequential_that_differ_stay_apart() -> None:
    assert {"0", "2"} <= patterns(tree_of({"0": 100, "2": 300})).keys()
    assert patterns(tree_of({"0": 100, "1": 100, "2": 100}))["*"] == (3, 300)


def test_some_alike_of_several_are_named_by_their_numbers() -> None:
    found = patterns(tree_of({"0": 5, **{f"{i}.conv": 10 for i in (1, 2, 3)}}))
    assert found["1..3.conv"] == (3, 30)
    assert found["0"] == (1, 5)


def test_stages_of_blocks_are_put_together_too() -> None:
    modules = {f"layer{i}.{j}.conv{k}": 10 * i for i in (1, 2) for j in (0, 1, 2) for k in (1, 2)}
    found = patterns(tree_of(modules))
    assert found["layer*.*"] == (6, 180)
    assert found["layer*.*.conv1"] == (6, 90), "conv1 and conv2 are not the same module twice"


def test_a_block_that_is_partly_freed_is_still_one_of_them() -> None:
    modules = {f"h.{i}.{name}": 10 for i in range(3) for name in ("a", "b", "c")}
    del modules["h.2.c"]
    assert patterns(tree_of(modules))["h.*"] == (3, 80)


def test_what_lies_beneath_a_module_is_counted_with_it() -> None:
    sums = subtree_bytes(transformer(2, activations=40 * MIB), Category.ACTIVATIONS)
    assert sums["net.h.1"] == 40 * MIB
    assert sums[""] == sums["net"] == sums["net.h"] == 80 * MIB
    assert sums["net.h.0.mlp"] == 24 * MIB


def test_a_report_of_nothing_has_a_root() -> None:
    assert patterns(tree_of({})) == {"": (1, 0)}


def test_the_largest_nodes_come_with_their_parents() -> None:
    rows = [(depth, node.name) for depth, node in largest(module_tree(transformer(12)), 2)]
    assert rows == [(0, "net.h.*"), (1, "mlp")]
    assert largest(module_tree(transformer(12)), 10, least_bytes=1 << 40) == []


@pytest.mark.parametrize(("own", "names"), [(30, ["the root itself", "a", "b"]), (15, ["a", "the root itself", "b"])])
def test_what_the_root_itself_holds_is_among_the_largest(own: int, names: list[str]) -> None:
    root = tree_of({"": own, "a": 20, "b": 10})
    rows = largest(root, 3)
    assert [node.name for _, node in rows] == names
    assert sum(node.bytes for _, node in rows) == root.bytes
    assert [node.name for _, node in largest(tree_of({"a": 20}), 3)] == ["a"]
