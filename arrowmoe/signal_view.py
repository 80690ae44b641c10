"""What `evolve signals` says: the requests that are kept for the night, and how surely each was answered badly."""

from __future__ import annotations

from typing import Any

import numpy as np

from arrowmoe import views
from arrowmoe.settings import Settings
from arrowmoe.signalling import signal_store
from evolution.combiner import Combiner, kept
from evolution.dissonance import dissonance, fisher
from evolution.protocols import Floats
from evolution.signals import Signal, SignalCounts, SignalStore
from registry.store import Registry

Json = dict[str, Any]


def signals(registry: Registry, settings: Settings, *, base: str | None, limit: int) -> Json:
    """Counts of each base (or of one), and its requests, the newest first, `limit` in all."""
    store, chosen = signal_store(registry.database, settings.evolution), settings.evolution
    counts = {name: found for name, found in store.counts().items() if base in (None, name)}
    bases, recent = [], []
    for name, count in counts.items():
        combiner = kept(registry.database, name)
        scored = _scored(store, name, count.total, combiner)
        bases.append(_counted(name, count, [score for _, score in scored], combiner))
        recent += scored[:limit]
    recent.sort(key=lambda one: (one[0].created is not None, one[0].created), reverse=True)
    return {
        "kept": chosen.signals,
        "sample_rate": chosen.sample_rate,
        "retention_days": chosen.retention_days,
        "bases": bases,
        "recent": [views.signal(one, dissonance=score) for one, score in recent[:limit]],
    }


def _scored(store: SignalStore, base: str, total: int, combiner: Combiner | None) -> list[tuple[Signal, float]]:
    """All signals of a base with their dissonance, the newest first."""
    found = store.recent(total, base=base)
    scores: Floats = dissonance(found, combine=combiner or fisher)
    return list(zip(found, map(float, scores), strict=True))


def _counted(base: str, count: SignalCounts, scores: list[float], combiner: Combiner | None) -> Json:
    return {
        "base": base,
        "total": count.total,
        "abstained": count.abstained,
        "good": count.good,
        "bad": count.bad,
        "queued": count.queued,
        "mean_dissonance": round(float(np.mean(scores)), 4),
        "combiner": None if combiner is None else _fitted(combiner),
    }


def _fitted(combiner: Combiner) -> Json:
    return {"good": combiner.good, "bad": combiner.bad, "auroc": combiner.auroc, "ece": combiner.ece}


__all__ = ["signals"]
