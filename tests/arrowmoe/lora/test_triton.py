"""The grouped layout's kernels: computed by Triton's interpreter here, and compiled for devices that are not here.

References are the plain formula in double precision, and PEFT's own forward passes.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from arrowmoe.lora import costs, grouped
from arrowmoe.lora.costs import CUDA, LAYOUTS, Part, Sizes, Work, cheapest, layouts_on, work
from arrowmoe.lora.grouped import Grouped, Pieces, add_grouped, form_groups
from arrowmoe.lora.plan import Plan
from evolution.gated import LowRank
from tests.arrowmoe.lora.test_layouts import (
    D_IN,
    D_OUT,
    TOLERANCE,
    adapters,
    normal,
    one_each,
    plain,
    relative_error,
    sorted_rows,
    two_each,
)
from tests.arrowmoe.lora.test_whole_models import adapters as peft_adapters
from tests.arrowmoe.lora.test_whole_models import by_peft, loaded, padded
from tests.peft_models import outputs, tiny_llama

pytest.importorskip("triton")
DTYPES = [torch.float32, torch.bfloat16]
WAITS = {"_local_scalar_dense", "nonzero", "unique_dim", "masked_select", "_to_copy", "copy_", "item"}


@pytest.fixture
def grouped_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("arrowmoe.lora.costs.cheapest", lambda *_: "grouped")


@pytest.mark.usefixtures("grouped_only")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("choose", "count", "tokens"),
    [(one_each, 1, 1), (sorted_rows, 7, 1), (two_each, 7, 1), (two_each, 3, 9), (one_each, 2, 70), (two_each, 64, 1)],
)
def test_it_equals_the_plain_formula(
    choose: Callable[[int, int], Tensor], count: int, tokens: int, dtype: torch.dtype
) -> None:
    """Ranks 1 to 64; decode steps, prefills shorter and longer than a tile; rows that chose nothing."""
    rows = max(4, count)
    slots, gates = adapters(count, dtype), choose(rows, count).to(dtype)
    x, y = normal(rows, tokens, D_IN, seed=90).to(dtype), normal(rows, tokens, D_OUT, seed=91).to(dtype)
    expected = plain(y, x, gates[:, None], slots)
    share = Plan(tuple(slots), gates).at("m", slots)
    assert share is not None
    assert relative_error(share.add(y.clone(), x, None), expected) <= TOLERANCE[dtype]
    assert relative_error(y, expected) > 10 * TOLERANCE[dtype], "the adapters do much more than rounding does"


@pytest.mark.usefixtures("grouped_only")
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_token_may_choose_or_choose_nothing(dtype: torch.dtype) -> None:
    rows, tokens, count = 3, 4, 5
    slots = adapters(count, dtype)
    chosen = torch.rand(rows, tokens, count, generator=torch.Generator().manual_seed(1)).topk(2).indices
    gates = torch.zeros(rows, tokens, count).scatter(2, chosen, normal(rows, tokens, 2, seed=2)).to(dtype)
    gates[1, 2] = 0
    x, y = normal(rows, tokens, D_IN, seed=3).to(dtype), normal(rows, tokens, D_OUT, seed=4).to(dtype)
    share = Plan(tuple(slots), gates).at("m", slots)
    assert share is not None
    found = share.add(y.clone(), x, None)
    assert relative_error(found, plain(y, x, gates, slots)) <= TOLERANCE[dtype]
    assert torch.equal(found[1, 2], y[1, 2])


@pytest.mark.usefixtures("grouped_only")
def test_a_row_gets_the_same_bits_whoever_shares_its_batch() -> None:
    slots = adapters(3)
    x, y = normal(5, 1, D_IN, seed=3), normal(5, 1, D_OUT, seed=4)

    def computed(rows: list[int], chosen: list[int]) -> Tensor:
        share = Plan(tuple(slots), torch.eye(3)[chosen]).at("m", slots)
        assert share is not None
        return share.add(y[rows].clone(), x[rows], None)

    alone = computed([2], [1])
    assert torch.equal(computed([0, 1, 2, 3, 4], [1, 1, 1, 0, 2])[2], alone[0])
    assert torch.equal(computed([4, 2, 0], [2, 1, 2])[1], alone[0])


@pytest.mark.parametrize("shape", [(6,), (6, 2, 3)])
def test_inputs_of_any_dimensions_and_strides(shape: tuple[int, ...]) -> None:
    """What does not lie as a card's tensors do is copied, and counted."""
    x = normal(*shape, 2 * D_IN, seed=1)[..., ::2]
    y = normal(*shape, D_OUT, seed=2)
    odd = LowRank(a=normal(D_IN, 5, seed=3).T, b=normal(5, D_OUT, seed=4), scaling=0.5)
    usual = LowRank(a=normal(3, D_IN, seed=5), b=normal(D_OUT, 3, seed=6).T, scaling=2.0)
    gates, pieces = torch.tensor([[1.0, 0.5]] * 6), Pieces()
    groups = form_groups(gates, [5, 3], [0.5, 2.0], together=2, device=x.device)
    expected = y.double()
    for gate, one in ((1.0, odd), (0.5, usual)):
        expected = expected + gate * one.scaling * (x.double() @ one.a.double().T @ one.b.double())
    layout = Grouped(groups=groups, pieces=pieces.of([odd, usual]))
    assert relative_error(add_grouped(y, x, layout, 6), expected) <= TOLERANCE[torch.float32]
    assert pieces.nbytes == 2 * 4 * 8 + odd.a.nbytes + odd.b.nbytes


