"""Print figures of the code's structure: `make house`, or `python scripts/house.py [--root DIR] [--json]`.

The product is the code below swarm/, node/ and client/; bench/ and tests/ are counted separately.  Generated code is
not counted.  The fields of a class are its annotated names and the attributes that its methods assign to `self`.
tests/test_house.py holds the checkout to the limits below.
"""

import argparse
import ast
import json
import statistics
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

PRODUCT = ("swarm", "node", "client")
OTHERS = ("bench", "tests")
PACKAGES = ("treeswarm", "treeswarm_node", "treeswarm_client", "treeswarm_bench")
MOST_FILES, MOST_LINES, MOST_FIELDS, MOST_METHODS = 14, 520, 10, 15
FRAGMENTS = ("After ", "As ", "By ", "For ", "How it ", "In ", "It ", "Its ", "None ", "Of ", "That ", "Whoever")
Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class House:
    """Figures of one checkout.  Lists name the places, longest or largest first."""

    product_lines: int
    product_files: int
    other_lines: dict[str, int]
    largest_folders: list[tuple[int, str]]
    longest_files: list[tuple[int, str]]
    many_lines: list[tuple[int, str]]
    many_fields: list[tuple[int, str]]
    many_methods: list[tuple[int, str]]
    function_lines: dict[str, float]
    longest_functions: list[tuple[int, str]]
    fragment_docstrings: list[str]
    class_names_twice: dict[str, list[str]]
    import_circles: list[list[str]]


@dataclass(frozen=True)
class Module:
    """One parsed file."""

    path: str
    lines: int
    tree: ast.Module

    @cached_property
    def nodes(self) -> list[ast.AST]:
        """All nodes of the syntax tree."""
        return list(ast.walk(self.tree))

    @property
    def name(self) -> str:
        """Dotted name that imports use."""
        parts = self.path.removesuffix(".py").split("/")[1:]
        return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def read(root: Path, folders: Iterable[str]) -> list[Module]:
    """Parse every file below the folders, except generated ones."""
    files = [file for folder in folders for file in sorted((root / folder).rglob("*.py")) if "_pb2" not in file.name]
    modules = []
    for file in files:
        text = file.read_text("utf-8")
        modules.append(Module(str(file.relative_to(root)), text.count("\n"), ast.parse(text)))
    return modules


def measure(root: Path) -> House:
    """Return the figures of the checkout at `root`."""
    product, others = read(root, PRODUCT), {folder: read(root, [folder]) for folder in OTHERS}
    typed = [*product, *others["bench"]]
    everything = [*typed, *others["tests"]]
    functions = sorted(
        ((_length(node), f"{module.path}:{node.name}") for module in product for node in _functions(module)),
        reverse=True,
    )
    lengths = [length for length, _ in functions]
    return House(
        product_lines=sum(module.lines for module in product),
        product_files=len(product),
        other_lines={folder: sum(module.lines for module in modules) for folder, modules in others.items()},
        largest_folders=_largest_folders(product),
        longest_files=sorted(((module.lines, module.path) for module in product), reverse=True)[:5],
        many_lines=_over(MOST_LINES, ((module.lines, module.path) for module in everything)),
        many_fields=_over(MOST_FIELDS, ((_fields(node), place) for node, place in _classes(product))),
        many_methods=_over(MOST_METHODS, ((_methods(node), place) for node, place in _classes(product))),
        function_lines={
            "median": statistics.median(lengths),
            "p90": statistics.quantiles(lengths, n=10)[-1],
            "max": max(lengths),
        },
        longest_functions=functions[:5],
        fragment_docstrings=[place for module in typed for place in _fragments(module)],
        class_names_twice=_twice(typed),
        import_circles=circles(_imports(typed)),
    )


def _largest_folders(modules: Sequence[Module]) -> list[tuple[int, str]]:
    files: dict[str, int] = defaultdict(int)
    for module in modules:
        folder, _, name = module.path.rpartition("/")
        files[folder] += name != "__init__.py"
    return sorted(((count, folder) for folder, count in files.items()), reverse=True)[:5]


def _classes(modules: Iterable[Module]) -> Iterator[tuple[ast.ClassDef, str]]:
    for module in modules:
        for node in module.nodes:
            if isinstance(node, ast.ClassDef):
                yield node, f"{module.path}:{node.name}"


def _over(limit: int, counted: Iterable[tuple[int, str]]) -> list[tuple[int, str]]:
    return sorted((pair for pair in counted if pair[0] > limit), reverse=True)


