"""Files over HTTP: ranges of bytes, through the proxy that the environment names, and redirects that lead nowhere else.

A redirect inside one origin is followed. To another one it is followed only from https to https, to a public address,
and without credentials: else a server could have a node of a cluster ask whatever only that node can reach.
"""

import ipaddress
import socket
import weakref
from typing import Any
from urllib.request import getproxies, proxy_bypass

import aiohttp
import yarl
from aiohttp.abc import AbstractResolver, ResolveResult
from fsspec.implementations.http import HTTPFileSystem

_MOST_REDIRECTS = 5
_REDIRECTS = (301, 302, 303, 307, 308)


class RedirectError(ValueError):
    """A redirect that is not followed. No OSError: aiohttp would hide what a resolver raises behind one of its own."""


class HttpFiles(HTTPFileSystem):  # type: ignore[misc] # fsspec has no types
    """fsspec's file system, of which only `cat_file` is used: with redirects by our rule, and never more than asked."""

    _elsewhere: aiohttp.ClientSession | None = None

    async def _cat_file(self, url: str, start: int | None = None, end: int | None = None, **kwargs: Any) -> bytes:
        """The bytes from `start` to before `end`, fewer where the file ends before; both must be given."""
        assert start is not None and end is not None and start < end
        headers = {"Range": f"bytes={start}-{end - 1}"}
        session, options = await self.set_session(), dict[str, Any]()
        target = yarl.URL(url)
        for _ in range(_MOST_REDIRECTS + 1):
            async with session.get(target, headers=headers, allow_redirects=False, **options) as response:
                if response.status in _REDIRECTS:
                    origin, target = target, redirected(target, response.headers.get("Location", ""))
                    if target.origin() != origin.origin():
                        session, options = self._session_elsewhere(), {"proxy": _proxy_of(target)}
                    continue
                self._raise_not_found_for_status(response, url)
                if start and response.status != 206:
                    raise OSError("the server knows no ranges of bytes")
                return await _first_bytes(response, end - start)
        raise RedirectError(f"more than {_MOST_REDIRECTS} redirects")

    def _session_elsewhere(self) -> aiohttp.ClientSession:
        """Of requests to other origins: no cookies, no passwords of the user's files, public addresses only."""
        if self._elsewhere is None:
            self._elsewhere = aiohttp.ClientSession(
                **{**self.client_kwargs, "trust_env": False},
                connector=aiohttp.TCPConnector(resolver=PublicResolver()),
                cookie_jar=aiohttp.DummyCookieJar(),
            )
            weakref.finalize(self, self.close_session, self.loop, self._elsewhere)
        return self._elsewhere


def redirected(url: yarl.URL, location: str) -> yarl.URL:
    """Where a redirect from `url` leads. Raises RedirectError where it must not be followed."""
    try:
        target = url.join(yarl.URL(location))
        if target.origin() == url.origin():
            return target
    except ValueError as error:
        raise RedirectError(f"a redirect to {location[:200]!r}, which is no address of the web") from error
    said = f"a redirect from {url.origin()} to {target.origin()}"
    if (url.scheme, target.scheme) != ("https", "https"):
        raise RedirectError(f"{said}: only https redirects to https elsewhere are followed; give the URL that it names")
    try:
        is_refused = not is_public(target.host or "")
    except ValueError:
        # A name: the resolver looks at its addresses.
        is_refused = False
    if is_refused:
        raise RedirectError(f"{said}: a private or loopback address")
    return target.with_user(None)


def is_public(address: str) -> bool:
    """Whether an IP address is one of the whole internet. Raises ValueError for what is none."""
    parsed = ipaddress.ip_address(address)
    inner = parsed.ipv4_mapped if isinstance(parsed, ipaddress.IPv6Address) else None
    return (inner or parsed).is_global and not (inner or parsed).is_multicast


class PublicResolver(AbstractResolver):
    """Names to addresses; raises RedirectError for names of private ones, but for the proxy of the environment."""

    def __init__(self) -> None:
        self._resolver = aiohttp.ThreadedResolver()

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        """The addresses of `host`; each connection is made to these, and to no others."""
        found = await self._resolver.resolve(host, port, family)
        if host not in {yarl.URL(proxy).host for proxy in getproxies().values()}:
            for entry in found:
                if not is_public(entry["host"]):
                    raise RedirectError(
                        f"a redirect to {host}, which is the private or loopback address {entry['host']}"
                    )
        return found

    async def close(self) -> None:
        """Nothing is open."""


def _proxy_of(url: yarl.URL) -> str | None:
    return None if proxy_bypass(url.host or "") else getproxies().get(url.scheme)


async def _first_bytes(response: aiohttp.ClientResponse, num_bytes: int) -> bytes:
    """At most `num_bytes` of the answer, however long it is."""
    data = bytearray()
    async for chunk in response.content.iter_chunked(1 << 18):
        data += chunk
        if len(data) >= num_bytes:
            break
    return bytes(data[:num_bytes])
