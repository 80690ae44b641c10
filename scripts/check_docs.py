"""Keeps the documents true: links and paths that they name exist, and so do the commands.

    python -m scripts.check_docs

Checks every Markdown file of the repository: relative links and their anchors' files; paths in README's annotated
tree; and that each `arrowmoe NOUN [VERB]` in a code block or in backticks is a command of the program.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent
LINK = re.compile(r"\[[^\]]*\]\(([^)#\s]+)(?:#[^)]*)?\)")
CODE = re.compile(r"```.*?```|`[^`\n]+`", re.DOTALL)
COMMAND = re.compile(r"(?:^|`|\$ )arrowmoe ([a-z]+(?: [a-z]+)?)", re.MULTILINE)
TREE_ROW = re.compile(r"^([\w./-]+/?)\s{2,}\S", re.MULTILINE)
VERBS = re.compile(r"^[│ ]+([a-z]+)\s{2,}\S", re.MULTILINE)


def main() -> int:
    """Print every fault; 1 if there is one."""
    faults = [f"{path.relative_to(ROOT)}: {fault}" for path in documents() for fault in faults_of(path)]
    faults += [f"README.md: the tree names {name!r}, which is not there" for name in missing_in_tree()]
    for fault in faults:
        print(fault)
    print(f"{len(documents())} documents, {len(faults)} faults")
    return 1 if faults else 0


@cache
def documents() -> list[Path]:
    """The Markdown files that git knows."""
    listed = subprocess.run(
        ["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    return [ROOT / name for name in listed]


def faults_of(path: Path) -> Iterator[str]:
    """Broken links and unknown commands of one document."""
    text = path.read_text()
    for target in LINK.findall(text):
        if "://" not in target and not target.startswith("mailto:") and not (path.parent / target).exists():
            yield f"links to {target!r}, which is not there"
    for words in COMMAND.findall("\n".join(CODE.findall(text))):
        noun, *rest = words.split()
        if noun not in verbs_of(""):
            yield f"names the command 'arrowmoe {noun}', which there is not"
        elif rest and verbs_of(noun) and rest[0] not in verbs_of(noun):
            yield f"names the command 'arrowmoe {noun} {rest[0]}', which there is not"


@cache
def verbs_of(noun: str) -> frozenset[str]:
    """The commands that `arrowmoe [noun] --help` lists."""
    command = [sys.executable, "-m", "arrowmoe", *noun.split(), "--help"]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    _, _, commands = shown.partition("Commands")
    return frozenset(VERBS.findall(commands))


def missing_in_tree() -> list[str]:
    """Paths of README's annotated tree (rows 'path   what it is' in the block after 'The tree') that do not exist."""
    _, _, after = (ROOT / "README.md").read_text().partition("## The tree")
    block = after.split("```")[1] if "```" in after else ""
    return [name for name in TREE_ROW.findall(block) if not (ROOT / name).exists()]


if __name__ == "__main__":
    sys.exit(main())
