"""Pictures behind URLs: only from hosts that the server's owner names, only from public addresses."""

import asyncio
import socket
import ssl
from functools import cache
from ipaddress import ip_address, ip_network

import httpx

from openbagel.checks import retold
from openbagel.serve.limits import ServerLimits

UNICAST = ip_network("2000::/3")
INSIDE = "192.0.0.0/24 192.88.99.0/24 168.63.129.16 2001::/23 2002::/16 3fff::/20".split()
"""What `is_global` of some Python version lets pass and no picture comes from: protocol assignments (with
clouds' metadata), relays to IPv6, the host under a virtual machine, tunnels, IPv4 inside IPv6, examples."""
REMEDY = "send the picture itself"


async def fetch(url: str, limits: ServerLimits) -> bytes:
    """The body behind an https URL whose host is in `url_hosts` ("host" or "host:port").

    The name is resolved once, every address must be public, and the first one is connected to, with
    certificates checked for the name. ValueError, which tells nothing of addresses, otherwise, and for
    answers that are not 200 (redirects too), too large or too late.
    """
    target = _allowed(url, limits)
    host, port = _place(target)
    with retold(f"the picture's URL cannot be read; {REMEDY}", OSError, httpx.HTTPError):
        async with asyncio.timeout(limits.url_seconds):
            addresses = await resolve(host, port)
            if not addresses or not all(map(public, addresses)):
                raise ValueError(f"the picture's URL does not lead to a public host; {REMEDY}")
            return await _body(target, addresses[0], limits)


def _allowed(url: str, limits: ServerLimits) -> httpx.URL:
    if not limits.url_hosts:
        raise ValueError(f"pictures behind URLs are not fetched; {REMEDY}")
    with retold(f"the picture's URL cannot be understood; {REMEDY}", httpx.InvalidURL, ValueError):
        target = httpx.URL(url)
    if target.scheme != "https" or target.userinfo or _place(target) not in places(limits):
        raise ValueError(f"the picture's URL is not https on a host that may be fetched from; {REMEDY}")
    return target


def places(limits: ServerLimits) -> set[tuple[str, int]]:
    """Hosts and ports that may be fetched from; ValueError for an entry that is none."""
    with retold("url_hosts {error}; write hosts such as example.com or example.com:8443", httpx.InvalidURL):
        return {_place(httpx.URL(f"https://{host}")) for host in limits.url_hosts}


def _place(url: httpx.URL) -> tuple[str, int]:
    return url.raw_host.decode("ascii"), 443 if url.port is None else url.port


async def resolve(host: str, port: int) -> list[str]:
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(place[0]) for *_, place in found]


def public(address: str) -> bool:
    """Whether the whole internet could reach it: no private, local, multicast or translated address."""
    ip = ip_address(address)
    ip = getattr(ip, "ipv4_mapped", None) or ip
    if ip.version == 6 and ip not in UNICAST:
        return False
    return ip.is_global and not ip.is_multicast and not any(ip in ip_network(net) for net in INSIDE)


async def _body(target: httpx.URL, address: str, limits: ServerLimits) -> bytes:
    headers = {"Host": target.netloc.decode("ascii"), "Accept": "image/*", "Accept-Encoding": "identity"}
    named = {"sni_hostname": _place(target)[0]}
    body = bytearray()
    client = httpx.AsyncClient(verify=_trusted(), trust_env=False, timeout=limits.url_seconds)
    at_address = client.stream("GET", target.copy_with(host=address), headers=headers, extensions=named)
    async with client, at_address as response:
        if response.status_code != 200:
            raise ValueError(f"the picture's URL answers {response.status_code}; {REMEDY}")
        async for chunk in response.aiter_raw():  # as sent: nothing is unpacked on the way
            body += chunk
            if len(body) > limits.url_bytes:
                raise ValueError(f"the picture's URL holds more than {limits.url_bytes:,} bytes")
    return bytes(body)


@cache
def _trusted() -> ssl.SSLContext:
    return httpx.create_ssl_context(trust_env=False)
