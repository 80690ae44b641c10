from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import arrowmoe

NAMES = [
    "Answer",
    "ArrowEngine",
    "BatchLimits",
    "ArrowMoEError",
    "BUILTINS",
    "BaseModel",
    "ByWeights",
    "Candidate",
    "CardEntry",
    "CardError",
    "CardStatistics",
    "Chunk",
    "Decision",
    "Discovery",
    "EngineError",
    "Evolution",
    "Features",
    "FederationError",
    "Gates",
    "Generation",
    "Identity",
    "LoRACard",
    "LoRAFlightClient",
    "LoRAFlightServer",
    "LoRAFormat",
    "LoRALinear",
    "LoRAManager",
    "LoRARouter",
    "LoadedLoRA",
    "Merge",
    "MultiExpertRouter",
    "MultiLoRAWithRouter",
    "Node",
    "Offer",
    "Opinion",
    "Origin",
    "Peer",
    "PeerError",
    "Policy",
    "Prompts",
    "Registry",
    "RegistryError",
    "Settings",
    "Swarm",
    "SyncReport",
    "TextFeaturizer",
    "TransportError",
    "__version__",
    "ask",
    "browse",
    "describe",
    "evolution_of_engine",
    "evolution_of_node",
    "load_base_model",
    "merge",
    "parse_address",
    "quantise",
    "serve",
    "sync",
]


def test_the_public_names_are_these() -> None:
    assert sorted(arrowmoe.__all__) == sorted(NAMES)
    assert set(NAMES) <= set(dir(arrowmoe))


@pytest.mark.parametrize("name", NAMES)
def test_each_name_is_what_it_says(name: str) -> None:
    value = getattr(arrowmoe, name)
    assert getattr(value, "__name__", name) == name


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'LoraCard'"):
        arrowmoe.LoraCard  # noqa: B018


def test_importing_the_package_imports_nothing_heavy() -> None:
    program = (
        "import sys, arrowmoe\nprint([m for m in ('torch', 'pyarrow', 'sqlalchemy', 'pydantic') if m in sys.modules])"
    )
    assert arrowmoe_process(program) == "[]\n"


def arrowmoe_process(program: str) -> str:
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=True, timeout=60
    )
    return done.stdout
