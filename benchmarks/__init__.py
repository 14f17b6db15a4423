"""Benchmarks of gn_linear: one suite a module, one JSON record, table and figure a run.

`python -m benchmarks list` names the suites and `python -m benchmarks run NAME` runs one.
How to add a suite is written in `benchmarks/suites/__init__.py`.
"""
