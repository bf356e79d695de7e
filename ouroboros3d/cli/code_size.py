"""Prints lines of code per folder, now and at an older revision, and the import graph.

    python scripts/code_size.py [--since 14cc34e]

A line counts if it holds code: blank lines, comments and docstrings do not.
"""

from __future__ import annotations

import ast
import io
import subprocess
import tokenize
from collections import Counter
from collections.abc import Iterator

from ouroboros3d.cli.options import Parser
from ouroboros3d.files import ROOT

PACKAGE = "ouroboros3d"
QUIET = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)


def code_lines(source: str) -> int:
    """Lines of a Python file that hold code."""
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in QUIET:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr):
            value = body[0].value
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                lines.difference_update(range(value.lineno, value.end_lineno + 1))
    return len(lines)


def folder_of(path: str) -> str:
    """`ouroboros3d/training` for a file of a folder there, `ouroboros3d` for one at its top, else the first folder."""
    parts = path.split("/")
    return "/".join(parts[: 2 if parts[0] == PACKAGE and len(parts) > 2 else 1]) if len(parts) > 1 else "top"


def files(revision: str | None) -> Iterator[tuple[str, str]]:
    """(path, source) of the Python files of a revision, or of the working tree for None."""
    listing = ["git", "ls-tree", "-r", "--name-only", revision] if revision else ["git", "ls-files"]
    for path in subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines():
        if not path.endswith(".py"):
            continue
        if revision:
            show = ["git", "show", f"{revision}:{path}"]
            yield path, subprocess.run(show, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        elif (ROOT / path).is_file():
            yield path, (ROOT / path).read_text()


def imports(path: str, source: str, modules: set[str]) -> set[str]:
    """The modules of the package that a file imports, wherever it does, but not for types alone."""
    found, tree = set(), ast.parse(source)
    tree.body = [n for n in tree.body if not (isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING")]
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == PACKAGE:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (names & modules) or ({node.module} & modules)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names} & modules
    return found - {path.removesuffix(".py").replace("/", ".")}


def levels(graph: dict[str, set[str]]) -> tuple[int, bool]:
    """Length of the longest chain of imports, and whether there is a circle (which is then cut somewhere)."""
    depth: dict[str, int] = {}
    circles = []

    def of(name: str, above: tuple[str, ...] = ()) -> int:
        if name in above:
            circles.append(name)
            return 0
        if name not in depth:
            depth[name] = 1 + max((of(other, (*above, name)) for other in sorted(graph[name])), default=0)
        return depth[name]

    return max(map(of, sorted(graph))), bool(circles)


def graph_of(sources: dict[str, str]) -> dict[str, set[str]]:
    """Module -> modules it imports, of the package."""
    names = {path.removesuffix(".py").removesuffix("/__init__").replace("/", "."): path for path in sources}
    modules = {name for name in names if name.startswith(f"{PACKAGE}.")}
    return {name: imports(names[name], sources[names[name]], modules) for name in modules}


def main(arguments: list[str]) -> None:
    parser = Parser(__doc__)
    parser.add_argument("--since", metavar="REVISION", help="a revision to compare with")
    options = parser.parse_args(arguments)
    tables = {}
    for revision in [options.since, None] if options.since else [None]:
        sources = dict(files(revision))
        counts = {path: code_lines(source) for path, source in sources.items()}
        folders: Counter[str] = Counter()
        for path, count in counts.items():
            folders[folder_of(path)] += count
        graph = graph_of(sources)
        edges, (depth, circle) = sum(map(len, graph.values())), levels(graph)
        tables[revision or "now"] = folders
        longest = max((p for p in sources if not p.startswith("tests/")), key=lambda p: sources[p].count("\n"))
        lines = sources[longest].count("\n")
        print(
            f"{revision or 'now'}: {folders.total()} lines of code in {len(sources)} files, {len(graph)} modules, "
            f"{edges} import edges on {depth} levels{' with a circle' if circle else ''}; longest {longest}, {lines}"
        )
    print(f"\n{'folder':24}" + "".join(f"{name[:10]:>10}" for name in tables))
    for name in sorted(set().union(*tables.values())):
        print(f"{name:24}" + "".join(f"{table[name]:10}" for table in tables.values()))
