"""Measures: every op against what a user would write without it; see results/README.md."""
