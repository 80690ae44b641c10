"""The card: an adapter with its manifest. A value; nothing here opens a `.lora.arrow` file (see `registry.format`)."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import registry.peft_io as peft_io
from registry.digest import Digest, digest_of
from registry.errors import CardIntegrityError, ManifestError
from registry.identity import Identity, Signature
from registry.manifest import (
    FORMAT_VERSION,
    AdapterSpec,
    Manifest,
    RoutingSpec,
    TensorSpec,
    base_fingerprint,
    manifest_bytes,
    module_shapes,
)
from registry.tensor import Role, Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class LoRACard:
    """An adapter: `manifest_bytes` verbatim, their parsed form, the tensors in the manifest's order, a signature.

    Two cards are equal if their manifests are, byte for byte: the manifest holds every tensor's digest.
    """

    manifest_bytes: bytes
    manifest: Manifest
    tensors: tuple[Tensor, ...]
    signature: Signature | None = None

    @classmethod
    def build(
        cls,
        *,
        name: str,
        adapter: AdapterSpec,
        tensors: Iterable[Tensor],
        base_name: str | None = None,
        base_architecture: str | None = None,
        **about: Any,
    ) -> LoRACard:
        """Make a card from tensors; `about` holds the manifest's other fields (version, description, examples …).

        Raises `ManifestError` where fields and tensors do not fit, `CardIntegrityError` for NaN or infinite weights.
        """
        ordered = tuple(sorted(tensors, key=_layout_key))
        check_finite(ordered)
        specs = [_spec_of(tensor) for tensor in ordered]
        about.setdefault("created", datetime.now(UTC).isoformat(timespec="seconds"))
        fields = {
            "format": FORMAT_VERSION,
            "name": name,
            "version": "1",
            "adapter": adapter.model_dump(mode="json"),
            "tensors": specs,
            **about,
            "base": {
                "name": base_name,
                "architecture": base_architecture,
                "fingerprint": base_fingerprint(module_shapes(ordered)),
            },
        }
        data = manifest_bytes(fields)
        return cls(manifest_bytes=data, manifest=Manifest.parse(data), tensors=ordered)

    @classmethod
    def from_peft(cls, directory: Path | str, name: str | None = None, **about: Any) -> LoRACard:
        """Read a PEFT adapter directory, or a checkpoint root with a `final/` subfolder; `name` defaults to its own.

        Raises `UnsupportedAdapterError` naming whatever a card cannot hold.
        """
        adapter = peft_io.read(Path(directory))
        return cls.build(
            name=name or adapter.name,
            adapter=adapter.spec,
            tensors=adapter.tensors,
            base_name=about.pop("base_name", None) or adapter.base_name,
            peft=adapter.config,
            **about,
        )

    def to_peft(self, directory: Path | str) -> None:
        """Write `adapter_config.json` and `adapter_model.safetensors`, with the bits and settings that came in."""
        peft_io.write(self.manifest, self.tensors, Path(directory))

    @property
    def name(self) -> str:
        """The name that the manifest gives."""
        return self.manifest.name

    @property
    def version(self) -> str:
        """The version that the manifest gives."""
        return self.manifest.version

    @property
    def base_name(self) -> str | None:
        """The logical name of its base model."""
        return self.manifest.base.name

    @property
    def description(self) -> str:
        """What it is for, as the manifest says."""
        return self.manifest.description

    @property
    def examples(self) -> tuple[str, ...]:
        """Prompts that it is for, as the manifest shows."""
        return self.manifest.examples

    @cached_property
    def digest(self) -> Digest:
        """The card's identity."""
        return digest_of(self.manifest_bytes)

    @property
    def nbytes(self) -> int:
        """Sum of all tensors' sizes in bytes."""
        return self.manifest.tensor_bytes

    @cached_property
    def modules(self) -> Mapping[str, Mapping[Role, Tensor]]:
        """Tensors by module path, then role (`FULL` and `STATS` tensors under their own names)."""
        modules: dict[str, dict[Role, Tensor]] = {}
        for tensor in self.tensors:
            modules.setdefault(tensor.name, {})[tensor.role] = tensor
        return modules

    @property
    def statistics(self) -> Mapping[str, Tensor]:
        """The tensors of role `STATS`, by name; `manifest.routing` says what they are."""
        return {tensor.name: tensor for tensor in self.tensors if tensor.role is Role.STATS}

    def describe(self, **changes: Any) -> LoRACard:
        """A new, unsigned card that shares the tensors; `changes` replace fields of the manifest, the rest stays."""
        forbidden = {"tensors", "adapter", "format", "base", "routing"} & changes.keys()
        if forbidden:
            raise ManifestError(f"{', '.join(sorted(forbidden))}: describe() changes the description, not the adapter")
        fields = json.loads(self.manifest_bytes) | {"publisher": None} | changes
        data = manifest_bytes(fields)
        return replace(self, manifest_bytes=data, manifest=Manifest.parse(data), signature=None)

    def scaled(self, factor: float) -> LoRACard:
        """A new, unsigned card whose adapter does `factor` times as much: alpha is what changes, never a weight."""
        fields = json.loads(self.manifest_bytes)
        adapter = fields["adapter"]
        patterns = {module: alpha * factor for module, alpha in adapter.get("alpha_pattern", {}).items()}
        adapter |= {"alpha": adapter["alpha"] * factor} | ({"alpha_pattern": patterns} if patterns else {})
        data = manifest_bytes(fields | {"publisher": None})
        return replace(self, manifest_bytes=data, manifest=Manifest.parse(data), signature=None)

    def with_routing(self, spec: RoutingSpec | None, tensors: Iterable[Tensor] = ()) -> LoRACard:
        """A new, unsigned card with the same weights, and with `tensors` for its statistics, which `spec` describes.

        None and no tensors take them out. Raises `ManifestError` where spec and tensors do not fit, and
        `CardIntegrityError` for statistics that are not finite.
        """
        statistics = tuple(tensors)
        weights = [tensor.name for tensor in statistics if tensor.role is not Role.STATS]
        if weights:
            raise ManifestError(f"expected statistics only, got the weight {weights[0]!r}, so the adapter would change")
        check_finite(statistics)
        fields = json.loads(self.manifest_bytes)
        old = zip(self.tensors, fields["tensors"], strict=True)
        rows = [(tensor, row) for tensor, row in old if tensor.role is not Role.STATS]
        rows += [(tensor, _spec_of(tensor)) for tensor in statistics]
        rows.sort(key=lambda row: _layout_key(row[0]))
        routing = None if spec is None else spec.model_dump(mode="json")
        data = manifest_bytes(fields | {"publisher": None, "routing": routing, "tensors": [row for _, row in rows]})
        return LoRACard(manifest_bytes=data, manifest=Manifest.parse(data), tensors=tuple(tensor for tensor, _ in rows))

    def signed(self, identity: Identity) -> LoRACard:
        """This card as published by `identity`: the manifest names the publisher, the signature covers it."""
        card = self.describe(publisher=identity.id)
        return replace(card, signature=identity.sign(card.manifest_bytes))

    def verify(self) -> None:
        """Check signature, every tensor's digest, and that weights are finite. Raises `CardIntegrityError`."""
        self.verify_signature()
        for tensor, spec in zip(self.tensors, self.manifest.tensors, strict=True):
            check_tensor(tensor, spec)

    def verify_signature(self) -> None:
        """Check that the publisher named in the manifest signed it. An unsigned card names no publisher."""
        if self.signature is None:
            if self.manifest.publisher is not None:
                raise CardIntegrityError(
                    f"the manifest names publisher {self.manifest.publisher}, but nobody signed it"
                )
            return
        self.signature.check(self.manifest_bytes)
        if self.signature.publisher != self.manifest.publisher:
            raise CardIntegrityError(
                f"the manifest names publisher {self.manifest.publisher}, but {self.signature.publisher} signed it"
            )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LoRACard) and self.manifest_bytes == other.manifest_bytes

    def __hash__(self) -> int:
        return hash(self.manifest_bytes)

    def __repr__(self) -> str:
        return f"LoRACard({self.name}@{self.version}, rank={self.manifest.adapter.rank}, {self.digest[:19]}…)"


