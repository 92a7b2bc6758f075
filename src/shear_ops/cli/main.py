"""Entry point of `shear-ops` and `python -m shear_ops`; the commands are in commands.py."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from typing import NoReturn

from .output import escaped

EXTRA = ("click", "rich", "safetensors", "matplotlib")  # [project.optional-dependencies] cli


def main() -> None:
    """Run the command line: whatever goes wrong is one line on stderr and exit code 2."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without the marks prints ? for them
    try:
        _run()
    except ImportError as error:  # a base install has torch and numpy only
        package = (error.name or "").partition(".")[0]
        if package not in EXTRA:
            _fail(f"ImportError: {error}")
        _stop(1, f'{package} is missing: pip install "shear_ops[cli]"')
    except BrokenPipeError:  # `shear-ops demo | head`: not an error of ours
        _stop(1)
    except KeyboardInterrupt:
        _stop(130)
    except (ValueError, TypeError, OSError) as error:
        _fail(str(error))
    except Exception as error:  # not foreseen: its type says more than a MemoryError's text, ""
        _fail(f"{type(error).__name__}: {error}".removesuffix(": "))


def _run() -> None:
    import click

    from .commands import commands

    try:
        # given no command, click would raise its help as an error
        commands.main(sys.argv[1:] or ["--help"], "shear-ops", standalone_mode=False)
        if sys.stdout is not None:
            sys.stdout.flush()
    except click.ClickException as error:
        _fail(error.format_message())
    except click.Abort:
        _stop(130)


def _fail(message: str) -> NoReturn:
    _stop(2, " ".join(line.strip() for line in message.splitlines()))


def _stop(code: int, message: str = "") -> NoReturn:
    with contextlib.suppress(OSError, ValueError):  # a stderr that cannot be written, or is closed
        if message and sys.stderr is not None:
            print("shear-ops:", escaped(message), file=sys.stderr)
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:  # not tried again at exit, where it would change the exit code
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)
