"""Ctrl-C while the command line starts, which is mostly the import of torch. Imported before that.

It ends with exit code 130 then, as later, and not with a traceback. Other processes that import
shear_ops are left alone.
"""

from __future__ import annotations

import signal
import sys
from itertools import pairwise
from pathlib import Path
from typing import NoReturn


def _stop(number: int, frame: object) -> NoReturn:
    raise SystemExit(130)


def _is_command() -> bool:
    command = Path(sys.argv[0]).stem if sys.argv else ""
    return command == "shear-ops" or ("-m", "shear_ops") in pairwise(sys.orig_argv)


def started() -> None:
    """Back to KeyboardInterrupt, which main() catches."""
    if signal.getsignal(signal.SIGINT) is _stop:
        signal.signal(signal.SIGINT, signal.default_int_handler)


# a process that ignores the signal, as one in the background, goes on doing so
if _is_command() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, _stop)
