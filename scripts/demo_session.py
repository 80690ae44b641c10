"""Puts what `arrowmoe demo` prints into README's session: `python -m scripts.demo_session`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Final

README: Final = Path(__file__).parents[1] / "README.md"
BEGIN: Final = "<!-- demo:begin -->\n"
END: Final = "<!-- demo:end -->\n"
COMMAND: Final = "$ arrowmoe demo\n"


def session(readme: str) -> str:
    """The demo's output as README shows it; empty if it shows none."""
    block = readme.split(BEGIN, 1)[1].split(END, 1)[0]
    return block.removeprefix(f"```\n{COMMAND}").removesuffix("```\n")


def with_session(readme: str, output: str) -> str:
    """`readme` with the demo's output in its place."""
    before, rest = readme.split(BEGIN, 1)
    after = rest.split(END, 1)[1]
    return f"{before}{BEGIN}```\n{COMMAND}{output}```\n{END}{after}"


def main() -> None:
    """Run the demo and write README."""
    command = [sys.executable, "-m", "arrowmoe", "demo"]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    README.write_text(with_session(README.read_text(encoding="utf-8"), output), encoding="utf-8")


if __name__ == "__main__":
    main()
