"""Routing: which adapters fit a prompt, and whether any does."""

from arrowmoe.routing.gates import Candidate, Decision, Gates
from arrowmoe.routing.policy import Opinion, Policy
from arrowmoe.routing.router import LoRARouter, Router

__all__ = ["Candidate", "Decision", "Gates", "LoRARouter", "Opinion", "Policy", "Router"]
