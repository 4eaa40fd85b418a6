"""Documentation that a machine can check is checked: commands, options and README's commands."""

from __future__ import annotations

import os
import re
import shlex
import typing

import pytest
import typer.main

import parnet_bench.cli
import parnet_export.cli

PROGRAMS = {"parnet-export": parnet_export.cli.app, "parnet-bench": parnet_bench.cli.app}


def commands():
    for program, app in PROGRAMS.items():
        yield from commands_of(program, typer.main.get_command(app))


def commands_of(name, command):
    """Yield a command, or the commands of a group and of the groups in it."""
    if not hasattr(command, "commands"):
        yield name, command
        return
    for part, inner in command.commands.items():
        yield from commands_of(f"{name} {part}", inner)


def reference():
    """Render the command reference from the command lines themselves."""
    lines = [
        "# Commands",
        "",
        "Written by `UPDATE_GOLDEN=1 .venv/bin/pytest tests/test_docs.py`; a test compares.",
        "",
        "Results go to standard output, progress and notes to standard error. Exit codes: 0 done,",
        "1 a check failed, 2 bad usage or bad input, 130 interrupted, 141 the reader went away.",
    ]
    for name, command in commands():
        lines += ["", f"## {name}", "", " ".join((command.help or "").split()), ""]
        lines += ["| option | meaning | default |", "|---|---|---|"]
        for parameter in command.params:
            if parameter.name == "help":
                continue
            if parameter.param_type_name == "argument":
                label = f"`{parameter.metavar or parameter.name.upper()}`"
            else:
                names = [*parameter.opts, *parameter.secondary_opts]
                label = ", ".join(f"`{option}`" for option in names)
            annotation = parameter.type_descriptor.annotation
            is_choice = typing.get_origin(annotation) is typing.Literal
            choices = typing.get_args(annotation) if is_choice else ()
            if choices:
                label += f" ({', '.join(map(str, choices))})"
            default = parameter.default
            shown = (
                ""
                if default is None or default is False or default in ("", ()) or callable(default)
                else f"`{default}`"
            )
            meaning = " ".join((getattr(parameter, "help", "") or "").split()).replace("|", "\\|")
            lines.append(f"| {label} | {meaning} | {shown} |")
    return "\n".join(lines) + "\n"


def test_the_command_reference_is_up_to_date(root):
    path = root / "docs" / "commands.md"
    if os.environ.get("UPDATE_GOLDEN") == "1":
        path.write_text(reference())
    assert path.read_text() == reference()


def test_every_command_and_option_explains_itself():
    for name, command in commands():
        assert command.help, name
        for parameter in command.params:
            assert getattr(parameter, "help", None), f"{name} {parameter.name}"


def shown_commands(text):
    for language, block in re.findall(r"```(\w*)\n(.*?)```", text, re.DOTALL):
        if language not in {"", "console", "sh"}:
            continue
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line.removeprefix("$ "), comments=True)
            if words and words[0] in PROGRAMS:
                yield words


@pytest.mark.parametrize(
    "document",
    [
        "README.md",
        "examples/digits/README.md",
        "docs/detectors.md",
        "docs/gpus.md",
        "docs/measurements.md",
    ],
)
def test_documents_show_only_commands_and_options_that_exist(document, root):
    known = dict(commands())
    seen = 0
    for words in shown_commands((root / document).read_text()):
        command = known.get(" ".join(words[:2])) or known[" ".join(words[:3])]
        options = {option for p in command.params for option in (*p.opts, *p.secondary_opts)}
        used = {word.partition("=")[0] for word in words[2:] if word.startswith("--")}
        assert used <= options, words
        seen += 1
    assert seen or document != "README.md"


def test_every_make_target_that_documents_name_exists(root):
    targets = set(re.findall(r"^([\w-]+):", (root / "Makefile").read_text(), re.MULTILINE))
    for document in ("README.md", "CONTRIBUTING.md"):
        named = set(
            re.findall(r"(?:^|`)make ([\w-]+)", (root / document).read_text(), re.MULTILINE)
        )
        assert named, document
        assert named <= targets


def test_the_changelog_has_an_entry_to_be_released(root):
    text = (root / "CHANGELOG.md").read_text()
    assert "## [Unreleased]" in text
    assert "### Added" in text
