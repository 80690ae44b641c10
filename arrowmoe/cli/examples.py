"""An example or two of each command, shown under its `--help`; each line can be typed as it is."""

from __future__ import annotations

from typing import Any

EXAMPLES: dict[str, tuple[str, ...]] = {
    "node start": ("--base builtin:smollm2", "--host 0.0.0.0 --flight-port 7420 --auto-sync"),
    "node status": ("--json",),
    "node stop": ("",),
    "node id": ("--quiet",),
    "skills import": ('runs/sql-expert --description "Writes SQL for questions about a schema"', "x.lora.arrow --sign"),
    "skills ls": ("--base SmolLM2-135M-Instruct", "--json"),
    "skills search": ('"iso date"',),
    "skills show": ("sql-expert", "sql-expert@2 --json"),
    "skills describe": ("sql-expert --examples prompts.txt --calibration other-prompts.txt",),
    "skills export": ("sql-expert runs/copy",),
    "skills rm": ("sql-expert@1", "sql-expert@1 --yes"),
    "skills unhide": ("1b99c9b05ac8",),
    "skills admit": ("sql-expert",),
    "skills verify": ("", "sql-expert --heal"),
    "skills label": ("sql-expert sql@1",),
    "skills tag": ("sql-expert good tested", "sql-expert tested --remove"),
    "skills extract": ("--base models/base --tuned models/tuned --name tuned --energy 0.99",),
    "skills sync": ("--dry-run", "--peer 192.168.1.20:7420 --name 'sql-*' --max-size 64"),
    "skills push": ("192.168.1.20:7420 sql-expert", "den --all"),
    "skills merge": ("dates units --name both", "dates units --name both --weights 1,0.5 --method svd --rank 16"),
    "skills quantise": ("sql-expert --bits 4 --name sql-expert-small",),
    "skills ps": ("",),
    "peers ls": ("--json",),
    "peers approve": ("7d2d-97f1-c16b-0000-0000-0000-0000-0000 --name den",),
    "peers block": ("7d2d97f1c16b00000000000000000000",),
    "peers rm": ("7d2d97f1c16b00000000000000000000",),
    "peers invite": ("--hours 2",),
    "peers join": ("arrowmoe-TOKEN",),
    "peers discover": ("--timeout 5",),
    "router fit": ("train.jsonl --calibration validation.jsonl",),
    "router show": ("--base SmolLM2-135M-Instruct",),
    "router eval": ("test.jsonl --html report.html",),
    "router compare": ("test.jsonl --head router.head --html report.html",),
    "router train": ("train.jsonl --out router.head", "train.jsonl --kind generative --name router"),
    "route": ('"Top five customers?" --explain',),
    "evolve signals": ("--limit 20",),
    "evolve gaps": ("--json",),
    "evolve run": ("--dry-run", ""),
    "evolve status": ("",),
    "evolve history": ("--limit 7",),
    "evolve show": ("night-3", "gap-5 --calls"),
    "evolve schedule": ('"0 2 * * *"', "off"),
    "evolve train": ("job.json",),
    "evolve nested train": ("digits.yaml",),
    "evolve nested show": ("runs/digits", "runs/digits --json"),
    "evolve nested eval": ("runs/digits",),
    "evolve nested consolidate": ("runs/digits two-three --rank 16",),
    "evolve nested rollback": ("runs/digits",),
    "evolve nested export": ("runs/digits --name digits",),
    "evolve rollback": ("", "HuggingFaceTB/SmolLM2-135M-Instruct --yes"),
    "evolve forget": ("--files --yes",),
    "ask": ('"Top five customers?"', '"Top five customers?" --adapter sql-expert=0.7 --adapter dates=0.3'),
    "feedback": ("good", 'bad --correction "billing"'),
    "encode": ('"a first text" "a second" --json',),
    "bench tune": ("--base builtin:smollm2",),
    "demo": ("--fast",),
    "doctor": ("--json",),
    "conformance": ("192.168.1.20:7420",),
    "config show": ("--json",),
}


def lines(name: str) -> list[str]:
    """Whole command lines that show how `name` is used."""
    return [f"arrowmoe {name} {words}".rstrip() for words in EXAMPLES.get(name, ())]


def show_in_help(command: Any, name: str) -> None:
    """Have `command`, known as `name`, and those below it end their help with their examples."""
    for below, one in getattr(command, "commands", {}).items():
        show_in_help(one, f"{name} {below}")
    if found := lines(name):
        paragraphs = ["Examples:", *found, *filter(None, [command.epilog])]
        command.epilog = "\n\n".join(paragraphs)


__all__ = ["EXAMPLES", "lines", "show_in_help"]
