"""Measurements of shear_ops against its floor (a matrix product) and against other libraries."""
