"""Print numbers about the package layout: files and lines, files per folder, import cycles, untyped config look-ups.

    python tools/measure_tree.py [checkout]

Modules are counted without `__init__.py`. An import counts wherever it stands: at the top, in a function or under
TYPE_CHECKING. A circle is a set of modules that import one another, directly or indirectly. A raw look-up is
`config["key"]` on an untyped mapping. Not counted are `config/` and `cli/`, where sections are still plain mappings,
and `model/` and `export/`, whose `config` is the plain config.json of a model.
"""

import ast
import re
import statistics
import sys
from pathlib import Path

RAW_LOOKUP = re.compile(r"\b(?:config|settings|section|filled|plain)\[[\"']")
MAY_LOOK_UP = ("config/", "cli/", "model/", "export/")


def module_names(package: Path) -> dict[str, Path]:
    """Return the paths of all modules of the package by dotted name."""
    names = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package.parent).with_suffix("").parts
        names[".".join(parts).removesuffix(".__init__")] = path
    return names


def imports_of(name: str, path: Path, modules: dict[str, Path]) -> set[str]:
    """Return the modules of the package that one module imports, wherever the import statements stand."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            origin = ".".join([*above, *([node.module] if node.module else [])])
            submodules = {f"{origin}.{alias.name}" for alias in node.names} & modules.keys()
            found |= submodules or {origin}
    return (found & modules.keys()) - {name}


def find_circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Return the strongly connected components with more than one module (Tarjan 1972)."""
    order: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    circles: list[list[str]] = []

    def visit(name: str) -> None:
        order[name] = lowest[name] = len(order)
        stack.append(name)
        for other in sorted(graph[name]):
            if other not in order:
                visit(other)
                lowest[name] = min(lowest[name], lowest[other])
            elif other in stack:
                lowest[name] = min(lowest[name], order[other])
        if lowest[name] == order[name]:
            members = stack[stack.index(name) :]
            del stack[stack.index(name) :]
            if len(members) > 1:
                circles.append(sorted(members))

    for name in graph:
        if name not in order:
            visit(name)
    return circles


def raw_lookups(package: Path) -> list[str]:
    """Return `file:line` of every look-up in an untyped configuration outside the folders where this is allowed."""
    found = []
    for path in sorted(package.rglob("*.py")):
        place = path.relative_to(package).as_posix()
        if not place.startswith(MAY_LOOK_UP):
            lines = path.read_text("utf-8").splitlines()
            found += [f"{place}:{number}" for number, line in enumerate(lines, 1) if RAW_LOOKUP.search(line)]
    return found


def main() -> None:
    root = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[1]
    package = root / "moss_train"
    modules = module_names(package)
    own = {name: path for name, path in modules.items() if path.name != "__init__.py"}
    lines = {name: len(path.read_text("utf-8").splitlines()) for name, path in modules.items()}
    folders: dict[str, int] = {}
    for path in own.values():
        folder = path.parent.relative_to(root).as_posix()
        folders[folder] = folders.get(folder, 0) + 1
    circles = find_circles({name: imports_of(name, path, modules) for name, path in modules.items()})
    lookups = raw_lookups(package)
    longest = max(folders, key=lambda folder: folders[folder])
    print(f"modules              {len(own)} (and {len(modules) - len(own)} __init__.py)")
    print(f"lines                {sum(lines.values())}")
    print(f"median lines         {statistics.median(lines[name] for name in own):.0f}")
    print(f"largest folder       {folders[longest]} modules, {longest}")
    print(f"longest modules      {', '.join(f'{n} {lines[n]}' for n in sorted(lines, key=lambda n: -lines[n])[:5])}")
    print(f"circles of imports   {len(circles)}")
    for circle in circles:
        print(f"    {', '.join(circle)}")
    print(f"raw look-ups         {len(lookups)}")
    for place in lookups:
        print(f"    {place}")


if __name__ == "__main__":
    main()
