"""A training process without a model: writes progress, then does what it is told, then an adapter's last words.

python fake_training.py good|fail|hang|eat SPEC.json
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from evolution.training_job import ADAPTER, ProgressLog, Step, Trained, TrainingJob, write_trained


def main(behaviour: str, path: Path) -> int:
    job = TrainingJob.load(path)
    job.output.mkdir(exist_ok=True)
    (job.output / "pid").write_text(str(os.getpid()))
    log = ProgressLog(job.output)
    for number in (1, 2, 3):
        log.append(Step(phase="train", step=number, steps=3, loss_nats=float(number)))
    if behaviour == "fail":
        sys.stderr.write("x" * 9000 + "\nthe disk is full")
        return 3
    held = bytearray(300 << 20) if behaviour == "eat" else b""
    if behaviour in ("eat", "hang"):
        time.sleep(60)
    if behaviour == "nothing":
        return 0
    trained = Trained(
        adapter_dir=job.output / ADAPTER,
        steps=3,
        best_validation_nats=None,
        losses_nats=(1.0, 2.0, 3.0),
        stopped_why="steps",
        seconds=float(len(held)),
    )
    write_trained(trained, job.fingerprint())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2])))
