"""Draws docs/rooms.svg: the rooms of the package, and who imports whom, from the sources themselves.

python docs/make_rooms.py            write the picture
python docs/make_rooms.py --check    exit with 1 where it is not the one of the sources, or an import goes down
"""

from __future__ import annotations

import ast
import sys
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PICTURE = ROOT / "docs" / "rooms.svg"
ROOMS: dict[str, tuple[tuple[str, ...], str]] = {
    "command": (("cli",), "the fastlora command"),
    "bench": (("bench",), "measuring: timing, records, suites, tables"),
    "search": (("search",), "settings by trial, each in a process"),
    "report": (("report",), "runs on one page"),
    "training": (("training",), "data, loop, checkpoints, methods, generation"),
    "integrations": (("integrations",), "PEFT, bitsandbytes: explicit calls, no patches"),
    "methods": (("adapters", "requantize", "parameters"), "around LoRA, one file each, on the same operator"),
    "layers": (
        ("linear", "blocks", "dora", "groups", "loss", "norm", "recomputed", "rotary"),
        "modules: checks, types, several layers at once",
    ),
    "operator": (("ops", "node", "packed"), "one differentiable node"),
    "choice": (("backends",), "which kernel runs, and why"),
    "kernels": (("kernels", "native", "eager"), "Triton, C++ and CUDA, library products"),
    "tables": (("tables",), "what was measured where"),
    "truth": (
        ("nf4", "int8", "dropout", "reference", "activation", "stacking", "decoded"),
        "format and mathematics, in plain PyTorch",
    ),
}
"""From the top to the bottom: imports go down this list only."""
ERRORS = "training.errors"
"""Errors that a user can mend are known everywhere: no room of its own."""
_PACKAGE = "fastlora"
_WIDTH, _BOX, _GAP, _LEFT = 760, 46, 18, 190


def _room(module: str) -> str | None:
    """The room of a module's name within the package."""
    head = module.split(".")[0]
    return next((name for name, (parts, _) in ROOMS.items() if head in parts), None)


def _imports(path: Path) -> set[str]:
    """Modules of the package that a file imports, within functions too; those only for types left out."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            node.body = []
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            inner = ROOT.joinpath(*node.module.split("."))
            for alias in node.names:
                deeper = (inner / f"{alias.name}.py").is_file() or (inner / alias.name).is_dir()
                found.add(f"{node.module}.{alias.name}" if deeper else node.module)
    return {name.removeprefix(f"{_PACKAGE}.") for name in found if name.startswith(f"{_PACKAGE}.")}


def arrows() -> dict[tuple[str, str], list[str]]:
    """(room, room that it imports) to the imports themselves. Raises LookupError for a module without a room."""
    found: dict[tuple[str, str], list[str]] = {}
    for path in sorted((ROOT / _PACKAGE).rglob("*.py")):
        module = ".".join(path.relative_to(ROOT / _PACKAGE).with_suffix("").parts).removesuffix(".__init__")
        if module == "__init__":
            continue
        room = _room(module)
        if room is None:
            raise LookupError(f"{module} is in no room: name it in ROOMS of {Path(__file__).name}")
        for name in _imports(path):
            other = _room(name)
            if other is not None and other != room and name != ERRORS:
                found.setdefault((room, other), []).append(f"{module} imports {name}")
    return found


def down(found: dict[tuple[str, str], list[str]]) -> list[str]:
    """Imports that go against the order of the rooms."""
    order = list(ROOMS)
    return [text for (a, b), texts in found.items() if order.index(a) > order.index(b) for text in texts]


def svg(found: dict[tuple[str, str], list[str]]) -> str:
    """The picture: a box for each room, and an arrow to each room that it imports."""
    order = list(ROOMS)
    height = len(order) * (_BOX + _GAP) + _GAP
    top = {name: _GAP + i * (_BOX + _GAP) for i, name in enumerate(order)}
    edges = sorted(((order.index(a), order.index(b)) for a, b in found), key=lambda e: (e[1] - e[0], e))
    said = ", ".join(
        f"{a} imports {' and '.join(b for c, b in sorted(found) if c == a)}"
        for a in order
        if any(c == a for c, _ in found)
    )
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" role="img" font-family="sans-serif">',
        f"<title>Rooms of fastlora: {escape(said)}</title>",
        "<style>.paper{fill:#fff}.box{fill:#eaf2fb;stroke:#0b63b5}.name{font-size:15px;font-weight:bold;fill:#1c2430}"
        ".what{font-size:12px;fill:#46525f}.arrow{fill:none;stroke:#8793a0;stroke-width:1.3}.head{fill:#5b6675}</style>",
        '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path class="head" d="M0 0L8 4L0 8z"/></marker></defs>',
        f'<rect class="paper" width="{_WIDTH}" height="{height}"/>',
    ]
    for a, b in edges:
        span = b - a
        if span <= 0:
            continue
        from_y, to_y = top[order[a]] + _BOX, top[order[b]]
        if span == 1:
            out.append(f'<path class="arrow" d="M{_LEFT + 70} {from_y}V{to_y - 1}" marker-end="url(#head)"/>')
            continue
        y0, y1 = top[order[a]] + _BOX / 2 + 8, top[order[b]] + _BOX / 2 - 8
        reach = _LEFT - 14 - span * 15
        curve = f"M{_LEFT} {y0:g}C{reach} {y0:g} {reach} {y1:g} {_LEFT - 1} {y1:g}"
        out.append(f'<path class="arrow" d="{curve}" marker-end="url(#head)"/>')
    for name, (parts, what) in ROOMS.items():
        y = top[name]
        out.append(f'<rect class="box" x="{_LEFT}" y="{y}" width="{_WIDTH - _LEFT - 20}" height="{_BOX}" rx="7"/>')
        out.append(f'<text class="name" x="{_LEFT + 14}" y="{y + 20}">{escape(name)}</text>')
        files = ", ".join(f"{part}.py" if (ROOT / _PACKAGE / f"{part}.py").is_file() else f"{part}/" for part in parts)
        out.append(f'<text class="what" x="{_LEFT + 130}" y="{y + 20}">{escape(files)}</text>')
        out.append(f'<text class="what" x="{_LEFT + 14}" y="{y + 37}">{escape(what)}</text>')
    return "\n".join([*out, "</svg>"]) + "\n"


def main(arguments: list[str]) -> int:
    found = arrows()
    wrong = down(found)
    if wrong:
        print(*(f"against the order of the rooms: {text}" for text in wrong), sep="\n", file=sys.stderr)
    if "--check" in arguments:
        same = PICTURE.is_file() and PICTURE.read_text(encoding="utf-8") == svg(found)
        if not same:
            print(f"{PICTURE.name} is old: run python docs/make_rooms.py", file=sys.stderr)
        return int(bool(wrong) or not same)
    PICTURE.write_text(svg(found), encoding="utf-8")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
