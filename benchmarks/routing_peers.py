"""What the closed form is compared with: each peer learns classes from vectors and scores new ones.

A class is a card, or finer (an intent); `by_card` makes scores of cards of them. Every peer needs all prompts in one
place, which a swarm's cards never are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from arrowmoe.features import Vectors
from arrowmoe.routing.heads import HeadConfig, RouterHead
from arrowmoe.routing.training import Stage1, train_stage1
from benchmarks.routing_data import Names

Scores = npt.NDArray[np.float64]
Scorer = Callable[[Vectors], Scores]
"""Rows (n, d) → scores (n, classes), classes in sorted order."""
Learner = Callable[[Vectors, Names], Scorer]
"""Vectors (n, d) and their classes (n,) → what was learnt."""

L2 = (1e-6, 1e-5, 1e-4, 1e-3)
MLP = Stage1(steps=3000, batch_size=64, look_every=100)
LBFGS_STEPS = 100


@dataclass(frozen=True)
class Peers:
    """Everyone's settings: the regression's `l2`, the MLP's `seed`."""

    l2: float
    seed: int = 0

    def all(self) -> dict[str, Learner]:
        """The peers by name."""
        return {
            "one centroid per class": centroid,
            "nearest example": nearest_example,
            "logistic regression": lambda x, classes: logistic(x, classes, self.l2),
            "MLP head": self.mlp(),
        }

    def mlp(self) -> Learner:
        """The head with this seed."""
        return lambda x, classes: mlp(x, classes, self.seed)


def centroid(x: Vectors, classes: Names) -> Scorer:
    """Cosine to the mean of each class."""
    means = np.stack([x[classes == one].mean(axis=0) for one in np.unique(classes)])
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    return lambda rows: np.asarray(rows @ means.T, dtype=np.float64)


def nearest_example(x: Vectors, classes: Names) -> Scorer:
    """Cosine to the nearest prompt of each class."""
    members = [x[classes == one] for one in np.unique(classes)]
    return lambda rows: np.stack([(rows @ own.T).max(axis=1) for own in members], axis=1).astype(np.float64)


def logistic(x: Vectors, classes: Names, l2: float) -> Scorer:
    """Log probabilities of a multinomial logistic regression, mean cross-entropy + l2 / 2 · ‖W‖², by L-BFGS."""
    names, labels = np.unique(classes, return_inverse=True)
    features, targets = torch.from_numpy(x), torch.from_numpy(labels)
    model = nn.Linear(x.shape[1], len(names))
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    optimiser = torch.optim.LBFGS(model.parameters(), max_iter=LBFGS_STEPS, line_search_fn="strong_wolfe")

    def closure() -> float:
        optimiser.zero_grad()
        loss = nn.functional.cross_entropy(model(features), targets) + l2 / 2 * model.weight.square().sum()
        torch.autograd.backward(loss)
        return loss.item()

    optimiser.step(closure)  # type: ignore[no-untyped-call]  # torch types LBFGS loosely
    return _log_probabilities(model)


def mlp(x: Vectors, classes: Names, seed: int) -> Scorer:
    """Log probabilities of the router head after Stage 1, which holds out a tenth for early stopping."""
    names, labels = np.unique(classes, return_inverse=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = RouterHead(HeadConfig(d_hidden=x.shape[1], n_cards=len(names)))
    train_stage1(head, torch.from_numpy(x), torch.from_numpy(labels), settings=replace(MLP, seed=seed))
    return _log_probabilities(head)


def chosen_l2(x: Vectors, classes: Names, validation: Vectors, expected: Names) -> float:
    """The `L2` with the most of `validation` right."""
    names = np.unique(classes)
    right = {l2: (names[logistic(x, classes, l2)(validation).argmax(axis=1)] == expected).mean() for l2 in L2}
    return max(right, key=lambda l2: right[l2])


def by_card(scores: Scores, classes: Sequence[str], card_of: Mapping[str, str]) -> Scores:
    """Scores (n, cards), cards in sorted order: each card's is that of its best class."""
    cards = np.array([card_of[one] for one in classes])
    return np.stack([scores[:, cards == card].max(axis=1) for card in np.unique(cards)], axis=1)


def _log_probabilities(model: nn.Module) -> Scorer:
    def score(rows: Vectors) -> Scores:
        with torch.inference_mode():
            logits = model(torch.from_numpy(rows)).double()
        return np.asarray(torch.log_softmax(logits, dim=-1).numpy())

    return score
