"""The four tasks' data by card name: pure functions of fixed seeds, no file is read."""

from __future__ import annotations

from scripts.demo_cards.dates import iso_dates
from scripts.demo_cards.logs import log_severity
from scripts.demo_cards.reviews import review_verdict
from scripts.demo_cards.splits import Labelled, Pair, Split
from scripts.demo_cards.tickets import ticket_triage

__all__ = [
    "Labelled",
    "Pair",
    "Split",
    "iso_dates",
    "log_severity",
    "review_verdict",
    "ticket_triage",
]
