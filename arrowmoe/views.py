"""What the command line and the control channel say, as JSON: one stable shape per thing. Pure; no torch, no I/O."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from federation.peer import Peer
from federation.sync import PeerReport, SyncProgress, SyncReport
from federation.wire import InventoryEntry
from registry.entries import CardEntry, VerifyReport

if TYPE_CHECKING:
    from arrowmoe.generation import Generation
    from arrowmoe.lora.loader import Loads
    from arrowmoe.lora.tiers import Memory, Residence
    from arrowmoe.memory_monitor import MemoryReading
    from arrowmoe.request import Answer
    from arrowmoe.routing.gates import Candidate, Decision, Gates
    from evolution.budget import Standing
    from evolution.journal import GapRecord, Job, NightRecord, Step
    from evolution.signals import Signal
    from evolution.teacher_audit import TeacherCall

Json = dict[str, Any]


def card(entry: CardEntry) -> Json:
    """A card of the catalog."""
    origin = entry.origin
    return _described(entry) | {
        "labels": list(entry.labels),
        "tags": list(entry.tags),
        "created": entry.created.isoformat(),
        "added_at": entry.added_at.isoformat(),
        "origin": None if origin is None else {"peer_id": origin.peer_id, "address": origin.address},
        "quarantined": entry.quarantined,
    }


def offer(entry: InventoryEntry) -> Json:
    """A card that a peer offers."""
    return _described(entry)


def _described(entry: CardEntry | InventoryEntry) -> Json:
    return {
        "digest": entry.digest,
        "name": entry.name,
        "version": entry.version,
        "base_name": entry.base_name,
        "architecture": entry.architecture,
        "fingerprint": entry.fingerprint,
        "rank": entry.rank,
        "nbytes": entry.nbytes,
        "description": entry.description,
        "domains": list(entry.domains),
        "examples": list(entry.examples),
        "publisher": entry.publisher,
    }


def verified(report: VerifyReport) -> Json:
    """What reading every byte of a card found."""
    entry = report.entry
    return {
        "digest": report.digest,
        "name": None if entry is None else entry.name,
        "version": None if entry is None else entry.version,
        "ok": report.ok,
        "reason": report.reason,
        "hint": report.hint,
    }


def peer(peer: Peer) -> Json:
    """Where a peer is and what it calls itself."""
    return {"node_id": peer.node_id, "name": peer.name, "address": peer.address, "source": peer.source}


def peer_seen(report: PeerReport) -> Json:
    """A peer that was just asked what it offers; `lacking` is how much of that is not here."""
    return peer(report.peer) | {
        "state": str(report.condition),
        "alive": report.error is None,
        "error": report.error,
        "cards": report.offered,
        "lacking": len(report.missing),
    }


def progress(done: SyncProgress) -> Json:
    """How far a sync is."""
    return {
        "peer": str(done.peer),
        "card": done.card,
        "bytes_done": done.bytes_done,
        "bytes_total": done.bytes_total,
        "cards_done": done.cards_done,
        "cards_total": done.cards_total,
    }


def sync_report(report: SyncReport, *, dry_run: bool) -> Json:
    """What a sync found and moved."""
    return {
        "ok": report.ok,
        "dry_run": dry_run,
        "fetched": len(report.fetched),
        "bytes_moved": report.bytes_moved,
        "quarantined": [_waiting(entry) for entry in report.fetched if entry.quarantined is not None],
        "peers": [_peer_report(one) for one in report.peers],
    }


def _waiting(entry: CardEntry) -> Json:
    """A card in quarantine, and what lets it out."""
    return {
        "digest": entry.digest,
        "name": entry.name,
        "version": entry.version,
        "reason": entry.quarantined,
        "hint": f"arrowmoe skills admit {entry.digest}",
    }


def _peer_report(report: PeerReport) -> Json:
    return peer(report.peer) | {
        "error": report.error,
        "offered": report.offered,
        "missing": [offer(entry) for entry in report.missing],
        "removed": [{"digest": stone.digest, "label": stone.label} for stone in report.removed],
        "fetched": [card(entry) for entry in report.fetched],
        "failed": [{"digest": digest, "reason": reason} for digest, reason in report.failed],
        "bytes_moved": report.bytes_moved,
        "tensors_verified": report.tensors_verified,
        "seconds": round(report.seconds, 3),
    }


def routed(text: str, gates: Gates, *, base: str | None) -> Json:
    """How one prompt was routed; `base` is the base model that cards had to fit, None for any."""
    return {"text": text, "base": base, "adapters": gates.attribution(0)} | _decision(gates)


def answer(answer: Answer, *, base: str) -> Json:
    """An answer and what made it: `adapters` name → weight, empty for the bare base model, which `why` explains."""
    about = {"base": base, "fetched": list(answer.fetched)}
    return generation(answer.generation) | about | _decision(answer.gates)


def generation(made: Generation) -> Json:
    """A text that was generated, by the cards `adapters` (name → weight; empty: the bare base model)."""
    return {
        "text": made.text,
        "adapters": {name: float(weight) for name, weight in made.adapters.items()},
        "prompt_tokens": made.prompt_tokens,
        "new_tokens": len(made.tokens),
        "logprob_nats": float(made.logprob_nats),
        "finish_reason": str(made.finish_reason),
        "signal": made.signal,
        "timing": None if made.timing is None else asdict(made.timing),
    }


def adapters(
    base: str,
    memory: Memory,
    residences: Sequence[Residence],
    loads: Loads,
    process: MemoryReading,
    device: tuple[int, int] | None,
) -> Json:
    """What the adapters of one base model take of the memory that there is, and where each of them is.

    `device` are the (free, total) bytes of one with memory of its own.
    """
    return {
        "base": base,
        "bytes": {"slots": memory.slots, "budget": memory.budget, "layouts": memory.layouts, "host": memory.host},
        "loads": asdict(loads),
        "process": asdict(process),
        "device": None if device is None else dict(zip(("free", "total"), device, strict=True)),
        "adapters": [
            {
                "digest": one.digest,
                "name": one.name,
                "tier": one.tier,
                "nbytes": one.nbytes,
                "uses": one.uses,
                "used_at": None if one.used_at is None else one.used_at.isoformat(timespec="seconds"),
                "pinned": one.pinned,
                "priority": one.priority,
                "in_flight": one.in_flight,
                "leaving": one.leaving,
            }
            for one in residences
        ],
    }


def _decision(gates: Gates) -> Json:
    """The decision of row 0; gates that were given by hand have none."""
    decision: Decision | None = gates.decisions[0] if gates.decisions else None
    if decision is None:
        why = "chosen by hand" if gates.adapters else "no card was asked for"
        nothing = {"alpha": None, "threshold": None, "p_value": None}
        return {"mode": "manual", "abstained": False, "why": why, "candidates": []} | nothing
    return {
        "mode": decision.mode,
        "abstained": decision.abstained,
        "alpha": decision.alpha,
        "threshold": decision.threshold,
        "p_value": decision.p_value,
        "why": decision.why,
        "candidates": [_candidate(one) for one in decision.candidates],
    }


def _candidate(candidate: Candidate) -> Json:
    return {
        "digest": candidate.digest,
        "name": candidate.name,
        "score": round(candidate.score, 4),
        "p_value": candidate.p_value,
        "cosine": candidate.cosine,
        "evidence": candidate.evidence,
        "nearest": candidate.nearest,
        "virtual": candidate.virtual,
        "source": candidate.source,
    }


def signal(signal: Signal, *, dissonance: float) -> Json:
    """A request that was kept for the night; `dissonance` is how surely it was answered badly."""
    return {
        "id": signal.id,
        "created": None if signal.created is None else signal.created.isoformat(),
        "base": signal.base,
        "prompt": signal.prompt,
        "answer": signal.answer,
        "accepted": signal.accepted,
        "card": signal.card,
        "p_value": signal.p_value,
        "sequence_nats": signal.sequence_nats,
        "tokens": signal.tokens,
        "feedback": signal.feedback,
        "correction": signal.correction,
        "agreement": signal.agreement,
        "weight": signal.weight,
        "gap": None if signal.gap_id is None else f"gap-{signal.gap_id}",
        "dissonance": round(dissonance, 4),
    }


def gap(gap: GapRecord) -> Json:
    """A gap as it was found, and what became of it."""
    return {
        "gap": f"gap-{gap.id}",
        "name": gap.name,
        "base": gap.base,
        "state": gap.state,
        "why": gap.why,
        "prompts": gap.size,
        "worth": gap.worth,
        "description": gap.theme.get("description", ""),
        "terms": list(gap.theme.get("terms", ())),
        "card": gap.card,
        "created": gap.created.isoformat(),
    }


def night(night: NightRecord) -> Json:
    """A night; what it came to is empty until it has ended."""
    report = night.report
    return {
        "night": f"night-{night.id}",
        "planned_at": night.planned_at.isoformat(),
        "started": night.started.isoformat(),
        "ended": None if night.ended is None else night.ended.isoformat(),
        "state": night.state,
        "published": list(report.get("published", ())),
        "consolidated": dict(report.get("consolidated", {})),
        "not_consolidated": dict(report.get("not_consolidated", {})),
        "taken_back": list(report.get("taken_back", ())),
        "rejected": dict(report.get("rejected", {})),
        "failed": dict(report.get("failed", {})),
        "unfinished": list(report.get("unfinished", ())),
        "seconds": report.get("seconds"),
        "error": report.get("error"),
    }


def job(job: Job) -> Json:
    """A job of a night, and what went wrong in its last attempt."""
    return {
        "job": job.key,
        "kind": job.kind,
        "base": job.base,
        "gap": f"gap-{job.spec['gap']}" if "gap" in job.spec else None,
        "state": job.state,
        "stage": job.stage,
        "attempts": job.attempts,
        "updated": job.updated.isoformat(),
        "error": job.outcome.get("error"),
    }


def step(step: Step) -> Json:
    """How far a training is."""
    loss = step.loss_nats
    return {
        "phase": step.phase,
        "step": step.step,
        "steps": step.steps,
        "loss_nats": loss if loss is not None and math.isfinite(loss) else None,
    }


def budget(standing: Standing) -> Json:
    """An account: dollars and tokens that it may spend, has spent, and has left after what calls under way may cost."""
    columns = {"limit": standing.limit, "spent": standing.spent, "left": standing.left}
    return {name: {"usd": cost.microusd / 1e6, "tokens": cost.tokens} for name, cost in columns.items()}


def teacher_call(call: TeacherCall) -> Json:
    """An exchange with a teacher, word for word."""
    return {
        "created": call.created.isoformat(),
        "teacher": call.teacher,
        "purpose": call.purpose,
        "disclosure": call.disclosure,
        "request": call.request,
        "response": call.response,
        "error": call.error,
        "prompt_tokens": call.prompt_tokens,
        "completion_tokens": call.completion_tokens,
        "usd": call.microusd / 1e6,
        "seconds": round(call.seconds, 3),
    }


def gate(evidence: object) -> Json | None:
    """The evidence of a gate in short; None for none. A peer may have written it: nothing is relied on."""
    if not isinstance(evidence, Mapping) or "against" not in evidence:
        return None
    rise = ("losses", "served_rise_nats")
    return {
        "accepted": evidence.get("accepted") is True,
        "reasons": [str(reason) for reason in _list(evidence.get("reasons"))],
        "items": _number(evidence, "against", "base", "items"),
        "base": _number(evidence, "accuracy", "base"),
        "incumbent": _number(evidence, "accuracy", "incumbent"),
        "candidate": _number(evidence, "accuracy", "candidate"),
        "lift_points": [_number(evidence, "against", "base", f"{end}_points") for end in ("low", "lift", "high")],
        "p_value": _number(evidence, "against", "base", "p_value"),
        "alpha": _number(evidence, "bars", "alpha"),
        "routed": _number(evidence, "routed"),
        "anchors": _number(evidence, "anchors", "served", "items"),
        "anchors_low_points": _number(evidence, "anchors", "served", "low_points"),
        "served_rise_nats": [_number(evidence, *rise, end) for end in ("mean", "high")],
        "scale": _number(evidence, "scale"),
    }


def _number(found: object, *path: str) -> float | None:
    for name in path:
        found = found.get(name) if isinstance(found, Mapping) else None
    good = isinstance(found, int | float) and not isinstance(found, bool) and math.isfinite(found)
    return found if good else None  # type: ignore[return-value]


def _list(value: object) -> list[object]:
    return value if isinstance(value, list) else []
