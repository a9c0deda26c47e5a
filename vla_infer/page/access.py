"""Who may talk to the page. Pure: headers in, the reason of a refusal out.

The server listens on this machine alone, but any web site that its user visits can make the browser send requests
there. Two headers, which a site's scripts cannot choose, tell them apart: `Host` names the site that the browser
believes to be on (after DNS rebinding that is the attacker's name), `Origin` the site that a request comes from.
"""

from __future__ import annotations

from collections.abc import Mapping
from urllib.parse import urlsplit

_LOCAL = frozenset({"127.0.0.1", "localhost"})


def refusal(headers: Mapping[str, str], *, acts: bool) -> str:
    """Why a request is refused; empty when it is not. acts: it does more than to read the page's own files."""
    host = headers.get("Host", "")
    try:
        named = urlsplit(f"//{host}")
        local = named.hostname in _LOCAL and (named.port or 80) > 0 and named.netloc == host
        local = local and not (named.username or named.password)
    except ValueError:
        local = False
    if not local:
        return "the Host header names no address of this machine; open the page by http://127.0.0.1"
    origin = headers.get("Origin")
    if origin is None:
        return "there is no Origin header; only the page itself may do this" if acts else ""
    # The port counts here: another program's page on this machine is another site.
    if origin != f"http://{host}":
        return "the request comes from another site; only the page itself may do this"
    return ""


#: On every answer: nothing but the page's own files runs in it, and no other site shows it in a frame, where a click
#: meant for something else would reach a button.
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self' ws://127.0.0.1:* ws://localhost:*; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "X-Frame-Options": "DENY",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}
