"""A toy task for routers: words of the lower half are answered by one adapter, those of the upper half by the other.

Answers are what PEFT computes with the right adapter, so routing each prompt to its own is the best that can be done.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from arrowmoe.base_model import BaseModel
from arrowmoe.lora.manager import LoRAManager
from arrowmoe.routing.heads import HeadConfig, RouterHead
from arrowmoe.routing.hidden import HiddenFeaturizer
from arrowmoe.routing.mixed import MultiLoRAWithRouter
from arrowmoe.routing.per_layer import PerLayerHead, layers_of
from arrowmoe.routing.training import IGNORED, Batch
from registry.card import LoRACard
from tests.arrowmoe import tiny
from tests.peft_models import HIDDEN, VOCABULARY, load_peft, make_peft, tiny_llama

LENGTH = 5


class Toy:
    """A tiny causal model, its adapters as PEFT directories and as cards."""

    def __init__(self, directory: Path, cards: int = 2) -> None:
        self.cards = cards
        self.directories = [make_peft(tiny_llama(), directory / f"card{seed}", seed=seed) for seed in range(cards)]
        self.lora_cards = [LoRACard.from_peft(path, base_name="tiny") for path in self.directories]
        self.peft = [load_peft(tiny_llama(), path) for path in self.directories]

    def mixed(self, *, bias: Sequence[float] = (), per_layer: bool = False, null: bool = False) -> MultiLoRAWithRouter:
        """A new mixed model, its head's output biased by `bias`."""
        base: BaseModel = tiny.base(tiny_llama())
        config = HeadConfig(d_hidden=HIDDEN, n_cards=self.cards, width=16, dropout=0.0, null=null)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            head = PerLayerHead(config, self.layers) if per_layer else RouterHead(config)
        if bias:
            with torch.no_grad():
                head.output.bias.add_(torch.tensor(bias))
        return MultiLoRAWithRouter(
            base, self.lora_cards, head.eval(), HiddenFeaturizer(base, layer=1), manager=LoRAManager(base.model)
        )

    @property
    def layers(self) -> tuple[str, ...]:
        return layers_of(self.lora_cards[0].modules)

    def prompts(self, rows: int, seed: int) -> tuple[Tensor, Tensor]:
        """Prompts (rows, LENGTH), and the adapter that each is for (rows,)."""
        generator = torch.Generator().manual_seed(seed)
        labels = torch.arange(rows) % self.cards
        width = (VOCABULARY - 3) // self.cards
        words = torch.randint(0, width, (rows, LENGTH), generator=generator)
        return 3 + words + width * labels[:, None], labels

    def batch(self, rows: int, seed: int) -> Batch:
        """Prompts, each with the one token that its adapter answers."""
        prompts, labels = self.prompts(rows, seed)
        answers = torch.stack([self.answers(prompts, k) for k in range(self.cards)])[labels, torch.arange(rows)]
        ids = torch.cat([prompts, answers[:, None]], dim=1)
        targets = torch.full_like(ids, IGNORED)
        targets[:, -1] = answers
        return Batch(input_ids=ids, attention_mask=torch.ones_like(ids), labels=targets)

    @torch.no_grad()
    def answers(self, prompts: Tensor, card: int) -> Tensor:
        """The token that PEFT gives with an adapter: (rows,)."""
        logits: Tensor = self.peft[card](input_ids=prompts).logits
        return logits[:, -1].argmax(dim=-1)
