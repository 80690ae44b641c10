"""The extraction benchmark's scores are what `generate` gives, and a card put into the base is the tuned model."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch

from benchmarks.extract import WithDeltas, relative_error
from benchmarks.extract_child import peak_bytes
from benchmarks.extract_tuning import put_pairs, put_whole, score
from evolution.extractor import LoRAExtractor
from evolution.model_files import ModelFiles
from evolution.training_data import Encoded
from registry.low_rank import Cut
from tests.peft_models import outputs, sample_inputs, tiny_llama


def greedy(prompt: list[int], tokens: int) -> list[int]:
    made = tiny_llama().generate(torch.tensor([prompt]), max_new_tokens=tokens, do_sample=False, eos_token_id=None)
    return list(made[0, len(prompt) :].tolist())


def test_an_answer_is_exact_where_generate_would_give_it() -> None:
    prompts = [[3, 5, 7], [2, 9], [11, 4, 6, 8]]
    rows: list[Encoded] = [(prompt, greedy(prompt, 4)) for prompt in prompts]
    assert score(tiny_llama(), rows).exact == 1
    prompt, answer = rows[1]
    wrong = [*answer[:-1], (answer[-1] + 1) % 30]
    found = score(tiny_llama(), [rows[0], (prompt, wrong), rows[2]])
    assert found.exact == pytest.approx(2 / 3)
    logits = tiny_llama()(torch.tensor([prompt + wrong])).logits[0, len(prompt) - 1 : -1]
    alone = score(tiny_llama(), [(prompt, wrong)]).nats
    assert alone == pytest.approx(-float(logits.log_softmax(-1)[range(4), wrong].mean()), rel=1e-5)


def test_an_extracted_card_in_the_base_is_the_tuned_model(tmp_path: Path) -> None:
    base, tuned = tiny_llama(), copy.deepcopy(tiny_llama())
    generator = torch.Generator().manual_seed(0)
    for weight in tuned.parameters():
        weight.data += 0.05 * torch.randn(weight.shape, generator=generator)
    base.save_pretrained(tmp_path / "base")
    tuned.save_pretrained(tmp_path / "tuned")
    one, other = ModelFiles(tmp_path / "base"), ModelFiles(tmp_path / "tuned")
    extractor = LoRAExtractor(cut=Cut(), others="full")
    card = extractor.extract(other, one, one.layout, name="whole", base_name=None).card
    wanted = outputs(tuned, sample_inputs())
    put_pairs(base, card)
    assert not torch.allclose(outputs(base, sample_inputs()), wanted, atol=1e-3)
    put_whole(base, card)
    torch.testing.assert_close(outputs(base, sample_inputs()), wanted, rtol=1e-4, atol=1e-5)


def test_planted_deltas_are_what_is_added(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path)
    files = ModelFiles(tmp_path)
    first, second = list(files.layout.linear)[:2]
    deltas = WithDeltas(base=files, modules={first})
    assert torch.equal(deltas.tensor(f"{second}.weight"), files.tensor(f"{second}.weight"))
    added = deltas.tensor(f"{first}.weight") - files.tensor(f"{first}.weight")
    torch.testing.assert_close(added, deltas.delta(first), rtol=1e-3, atol=1e-6)
    card = LoRAExtractor(cut=Cut(error=1e-4)).extract(deltas, files, files.layout, name="one", base_name=None).card
    assert card.manifest.adapter.target_modules == (first,)
    assert relative_error(card, first, deltas.delta(first)) < 1e-4
    assert relative_error(card, first, 2 * deltas.delta(first)) == pytest.approx(0.5, rel=1e-3)


def test_the_peak_of_memory_is_at_least_what_is_there() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    assert math.isfinite(peak_bytes())
    assert peak_bytes() >= 4096 * pages * 0.9
