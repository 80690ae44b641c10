"""The stages: what moves and what must not, early stopping, a planted collapse, and Stage 2 against Stage 1."""

from __future__ import annotations

from collections import Counter
from itertools import cycle, islice

import pytest
import torch

from arrowmoe.errors import RoutingError
from arrowmoe.routing.balance import CollapseMonitor
from arrowmoe.routing.heads import HeadConfig, RouterHead
from arrowmoe.routing.mixed import MultiLoRAWithRouter
from arrowmoe.routing.training import (
    BalancedSampler,
    Batch,
    Stage1,
    Stage2,
    task_loss,
    train_stage1,
    train_stage2,
    train_stage3,
)
from tests.arrowmoe.routing.toy import Toy
from tests.peft_models import tiny_llama


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    return Toy(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="module")
def batches(toy: Toy) -> list[Batch]:
    return [toy.batch(16, seed) for seed in range(8)]


@pytest.fixture(scope="module")
def many(toy: Toy) -> list[Batch]:
    return [toy.batch(32, seed) for seed in range(40)]


@pytest.fixture(scope="module")
def held(toy: Toy) -> list[Batch]:
    return [toy.batch(64, 100)]


def clusters(rows: int = 200, noise: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(rows) % 3
    centres = 2 * torch.randn(3, 8, generator=generator)
    return centres[labels] + noise * torch.randn(rows, 8, generator=generator), labels


def small_head(seed: int = 0, null: bool = False) -> RouterHead:
    torch.manual_seed(seed)
    return RouterHead(HeadConfig(d_hidden=8, n_cards=2 if null else 3, width=16, null=null))


def adapter_bits(mixed: MultiLoRAWithRouter) -> list[list[bytes]]:
    return [[bytes(tensor.data) for tensor in card.tensors] for card in mixed.trained_cards("x")]


def head_state(mixed: MultiLoRAWithRouter) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in mixed.head.parameters()]


def base_is_untouched(mixed: MultiLoRAWithRouter) -> bool:
    own = {name.replace(".base.", "."): tensor for name, tensor in mixed.base.model.state_dict().items()}
    return all(own[name].equal(tensor) for name, tensor in tiny_llama().state_dict().items())


def test_every_card_is_drawn_equally_often() -> None:
    labels = [0] * 50 + [1] * 3 + [2] * 10
    drawn = [row for batch in islice(BalancedSampler(labels, 9, seed=1), 20) for row in batch]
    assert Counter(labels[row] for row in drawn) == {0: 60, 1: 60, 2: 60}
    assert len({row for row in drawn if labels[row] == 0}) == 50


def test_draws_follow_the_seed() -> None:
    labels = [0] * 20 + [1] * 20
    one, same, other = (list(islice(BalancedSampler(labels, 8, seed=seed), 3)) for seed in (0, 0, 1))
    assert one == same != other


def test_stage1_learns_labels_and_reports() -> None:
    features, labels = clusters()
    head = small_head()
    report = train_stage1(head, features, labels, settings=Stage1(steps=200, learning_rate=3e-3))
    assert (head(features).argmax(dim=1) == labels).float().mean() > 0.97
    assert report.losses[-1] < report.losses[0]
    assert len(report.losses) == len(report.entropies) == report.steps
    assert report.marginal == pytest.approx([1 / 3] * 3, abs=0.1)
    assert not head.training


def test_stage1_learns_the_null_expert() -> None:
    features, labels = clusters()
    head = small_head(null=True)
    train_stage1(head, features, labels, settings=Stage1(steps=200, learning_rate=3e-3))
    assert (head(features).argmax(dim=1) == labels).float().mean() > 0.97


