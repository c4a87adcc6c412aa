"""Which code a result comes from: an edited loss gives another result."""

import ast
import functools
import hashlib
from pathlib import Path

from tasks.registry import MODULES

ROOT = Path(__file__).parents[1]
# Where the search for the code of a result begins; all that these import belongs to it as well.
STARTS = ("train", "capfilt", "tools.judge", *MODULES)
# They only show what came out (but for what judges).
ASIDE, BUT = ("reports", "tools"), ("reports.metrics", "tools.judge")


@functools.cache
def digest_of_code() -> str:
    """Of the code that a result may depend on, as it is at the first call.

    Without comments and docstrings.
    """
    content = hashlib.sha256()
    for _, tree in sorted(code_files().items()):
        content.update(code_of(tree).encode())
    return content.hexdigest()


def code_files() -> dict[Path, ast.Module]:
    """The files that a result may depend on, a student's own too: found by what imports what."""
    waiting, needed = list(STARTS), {}
    while waiting:
        name = waiting.pop()
        path = file_of(name)
        if path and path not in needed and (name in BUT or name.split(".")[0] not in ASIDE):
            needed[path] = ast.parse(path.read_text(encoding="utf-8"))
            waiting += imports_of(needed[path])
    return needed


def file_of(module: str) -> Path | None:
    """The file of one of this project's modules; None: it is none of them."""
    path = ROOT.joinpath(*module.split("."))
    if path.with_suffix(".py").exists():
        return path.with_suffix(".py")
    return path / "__init__.py" if (path / "__init__.py").exists() else None


def imports_of(tree: ast.Module) -> list[str]:
    """Names that may be modules which a file imports."""
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return names


def code_of(tree: ast.Module) -> str:
    """A file's code, without comments and docstrings (the tree loses them)."""
    documented = ast.Module | ast.ClassDef | ast.FunctionDef
    for node in ast.walk(tree):
        if isinstance(node, documented) and ast.get_docstring(node):
            node.body[0].value.value = ""
    return ast.unparse(tree)
