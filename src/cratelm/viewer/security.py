"""Rules for requests from the network: hosts, headers, lengths, rates.

A page of another site can make a browser send requests to this server (DNS rebinding, cross-site requests).
The server therefore answers only requests whose Host header names this server and that do not come from another
site. Starlette's TrustedHostMiddleware supports only fixed names and suffixes, but a server that listens on all
addresses has to accept every IP address and reject every name.
"""

import ipaddress
import threading
import time
from dataclasses import dataclass, field

from cachetools import LRUCache

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self';"
    " img-src 'self' data: blob:; connect-src 'self'; form-action 'self'; base-uri 'none';"
    " frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}
LONGEST_ADDRESS = 4096
"""characters of path and query"""
LONGEST_BODY = 64 * 1024
"""bytes"""


def allowed_hosts(host: str) -> frozenset[str]:
    """Return the host names by which a browser may address a server that listens on `host`."""
    names = {"127.0.0.1", "localhost", "[::1]"}
    if host not in ("0.0.0.0", "::"):
        names.add(f"[{host}]" if ":" in host else host.lower())
    return frozenset(names)


def is_allowed(header: str, names: frozenset[str], anywhere: bool) -> bool:
    """Return whether a Host header names this server.

    If `anywhere`, the server listens on all addresses, and any IP address is accepted.
    """
    name = header.strip().lower()
    name = (
        name[: name.index("]") + 1]
        if name.startswith("[") and "]" in name
        else name.partition(":")[0]
    )
    if name in names:
        return True
    if not anywhere:
        return False
    try:  # DNS rebinding needs a name, so an address is safe
        ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        return False
    return True


def is_own(origin: str, host: str) -> bool:
    """Return whether an Origin header names the same site as the Host header."""
    return origin.partition("://")[2].lower() == host.strip().lower()


@dataclass
class Rate:
    """A rate limit per client (token bucket): `burst` requests at once, `per_second` in the long run.

    Only the last thousand clients are remembered.
    """

    burst: float
    per_second: float
    _buckets: LRUCache[str, tuple[float, float]] = field(default_factory=lambda: LRUCache(1000))
    """by client: requests left, and the time of its last request (`time.monotonic`)"""
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def take(self, client: str, now: float | None = None) -> bool:
        """Return whether the client may make a request now, and count it if so."""
        now = time.monotonic() if now is None else now
        with self._lock:
            level, then = self._buckets.get(client, (self.burst, now))
            level = min(self.burst, level + (now - then) * self.per_second)
            self._buckets[client] = (level - 1 if level >= 1 else level, now)
            return level >= 1