@pytest.mark.usefixtures("grouped_only")
def test_what_no_row_chose_is_not_computed() -> None:
    slots = adapters(3)
    bad = slots["a1"].low_rank
    assert bad is not None
    bad.a.fill_(float("nan"))
    share = Plan(tuple(slots), torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 2.0]])).at("m", slots)
    assert share is not None
    assert share.add(torch.zeros(2, 4, D_OUT), torch.ones(2, 4, D_IN), None).isfinite().all()


@pytest.mark.usefixtures("grouped_only")
def test_where_a_gradient_is_wanted_another_layout_computes() -> None:
    slots = adapters(2)
    x = torch.ones(2, 1, D_IN, requires_grad=True)
    share = Plan(tuple(slots), torch.eye(2)).at("m", slots)
    assert share is not None
    share.add(torch.nn.functional.pad(x, (0, D_OUT - D_IN)), x, None).sum().backward()
    assert x.grad is not None
    assert (x.grad != 1).any()


@pytest.mark.usefixtures("grouped_only")
def test_padded_rows_of_a_model_equal_peft_and_are_traced_whole(tmp_path: Path) -> None:
    model, inputs = tiny_llama(), padded("left")
    paths = peft_adapters(model, tmp_path)
    expected, attended = by_peft(model, paths, inputs), inputs["attention_mask"].bool()
    manager, gates = loaded(model, paths)
    traced = torch.compile(model, fullgraph=True, backend="eager")
    with manager.gated(gates), torch.no_grad():
        found = outputs(model, inputs)
        assert relative_error(found[attended], expected[attended]) <= 1e-5
        assert torch.equal(traced(**inputs).logits, found)


