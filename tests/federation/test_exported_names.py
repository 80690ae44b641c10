from __future__ import annotations

import subprocess
import sys

import federation


def test_all_names_what_there_is_and_sorted() -> None:
    assert all(hasattr(federation, name) for name in federation.__all__)
    assert sorted(federation.__all__, key=lambda name: (not name.isupper(), name.islower(), name)) == federation.__all__


def test_federation_imports_no_torch() -> None:
    code = "import federation, sys; print([name for name in ('torch', 'transformers', 'peft') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_every_error_is_either_the_peers_fault_or_the_lines() -> None:
    assert issubclass(federation.PeerUnreachableError, federation.TransportError)
    assert issubclass(federation.TransferError, federation.TransportError)
    assert not issubclass(federation.PeerError, federation.TransportError)
    assert not issubclass(federation.TransportError, federation.PeerError)
