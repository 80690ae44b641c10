"""Texts of the card `log-severity`: log lines whose neighbours should share the severity.

No line names its level. Held-out lines share neither component nor wording with training; the
reference set speaks of the held-out components in training wordings, every severity for each.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Final

from scripts.demo_cards.splits import Labelled, Split

SEED: Final = 20_104
REFERENCES_PER_COMPONENT: Final = 3
HELDOUT_PER_COMPONENT: Final = 2

TRAIN_COMPONENTS: Final = [
    "postgres",
    "redis",
    "nginx",
    "scheduler",
    "mailer",
    "backup",
    "auth-service",
    "billing-worker",
    "search-index",
    "load-balancer",
    "kafka",
    "dns-resolver",
    "image-resizer",
    "session-store",
    "metrics-agent",
    "message-queue",
    "payment-gateway",
    "file-sync",
    "web-crawler",
    "vpn-tunnel",
    "cron-runner",
    "log-shipper",
    "api-gateway",
    "thumbnailer",
    "license-server",
    "report-builder",
    "chat-relay",
    "feature-store",
]
HELDOUT_COMPONENTS: Final = [
    "mongodb",
    "print-spooler",
    "ldap-bridge",
    "video-encoder",
    "inventory-sync",
    "ntp-client",
    "webhook-sender",
    "object-storage",
    "rate-limiter",
    "translation-cache",
]

TRAIN_WORDINGS: Final[Mapping[str, tuple[str, ...]]] = {
    "info": (
        "{x} started, pid {n}",
        "{x}: configuration loaded from disk",
        "{x}: listening on port {n}",
        "{x} finished job {n} in 38 ms",
        "{x}: connection opened from 10.0.0.7",
        "{x}: client {n} disconnected normally",
        "{x} upgraded to version 4.2",
        "{x}: heartbeat ok",
        "{x}: cache warmed with {n} entries",
        "{x} accepted request {n}",
        "{x}: nightly maintenance completed",
        "{x}: user admin logged in",
        "{x}: {n} records processed",
        "{x} joined the cluster as node {n}",
        "{x}: checkpoint written",
        "{x}: shutting down as requested",
        "{x}: health check passed",
        "{x}: settings reloaded without restart",
        "{x}: session {n} created",
        "{x}: snapshot {n} saved",
        "{x} is ready to serve",
        "{x}: statistics flushed, {n} samples",
        "{x}: leader elected, term {n}",
        "{x}: rotation of files done",
    ),
    "warning": (
        "{x}: disk 91 % full",
        "{x}: response took {n} ms, slower than usual",
        "{x}: retrying, attempt 2 of 5",
        "{x}: certificate expires in 6 days",
        "{x}: memory use above 85 percent",
        "{x}: queue is growing, {n} items waiting",
        "{x}: deprecated option 'legacy' in use",
        "{x}: clock differs by {n} ms",
        "{x}: replica lags {n} seconds behind",
        "{x}: only 3 free connections left in the pool",
        "{x}: unusual number of failed logins from one address",
        "{x}: no value for 'timeout', using the default",
        "{x}: temperature approaching the limit",
        "{x}: rate close to the quota, {n} per minute",
        "{x}: answer truncated to {n} bytes",
        "{x}: one of three nodes does not answer, continuing with two",
        "{x}: backlog high, throttling new work",
        "{x}: unknown field ignored in message {n}",
        "{x}: running without encryption on a private network",
        "{x}: cache hit rate dropped to 40 percent",
        "{x}: connection reset, reconnecting",
        "{x}: licence has only {n} days left",
        "{x}: swap in use, performance may suffer",
        "{x}: file handles nearly exhausted",
    ),
    "error": (
        "{x} crashed with signal 11",
        "{x}: could not open the data file, permission denied",
        "{x}: request {n} failed after 5 attempts, giving up",
        "{x}: out of memory, process killed",
        "{x}: connection refused by host 10.0.0.7",
        "{x}: write failed, no space left on device",
        "{x}: unhandled exception in thread {n}",
        "{x}: checksum mismatch, block {n} is corrupt",
        "{x}: authentication of the service account was rejected",
        "{x}: certificate has expired, handshake aborted",
        "{x} cannot start, port {n} is in use",
        "{x}: transaction {n} rolled back, data lost",
        "{x}: quorum lost, refusing all writes",
        "{x}: deadlock detected, job {n} aborted",
        "{x}: invalid configuration, exiting with code 1",
        "{x}: message {n} could not be delivered and was dropped",
        "{x}: stack overflow while parsing input",
        "{x}: upstream unreachable, returning 502",
        "{x}: index is broken and must be rebuilt",
        "{x}: fatal, cannot allocate {n} bytes",
        "{x}: migration {n} failed halfway",
        "{x}: null pointer in handler, request aborted",
        "{x}: all replicas are down",
        "{x}: volume could not be mounted",
    ),
}
HELDOUT_WORDINGS: Final[Mapping[str, tuple[str, ...]]] = {
    "info": (
        "{x} is up and running",
        "{x}: task {n} completed successfully",
        "{x}: loaded {n} rules at start-up",
        "{x}: new client connected",
        "{x}: daily clean-up finished",
        "{x} stopped cleanly on request",
        "{x}: backup {n} stored",
        "{x} registered with the cluster",
    ),
    "warning": (
        "{x}: storage is nearly full, 8 percent left",
        "{x}: latency rising, now {n} ms",
        "{x}: will try again in {n} seconds",
        "{x}: token expires soon",
        "{x}: CPU load above 90 percent",
        "{x}: {n} tasks pending, falling behind",
        "{x}: this setting is obsolete and will be removed",
        "{x}: high number of timeouts, slowing down",
    ),
    "error": (
        "{x} terminated unexpectedly, core dumped",
        "{x}: access denied, cannot read {n}.db",
        "{x}: gave up on task {n}, all retries failed",
        "{x}: data file is damaged and unreadable",
        "{x}: cannot reach the server, operation aborted",
        "{x}: failed to start, missing library",
        "{x}: uncaught exception, worker {n} died",
        "{x}: disk failure, writes are rejected",
    ),
}


def log_severity() -> Split[Labelled]:
    """The task's splits; pure, the same for every call."""
    rng = random.Random(SEED)
    train = [
        _line(rng, wording, component, label)
        for component in TRAIN_COMPONENTS
        for label, wordings in TRAIN_WORDINGS.items()
        for wording in wordings
    ]
    rng.shuffle(train)
    reference = _per_component(rng, TRAIN_WORDINGS, REFERENCES_PER_COMPONENT)
    heldout = _per_component(rng, HELDOUT_WORDINGS, HELDOUT_PER_COMPONENT)
    return Split(train=tuple(train), heldout=heldout, reference=reference)


def _line(rng: random.Random, wording: str, component: str, label: str) -> Labelled:
    return Labelled(text=wording.format(x=component, n=rng.randint(100, 9999)), label=label)


def _per_component(rng: random.Random, wordings: Mapping[str, tuple[str, ...]], count: int) -> tuple[Labelled, ...]:
    """For every held-out component, `count` wordings of each severity."""
    return tuple(
        _line(rng, wording, component, label)
        for component in HELDOUT_COMPONENTS
        for label in wordings
        for wording in rng.sample(wordings[label], count)
    )
