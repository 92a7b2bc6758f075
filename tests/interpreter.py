"""Triton's interpreter, made five times faster: for tests, and for bench/gpu.sh --quick."""

from __future__ import annotations

from types import SimpleNamespace


def patch_once() -> None:
    """Triton patches its language at every call of a function in a kernel: once is enough."""
    import triton.language as tl
    from triton.runtime import interpreter

    # it patches what the globals of a function name: the language, and its core
    for names in ({"tl": tl}, {"core": tl.core}):
        interpreter._patch_lang(SimpleNamespace(__globals__=names))
    interpreter._patch_lang = lambda _: interpreter._LangPatchScope()
