"""Write docs/commands.rst from what the commands say of themselves; ``--check`` only says whether it is up to date."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from converter.cli import COMMANDS, cli

PAGE = Path(__file__).resolve().parent.parent / "docs" / "commands.rst"


def render() -> str:
    """Give the page: the help of each command, as the terminal shows it."""
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


def main() -> int:
    """Write the page, or check it."""
    text = render()
    if "--check" in sys.argv[1:]:
        if PAGE.exists() and PAGE.read_text("utf-8") == text:
            return 0
        print("docs/commands.rst is out of date: run 'make docs'", file=sys.stderr)
        return 1
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(text, "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
