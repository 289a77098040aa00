"""Rooms import only from rooms below them, and light commands do not load JAX."""

import ast
import subprocess
import sys
from pathlib import Path

import memjax

ROOT = Path(memjax.__file__).parent
# Top to bottom; files of the package root that every room may use stand last.
ORDER = [
    "cli", "plan", "evaluate", "bench", "serve", "bank", "write", "evict", "train", "models", "memory", "kernels",
    "sharding", "distributed", "config", "ids", "errors",
]  # fmt: skip


def room_of(module: str) -> str | None:
    parts = module.split(".")
    return parts[1] if parts[0] == "memjax" and len(parts) > 1 else None


def imports(path: Path):
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names] if node.module == "memjax" else [node.module]
            yield from ((node.lineno, name) for name in names)
        elif isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)


def test_imports_run_downwards_only():
    wrong = []
    for path in ROOT.rglob("*.py"):
        relative = path.relative_to(ROOT)
        own = relative.parts[0] if len(relative.parts) > 1 else relative.stem
        if own == "__init__":
            continue
        for line, name in imports(path):
            room = room_of(name)
            if room in ORDER and room != own and ORDER.index(room) < ORDER.index(own):
                wrong.append(f"{relative}:{line} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_every_room_is_in_the_order():
    rooms = {p.name for p in ROOT.iterdir() if p.is_dir() and (p / "__init__.py").exists()}
    files = {p.stem for p in ROOT.glob("*.py")} - {"__init__"}
    assert (rooms | files) <= set(ORDER)


def test_help_and_the_index_need_no_jax():
    code = "import sys, memjax.cli.main, memjax.bank.store; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
