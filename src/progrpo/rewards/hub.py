"""The models of rewards: pinned revisions of the hub, files with checksums, packages of extras."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import re
import threading
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar
from urllib.parse import unquote

import httpx2
import numpy as np
import torch
from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from progrpo.environment import on_the_way, on_the_way_to_the_hub
from progrpo.rewards.base import Refusal, Reward, Score
from progrpo.rewards.settings import RewardTerm
from progrpo.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

_HUB = "the Hugging Face hub"

_Module = TypeVar("_Module", bound=torch.nn.Module)
_Model = TypeVar("_Model", bound="PreTrainedModel")


class LazyReward(Reward):
    """A reward that is loaded at its first use: once, also where several threads use it at the same time."""

    def __init__(self, kind: type[HubReward], term: RewardTerm) -> None:
        self.groupwise, self.video, self.needed = kind.groupwise, kind.video, kind.needed
        self._load = functools.cache(partial(kind.from_hub, term))
        self._lock = threading.Lock()

    def score(self, pictures_NHWC: np.ndarray, prompts: Sequence[Prompt]) -> list[Score]:
        return self._loaded().score(pictures_NHWC, prompts)

    def check(self, prompts: Sequence[Prompt]) -> None:
        self._loaded().check(prompts)

    def _loaded(self) -> Reward:
        with self._lock:
            return self._load()


class HubReward(Reward):
    """A reward with a network from the hub, which is fetched and loaded at its first use."""

    @classmethod
    def make(cls, term: RewardTerm) -> Reward:
        return LazyReward(cls, term)

    @classmethod
    @abstractmethod
    def from_hub(cls, term: RewardTerm) -> Self:
        """Load its weights from the cache or the hub. Refusal where neither has them."""


@contextmanager
def fetching(reward: str, what: str, source: str = _HUB) -> Iterator[None]:
    """Turn the error of a download into a Refusal that names the reward and the file."""
    try:
        yield
    except (OSError, ImportError, httpx2.InvalidURL) as error:
        if isinstance(error, ImportError) and "socks" not in str(error).lower():
            raise
        way = on_the_way_to_the_hub() if source == _HUB else on_the_way(source)
        reason = " ".join(str(error).split())
        raise Refusal(
            f"reward {reward!r}: there is no cached copy of {what}, and {source}{way} did not give one: {reason}"
        ) from error
    except SafetensorError as error:
        raise damaged(reward, f"weights of {what}", error) from error


def damaged(reward: str, what: str, error: Exception) -> Refusal:
    reason = " ".join(str(error).split())
    return Refusal(f"reward {reward!r}: the {what} are damaged ({reason}); fetch them anew")


def hub_file(reward: str, repository: str, name: str, revision: str) -> Path:
    """The path of a file of a repository at a commit, from the cache or the hub, or of a file of a folder."""
    with fetching(reward, repository):
        if Path(repository).is_dir():
            return Path(repository, name).resolve(strict=True)
        return Path(hf_hub_download(repository, name, revision=revision))


def downloaded_file(reward: str, url: str) -> Path:
    """The path of a file from another server than the hub. It is kept in the folder of torch's hub."""
    path = Path(torch.hub.get_dir(), "checkpoints", unquote(url.rpartition("/")[2]))
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with fetching(reward, str(path), url):
            torch.hub.download_url_to_file(url, str(path), progress=False)
    return path


def sha256_at_hub(reward: str, repository: str, name: str, revision: str) -> str:
    """The checksum that the hub has of a large file, where it is published nowhere else.

    It guards the transfer and the cache. For the origin only the commit vouches.
    """
    # The cache keeps such a file under its sha256, behind a link, so that no network is needed. On systems without
    # links the hub is asked.
    path = hub_file(reward, repository, name, revision)
    if path.resolve().name != name:
        return path.resolve().name
    with fetching(reward, f"the checksum of {repository}"):
        return str(get_hf_file_metadata(hf_hub_url(repository, name, revision=revision)).etag)


_ANEW = "delete it, and it is fetched anew"


