"""LoRA layers: wrapping a base model's modules in place and computing gated sums of adapters."""
