from __future__ import annotations

import io
import json
import math
import os
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from rich.table import Table

from parnet_export import console
from parnet_export.errors import CheckFailedError, InputError, MissingBackendError, ParnetError

LONG_PATH = "/data/" + "a folder [red]/" * 20 + "model.onnx"


def an_app_that(command):
    app = typer.Typer()
    app.command("work")(command)
    app.command("rest")(lambda: None)
    return app


def raising(error):
    def work() -> None:
        raise error

    return an_app_that(work)


def test_a_command_that_ends_well_exits_with_0(capsys):
    assert console.run(an_app_that(lambda: console.print_json({"a": 1})), ["work"]) == 0
    assert capsys.readouterr() == ('{\n  "a": 1\n}\n', "")


def test_an_error_of_the_user_is_one_line_on_stderr_as_it_stands(capsys):
    error = InputError(LONG_PATH, "is empty", "Give another file")

    assert console.run(raising(error), ["work"]) == 2

    out, err = capsys.readouterr()
    assert out == ""
    assert err == f"error: {LONG_PATH}: is empty. Give another file.\n"


@pytest.mark.parametrize(
    ("error", "exit_code"),
    [
        (CheckFailedError("outputs differ"), 1),
        (MissingBackendError("tensorrt", "An engine", "pip install tensorrt"), 2),
        (ParnetError("something else"), 2),
    ],
)
def test_every_kind_of_error_has_its_exit_code(error, exit_code, capsys):
    assert console.run(raising(error), ["work"]) == exit_code
    assert capsys.readouterr().err == f"error: {error}\n"


def test_control_characters_in_a_message_do_not_reach_the_terminal(capsys):
    error = InputError("a\x1b[2Jb\nc\x07\udcff", "is odd", "Rename it")

    console.run(raising(error), ["work"])

    assert capsys.readouterr().err == "error: a\\x1b[2Jb c\\x07\\udcff: is odd. Rename it.\n"


