"""Benchmarks: `python -m script.benchmark.NAME` runs one."""
