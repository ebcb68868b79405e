"""The modules of a report as a tree in which repeated blocks are one: `h.0` to `h.11` become `h.*`, twelve of them."""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from ..category import Category
from ..report import MemoryReport

_ALIKE = 0.5
"""Blocks are repeated where this share of the names beneath them is common. At the peak some are partly freed."""


@dataclass
class Node:
    """A module, or several that are alike, with what they hold at the peak."""

    name: str
    """Relative to the parent: `attn`, or `*` for all numbered children, `2..5` for some of them."""
    paths: tuple[str, ...]
    """The modules that this node stands for."""
    own: dict[Category, int] = field(default_factory=dict)
    """Bytes of these modules themselves."""
    children: list["Node"] = field(default_factory=list)
    pattern: str = ""
    """The whole path, with the names of repeated blocks in it: `transformer.h.*.attn`."""
    repeated: bool = False
    """Whether it stands for more modules than its parent does: `h.*`, but not what is in it."""

    @property
    def total(self) -> dict[Category, int]:
        """Bytes of these modules and all beneath."""
        total = dict(self.own)
        for child in self.children:
            for category, size in child.total.items():
                total[category] = total.get(category, 0) + size
        return total

    @property
    def bytes(self) -> int:
        return sum(self.total.values())

    def walk(self) -> Iterator["Node"]:
        """This node and all beneath, parents first."""
        yield self
        for child in self.children:
            yield from child.walk()


def module_tree(report: MemoryReport) -> Node:
    """The report's modules as a tree: its root is the root module, and children come largest first."""
    paths = {""}
    for path in report.modules:
        parts = path.split(".") if path else []
        paths.update(".".join(parts[:end]) for end in range(1, len(parts) + 1))
    beneath: dict[str, list[str]] = {path: [] for path in paths}
    for path in sorted(paths - {""}, key=_natural):
        beneath[path.rpartition(".")[0]].append(path)
    root = _node("", ("",), beneath, report.modules)
    root.children = [_joined(child) for child in root.children]
    _name(root, "", 1)
    return root


def top_level(root: Node) -> list[Node]:
    """The root's children, and what the root itself holds beside them as one more, largest first."""
    itself = Node("the root itself", root.paths, root.own)
    return sorted([*root.children, itself], key=lambda node: -node.bytes)


def largest(root: Node, count: int, least_bytes: float = 0) -> list[tuple[int, Node]]:
    """The `count` largest nodes, in the order of the tree, each with its depth (0: of the top level).

    A parent is never smaller than its children, so that it is among them where they are.
    """
    deep: list[tuple[int, Node]] = []

    def visit(nodes: list[Node], depth: int) -> None:
        for node in nodes:
            deep.append((depth, node))
            visit(node.children, depth + 1)

    visit(top_level(root), 0)
    sizes = [node.bytes for _, node in deep]
    kept = sorted(range(len(deep)), key=lambda i: -sizes[i])[:count]
    return [deep[i] for i in sorted(kept) if sizes[i] >= least_bytes and sizes[i]]


def subtree_bytes(report: MemoryReport, category: Category) -> dict[str, int]:
    """Module path -> bytes of `category` in the module and all beneath it, at the peak."""
    sums: dict[str, int] = {}
    for path, own in report.modules.items():
        size = own.get(category, 0)
        parts = path.split(".") if path else []
        for end in range(len(parts) + 1):
            above = ".".join(parts[:end])
            sums[above] = sums.get(above, 0) + size
    return sums


def _node(
    name: str,
    paths: tuple[str, ...],
    beneath: Mapping[str, list[str]],
    modules: Mapping[str, Mapping[Category, int]],
) -> Node:
    node = Node(name, paths)
    for path in paths:
        for category, size in modules.get(path, {}).items():
            node.own[category] = node.own.get(category, 0) + size
    together: dict[str, list[str]] = {}
    for path in paths:
        for child in beneath[path]:
            together.setdefault(child.rpartition(".")[2], []).append(child)
    for label, members in _groups(together, beneath, modules):
        node.children.append(_node(label, members, beneath, modules))
    node.children.sort(key=lambda child: -child.bytes)
    return node


def _groups(
    together: Mapping[str, list[str]],
    beneath: Mapping[str, list[str]],
    modules: Mapping[str, Mapping[Category, int]],
) -> list[tuple[str, tuple[str, ...]]]:
    """Children by name; those with a number for a name, or at the end of it, are put together where they are alike."""
    series: dict[str, list[str]] = {}
    groups: list[tuple[str, tuple[str, ...]]] = []
    for name, members in together.items():
        stem, number = re.fullmatch(r"(.*?)(\d*)", name, re.DOTALL).groups()  # type: ignore[union-attr]
        # `h.0`, and `layer1` where it has modules of its own; but `fc1` and `fc2` are not the same thing twice.
        if number and (not stem or any(beneath[path] for path in members)):
            series.setdefault(stem, []).append(name)
        else:
            groups.append((name, tuple(members)))
    for stem, names in series.items():
        clusters: list[tuple[frozenset[str], list[str]]] = []
        for name in names:
            marks = frozenset().union(*(_marks(path, beneath, modules) for path in together[name]))
            for known, cluster in clusters:
                if marks and len(marks & known) >= _ALIKE * len(marks | known):
                    cluster.append(name)
                    break
            else:
                clusters.append((marks, [name]))
        for _, cluster in clusters:
            label = cluster[0]
            if len(cluster) > 1:
                numbers = [name[len(stem) :] for name in cluster]
                label = f"{stem}*" if len(clusters) == 1 else f"{stem}{numbers[0]}..{numbers[-1]}"
            groups.append((label, tuple(path for name in cluster for path in together[name])))
    return groups


def _marks(path: str, beneath: Mapping[str, list[str]], modules: Mapping[str, Mapping[Category, int]]) -> set[str]:
    """What a module is known by: the names beneath it; of one that has none, how much it weighs."""
    names = {below[len(path) :] for below in _below(path, beneath)}
    weights = modules.get(path, {}).get(Category.WEIGHTS, 0)
    return names or ({f"{weights} bytes"} if weights else set())


def _below(path: str, beneath: Mapping[str, list[str]]) -> Iterable[str]:
    for child in beneath[path]:
        yield child
        yield from _below(child, beneath)


def _joined(node: Node) -> Node:
    """`net`, which holds nothing but `net.transformer`, is one node with it. A repeated block stays by itself."""
    node.children = [_joined(child) for child in node.children]
    if len(node.children) == 1 and len(node.paths) == 1 and not any(node.own.values()):
        child = node.children[0]
        child.name = f"{node.name}.{child.name}"
        return child
    return node


def _name(node: Node, above: str, count: int) -> None:
    node.repeated = len(node.paths) > count
    node.pattern = f"{above}.{node.name}" if above else node.name
    for child in node.children:
        _name(child, node.pattern, len(node.paths))


def _natural(path: str) -> list[tuple[int, int, str]]:
    """`h.2` before `h.10`."""
    return [(0, len(part), part) if part.isdecimal() else (1, 0, part) for part in re.split(r"(\d+)", path)]
