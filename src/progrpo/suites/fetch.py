"""The published files of a suite, from the hub or from their address, kept in the hub's cache."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from urllib.request import Request, urlopen

from progrpo.durable import write_file
from progrpo.environment import on_the_way, on_the_way_to_the_hub
from progrpo.messages import named
from progrpo.prompts.load import DATASET
from progrpo.suites.formats import read_suite
from progrpo.suites.table import Published, Suite
from progrpo.types import Prompt

_SECONDS = 30


def read_published(suite: Suite, split: str = "test") -> tuple[Prompt, ...]:
    """The published prompts of a suite. ValueError, with what to download, where they cannot be had."""
    published = suite.published
    if published is None:
        return read_suite(suite, [], split)
    if published.files:
        return read_suite(suite, [str(_file(suite, published, name)) for name in published.files])
    try:
        return read_suite(suite, [f"{DATASET}{published.dataset}"])
    except ValueError as error:
        raise ValueError(unreachable(suite, f": {error}")) from None


def _file(suite: Suite, published: Published, name: str) -> Path:
    try:
        return _from_hub(published, name) if published.dataset else _from_address(suite, f"{published.address}/{name}")
    except (OSError, ValueError, ImportError) as error:  # also of httpx, for a proxy that needs a package
        way = on_the_way_to_the_hub() if published.dataset else on_the_way(published.address)
        raise ValueError(unreachable(suite, f"{way}: {named(' '.join(str(error).split()))}")) from None


def unreachable(suite: Suite, reason: str) -> str:
    """The sentence for prompts that cannot be fetched."""
    assert suite.published is not None
    several = len(suite.published.files) > 1
    return (
        f"the prompts of {suite.name} could not be fetched{reason.rstrip('.')}; download"
        f" {suite.published.in_words()} elsewhere, and give the {'folder' if several else 'file'} as --prompts"
    )


def _from_hub(published: Published, name: str) -> Path:
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(published.dataset, name, repo_type="dataset", revision=published.revision))


def _from_address(suite: Suite, url: str) -> Path:
    """The file at an address that names a commit, so that a kept one never changes."""
    from huggingface_hub.constants import HF_HOME

    path = Path(HF_HOME, "progrpo", "suites", suite.name, os.path.basename(url))
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with urlopen(Request(url, headers={"User-Agent": "progrpo"}), timeout=_SECONDS) as answer:
            write_file(path, lambda file: shutil.copyfileobj(answer, file))
    return path
