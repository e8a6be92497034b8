"""Suites that anyone can rerun: rows of attack, defence, share, seed and the metric names of a run's summary."""
