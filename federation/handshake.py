"""How two nodes prove to each other who they are, before the first call.

The server proves it by TLS: a client reads the certificate, checks whose it is, and then connects with this certificate
as its only root. The client proves it by a signature over that very certificate, sent with every call inside TLS. Only
the process that made the certificate can have received it there, and no other server accepts it, not even the same
node's after a restart: so there is no challenge to wait for, no session to keep and no clock to trust (docs/adr/0022).
"""

from __future__ import annotations

import socket
import ssl
import threading
from collections import OrderedDict
from typing import Any

from blake3 import blake3
from pyarrow import flight

from federation import limits
from federation.errors import IdentityError, PeerError, PeerUnreachableError
from federation.peer import format_address
from registry.identity import Identity, Signature

PROOF_HEADER = b"auth-token-bin"
"""Where Flight's servers look for a caller's token; the value is binary: key (32 bytes), signature (64)."""

DOMAIN = b"arrowmoe.caller.1\0"
_KEY_BYTES, _PROOF_BYTES = 32, 96


def proof(identity: Identity, certificate: bytes) -> bytes:
    """What `identity` shows to the server with this certificate (DER), and to no other."""
    signature = identity.sign(_statement(certificate))
    return signature.public_key + signature.value


def caller_of(shown: bytes, certificate: bytes) -> str:
    """The id of the node that made the proof `shown` for the server with this certificate. Raises `IdentityError`."""
    if len(shown) != _PROOF_BYTES:
        raise IdentityError(f"expected a proof of identity of {_PROOF_BYTES} bytes, got {len(shown)}")
    signature = Signature(public_key=shown[:_KEY_BYTES], value=shown[_KEY_BYTES:])
    if not signature.signs(_statement(certificate)):
        raise IdentityError(
            f"the proof of node {signature.publisher} is not for this server as it runs now, so it proves nothing"
        )
    return signature.publisher


class Callers(flight.ServerAuthHandler):  # type: ignore[misc]  # the library takes a subclass only
    """Tells a server's calls apart by the callers' proofs; the library asks it before every handler."""

    def __init__(self, certificate: bytes) -> None:
        super().__init__()
        self._certificate = certificate
        self._lock = threading.Lock()
        self._known: OrderedDict[bytes, str] = OrderedDict()

    def is_valid(self, token: bytes) -> str:
        """The caller's id."""
        with self._lock:
            if (known := self._known.get(token)) is not None:
                self._known.move_to_end(token)
                return known
        try:
            caller = caller_of(token, self._certificate)
        except IdentityError as error:
            raise flight.FlightUnauthenticatedError(str(error)) from None
        with self._lock:
            self._known[token] = caller
            if len(self._known) > limits.MAX_KNOWN_CALLERS:
                self._known.popitem(last=False)
        return caller

    def authenticate(self, outgoing: Any, incoming: Any) -> None:
        """Flight's own handshake, which would let a stranger hold a thread: refused unread."""
        raise flight.FlightUnauthenticatedError("there is no handshake here: send a proof of identity with each call")


def certificate_at(host: str, port: int, *, timeout_s: float) -> bytes:
    """Ask a server for its certificate (DER), and believe nothing of it. Raises `PeerUnreachableError`, `PeerError`."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # `credentials.node_of` does both
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.set_alpn_protocols(["h2"])
    address = format_address(host, port)
    try:
        with socket.create_connection((host, port), timeout_s) as line, context.wrap_socket(line) as secured:
            return secured.getpeercert(binary_form=True) or b""
    except ssl.SSLEOFError as error:
        raise PeerUnreachableError(f"{address} broke off the TLS handshake") from error
    except ssl.SSLError as error:
        raise PeerError(
            f"{address} does not speak TLS as a node does: {error.reason}",
            hint="is it a node of this release, and the port right?",
        ) from error
    except TimeoutError as error:
        raise PeerUnreachableError(f"{address} did not answer in time") from error
    except (OSError, UnicodeError) as error:
        raise PeerUnreachableError(
            f"{address} is not available: {error}", hint="is the node running, and the address right?"
        ) from error


def _statement(certificate: bytes) -> bytes:
    return DOMAIN + blake3(certificate).digest()


__all__ = ["DOMAIN", "PROOF_HEADER", "Callers", "caller_of", "certificate_at", "proof"]
