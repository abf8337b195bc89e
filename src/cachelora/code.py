"""Digests of code that change when what the code does may change, and not when a comment does."""

import ast
import hashlib
from pathlib import Path

_PACKAGE = Path(__file__).parent


def code_digest(*paths: str | Path) -> str:
    """Return a digest of Python files and of all modules of this library that they import.

    It is taken of the syntax trees without docstrings and positions, so comments and layout do not count. The module of
    the configuration does not count either: what it says reaches a job through its params.

    Parameters
    ----------
    *paths : str or Path
        Python files, such as the script of a stage.

    Returns
    -------
    str
        16 hexadecimal digits.
    """
    trees: dict[Path, str] = {}
    waiting = [Path(path).resolve() for path in paths]
    while waiting:
        path = waiting.pop()
        if path in trees or path == _PACKAGE.resolve() / "config.py":
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        waiting += _imports(tree)
        trees[path] = ast.dump(_without_docstrings(tree))
    # Sorted by content, not by path: where the checkout lies does not count.
    content = "\n".join(sorted(trees.values())) + _data_digest(trees)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def _imports(tree: ast.AST) -> list[Path]:
    """List the files of this library that a module imports, at any depth of its code."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    found = []
    for name in names:
        package, *parts = name.split(".")
        place = _PACKAGE.joinpath(*parts)
        if package == _PACKAGE.name:
            found += [path for path in (place.with_suffix(".py"), place / "__init__.py") if path.is_file()]
    return [path.resolve() for path in found]


def _without_docstrings(tree: ast.AST) -> ast.AST:
    """Remove the docstrings of a tree in place."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            if (
                isinstance(first, ast.Expr)
                and isinstance(first.value, ast.Constant)
                and isinstance(first.value.value, str)
            ):
                node.body = node.body[1:]
    return tree


def _data_digest(trees: dict[Path, str]) -> str:
    """Return the prompts and pages that lie beside the modules: they are code in another language."""
    folders = {path.parent for path in trees if path.is_relative_to(_PACKAGE)}
    found = sorted(
        path for folder in folders for pattern in ("prompts/*.txt", "*.html") for path in folder.glob(pattern)
    )
    return "\n".join(path.read_text(encoding="utf-8") for path in found)
