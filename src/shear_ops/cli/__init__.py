"""The command line: shear-ops demo, score, info."""
