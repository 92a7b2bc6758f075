"""Adapters to trainers. Each imports its trainer; importing shear_ops imports none of them."""