class Recording(TorchDispatchMode):
    """The names of the operations that ran."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@contextmanager
def recording() -> Iterator[list[str]]:
    with Recording() as mode, torch.no_grad():
        yield mode.names


@pytest.mark.parametrize("layout", [*LAYOUTS, "grouped"])
def test_nothing_in_a_forward_pass_waits_or_comes_from_the_host(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """So a CUDA graph can hold it. The first pass lays out, which does both."""
    monkeypatch.setattr("arrowmoe.lora.costs.cheapest", lambda *_: layout)
    slots = adapters(3)
    x, y = normal(4, 2, D_IN, seed=3), normal(4, 2, D_OUT, seed=4)
    with recording() as first:
        plan = Plan(tuple(slots), two_each(4, 3))
        plan.at("m", slots).add(y.clone(), x, None)  # type: ignore[union-attr]
    with recording() as names:
        plan.at("m", slots).add(y, x, None)  # type: ignore[union-attr]
    assert set(first) & WAITS, "the test can see it"
    assert not set(names) & WAITS
    assert ("add_grouped" in names) == (layout == "grouped")


COMPILE = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from arrowmoe.lora import triton_kernels

TYPES = {"pieces": "*i64", "factors": "*fp32", "order": "*i32", "tiles": "*i32", "entries": "*i32"}
VALUES = ("x", "y", "hidden")
fixed = dict(RANKS=triton_kernels.RANKS, WIDEN=triton_kernels.WIDEN)
assert not triton_kernels.WIDEN
for capability, dtype, block, wide in ((80, "bf16", 16, 128), (90, "bf16", 64, 64), (80, "fp32", 64, 64)):
    for kernel, sizes in (
        (triton_kernels._shrink, dict(BLOCK_M=block, BLOCK_K=triton_kernels.BLOCK_K, **fixed)),
        (triton_kernels._expand, dict(BLOCK_M=block, BLOCK_N=wide, **fixed)),
    ):
        types = {name: TYPES.get(name, f"*{dtype}" if name in VALUES else "i32") for name in kernel.arg_names}
        types |= dict.fromkeys(sizes, "constexpr")
        source = ASTSource(fn=kernel, signature=types, constexprs=sizes)
        found = triton.compile(source, target=GPUTarget("cuda", capability, 32))
        assert found.asm["cubin"]
        assert ("mma" in found.asm["ptx"]) == (dtype == "bf16"), "tensor cores, but never for fp32"
        assert "atom." not in found.asm["ptx"]
        assert found.metadata.shared <= 99 << 10, "what one block may have on every device from 8.0 on"
"""


def test_it_compiles_for_devices_that_are_not_here(tmp_path: Path) -> None:
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_model_on_the_cpu_never_imports_triton() -> None:
    code = (
        "import sys, torch\n"
        "from arrowmoe.lora.costs import layouts_on\n"
        "import arrowmoe.lora.manager, arrowmoe.lora.tuning\n"
        "layouts_on(torch.device('cpu'))\n"
        "assert 'triton' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("device", "capability", "imports", "offered"),
    [("cuda", (9, 0), True, True), ("cuda", (7, 5), True, False), ("cuda", (9, 0), False, False)],
)
def test_it_is_offered_where_it_can_run(
    device: str, capability: tuple[int, int], imports: bool, offered: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(grouped, "_kernels", lambda: torch if imports else None)
    assert ("grouped" in layouts_on(torch.device(device))) == offered
    assert layouts_on(torch.device("cpu")) == LAYOUTS


def test_triton_that_does_not_import_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "arrowmoe.lora.triton_kernels", None)
    grouped._kernels.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    try:
        assert layouts_on(torch.device("cuda")) == LAYOUTS
    finally:
        grouped._kernels.cache_clear()


def test_its_work_is_counted_by_the_formula_of_the_document() -> None:
    parts = [Part(rank=rank, units=20, together=True, one_gate=True) for rank in (8, 17)]
    found = Sizes(rows=40, row_rank=17, total_rank=25, one_gate=False, parts=parts)
    assert work("grouped", found, 1, 100) == Work(
        launch=2,
        read=2 * (8 + 17) * 100,
        multiply_grouped=20 * (16 + 32) * 100,
        move=20 * (100 + 2 * 16) + 20 * (100 + 2 * 32),
    )


def test_it_is_chosen_only_where_offered() -> None:
    parts = [Part(rank=rank, units=64, together=False, one_gate=True) for rank in [64] + [4] * 31]
    found = Sizes(rows=2048, row_rank=None, total_rank=64 + 31 * 4, one_gate=False, parts=parts)
    assert cheapest(found, 2048, 8192, CUDA, (*LAYOUTS, "grouped")) == "grouped"
    assert costs.cheapest(found, 2048, 8192, CUDA) != "grouped"
