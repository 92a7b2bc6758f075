"""Entry point of `shear-ops` and `python -m shear_ops`; the commands are in commands.py."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line: bad input is one line on stderr and exit code 2."""
    try:
        import click

        from .commands import commands
    except ImportError as error:  # a base install has torch and numpy only
        sys.exit(f'shear-ops: {error.name} is missing: pip install "shear_ops[cli]"')
    try:
        commands.main(standalone_mode=False)
    except click.ClickException as error:
        _fail(error.format_message())
    except (click.Abort, KeyboardInterrupt):
        sys.exit(130)
    except (ValueError, TypeError, OSError) as error:
        _fail(str(error))


def _fail(message: str) -> None:
    print("shear-ops:", " ".join(message.split()), file=sys.stderr)
    sys.exit(2)
