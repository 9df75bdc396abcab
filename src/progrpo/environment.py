"""What the environment tells the libraries that reach a server, in words: proxies, certificates, the hub's settings."""

from __future__ import annotations

import importlib.util
import ipaddress
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from progrpo.messages import named

_CERTIFICATES = ("SSL_CERT_FILE", "SSL_CERT_DIR")
_HUB = "https://huggingface.co"
_OFFLINE, _TRUE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"), ("1", "ON", "YES", "TRUE")  # as its library reads them


@dataclass(frozen=True)
class Proxy:
    """A proxy before a host, and the environment variable that names it."""

    url: str
    variable: str
    host: str

    def __str__(self) -> str:
        """Without its user and password."""
        shown = named(re.sub(r"//.*@", "//", self.url))
        lacking = self.url.startswith("socks") and importlib.util.find_spec("socksio") is None
        needs = ", which needs a package: pip install socksio" if lacking else ""
        return f"through the proxy {shown} of {self.variable}{needs}; to reach it without, unset that or add {self.host} to NO_PROXY"


def proxy_for(url: str) -> Proxy | None:
    """The proxy before a server; None for this machine, and where NO_PROXY lists the host."""
    try:
        parts, proxies = urlsplit(url), getproxies()
    except ValueError:  # it is no URL
        return None
    host, place = parts.hostname or "", parts.netloc.rpartition("@")[2]
    found = next((scheme for scheme in (parts.scheme, "all") if proxies.get(scheme)), None)
    if found is None or _is_here(host) or proxy_bypass(place) or _in_a_network(host, proxies.get("no", "")):
        return None
    proxy = proxies[found] if "://" in proxies[found] else f"http://{proxies[found]}"
    names = (f"{found}_proxy", f"{found}_proxy".upper())
    return Proxy(proxy, next((name for name in names if os.environ.get(name)), "the system's settings"), host)


def on_the_way(url: str) -> str:
    """What the environment puts between here and a server, in brackets behind its name; empty where that is nothing."""
    return _in_brackets(_between(url))


def on_the_way_to_the_hub() -> str:
    """The same of the Hugging Face hub."""
    endpoint = os.environ.get("HF_ENDPOINT") or _HUB
    settings = []
    if endpoint != _HUB:
        settings.append(f"at {named(endpoint)}, which HF_ENDPOINT names")
    if offline := next((name for name in _OFFLINE if os.environ.get(name, "").upper() in _TRUE), None):
        settings.append(f"{offline} is set, so it was not asked")
    return _in_brackets([*settings, *_between(endpoint)])


def is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _between(url: str) -> Iterator[str]:
    if (proxy := proxy_for(url)) is not None:
        yield str(proxy)
    for name in _CERTIFICATES:
        if url.startswith("https:") and (path := os.environ.get(name)):
            yield f"with the certificates that {name} names, {named(path)}{'' if os.path.exists(path) else ', which are not there'}"


def _in_brackets(parts: Iterable[str]) -> str:
    said = "; ".join(parts)
    return f" ({said})" if said else ""


def _is_here(host: str) -> bool:
    """Whether a client that connects to the host stays on this machine."""
    return is_loopback(host) or host in ("0.0.0.0", "::") or host.endswith(".localhost")


def _in_a_network(host: str, listed: str) -> bool:
    """Whether NO_PROXY lists a network, such as 10.0.0.0/8, that has this address."""
    for entry in listed.split(","):
        try:
            if "/" in entry and ipaddress.ip_address(host) in ipaddress.ip_network(entry.strip(), strict=False):
                return True
        except ValueError:  # it lists a name, or the host is one
            continue
    return False
