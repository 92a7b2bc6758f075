"""The Triton backend: token weights on any GPU that Triton compiles for.

Nothing here is imported with the package: Triton is an extra, and shear_ops.triton.ops imports it.
"""
