"""python -m shear_ops: the same as the command shear-ops."""

from .cli import main

main()
