"""Benchmarks: `python -m benchmarks.NAME`; the last line is one JSON object with targets."""

from arrowmoe.threads import set_threads

set_threads()  # before torch and numpy are imported
