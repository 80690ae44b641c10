"""From a routed request to the signal that the night reads: how well a card fitted, how sure the answer was."""

from __future__ import annotations

from typing import TYPE_CHECKING

from arrowmoe.settings import EvolutionSettings
from evolution.clock import Now, utc_now
from evolution.signals import Signal, SignalPolicy, SignalStore
from registry.database import Database
from registry.errors import ArrowMoEError
from registry.logs import get_logger

if TYPE_CHECKING:
    from arrowmoe.generation import Generation
    from arrowmoe.routing.gates import Decision

log = get_logger(__name__)


class SignalRecorder:
    """Writes a signal for each request that an engine tells of; a request is never lost for a signal that was."""

    def __init__(self, signals: SignalStore) -> None:
        self._signals = signals

    def saw(self, base: str, text: str, decision: Decision, generation: Generation | None) -> str | None:
        """The signal's id; None where policy, sampling or an error dropped it."""
        try:
            return self._signals.record(signal_of(base, text, decision, generation))
        except ArrowMoEError as error:  # a full disk, a locked catalog
            log.warning("signal_not_recorded", error=str(error))
            return None


def signal_of(base: str, text: str, decision: Decision, generation: Generation | None) -> Signal:
    """What a request tells: the best card and its p-value, and −log P of the answer, if there was one."""
    best = decision.candidates[0] if decision.candidates else None
    return Signal(
        base=base,
        prompt=text,
        accepted=not decision.abstained,
        card=None if best is None or decision.abstained else best.digest,
        answer=None if generation is None else generation.text,
        p_value=decision.p_value,
        sequence_nats=None if generation is None else -generation.logprob_nats,
        tokens=None if generation is None else len(generation.tokens),
    )


def signal_store(database: Database, settings: EvolutionSettings, now: Now = utc_now) -> SignalStore:
    """The signals of a home, under the settings' policy."""
    policy = SignalPolicy(
        enabled=settings.signals,
        sample_rate=settings.sample_rate,
        max_rows=settings.max_signals,
        retention_days=settings.retention_days,
    )
    return SignalStore(database, policy=policy, now=now)


__all__ = ["SignalRecorder", "signal_of", "signal_store"]
