"""Outputs: what may be shown in a line of text, which paths are written, and how."""

from __future__ import annotations

import os
import secrets
import shutil
import stat
from pathlib import Path


def escaped(text: object) -> str:
    r"""Return text for one line of a terminal: what does not print becomes \n, \x1b, \udcff."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def check_output(path: Path) -> bool:
    """Return whether path is opened and written (a pipe, a character device), not replaced.

    Else it is a new name, or a regular file. A link is refused: whoever made it chose where it
    leads. So are folders and block devices.

    Raises:
        ValueError, OSError: in one line, if nothing can be written there.
    """

    def refuse(reason: str) -> ValueError:
        return ValueError(f"cannot write {escaped(path)}: {reason}")

    if not path.parent.is_dir():
        raise refuse(f"no such folder {escaped(path.parent)}")
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        mode = 0
    if stat.S_ISLNK(mode):
        raise refuse("it is a symbolic link")
    special = stat.S_ISFIFO(mode) or stat.S_ISCHR(mode)
    if mode and not special and not stat.S_ISREG(mode):
        raise refuse("it exists and is not a regular file")
    if mode and not os.access(path, os.W_OK):
        raise refuse("permission denied")
    if not special and not os.access(path.parent, os.W_OK):
        raise refuse(f"permission denied in its folder {escaped(path.parent)}")
    return special


def same_file(a: Path, b: Path) -> bool:
    """Return whether two paths are one file, by whatever names; neither needs to exist."""
    try:
        return a.samefile(b)
    except OSError:
        return os.path.realpath(a) == os.path.realpath(b)


def write_output(path: Path, content: bytes) -> None:
    """Write a file whole or not at all; a pipe or a character device is written to.

    Raises:
        ValueError, OSError: in one line, if that fails.
    """
    special = check_output(path)
    try:
        if special:
            with open(os.open(path, os.O_WRONLY | os.O_NOFOLLOW), "wb") as file:
                file.write(content)
        else:
            _replace(path, content)
    except OSError as error:  # one of the path, even where it is a BrokenPipeError
        raise OSError(f"cannot write {escaped(path)}: {error.strerror}") from error


def _replace(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".shear-ops-{secrets.token_hex(8)}")
    try:
        with open(temporary, "xb") as file:
            file.write(content)
        if path.exists():
            shutil.copymode(path, temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
