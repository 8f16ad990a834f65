"""The commands of the documentation: run at small size, or, where slow or for a GPU, with their options checked.

A fence that begins with ```bash holds commands, one a line. ``<!-- slow -->`` or ``<!-- gpu -->`` on the line before it
says that they are not run.
"""

from __future__ import annotations

import ast
import importlib.util
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
pytestmark = pytest.mark.skipif(not (ROOT / "docs").is_dir(), reason="this is no checkout")

FENCE = re.compile(r"(?P<mark><!-- (?:slow|gpu) -->\n)?^```bash\n(?P<body>.*?)^```$", re.M | re.S)
SMALL = {
    "train": [
        "--max-steps",
        "2",
        "--batch-size",
        "2",
        "--max-length",
        "32",
        "--max-eval-samples",
        "4",
        "--device",
        "cpu",
    ],
    "generate": ["--max-new-tokens", "2", "--device", "cpu"],
}
"""What makes a command small; a later flag wins."""


class Command(NamedTuple):
    """One line of a fence."""

    page: Path
    line: str
    run: bool

    @property
    def words(self) -> list[str]:
        return shlex.split(self.line, comments=True)


def commands(page: Path) -> Iterator[Command]:
    for fence in FENCE.finditer(page.read_text(encoding="utf-8")):
        for line in fence["body"].replace("\\\n", " ").splitlines():
            if line.strip() and not line.lstrip().startswith("#"):
                yield Command(page, line.strip(), fence["mark"] is None)


EVERY = [command for page in PAGES if page.is_file() for command in commands(page)]


def parsed(words: list[str]) -> Any:
    """The arguments of a ``fastlora`` command, as its own parser reads them."""
    import typer

    from fastlora.cli import build

    return typer.main.get_command(build()).commands[words[0]].make_context(words[0], words[1:])


def test_there_are_commands() -> None:
    assert len(EVERY) > 20
    run = {command.words[1] for command in EVERY if command.run and command.words[0] == "fastlora"}
    assert run >= {"train", "generate", "report", "merge", "info", "explain"}
    strange = [command.line for command in EVERY if command.run and command.words[0] != "fastlora"]
    assert strange == [], "only fastlora's own commands can be run offline: mark the fence <!-- slow -->"


@pytest.mark.parametrize("command", [c for c in EVERY if not c.run], ids=lambda c: f"{c.page.name}: {c.line[:50]}")
def test_commands_that_are_not_run_are_valid(command: Command) -> None:
    words = command.words
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words.pop(0)
    program, *rest = words
    if program == "fastlora":
        pytest.importorskip("typer", reason="typer is missing (extra: train)")
        parsed(rest)
    elif program in ("torchrun", "accelerate"):  # whose own options stand before
        pytest.importorskip("typer", reason="typer is missing (extra: train)")
        parsed(rest[rest.index("fastlora.cli") + 1 :])
    elif program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
        assert set(rest) <= set(targets)
    elif program == "pip":
        assert rest[0] == "install"
        text = (ROOT / "pyproject.toml").read_text()
        extras = re.findall(r"^([\w-]+) = \[", text.split("[project.optional-dependencies]")[1].split("\n\n")[0], re.M)
        for named in re.findall(r"\.\[([\w,-]+)\]", command.line):
            assert set(named.split(",")) <= set(extras)
    elif program in ("python", "bash"):
        if rest[0] == "-m":
            assert importlib.util.find_spec(rest[1]) is not None
        else:
            assert (ROOT / rest[0]).is_file() or not (ROOT / rest[0]).parent.is_dir()
    elif program == "for":  # a loop over files that are there
        (pattern,) = re.findall(r"in (\S+);", command.line)
        assert list(ROOT.glob(pattern))
    else:
        pytest.fail(f"nothing here knows how to check {program}")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the commands name: data, a configuration, and a tiny model in the place of the hub's."""
    pytest.importorskip("transformers", reason="transformers is missing (extra: train)")
    sys.path.insert(0, str(ROOT / "tests" / "training"))
    try:
        import tiny
    finally:
        sys.path.pop(0)
    folder = tmp_path_factory.mktemp("docs")
    tiny.save_llama(folder / "tiny")
    tiny.write_rows(folder / "data.jsonl", tiny.text_rows(24))
    shutil.copytree(ROOT / "examples", folder / "examples")
    (folder / "config.yaml").write_text("model: tiny\ndata: data.jsonl\noutput_dir: runs/config\n")
    return folder


