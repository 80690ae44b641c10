"""Heads: their formula, their files, and the capacity of `MultiExpertRouter`."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from arrowmoe.errors import RoutingError
from arrowmoe.routing.heads import HeadConfig, MultiExpertConfig, MultiExpertRouter, RouterHead, load, save

CONFIG = HeadConfig(d_hidden=6, d_side=2, n_cards=3, width=8, dropout=0.5)


def head(config: HeadConfig = CONFIG) -> RouterHead:
    torch.manual_seed(0)
    return RouterHead(config).eval()


def test_a_head_is_layer_norm_projection_and_two_layers() -> None:
    made, hidden, side = head(), torch.randn(5, 6), torch.randn(5, 2)
    w = made.state_dict()
    x = torch.cat([hidden, side], dim=1)
    x = (x - x.mean(1, keepdim=True)) / (x.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    x = x * w["trunk.norm.weight"] + w["trunk.norm.bias"]
    x = x @ w["trunk.projection.weight"].T + w["trunk.projection.bias"]
    x = x @ w["trunk.layer.weight"].T + w["trunk.layer.bias"]
    x = x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))
    torch.testing.assert_close(made(hidden, side), x @ w["output.weight"].T + w["output.bias"])


def test_dropout_acts_in_training_only() -> None:
    made, x = head(), (torch.randn(4, 6), torch.randn(4, 2))
    assert made(*x).equal(made(*x))
    made.train()
    assert not made(*x).equal(made(*x))


def test_the_null_expert_has_a_column() -> None:
    assert head(HeadConfig(d_hidden=4, n_cards=3, null=True))(torch.randn(2, 4)).shape == (2, 4)


@pytest.mark.parametrize(("hidden", "side"), [((5, 6), None), ((5, 7), (5, 2)), ((5, 6), (5, 3))])
def test_features_of_another_width_are_refused(hidden: tuple[int, int], side: tuple[int, int] | None) -> None:
    with pytest.raises(RoutingError, match=r"expected features and side features \(6, 2\) wide"):
        head()(torch.zeros(hidden), None if side is None else torch.zeros(side))


def test_a_saved_head_comes_back_as_it_was(tmp_path: Path) -> None:
    made, x = head(), (torch.randn(4, 6), torch.randn(4, 2))
    save(made, ["a", "b", "c"], tmp_path / "head.safetensors", embedder="tiny#layer1-mean")
    saved = load(tmp_path / "head.safetensors", embedder="tiny#layer1-mean")
    assert (saved.names, saved.head.config) == (("a", "b", "c"), CONFIG)
    assert not saved.head.training
    assert saved.head(*x).equal(made(*x))


def test_a_head_for_other_features_is_refused(tmp_path: Path) -> None:
    save(head(), ["a", "b", "c"], tmp_path / "h", embedder="one")
    with pytest.raises(RoutingError, match="expected a head for features by other, got one for one"):
        load(tmp_path / "h", embedder="other")


def test_names_must_fit_the_columns(tmp_path: Path) -> None:
    for names in (["a", "b"], ["a", "b", "b"]):
        with pytest.raises(RoutingError, match="expected 3 distinct card names"):
            save(head(), names, tmp_path / "h", embedder="e")


def test_files_that_are_no_heads_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("not tensors")
    save_file({"x": torch.zeros(2)}, str(tmp_path / "other"))
    for name in ("text", "other", "missing"):
        with pytest.raises(RoutingError, match="expected a router head"):
            load(tmp_path / name)


def test_a_head_whose_weights_are_of_other_sizes_is_refused(tmp_path: Path) -> None:
    made = head()
    made.config = HeadConfig(d_hidden=6, d_side=2, n_cards=3, width=9)
    save(made, ["a", "b", "c"], tmp_path / "h", embedder="e")
    with pytest.raises(RoutingError, match="expected a router head"):
        load(tmp_path / "h")


@pytest.mark.parametrize("wrong", [{"n_cards": 0}, {"dropout": 1.0}, {"d_side": -1}])
def test_sizes_that_cannot_be_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(RoutingError, match="expected sizes"):
        HeadConfig(**{"d_hidden": 4, "n_cards": 2} | wrong)  # type: ignore[arg-type]


def multi(**settings: object) -> MultiExpertRouter:
    torch.manual_seed(1)
    return MultiExpertRouter(MultiExpertConfig(d_hidden=6, n_experts=5, **settings))  # type: ignore[arg-type]


@pytest.mark.parametrize("router_type", ["threshold", "topk"])
def test_multi_expert_routing_equals_loops(router_type: str) -> None:
    router, hidden = (
        multi(router_type=router_type, threshold=0.22, max_experts=2, capacity_factor=0.8),
        torch.randn(30, 6),
    )
    routed = router(hidden)
    capacity = math.ceil(0.8 * 30 * 2 / 5)
    used = [0] * 5
    p = torch.softmax(hidden @ router.router.weight.T + router.router.bias, dim=1)
    dropped_any = False
    for row, values in enumerate(p.tolist()):
        best = sorted(range(5), key=lambda k: -values[k])[:2]
        chosen = best if router_type == "topk" else [k for k in best if values[k] >= 0.22]
        for k in range(5):
            used[k] += k in chosen
            full = k in chosen and used[k] > capacity
            weight = values[k] / sum(values[j] for j in chosen) if k in chosen and not full else 0.0
            assert routed.weights[row, k].item() == pytest.approx(weight, abs=1e-6)
            assert bool(routed.dropped[row, k]) == full
            dropped_any |= full
    assert dropped_any


def test_capacity_is_rounded_up() -> None:
    assert multi().capacity(3) == math.ceil(1.25 * 3 * 4 / 5)
    assert multi(max_experts=9).capacity(4) == 5


def test_nothing_is_dropped_where_there_is_room() -> None:
    routed = multi(capacity_factor=10.0)(torch.randn(30, 6))
    assert not routed.dropped.any()


def test_balance_loss_is_weighted_and_moves_the_router() -> None:
    hidden = torch.randn(30, 6)
    light, heavy = multi(load_balancing_weight=0.01), multi(load_balancing_weight=0.02)
    assert float(heavy(hidden).balance_loss) == pytest.approx(2 * float(light(hidden).balance_loss))
    light(hidden).balance_loss.backward()
    assert light.router.weight.grad is not None
    assert light.router.weight.grad.abs().sum() > 0


def test_the_bias_is_an_option_and_the_defaults_are_the_stated_ones() -> None:
    assert multi(use_router_bias=False).router.bias is None
    config = MultiExpertConfig(d_hidden=6, n_experts=5)
    assert (config.threshold, config.max_experts, config.capacity_factor) == (0.3, 4, 1.25)
    assert (config.load_balancing_weight, config.router_type, config.use_router_bias) == (0.01, "threshold", True)


def test_settings_that_cannot_be_are_refused() -> None:
    with pytest.raises(RoutingError, match="threshold or topk"):
        multi(router_type="best")
    with pytest.raises(RoutingError, match="capacity factor"):
        multi(capacity_factor=0)