def test_bad_usage_exits_with_2_and_says_so_on_stderr(capsys):
    assert console.run(an_app_that(lambda: None), ["nonsense"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "nonsense" in err


def test_a_command_chooses_its_own_exit_code():
    assert console.run(raising(typer.Exit(3)), ["work"]) == 3


def test_an_interrupted_command_exits_as_shells_expect(capsys):
    assert console.run(raising(KeyboardInterrupt()), ["work"]) == 130
    assert "Traceback" not in capsys.readouterr().err


def test_a_bug_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        console.run(raising(ZeroDivisionError()), ["work"])


def run_script(body: str, **options):
    lines = ["import sys, typer", "from parnet_export import console", "app = typer.Typer()"]
    lines += ["@app.command()", "def work():", f"    {body}", "sys.exit(console.run(app, []))"]
    return subprocess.Popen(
        [sys.executable, "-c", "\n".join(lines)], stderr=subprocess.PIPE, text=True, **options
    )


@pytest.mark.parametrize(
    "body",
    [
        "[console.stdout().print('x' * 70) for _ in range(20000)]",
        "[console.print_json(list(range(2000))) for _ in range(200)]",
        "print('x')",
    ],
)
def test_a_closed_pipe_ends_a_command_quietly(body):
    process = run_script(body, stdout=subprocess.PIPE)
    process.stdout.close()

    assert process.stderr.read() == ""
    assert process.wait(timeout=60) == 141


@pytest.mark.parametrize("body", ["console.print_json({})", "console.show({}, 'a table')"])
def test_a_full_disk_behind_stdout_is_one_message(body):
    full = Path("/dev/full")
    if not (full.exists() and stat.S_ISCHR(full.stat().st_mode)):
        pytest.skip("this system has no device /dev/full")
    with full.open("wb") as stdout:
        process = run_script(body, stdout=stdout)
        _, err = process.communicate(timeout=60)

    assert process.returncode == 2
    assert err.startswith("error: standard output: cannot be written (No space left on device)")
    assert err.count("\n") == 1


def test_a_terminal_without_unicode_gets_a_replacement_for_what_it_lacks():
    process = run_script(
        "console.stdout().print('a \\u2192 b')",
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
    )
    out, err = process.communicate(timeout=60)

    assert (process.returncode, out, err) == (0, "a ? b\n", "")


def test_importing_the_console_loads_neither_rich_nor_typer_nor_torch():
    code = (
        "import sys, parnet_export.console as c; c.format_count(1); "
        "print(sorted({'rich', 'typer', 'click', 'torch', 'onnx', 'numpy'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)

    assert found.stdout == "[]\n"


def test_json_keeps_the_order_of_keys_and_has_no_nan():
    assert console.encode_json({"b": [1.5, math.nan], "a": {"z": "ü", "y": None}}) == (
        '{\n  "b": [\n    1.5,\n    null\n  ],\n  "a": {\n    "z": "ü",\n    "y": null\n  }\n}\n'
    )


def test_a_result_is_shown_as_a_table_as_json_or_in_a_file(tmp_path, capsys):
    table = Table("name")
    table.add_row("[bold]stream1")
    output = tmp_path / "result.json"

    console.show({"name": "x"}, table, output=output)
    shown = capsys.readouterr().out
    console.show({"name": "x"}, table, as_json=True)

    assert "name" in shown
    assert json.loads(output.read_text()) == {"name": "x"}
    assert capsys.readouterr().out == output.read_text()


def test_a_result_that_cannot_be_written_is_not_shown(tmp_path, capsys):
    with pytest.raises(InputError, match="nowhere"):
        console.show({}, "table", output=tmp_path / "nowhere" / "result.json")
    assert capsys.readouterr().out == ""


def test_notes_and_warnings_go_to_stderr_unwrapped(capsys):
    console.note(f"wrote {LONG_PATH}")
    console.warn("slow")

    assert capsys.readouterr() == ("", f"wrote {LONG_PATH}\nwarning: slow\n")


def test_progress_is_silent_when_stderr_is_no_terminal(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    with console.progress() as progress:
        for _ in progress.track(range(3), description="counting"):
            time.sleep(0.001)
    with console.working("thinking"):
        pass

    assert capsys.readouterr() == ("", "")


def test_progress_shows_on_a_terminal(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(console, "stderr", lambda: Console(file=terminal, force_terminal=True))
    with console.working("proving the split"):
        time.sleep(0.15)

    assert "proving the split" in terminal.getvalue()


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (640, "640"),
        (999, "999"),
        (1000, "1.00 k"),
        (19_177_032, "19.18 M"),
        (26_648_000_000, "26.65 G"),
        (999_994, "999.99 k"),
        (999_996, "1.00 M"),
        (1.5, "1.50"),
        (-2_000, "-2.00 k"),
        (3.2e18, "3200.00 P"),
    ],
)
def test_counts_have_two_decimals_and_a_multiple(value, text):
    assert console.format_count(value) == text


def test_sizes_durations_ratios_shares_and_shapes_have_their_units():
    assert console.format_bytes(1_254_400) == "1.25 MB"
    assert console.format_bytes(512) == "512 B"
    assert console.format_ms(139.4) == "139 ms"
    assert console.format_ms(4.2) == "4.20 ms"
    assert console.format_ms(9.999) == "10.0 ms"
    assert console.format_ms(0.0421) == "0.0421 ms"
    assert console.format_ms(0) == "0 ms"
    assert console.format_ms(12345.6) == "12346 ms"
    assert console.format_ms(math.inf) == "inf ms"
    assert console.format_ratio(1.844) == "1.84x"
    assert console.format_percent(0.271) == "27.1 %"
    assert console.format_shape((1, 160, 56, 56)) == "1x160x56x56"
    assert console.format_shape(("batch", 3, 224, 224)) == "[batch, 3, 224, 224]"
    assert console.format_shape(()) == "scalar"


@given(st.integers(min_value=0, max_value=10**17))
def test_a_formatted_count_reads_back_as_the_count(value):
    number, _, multiple = console.format_count(value).partition(" ")
    read = float(number) * {"": 1, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}[multiple]

    assert float(number) < 1000
    assert read == pytest.approx(value, rel=0.0051, abs=0)


@given(st.floats(min_value=1e-4, max_value=1e5))
def test_a_formatted_duration_reads_back_with_three_digits(duration_ms):
    number, unit = console.format_ms(duration_ms).split()

    assert unit == "ms"
    assert float(number) == pytest.approx(duration_ms, rel=0.0051)