@pytest.mark.parametrize("page", [p for p in PAGES if any(c.run for c in EVERY if c.page == p)], ids=lambda p: p.name)
def test_commands_run(
    page: Path, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In their order, in one folder of the page's own: a later one uses what an earlier one made."""
    found = [command for command in EVERY if command.page == page and command.run]
    for package in ("typer", "peft", "bitsandbytes", "datasets", "yaml", "matplotlib", "tensorboard"):
        pytest.importorskip(package, reason=f"{package} is missing (extra: train, bench)")
    from fastlora.cli import main

    shutil.copytree(place, place / page.stem, ignore=shutil.ignore_patterns(*(p.stem for p in PAGES)))
    monkeypatch.chdir(place / page.stem)
    for command in found:
        _, name, *rest = command.words
        if name == "train":
            parsed([name, *rest])
            rest += SMALL["train"]
            rest += ["--model", "tiny"]
        elif name == "generate":
            rest += SMALL["generate"]
        capsys.readouterr()
        code = main([name, *rest])
        shown = capsys.readouterr()
        assert code == 0, f"{page.name}: {command.line}\n{shown.err}"
        assert shown.out.strip(), f"{command.line} says nothing"


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page.name} links to {target}"
        for target, heading in re.findall(r"\]\(([^)#\s]*)#([^)]+)\)", text):
            other = page.parent / target if target else page
            if other.suffix == ".md":
                heads = re.findall(r"^#+ (.+)$", other.read_text(encoding="utf-8"), re.M)
                slugs = {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}
                assert heading in slugs, f"{page.name} links to {target}#{heading}"


def test_every_page_is_in_the_index() -> None:
    index = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [page.name for page in (ROOT / "docs").glob("*.md") if f"docs/{page.name}" not in index] == []


GAP = "\0"


def templates() -> list[str]:
    """Every text of the package, with a gap for what is put in."""

    def text(node: ast.AST) -> str:
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            return node.value
        if isinstance(node, ast.JoinedStr):
            return "".join(text(value) for value in node.values)
        return GAP

    found = []
    for path in (ROOT / "fastlora").rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        found += [text(node) for node in ast.walk(tree) if isinstance(node, ast.Constant | ast.JoinedStr)]
    return [template for template in found if template.strip(GAP + " ")]


def messages() -> list[str]:
    """The messages that the page of errors explains."""
    text = (ROOT / "docs" / "faq.md").read_text(encoding="utf-8")
    return re.findall(r"^\| `(.+?)` \|", text, re.M)


def explains(message: str, text: str) -> bool:
    """Whether what a message of the page says between its gaps is in a text of the package, in that order."""
    at = 0
    for part in message.split("…"):
        found = text.find(part.strip(" "), at)
        if found < 0:
            return False
        at = found + len(part.strip(" "))
    return True


def test_explained_errors_exist() -> None:
    known = templates()
    found = messages()
    assert len(found) > 50
    assert [message for message in found if not any(explains(message, text) for text in known)] == []


RAISED = (
    *(f"training/{name}" for name in ("errors", "checkpoints", "callbacks", "saving", "durable", "train", "optimizer")),
    *(
        "training/tasks",
        "training/distributed",
        "search/space",
        "search/study",
        "search/results",
        "search/worker",
        "search/command",
    ),
)


@pytest.mark.parametrize("module", RAISED)
def test_errors_of_a_run_are_explained(module: str) -> None:
    """Whatever `fastlora train` and `fastlora search` raise has its line on the page."""
    tree = ast.parse((ROOT / "fastlora" / f"{module}.py").read_text(encoding="utf-8"))
    explained, silent = messages(), []
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("UserError", "Interrupted")):
            continue
        first = node.args[0]
        if not isinstance(first, ast.JoinedStr | ast.Constant):
            continue
        text = "".join(v.value if isinstance(v, ast.Constant) else GAP for v in getattr(first, "values", [first]))
        if len(text.replace(GAP, "").strip(" :,")) < 12:
            continue  # made of other messages
        if not any(explains(message, text) for message in explained):
            silent.append(text.replace(GAP, "…"))
    assert silent == [], "docs/faq.md does not explain them"


def test_the_picture_of_the_rooms_is_that_of_the_sources() -> None:
    script = ROOT / "docs" / "make_rooms.py"
    done = subprocess.run([sys.executable, str(script), "--check"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
