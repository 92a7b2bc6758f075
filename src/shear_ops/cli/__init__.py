"""The command line: shear-ops demo, score, plan, info."""