def check_tensor(tensor: Tensor, spec: TensorSpec) -> None:
    """Check a tensor's bytes against what the manifest promises, and that they are finite.

    Raises `CardIntegrityError`.
    """
    found = digest_of(tensor.data)
    if found != spec.digest:
        raise CardIntegrityError(f"tensor {spec.name!r} ({spec.role}): expected {spec.digest}, got {found}")
    check_finite([tensor])


def _layout_key(tensor: Tensor) -> tuple[int, str, str]:
    """Larger elements first, so that a batch of whole tensors keeps each aligned to its element size."""
    return (-tensor.dtype.itemsize, tensor.name, tensor.role)


def _spec_of(tensor: Tensor) -> dict[str, Any]:
    return {
        "name": tensor.name,
        "role": tensor.role,
        "dtype": tensor.dtype,
        "shape": list(tensor.shape),
        "nbytes": tensor.nbytes,
        "digest": digest_of(tensor.data),
    }


def check_finite(tensors: Iterable[Tensor]) -> None:
    """Raise `CardIntegrityError` for NaN or infinite elements."""
    for tensor in tensors:
        if not tensor.is_finite():
            raise CardIntegrityError(
                f"tensor {tensor.name!r} ({tensor.role}) holds NaN or infinite values",
                hint="train the adapter again; such weights turn every answer into NaN",
            )
