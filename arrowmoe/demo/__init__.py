"""The demo: the product's main job on two real nodes, four shipped cards and two real models, all on this machine.

`run` tells what happens as a stream of events; whoever iterates decides how they look. No torch in this process: the
models are in node B's, which is asked through the control channel as the command line would.
"""

from arrowmoe.demo.events import (
    Answered,
    Asked,
    Copied,
    Ended,
    Event,
    Found,
    Grown,
    Learnt,
    Ready,
    Scored,
    Started,
    Training,
    Waiting,
)
from arrowmoe.demo.nodes import DemoError
from arrowmoe.demo.story import run

__all__ = [
    "Answered",
    "Asked",
    "Copied",
    "DemoError",
    "Ended",
    "Event",
    "Found",
    "Grown",
    "Learnt",
    "Ready",
    "Scored",
    "Started",
    "Training",
    "Waiting",
    "run",
]
