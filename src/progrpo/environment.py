"""Descriptions of the environment for messages about servers: proxies, certificates and the hub's settings."""

from __future__ import annotations

import importlib.util
import ipaddress
import os
import re
import socket
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from progrpo.messages import named

_CERTIFICATES = ("SSL_CERT_FILE", "SSL_CERT_DIR")
_HUB = "https://huggingface.co"
_OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
_TRUE = ("1", "ON", "YES", "TRUE")  # as huggingface_hub reads them


@dataclass(frozen=True)
class Proxy:
    """A proxy for a host, and the environment variable that names it."""

    url: str
    variable: str
    host: str

    def __str__(self) -> str:
        """A clause with the proxy, without its user and password."""
        shown = named(re.sub(r"//.*@", "//", self.url))
        lacking = self.url.startswith("socks") and importlib.util.find_spec("socksio") is None
        needs = ", which needs a package: pip install socksio" if lacking else ""
        return (
            f"through the proxy {shown} of {self.variable}{needs}; to reach it without, unset that or add {self.host}"
            " to NO_PROXY"
        )


def proxy_for(url: str) -> Proxy | None:
    """The proxy for a server. None for this machine, and for hosts that NO_PROXY lists."""
    try:
        parts, proxies = urlsplit(url), getproxies()
    except ValueError:  # it is no URL
        return None
    host = parts.hostname or ""
    host_and_port = parts.netloc.rpartition("@")[2]
    scheme = next((scheme for scheme in (parts.scheme, "all") if proxies.get(scheme)), None)
    if scheme is None or _is_this_machine(host):
        return None
    if proxy_bypass(host_and_port) or _is_in_listed_network(host, proxies.get("no", "")):
        return None
    proxy = proxies[scheme] if "://" in proxies[scheme] else f"http://{proxies[scheme]}"
    names = (f"{scheme}_proxy", f"{scheme}_proxy".upper())
    return Proxy(proxy, next((name for name in names if os.environ.get(name)), "the system's settings"), host)


def on_the_way(url: str) -> str:
    """The proxy and certificates that the environment sets for a server, in brackets. Empty if there are none."""
    return _in_brackets(_on_the_way(url))


def on_the_way_to_the_hub() -> str:
    """The settings, proxy and certificates that the environment sets for the Hugging Face hub, in brackets."""
    endpoint = os.environ.get("HF_ENDPOINT") or _HUB
    settings = []
    if endpoint != _HUB:
        settings.append(f"at {named(endpoint)}, which HF_ENDPOINT names")
    if offline := next((name for name in _OFFLINE if os.environ.get(name, "").upper() in _TRUE), None):
        settings.append(f"{offline} is set, so it was not asked")
    return _in_brackets([*settings, *_on_the_way(endpoint)])


def listening_socket(host: str, port: int) -> socket.socket:
    """A socket that listens at an address; port 0 is any free one. ValueError where it cannot."""
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, OverflowError) as error:
        raise ValueError(f"cannot listen at {host}, port {port}: {error}") from None


def is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _on_the_way(url: str) -> Iterator[str]:
    if (proxy := proxy_for(url)) is not None:
        yield str(proxy)
    for name in _CERTIFICATES:
        if url.startswith("https:") and (path := os.environ.get(name)):
            missing = "" if os.path.exists(path) else ", which are not there"
            yield f"with the certificates that {name} names, {named(path)}{missing}"


def _in_brackets(clauses: Iterable[str]) -> str:
    text = "; ".join(clauses)
    return f" ({text})" if text else ""


def _is_this_machine(host: str) -> bool:
    """Whether a client that connects to the host stays on this machine."""
    return is_loopback(host) or host in ("0.0.0.0", "::") or host.endswith(".localhost")


def _is_in_listed_network(host: str, listed: str) -> bool:
    """Whether NO_PROXY lists a network, such as 10.0.0.0/8, that has this address."""
    for entry in listed.split(","):
        try:
            if "/" in entry and ipaddress.ip_address(host) in ipaddress.ip_network(entry.strip(), strict=False):
                return True
        except ValueError:  # the entry or the host is a name
            continue
    return False
