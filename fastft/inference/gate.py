"""Who may ask the server: this machine's own programs, or whoever has the key.

A web page that the user looks at runs on this machine too. It may not ask: a request with an
Origin comes from a page and is refused, and a Host that is not this machine's name is a page's
whose name was pointed here (DNS rebinding).
"""

from __future__ import annotations

import hmac
import ipaddress
from typing import Any

LOCAL_NAMES = ("localhost", "127.0.0.1", "[::1]")


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach what listens at `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


class Gate:
    """ASGI middleware: answers 403 or 401 in the place of the application."""

    def __init__(self, app: Any, *, host: str, api_key: str | None) -> None:
        self.app, self.api_key = app, api_key
        shown = f"[{host}]" if ":" in host else host
        self.names = {*LOCAL_NAMES, shown.lower()} if is_loopback(host) else None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer one request, or refuse it before its body is read."""
        refusal = self._refusal(scope) if scope["type"] == "http" else None
        if refusal is None:
            return await self.app(scope, receive, send)
        await refusal.response()(scope, receive, send)

    def _refusal(self, scope: Any) -> Any:
        from fastft.inference.requests import RefusedError

        headers: dict[bytes, list[bytes]] = {}
        for name, value in scope["headers"]:
            headers.setdefault(name.lower(), []).append(value)
        hosts = [value.decode("latin-1").lower() for value in headers.get(b"host", [])]
        if self.names is not None and not (
            len(hosts) == 1 and _without_port(hosts[0]) in self.names
        ):
            return RefusedError(403, f"the Host header must be one of: {', '.join(LOCAL_NAMES)}")
        if b"origin" in headers or b"cross-site" in headers.get(b"sec-fetch-site", []):
            return RefusedError(403, "requests of web pages are not answered")
        if self.api_key is not None:
            given = b"".join(headers.get(b"authorization", []))
            if not hmac.compare_digest(given, b"Bearer " + self.api_key.encode()):
                return RefusedError(401, "the API key is missing or wrong")
        return None


def _without_port(host: str) -> str:
    if host.startswith("["):
        return host.partition("]")[0] + "]"
    return host.partition(":")[0]
