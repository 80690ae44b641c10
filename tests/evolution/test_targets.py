"""Targets by name: found in the model's own paths, whatever it calls them; never a head, never in silence."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel

from evolution.errors import TrainingError
from evolution.fine_tuning import attach
from evolution.targets import mlp_of, plan_by_name
from evolution.training_job import ByName, FineTuning
from tests.peft_models import tiny_bert, tiny_bert_classifier, tiny_gpt2, tiny_llama

LLAMA_MLP = {"mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"}
LLAMA_ATTENTION = {f"self_attn.{one}_proj" for one in "qkvo"}
GPT2_MLP, GPT2_ATTENTION = {"mlp.c_fc", "mlp.c_proj"}, {"attn.c_attn", "attn.c_proj"}
BERT_MLP = {"intermediate.dense", "output.dense"}
BERT_ATTENTION = {f"attention.{one}" for one in ("self.query", "self.key", "self.value", "output.dense")}
CASES = [
    (tiny_llama, "model.layers", LLAMA_MLP, LLAMA_ATTENTION),
    (tiny_gpt2, "transformer.h", GPT2_MLP, GPT2_ATTENTION),
    (tiny_bert, "encoder.layer", BERT_MLP, BERT_ATTENTION),
    (tiny_bert_classifier, "bert.encoder.layer", BERT_MLP, BERT_ATTENTION),
]


def adapted(model: PreTrainedModel, tuning: FineTuning) -> set[str]:
    """The modules that PEFT has put an adapter on."""
    found = attach(model, tuning, base_name="", task_type="FEATURE_EXTRACTION").get_base_model()
    return {name for name, module in found.named_modules() if hasattr(module, "lora_A")}


@pytest.mark.parametrize(("build", "blocks", "mlp", "attention"), CASES)
def test_names_mean_the_models_own_layers(
    build: Callable[[], PreTrainedModel], blocks: str, mlp: set[str], attention: set[str]
) -> None:
    for name, wanted in (("mlp", mlp), ("all", mlp | attention)):
        tuning = FineTuning(rank=3, targets=name)
        expected = {f"{blocks}.{block}.{path}" for block in range(2) for path in wanted}
        assert adapted(build(), tuning) == expected
        one = FineTuning(rank=3, targets=name, layers=(1, 2))
        assert adapted(build(), one) == {module for module in expected if f"{blocks}.1." in module}


@pytest.mark.parametrize(("name", "count"), [("mlp", 6), ("all", 14)])
def test_a_plan_counts_what_trains(name: ByName, count: int) -> None:
    tuning = FineTuning(rank=3, targets=name)
    plan = plan_by_name(tiny_llama(), tuning)
    trained = [one for one in attach(tiny_llama(), tuning, base_name="").parameters() if one.requires_grad]
    assert (plan.name, len(plan.ranks)) == (name, count)
    assert plan.parameters == sum(one.numel() for one in trained)


@pytest.mark.parametrize(
    ("path", "is_mlp"),
    [
        ("decoder.layers.0.fc1", True),  # OPT
        ("decoder.layers.0.self_attn.out_proj", False),
        ("transformer.layer.0.ffn.lin1", True),  # DistilBERT
        ("transformer.layer.0.attention.q_lin", False),
        ("transformer.h.3.mlp.dense_h_to_4h", True),  # Falcon, Bloom
        ("transformer.h.3.self_attention.dense", False),
        ("encoder.block.0.layer.0.SelfAttention.q", False),  # T5
        ("encoder.block.0.layer.1.DenseReluDense.wi", True),
        ("rwkv.blocks.0.feed_forward.key", True),
        ("model.layers.0.mixer.in_proj", False),  # Mamba
    ],
)
def test_paths_of_other_families_are_told_apart(path: str, is_mlp: bool) -> None:
    assert mlp_of([path]) == ([path] if is_mlp else [])


class Odd(torch.nn.Module):
    """Blocks whose layers are called like nothing."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList(
            torch.nn.ModuleDict({"mixer": torch.nn.Linear(4, 4), "norm": torch.nn.LayerNorm(4)}) for _ in range(blocks)
        )
        self.lm_head = torch.nn.Linear(4, 9)

    def get_output_embeddings(self) -> torch.nn.Module:
        return self.lm_head


def test_where_nothing_is_called_an_mlp_all_are_adapted_and_it_is_said(caplog: pytest.LogCaptureFixture) -> None:
    plan = plan_by_name(Odd(2), FineTuning(targets="mlp"))
    assert (plan.name, set(plan.ranks)) == ("all", {"blocks.0.mixer", "blocks.1.mixer"})
    assert caplog.text.count("targets_unknown") == 1


def test_where_nothing_matches_it_is_refused() -> None:
    with pytest.raises(TrainingError, match="linear layers in numbered blocks of Odd, got none"):
        plan_by_name(Odd(0), FineTuning(targets="all"))
    with pytest.raises(TrainingError, match="blocks 7 to 8 of LlamaForCausalLM, got none"):
        plan_by_name(tiny_llama(), FineTuning(targets="mlp", layers=(7, 9)))
    with pytest.raises(TrainingError, match=r"GPT2LMHeadModel has .* got .*up_proj"):
        attach(tiny_gpt2(), FineTuning(targets=("up_proj",)), base_name="")


@pytest.mark.parametrize("targets", ["hot", "q_proj", "", ()])
def test_other_words_are_refused(targets: object) -> None:
    with pytest.raises(TrainingError, match="expected modules, or one of"):
        FineTuning(targets=targets)  # type: ignore[arg-type]
