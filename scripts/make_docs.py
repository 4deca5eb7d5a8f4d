"""Write docs/commands.rst and docs/findings.rst from what the code says; ``--check`` only says whether they are so."""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path

import click

from converter.cli import COMMANDS, cli
from converter.doctor.findings import KINDS

DOCS = Path(__file__).resolve().parent.parent / "docs"


def render_commands() -> str:
    """Give a page: the help of each command, as the terminal shows it."""
    parts = ["Commands", "========", "", ".. Written by scripts/make_docs.py; edit the commands instead.", ""]
    root = click.Context(cli, info_name="wconv")
    for name in COMMANDS:
        command = cli.get_command(root, name)
        assert command is not None
        context = click.Context(command, info_name=name, parent=root, terminal_width=100)
        title = f"wconv {name}"
        parts += [title, "-" * len(title), "", "::", ""]
        parts += [f"    {line}".rstrip() for line in command.get_help(context).splitlines()] + [""]
    return "\n".join(parts)


def render_findings() -> str:
    """Give a page: each kind of finding, what it does and how to mend it."""
    parts = ["What the doctor finds", "=====================", "", ".. Written by scripts/make_docs.py.", ""]
    parts += [
        "``wconv doctor`` names each finding by a code. Errors and warnings make its exit code 1, notes do not.",
        "",
    ]
    for code, kind in KINDS.items():
        parts += [
            code,
            "-" * len(code),
            "",
            f"**{kind.title}** ({kind.severity})",
            "",
            *textwrap.wrap(kind.effect, 118),
            "",
        ]
        parts += [*textwrap.wrap(kind.mending, 118), ""] if kind.mending else []
    return "\n".join(parts)


PAGES = {"commands.rst": render_commands, "findings.rst": render_findings}


def main() -> int:
    """Write the pages, or check them."""
    stale = 0
    for name, render in PAGES.items():
        page, text = DOCS / name, render()
        if "--check" not in sys.argv[1:]:
            page.write_text(text, "utf-8")
        elif not page.exists() or page.read_text("utf-8") != text:
            print(f"docs/{name} is out of date: run 'make docs'", file=sys.stderr)
            stale = 1
    return stale


if __name__ == "__main__":
    sys.exit(main())
