"""Entry point of `shear-ops` and `python -m shear_ops`; the commands are in commands.py."""

from __future__ import annotations

import io
import os
import sys

EXTRA = ("click", "rich", "safetensors", "matplotlib")  # [project.optional-dependencies] cli


def main() -> None:
    """Run the command line: bad input is one line on stderr and exit code 2."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without the marks prints ? for them
    try:
        _run()
    except ImportError as error:  # a base install has torch and numpy only
        package = (error.name or "").partition(".")[0]
        if package not in EXTRA:
            raise
        print(f'shear-ops: {package} is missing: pip install "shear_ops[cli]"', file=sys.stderr)
        sys.exit(1)
    except BrokenPipeError:  # `shear-ops demo | head`: not an error of ours
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, TypeError, OSError) as error:
        _fail(str(error))


def _run() -> None:
    import click

    from .commands import commands

    try:
        # given no command, click would raise its help as an error
        commands.main(sys.argv[1:] or ["--help"], "shear-ops", standalone_mode=False)
        sys.stdout.flush()
    except click.ClickException as error:
        _fail(error.format_message())
    except click.Abort:
        sys.exit(130)


def _fail(message: str) -> None:
    text = " ".join(message.split())
    printable = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
    print("shear-ops:", printable, file=sys.stderr)
    sys.exit(2)
