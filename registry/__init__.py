"""Cards and where a node keeps them: format, identity, store and catalog. Knows no torch and no network.

Names are loaded when they are first used: the command line's `--help` must not wait for Arrow and SQLAlchemy.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from registry.blobs import BlobStore, FileBlobStore
    from registry.card import LoRACard
    from registry.digest import Digest, digest_of, hex_of, is_digest
    from registry.entries import CardEntry, Origin, VerifyReport
    from registry.errors import (
        AmbiguousCardError,
        ArrowMoEError,
        CardError,
        CardFormatError,
        CardIntegrityError,
        CardLimitError,
        HomeError,
        LabelTakenError,
        ManifestError,
        MissingFileError,
        RegistryError,
        UnknownCardError,
        UnsupportedAdapterError,
    )
    from registry.format import LoRAFormat
    from registry.identity import Identity, Signature
    from registry.ipc_guard import CardLimits
    from registry.manifest import AdapterSpec, BaseRef, Manifest, TensorSpec
    from registry.store import Registry
    from registry.tensor import DType, Role, Tensor

_MODULES = {
    "blobs": ("BlobStore", "FileBlobStore"),
    "card": ("LoRACard",),
    "digest": ("Digest", "digest_of", "hex_of", "is_digest"),
    "entries": ("CardEntry", "Origin", "VerifyReport"),
    "errors": (
        "AmbiguousCardError",
        "ArrowMoEError",
        "CardError",
        "CardFormatError",
        "CardIntegrityError",
        "CardLimitError",
        "HomeError",
        "LabelTakenError",
        "ManifestError",
        "MissingFileError",
        "RegistryError",
        "UnknownCardError",
        "UnsupportedAdapterError",
    ),
    "format": ("LoRAFormat",),
    "identity": ("Identity", "Signature"),
    "ipc_guard": ("CardLimits",),
    "manifest": ("AdapterSpec", "BaseRef", "Manifest", "TensorSpec"),
    "store": ("Registry",),
    "tensor": ("DType", "Role", "Tensor"),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "AdapterSpec",
    "AmbiguousCardError",
    "ArrowMoEError",
    "BaseRef",
    "BlobStore",
    "CardEntry",
    "CardError",
    "CardFormatError",
    "CardIntegrityError",
    "CardLimitError",
    "CardLimits",
    "DType",
    "Digest",
    "FileBlobStore",
    "HomeError",
    "Identity",
    "LabelTakenError",
    "LoRACard",
    "LoRAFormat",
    "Manifest",
    "ManifestError",
    "MissingFileError",
    "Origin",
    "Registry",
    "RegistryError",
    "Role",
    "Signature",
    "Tensor",
    "TensorSpec",
    "UnknownCardError",
    "UnsupportedAdapterError",
    "VerifyReport",
    "digest_of",
    "hex_of",
    "is_digest",
]

if not TYPE_CHECKING:  # a type checker would take any misspelt name for Any

    def __getattr__(name: str) -> Any:
        module = _MODULE_OF.get(name)
        if module is None:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = globals()[name] = getattr(import_module(f"{__name__}.{module}"), name)
        return value
