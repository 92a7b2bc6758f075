"""python -m shear_ops: the same as the command shear-ops."""

from .cli.main import main

main()