def test_stage1_stops_early_and_keeps_the_best_state() -> None:
    features, _ = clusters()
    noise = torch.randint(0, 3, (len(features),), generator=torch.Generator().manual_seed(5))
    settings = Stage1(steps=1000, learning_rate=1e-2, look_every=10, patience=3)
    report = train_stage1(small_head(), features, noise, settings=settings)
    assert report.stopped_why == "patience"
    assert report.steps == report.best + 30
    assert report.validation[report.best // 10] == min(report.validation)


def test_stage1_is_repeatable() -> None:
    features, labels = clusters()
    reports = [train_stage1(small_head(), features, labels, settings=Stage1(steps=20)) for _ in range(2)]
    assert reports[0] == reports[1]


@pytest.mark.parametrize("labels", [torch.tensor([0, 1, 3]), torch.tensor([0, -1, 1]), torch.tensor([0, 1])])
def test_labels_that_do_not_fit_are_refused(labels: torch.Tensor) -> None:
    with pytest.raises(RoutingError, match="expected"):
        train_stage1(small_head(), torch.randn(3, 8), labels)


@pytest.mark.parametrize("mode", ["soft", "top1"])
def test_stage2_moves_the_head_alone(toy: Toy, batches: list[Batch], mode: str) -> None:
    mixed = toy.mixed()
    before, bits = head_state(mixed), adapter_bits(mixed)
    report = train_stage2(mixed, batches, settings=Stage2(mode=mode, hard_gumbel=mode == "top1"))  # type: ignore[arg-type]
    assert report.steps == len(batches)
    assert all(not new.equal(old) for new, old in zip(head_state(mixed), before, strict=True))
    assert base_is_untouched(mixed)
    assert adapter_bits(mixed) == bits


def test_stage3_moves_adapters_slowly_and_never_the_base(toy: Toy, batches: list[Batch]) -> None:
    mixed = toy.mixed()
    before, old = head_state(mixed), [tensor.float32() for card in mixed.trained_cards("x") for tensor in card.tensors]
    settings = Stage2(learning_rate=1e-2, adapter_learning_rate=1e-4)
    train_stage3(mixed, batches, settings=settings)
    new = [tensor.float32() for card in mixed.trained_cards("2") for tensor in card.tensors]
    moved = [abs(after - tensor).max() for after, tensor in zip(new, old, strict=True)]
    assert min(moved) > 0
    assert max(moved) < 2 * 1e-4 * len(batches)
    assert all(not new.equal(old) for new, old in zip(head_state(mixed), before, strict=True))
    assert base_is_untouched(mixed)
    frozen = mixed(batches[0].input_ids, batches[0].attention_mask, adapter="card0").output
    assert not frozen.requires_grad


def test_stage2_lowers_the_task_loss_from_scratch(toy: Toy, batches: list[Batch], held: list[Batch]) -> None:
    mixed = toy.mixed()
    before = task_loss(mixed, held)
    train_stage2(mixed, batches * 20, validation=held, settings=Stage2(steps=100, learning_rate=1e-2))
    assert task_loss(mixed, held) < before


def test_stage2_does_not_fall_below_stage1(toy: Toy, many: list[Batch]) -> None:
    """Judged on rows that neither stage saw, not those that Stage 2 picks its best state by."""
    mixed, unseen = toy.mixed(), [toy.batch(256, 1000)]
    prompts, labels = toy.prompts(256, seed=7)
    assert isinstance(mixed.head, RouterHead)
    features = mixed.features(prompts, torch.ones_like(prompts))
    train_stage1(mixed.head, features, labels, settings=Stage1(steps=200, learning_rate=1e-2))
    after_stage1 = task_loss(mixed, unseen)
    settings = Stage2(steps=120, learning_rate=3e-3, kl_weight=0.1)
    train_stage2(mixed, cycle(many), validation=[toy.batch(128, 500)], settings=settings)
    assert after_stage1 < 3.2  # one card for every row gives 3.6, the right one 2.6
    assert task_loss(mixed, unseen) <= after_stage1


def test_a_harmful_stage2_is_undone(toy: Toy, batches: list[Batch], held: list[Batch]) -> None:
    mixed = toy.mixed()
    before = task_loss(mixed, held)
    settings = Stage2(learning_rate=1.0, steps=40, entropy_weight=-10.0, look_every=5)
    report = train_stage2(mixed, batches * 5, validation=held, settings=settings)
    assert task_loss(mixed, held) <= before
    assert report.validation[0] == pytest.approx(before)


def test_kl_keeps_the_head_near_where_it_began(toy: Toy, batches: list[Batch]) -> None:
    def moved(kl_weight: float) -> float:
        mixed = toy.mixed()
        prompts, _ = toy.prompts(32, seed=3)
        features = mixed.features(prompts, torch.ones_like(prompts))
        before = torch.softmax(mixed.head(features), dim=1)
        train_stage2(mixed, batches * 5, settings=Stage2(steps=40, learning_rate=1e-2, kl_weight=kl_weight))
        return float((torch.softmax(mixed.head(features), dim=1) - before).detach().abs().mean())

    assert moved(100.0) < 0.2 * moved(0.0)


def uses(toy: Toy, mixed: MultiLoRAWithRouter) -> list[float]:
    """The share of prompts, half of them for each card, that each card gets."""
    batch = toy.batch(64, 77)
    with torch.no_grad():
        made = mixed(batch.input_ids, batch.attention_mask, prompt_mask=batch.prompt_mask)
    found: list[float] = made.gates.mean(dim=0).tolist()
    return found


def after_a_planted_collapse(toy: Toy, many: list[Batch], balance_weight: float) -> MultiLoRAWithRouter:
    """Stage 2 from a head that gives all prompts to the first card, under a pull to sharp gates that keeps it there."""
    mixed = toy.mixed(bias=(6.0, 0.0))
    assert uses(toy, mixed) == [1.0, 0.0]
    settings = Stage2(steps=250, learning_rate=1e-2, entropy_weight=0.3, balance_weight=balance_weight)
    monitor = CollapseMonitor(most=0.7, least_entropy=0.0)
    report = train_stage2(mixed, cycle(many), settings=settings, monitor=monitor)
    assert report.steps == 250
    assert monitor.collapsed == (balance_weight == 0)
    return mixed


def test_the_balance_term_undoes_a_planted_collapse(toy: Toy, many: list[Batch], held: list[Batch]) -> None:
    without, with_term = (after_a_planted_collapse(toy, many, weight) for weight in (0.0, 3.0))
    assert uses(toy, without) == [1.0, 0.0]
    assert max(uses(toy, with_term)) < 0.7
    assert task_loss(with_term, held) < task_loss(without, held) - 0.2


def test_without_a_collapse_the_balance_term_is_off(toy: Toy, batches: list[Batch]) -> None:
    def losses(balance_weight: float) -> tuple[float, ...]:
        settings = Stage2(balance_weight=balance_weight)
        monitor = CollapseMonitor(most=1.0, least_entropy=0.0)
        return train_stage2(toy.mixed(), batches, settings=settings, monitor=monitor).losses

    assert losses(100.0) == losses(0.0)


def test_per_layer_gates_train_too(toy: Toy, batches: list[Batch], held: list[Batch]) -> None:
    mixed = toy.mixed(per_layer=True)
    before, logged = task_loss(mixed, held), head_state(mixed)
    train_stage2(mixed, batches * 20, validation=held, settings=Stage2(steps=100, learning_rate=1e-2))
    assert task_loss(mixed, held) < before
    assert any(not new.equal(old) for new, old in zip(head_state(mixed), logged, strict=True))


def test_no_batches_and_losses_that_overflow_are_errors(toy: Toy, batches: list[Batch]) -> None:
    with pytest.raises(RoutingError, match="expected batches"):
        train_stage2(toy.mixed(), [])
    with pytest.raises(RoutingError, match="expected a finite loss"):
        train_stage2(toy.mixed(bias=(float("nan"), 0.0)), batches)
