"""Benchmarks: `python -m benchmarks.NAME`; the last line is one JSON object with targets."""

from arrowmoe.threads import wait_politely

wait_politely()  # before torch is imported
