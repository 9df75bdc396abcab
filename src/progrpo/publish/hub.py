"""Errors of the hub in one sentence."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from progrpo.environment import on_the_way_to_the_hub
from progrpo.messages import named


@contextmanager
def hub_errors(what: str, instead: str) -> Iterator[None]:
    """Turn errors of the hub and of the way there into a ValueError of one sentence.

    `what` is what cannot be done, and `instead` how to do without the hub.
    """
    import httpx2
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

    try:
        yield
    except HFValidationError as error:
        raise ValueError(f"{what}: {_on_a_line(error)}") from None
    except LocalTokenNotFoundError:
        raise ValueError(f"{what}: the hub asks for a token; log in with hf auth login, or set HF_TOKEN") from None
    except HfHubHTTPError as error:
        raise ValueError(f"{what}: {_refusal(error.response.status_code, error)}") from None
    except (httpx2.HTTPError, OSError) as error:
        way = on_the_way_to_the_hub()
        reason = f"the hub{way} cannot be reached ({_on_a_line(error)})"
        raise ValueError(f"{what}: {reason}; try again with a network, or {instead}") from None


def _refusal(status: int, error: Exception) -> str:
    if status == 401:
        return "the hub refuses the token or asks for one; log in with hf auth login, or set HF_TOKEN"
    if status == 403:
        return "the token may not do this; take one with the right to write, of an owner of the repository"
    return f"the hub answered {status} ({_on_a_line(error)})"


def _on_a_line(error: Exception) -> str:
    return named(" ".join(str(error).split()) or type(error).__name__)