def _fields(node: ast.ClassDef) -> int:
    names = {
        part.target.id for part in node.body if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name)
    }
    for part in ast.walk(node):
        targets = (
            part.targets if isinstance(part, ast.Assign) else [part.target] if isinstance(part, ast.AnnAssign) else []
        )
        names |= {target.attr for target in targets if isinstance(target, ast.Attribute) and _is_self(target.value)}
    return len(names)


def _is_self(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id == "self"


def _methods(node: ast.ClassDef) -> int:
    return sum(isinstance(part, Function) for part in node.body)


def _functions(module: Module) -> Iterator[Function]:
    return (node for node in module.nodes if isinstance(node, Function))


def _length(node: Function) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


def _fragments(module: Module) -> Iterator[str]:
    """Yield the places of docstrings, those of fields included, that begin as a fragment."""
    for node in module.nodes:
        text = node.value if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) else None
        if text is not None and isinstance(text.value, str) and text.value.startswith(FRAGMENTS):
            yield f"{module.path}:{text.lineno}"


def _twice(modules: Sequence[Module]) -> dict[str, list[str]]:
    places = defaultdict(list)
    for node, place in _classes(modules):
        places[node.name].append(place.partition(":")[0])
    return {name: files for name, files in sorted(places.items()) if len(files) > 1}


def _imports(modules: Sequence[Module]) -> dict[str, set[str]]:
    """Return which of the modules each one imports, imports for types and within functions included."""
    names = {module.name for module in modules}
    graph: dict[str, set[str]] = {}
    for module in modules:
        imported = set()
        for node in module.nodes:
            if isinstance(node, ast.Import):
                imported |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                inner = {f"{node.module}.{alias.name}" for alias in node.names}
                imported |= {name if name in names else node.module for name in inner}
        graph[module.name] = (imported & names) - {module.name}
    return graph


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Return the strongly connected components of more than one module (Tarjan, 1972)."""
    order: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    components: list[list[str]] = []

    def visit(name: str) -> None:
        order[name] = low[name] = len(order)
        stack.append(name)
        for other in sorted(graph[name]):
            if other not in order:
                visit(other)
            if other in stack:
                low[name] = min(low[name], low[other])
        if low[name] == order[name]:
            cut = stack.index(name)
            component = sorted(stack[cut:])
            del stack[cut:]
            if len(component) > 1:
                components.append(component)

    for name in sorted(graph):
        if name not in order:
            visit(name)
    return components


def show(house: House) -> str:
    """Return the figures as text."""
    lines = [
        f"product                          {house.product_lines} lines in {house.product_files} files",
        f"beside it                        {', '.join(f'{k} {v} lines' for k, v in house.other_lines.items())}",
        f"largest folder                   {_first(house.largest_folders)} files (limit {MOST_FILES})",
        f"longest file                     {_first(house.longest_files)} lines",
        f"classes over {MOST_FIELDS} fields           {_listed(house.many_fields)}",
        f"classes over {MOST_METHODS} methods          {_listed(house.many_methods)}",
        "functions, lines                 median {median:.0f}, p90 {p90:.0f}, longest {max}".format(
            **house.function_lines
        )
        + f" ({house.longest_functions[0][1]})",
        f"docstrings that start as fragments  {len(house.fragment_docstrings)}",
        f"class names with two meanings    {len(house.class_names_twice)} {', '.join(house.class_names_twice)}",
        f"import circles                   {len(house.import_circles)} {house.import_circles or ''}",
    ]
    return "\n".join(line.rstrip() for line in lines)


def _first(pairs: Sequence[tuple[int, str]]) -> str:
    return f"{pairs[0][1]}: {pairs[0][0]}"


def _listed(pairs: Sequence[tuple[int, str]]) -> str:
    return f"{len(pairs)}  " + ", ".join(f"{place.rpartition(':')[2]} {count}" for count, place in pairs)


def main() -> None:
    """Read the command line and print the figures."""
    parser = argparse.ArgumentParser(description="Print figures of the code's structure.")
    parser.add_argument("--root", type=Path, default=Path(__file__).parents[1], help="checkout (default: this one)")
    parser.add_argument("--json", action="store_true", help="one JSON object with every place named")
    args = parser.parse_args()
    house = measure(args.root)
    print(json.dumps(asdict(house), indent=1) if args.json else show(house))


if __name__ == "__main__":
    main()
