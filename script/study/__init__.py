"""The study: `python -m script.study.compare` runs it."""