def read_pickle(reward: str, path: Path, sha256: str, remedy: str = _ANEW) -> Any:
    """Load a published pickle, as tensors alone. Refusal, with a remedy, where the file has another checksum."""
    with path.open("rb") as file:
        actual = hashlib.file_digest(file, "sha256").hexdigest()
    if actual != sha256:
        raise Refusal(
            f"reward {reward!r}: {path.resolve()} is damaged, its sha256 is {actual} and not {sha256}; {remedy}"
        )
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch and pickle raise several kinds
        raise Refusal(
            f"reward {reward!r}: {path.resolve()} is damaged, or holds more than tensors; {remedy}"
        ) from error


def own_weights(term: RewardTerm) -> dict[str, Tensor]:
    """Read the file of weights that the user brings in `model`: safetensors, or a pickle of the stated SHA-256.

    Refusal where it is neither, and where it holds anything but named tensors.
    """
    path = Path(term.model).expanduser()
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (OSError, SafetensorError) as error:
            raise damaged(term.name, f"weights of {path}", error) from error
    state = read_pickle(term.name, path, term.sha256, "give the file that you mean, and its own checksum")
    if not isinstance(state, dict) or not all(isinstance(weight, Tensor) for weight in state.values()):
        raise Refusal(f"reward {term.name!r}: {path} holds more than named tensors; give its weights alone")
    return state


def require_own_weights(term: RewardTerm, what: str) -> None:
    """Refuse a term that does not name a file of weights, or that names a pickle without its checksum."""
    path = Path(term.model).expanduser()
    if not term.model:
        raise Refusal(
            f"reward {term.name!r} needs the file of {what} in `model`, which you bring yourself:"
            " docs/rewards.md#weights-that-you-bring says where it is"
        )
    if not path.is_file():
        raise Refusal(f"reward {term.name!r}: there is no file {path}; give the file of {what} in `model`")
    if path.suffix != ".safetensors" and not term.sha256:
        raise Refusal(
            f"reward {term.name!r}: {path} may be a pickle, which is read only if its checksum is stated; give what"
            " `sha256sum` prints as `sha256`, or convert the file to safetensors"
        )


_UNUSED = re.compile(r"criterion\.|.*num_batches_tracked$")  # for training alone: no score depends on them


def load_pretrained(kind: Any, reward: str, repository: str, revision: str) -> Any:
    """Load a network of a class of transformers from the safetensors of a repository at a commit, or of a folder.

    Refusal where a weight is missing.
    """
    options = {"use_safetensors": True, "ignore_mismatched_sizes": True, "output_loading_info": True}
    with fetching(reward, repository):
        model, report = kind.from_pretrained(repository, revision=revision, **options)
    missing = {*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])}
    missing = {name for name in missing if not _UNUSED.match(name)}
    if missing:  # transformers has filled them with random numbers
        raise Refusal(
            f"reward {reward!r}: {repository} is no {type(model).__name__}, it has no {min(missing)} of the right size"
        )
    return model


def build_network(
    kind: type[_Model], config: PreTrainedConfig, weights: Mapping[str, Tensor], **options: object
) -> _Model:
    """Build a network of transformers with these weights. None may be missing or left over."""
    model, report = kind.from_pretrained(None, config=config, state_dict=weights, output_loading_info=True, **options)
    assert not any(report.values()), report
    return model


def rename(name: str, names: Mapping[str, str]) -> str:
    """Replace each key of `names` in a name by its value, in their order."""
    return functools.reduce(lambda new, pair: new.replace(*pair), names.items(), name)


def place(model: _Module, term: RewardTerm) -> _Module:
    """Freeze a network and move it to the term's device and dtype."""
    return place_at(model, term.device, term.dtype)


def place_at(model: _Module, device_name: str, dtype_name: str) -> _Module:
    """Freeze a network and move it to a device and a dtype, each `auto` or torch's name."""
    has_gpu = torch.cuda.is_available()
    device = torch.device(("cuda" if has_gpu else "cpu") if device_name == "auto" else device_name)
    if device.type == "cuda" and not has_gpu:
        raise Refusal(f"reward device {device_name}: there is no GPU here; leave it out or say cpu")
    automatic = torch.float16 if device.type == "cuda" else torch.float32
    dtype = automatic if dtype_name == "auto" else getattr(torch, dtype_name)
    return model.eval().requires_grad_(False).to(device, dtype)


def require(reward: str, *modules: str, extra: str) -> None:
    """Refuse a reward whose package is not installed, with the pip command."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise Refusal(f"reward {reward!r} needs {missing[0]}, which is not installed: pip install 'progrpo[{extra}]'")
