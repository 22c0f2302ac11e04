"""What stands between the pages and the network: hosts, headers, lengths, rates.

A page of another site can make a browser ask this server (DNS rebinding, cross-site requests): only
requests that name this server as their host are answered, and only those that do not come from
another site.
"""

import ipaddress
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass, field

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
    """Names by which a browser may ask a server that listens on `host`."""
    names = {"127.0.0.1", "localhost", "[::1]"}
    if host not in ("0.0.0.0", "::"):
        names.add(f"[{host}]" if ":" in host else host.lower())
    return frozenset(names)


def is_allowed(header: str, names: frozenset[str], anywhere: bool) -> bool:
    """Whether a Host header names this server. `anywhere`: it listens on all addresses, so any IP will do."""
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
    try:  # an address cannot be rebound, a name can
        ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        return False
    return True


def is_own(origin: str, host: str) -> bool:
    """Whether an Origin header names the site that the Host header does."""
    return origin.partition("://")[2].lower() == host.strip().lower()


@dataclass
class Rate:
    """A bucket of tokens for each client: `burst` at once, `per_second` in the long run.

    Holds the last thousand clients.
    """

    burst: float
    per_second: float
    _buckets: OrderedDict[str, tuple[float, float]] = field(default_factory=OrderedDict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def take(self, client: str, now: float | None = None) -> bool:
        """False where the client has to wait."""
        now = time.monotonic() if now is None else now
        with self._lock:
            level, then = self._buckets.get(client, (self.burst, now))
            level = min(self.burst, level + (now - then) * self.per_second)
            self._buckets[client] = (level - 1 if level >= 1 else level, now)
            self._buckets.move_to_end(client)
            while len(self._buckets) > 1000:
                self._buckets.popitem(last=False)
            return level >= 1
