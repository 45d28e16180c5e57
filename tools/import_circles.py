"""Find files that import each other in a circle: python -m tools.import_circles

Every import counts, inside functions and under TYPE_CHECKING, too: what is imported late to get round a circle is still in it.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Mapping
from importlib.util import resolve_name
from pathlib import Path

ROOTS = (Path("."), Path("clients/python"))
PACKAGES = ("orthokv", "orthokv_client", "app", "workers", "migrations")

Graph = Mapping[str, set[str]]


def product_files() -> dict[str, Path]:
    """Every product file by the name that it is imported by."""
    return {
        _module(path.relative_to(root)): path
        for root in ROOTS
        for package in PACKAGES
        for path in sorted((root / package).rglob("*.py"))
    }


def _module(path: Path) -> str:
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


def import_graph(files: Mapping[str, Path]) -> Graph:
    return {
        module: {found for found in _imported(module, path, files) if found != module}
        for module, path in files.items()
    }


def _imported(module: str, path: Path, files: Mapping[str, Path]) -> Iterator[str]:
    """The product's modules that a file names. A package counts where a name is taken from the package itself."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in files)
        elif isinstance(node, ast.ImportFrom):
            package = module if path.name == "__init__.py" else module.rpartition(".")[0]
            base = resolve_name("." * node.level + (node.module or ""), package)
            for alias in node.names:
                if (found := f"{base}.{alias.name}") in files:
                    yield found
                elif base in files:
                    yield base


def circles(graph: Graph) -> list[list[str]]:
    """Sets of modules of which each reaches each other, by Tarjan's algorithm; the largest first."""
    order: dict[str, int] = {}
    lowest: dict[str, int] = {}
    path: list[str] = []
    found: list[list[str]] = []

    def visit(module: str) -> None:
        order[module] = lowest[module] = len(order)
        path.append(module)
        for other in sorted(graph[module]):
            if other not in order:
                visit(other)
                lowest[module] = min(lowest[module], lowest[other])
            elif other in path:
                lowest[module] = min(lowest[module], order[other])
        if lowest[module] == order[module]:
            start = path.index(module)
            if len(path) - start > 1:
                found.append(sorted(path[start:]))
            del path[start:]

    for module in graph:
        if module not in order:
            visit(module)
    return sorted(found, key=len, reverse=True)


def main() -> int:
    graph = import_graph(product_files())
    found = circles(graph)
    for circle in found:
        print(f"{len(circle)} files import each other in a circle:")
        for module in circle:
            print(f"  {module} imports {', '.join(sorted(graph[module] & set(circle)))}")
    if not found:
        print(f"no two files import each other in a circle ({len(graph)} files)")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
