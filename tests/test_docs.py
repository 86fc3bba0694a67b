"""The site is built without a warning, its code runs, and no reason that a report can give is missing in it."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from typer.testing import CliRunner

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


# --- code blocks --------------------------------------------------------------------------------------


class Block(NamedTuple):
    page: str
    language: str
    code: str
    slow: bool  # the line above says "% slow: why"


def blocks(page: Path) -> list[Block]:
    found = re.findall(r"^(% slow: [^\n]*\n)?```(\w+)\n(.*?)^```$", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    return [Block(page.name, language, code, bool(slow)) for slow, language, code in found]


BLOCKS = [block for page in sorted(DOCS.glob("*.md")) for block in blocks(page)]
PAGES = sorted({block.page for block in BLOCKS if block.language == "python"})
# Commands that simulate steps are left to the slow run: tests/test_planner.py is about them.
COMMANDS = [
    pytest.param(line, marks=[pytest.mark.slow] if block.slow or "--gpu-memory" in line else [])
    for block in BLOCKS
    if block.language == "sh"
    for line in block.code.splitlines()
    if line.startswith(("invact ", "python docs/"))
]


def test_code_was_found_on_the_pages_that_show_some() -> None:
    assert {"index.md", "quickstart.md", "decisions.md", "reasons.md", "living_with_others.md"} <= set(PAGES)
    assert len(COMMANDS) >= 6


@pytest.mark.parametrize("page", PAGES)
def test_the_python_of_a_page_runs_from_top_to_bottom(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "docs"}
    for block in BLOCKS:
        if (block.page, block.language) == (page, "python"):
            exec(compile(block.code, page, "exec"), names)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_docs_runs(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    program, *arguments = shlex.split(command)
    if program == "python":
        script, *rest = arguments
        done = subprocess.run(
            [sys.executable, str(ROOT / script), *rest, "--into", "."], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert "`gelu`" in Path("accuracy_table.md").read_text()
        assert "</svg>" in Path("accuracy.svg").read_text()
        return
    from invact.cli import app

    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert result.stdout


# --- reasons ------------------------------------------------------------------------------------------


def sentences(file: str) -> Iterator[tuple[ast.AST, str]]:
    """Every string of three words or more that is no docstring, as a pattern: what is filled in may be anything."""
    tree = ast.parse((ROOT / "invact" / file).read_text())
    parts = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    statements = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if id(node) in parts | statements:
            continue
        if isinstance(node, ast.JoinedStr):
            literal = [str(part.value) if isinstance(part, ast.Constant) else None for part in node.values]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            literal = [node.value]
        else:
            continue
        if len(" ".join(text or "x" for text in literal).split()) >= 3:
            yield node, "".join(re.escape(text) if text is not None else ".+?" for text in literal)


def noted(file: str) -> list[str]:
    """Those that a call of `notes.append` is given, or that stand in a list called notes."""
    tree = ast.parse((ROOT / "invact" / file).read_text())
    given = {
        (inner.lineno, inner.col_offset)
        for node in ast.walk(tree)
        if (isinstance(node, ast.Call) and ast.unparse(node.func).endswith("notes.append"))
        or (isinstance(node, ast.keyword) and node.arg == "notes")
        for inner in ast.walk(node)
        if isinstance(inner, ast.expr)
    }
    return [pattern for node, pattern in sentences(file) if (node.lineno, node.col_offset) in given]  # type: ignore[attr-defined]


REASONS = [pattern for file in ("report/reasons.py", "planning/fusing.py") for _, pattern in sentences(file)]
NOTES = [pattern for _, pattern in sentences("report/notes.py")]
NOTES += [
    pattern
    for file in sorted((ROOT / "invact").rglob("*.py"))
    for pattern in noted(str(file.relative_to(ROOT / "invact")))
]


def test_reasons_were_found_in_the_source() -> None:
    assert re.escape("no gradient flows through it here") in REASONS
    assert ".+?" + re.escape(" keeps its output anyway, so its input can go") in REASONS
    assert len(REASONS) >= 15
    assert len(NOTES) >= 4


@pytest.mark.parametrize("reason", [*REASONS, *NOTES])
def test_every_reason_and_note_of_a_report_is_explained(reason: str) -> None:
    page = (DOCS / "reasons.md").read_text()
    shown = re.findall(r"`([^`\n]+)`", page)
    assert any(re.fullmatch(reason, text) for text in shown), "add it to docs/reasons.md, in backticks on one line"


# --- the site -----------------------------------------------------------------------------------------


def test_the_site_is_built_without_a_warning_has_every_name_and_needs_no_network(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One test, since the site takes long to build; in this process, since torch takes long to import."""
    build = pytest.importorskip("sphinx.cmd.build")
    failed = build.main(["-W", "--keep-going", "-q", "-b", "html", str(DOCS), str(tmp_path)])
    assert not failed, capsys.readouterr().err

    pages = {page.stem: page.read_text() for page in tmp_path.glob("*.html")}
    assert {page.stem for page in DOCS.glob("*.md")} - {"accuracy_table"} <= pages.keys()
    assert pages["mathematics"].count('display="block"') >= 5  # formulas in the page itself

    for page, html in pages.items():
        for tag in re.findall(r"<(?:script|link|img|iframe|object)\b[^>]*>", html):
            assert not re.search(r'(?:src|href|data)="(?:https?:)?//', tag), f"{page}: {tag}"
    for style in tmp_path.rglob("*.css"):
        assert not re.search(r"url\(['\"]?(?:https?:)?//", style.read_text()), style

    import invact

    names = {f"invact.{name}" for name in invact.__all__} - {"invact.functional", "invact.nn"}
    names |= {f"invact.functional.{name}" for name in invact.functional.__all__}
    names |= {f"invact.nn.{name}" for name in invact.nn.__all__}
    assert not {name for name in names if f'id="{name}"' not in pages["api"]}


# --- the contributor's page ---------------------------------------------------------------------------


def test_every_session_that_contributing_names_is_there() -> None:
    tree = ast.parse((ROOT / "noxfile.py").read_text())
    sessions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.decorator_list}
    named = re.findall(r"nox (?:--no-venv )?-s ([a-z ]+)", (ROOT / "CONTRIBUTING.md").read_text())
    assert {name for names in named for name in names.split()} == sessions
