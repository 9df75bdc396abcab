"""The fixtures that tests of several folders share; what they are made of is in `tests/support`."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support import linear, runs
from tests.support.browser import chromium
from tests.support.linear import LinearDiffusionPolicy, LinearPolicy
from tests.support.pipelines import TINY_PIPELINES

for _name in (
    "SSL_CERT_FILE",
    "SSL_CERT_DIR",
    "HF_ENDPOINT",
    *(name for name in os.environ if name.lower().endswith("_proxy")),
):
    os.environ.pop(_name, None)  # sentences name what lies before a server: here they are of no machine's own

# without byte code each process that a test starts compiles the package, and each run of the tests all of them
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

torch.set_num_threads(1)  # tensors here are tiny: on a busy machine threads wait for each other for seconds


def pytest_collection_finish() -> None:
    """Keep the garbage collector from going through what is imported and collected, at a tenth of the suite's time.

    It also comes seldom: networks are thousands of objects, and going through them costs a fifteenth.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000)


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Runs in tests, also those of other processes, know no timings of an earlier one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session", autouse=True)
def quick_disk() -> Iterator[None]:
    """Files are not waited for until they are on the disk, fifty times a run: no test cuts the power."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        yield


# --- folders of tiny pipelines, as save_pretrained writes them --------------------------------------------------------


@pytest.fixture(scope="session")
def saved_pipeline(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of one of `TINY_PIPELINES`, written anew."""

    def save(name: str) -> Path:
        folder = tmp_path_factory.mktemp("models") / name.replace("_", "-")
        TINY_PIPELINES[name]().save_pretrained(folder)
        return folder

    return save


@pytest.fixture(scope="session")
def tiny_sd3(saved_pipeline: Callable[[str], Path]) -> Path:
    return saved_pipeline("tiny_sd3")


@pytest.fixture(scope="session")
def tiny_flux(saved_pipeline: Callable[[str], Path]) -> Path:
    return saved_pipeline("tiny_flux")


@pytest.fixture(scope="session")
def tiny_flux_schnell(saved_pipeline: Callable[[str], Path]) -> Path:
    return saved_pipeline("tiny_flux_schnell")


@pytest.fixture(scope="session")
def tiny_kontext(saved_pipeline: Callable[[str], Path]) -> Path:
    return saved_pipeline("tiny_kontext")


@pytest.fixture(scope="session")
def tiny_flux2_klein(saved_pipeline: Callable[[str], Path]) -> Path:
    return saved_pipeline("tiny_flux2_klein")


@pytest.fixture(scope="session")
def tiny_qwen_image(saved_pipeline: Callable[[str], Path]) -> Path:
    return saved_pipeline("tiny_qwen_image")


@pytest.fixture(scope="session")
def tiny_wan(saved_pipeline: Callable[[str], Path]) -> Path:
    return saved_pipeline("tiny_wan")


@pytest.fixture(scope="session")
def tiny_sd(saved_pipeline: Callable[[str], Path]) -> Path:
    return saved_pipeline("tiny_sd")


@pytest.fixture(scope="session")
def tiny_sd_v(saved_pipeline: Callable[[str], Path]) -> Path:
    return saved_pipeline("tiny_sd_v")


@pytest.fixture(scope="session")
def tiny_sdxl(saved_pipeline: Callable[[str], Path]) -> Path:
    return saved_pipeline("tiny_sdxl")


_QUICK = ("tiny_sd3", "tiny_kontext", "tiny_flux2_klein", "tiny_wan", "tiny_sd")


@pytest.fixture(scope="session", params=list(TINY_PIPELINES))
def family(request: pytest.FixtureRequest) -> Path:
    """The folder of each pipeline in turn."""
    return request.getfixturevalue(request.param)


@pytest.fixture(
    scope="session",
    params=[name if name in _QUICK else pytest.param(name, marks=pytest.mark.slow) for name in TINY_PIPELINES],
)
def family_at_length(request: pytest.FixtureRequest) -> Path:
    """The same for suites that take seconds of each: one of each kind, and the others in the slow suite."""
    return request.getfixturevalue(request.param)


# --- runs of them -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def prompts_of() -> Callable[..., list[Any]]:
    return runs.prompts_of


@pytest.fixture(scope="session")
def prompts() -> tuple[str, ...]:
    return runs.PROMPTS


@pytest.fixture(scope="session")
def redness() -> Callable[..., list[float]]:
    return runs.redness


@pytest.fixture(scope="session")
def move() -> Callable[[Any, float], None]:
    return runs.move


@pytest.fixture(scope="session")
def tiny_config() -> Callable[..., Any]:
    return runs.tiny_config


@pytest.fixture(scope="session")
def on_a_tiny_model(tiny_sd3: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Options of `train smoke` for a tiny model and three prompts, at a tenth of the built-in model's time."""
    file = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    file.write_text("\n".join(runs.PROMPTS))
    options = {"model.path": tiny_sd3, "model.lora-rank": 2, "reward.terms": "jpeg_compressibility"}
    options |= {"prompts.source": file, "eval.prompts": file, "eval.pictures": 2}
    return [str(word) for name, value in options.items() for word in (f"--{name}", value)]


@pytest.fixture(scope="session")
def tiny_pipeline(tiny_sd3: Path) -> Callable[..., Any]:
    """The untouched pipeline of a folder, as a user of diffusers has it, new at every call."""

    def load(folder: Path = tiny_sd3) -> Any:
        return runs.load_pipeline(folder)

    return load


@pytest.fixture(scope="session")
def tiny_policy(tiny_sd3: Path) -> Callable[..., Any]:
    """The pipeline as a policy, new at every call; `moved` is how far its trained weights are from their start."""

    def load(
        weights: Any = "lora",
        dtype: Any = "float32",
        moved: float = 0.0,
        folder: Path = tiny_sd3,
        quantize: Any = "none",
    ) -> Any:
        return runs.load_tiny_policy(folder, weights, dtype, moved, quantize)

    return load


@pytest.fixture(scope="session")
def tiny_trainer(tiny_policy: Callable[..., Any]) -> Callable[..., Any]:
    """A trainer of a configuration, of the tiny policy and of `redness` if no other is given."""

    def build(config: Any, policy: Any = None, reward: Callable[..., Any] = runs.redness) -> Any:
        return runs.build_trainer(config, policy or tiny_policy(config.model.weights), reward)

    return build


@pytest.fixture(scope="session")
def first_experience() -> Callable[[Any], Any]:
    return runs.first_experience


@pytest.fixture(scope="session")
def assert_trained_alike() -> Callable[..., None]:
    return runs.assert_trained_alike


# --- a policy for computing by hand -----------------------------------------------------------------------------------


@pytest.fixture
def linear_policy() -> LinearPolicy:
    return LinearPolicy(0.3, -0.2)


@pytest.fixture(scope="session")
def linear_diffusion_policy() -> Callable[[str], LinearDiffusionPolicy]:
    """New at every call, of a prediction type."""
    return lambda prediction: LinearDiffusionPolicy(0.3, -0.2, prediction)


@pytest.fixture(scope="session")
def linear_experience() -> Callable[..., Any]:
    return linear.linear_experience


@pytest.fixture(scope="session")
def linear_transitions() -> Callable[..., Any]:
    return linear.linear_transitions


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """The system's Chromium, one for the tests of a file: while it runs, nobody else can run an event loop."""
    with chromium() as chrome:
        yield chrome
