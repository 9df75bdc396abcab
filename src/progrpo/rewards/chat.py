"""Rewards that ask a vision-language model behind an OpenAI-compatible server (vLLM, SGLang, llama.cpp, OpenAI)."""

from __future__ import annotations

import base64
import io
import json
import math
import os
from abc import abstractmethod
from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Self

import httpx2
import numpy as np
from PIL import Image

from progrpo.environment import on_the_way
from progrpo.rewards.base import Refusal, Reward, Score, WrongAnswer
from progrpo.rewards.remote import make_client, send
from progrpo.rewards.settings import RewardTerm
from progrpo.types import Prompt

Part = str | np.ndarray
"""A text, or a picture (uint8, (H, W, 3))."""

_EXAMPLE = "http://127.0.0.1:8000/v1"
_TOP = 20  # the most log-probabilities that servers give
_MENDED_BY_THE_USER = {
    401: "the key in OPENAI_API_KEY",
    403: "the key's rights",
    404: "the model's name and the url",
    407: "the proxy's user and password",
}


class ChatReward(Reward):
    """A model that is asked about each picture, at temperature 0. An answer without a score is a missing score.

    A subclass says what is asked and how the answer is read (`value`).
    """

    takes_model = True
    name: str
    default_model = ""
    """The model where a term names none: the hub id, by which a server knows it unless it is told another name."""
    max_tokens = 1024
    """The length of an answer, with room for a model that thinks first."""

    def __init__(self, url: str, model: str, key: str = "", timeout: float = 60.0, batch_size: int = 16) -> None:
        """`batch_size` pictures are asked about at once, over connections that stay open."""
        self._model = model
        self._key = key
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._client = make_client(self.name, url, timeout, batch_size, headers)
        self._way = on_the_way(url)
        self._threads = ThreadPoolExecutor(batch_size, thread_name_prefix=self.name)

    @classmethod
    def make(cls, term: RewardTerm) -> Self:
        """Take the server from `term.url` or OPENAI_BASE_URL, and the key from OPENAI_API_KEY in the environment."""
        url = term.url or os.environ.get("OPENAI_BASE_URL", "")
        if not url.startswith(("http://", "https://")):
            fault = "no server is named" if not url else "its url does not begin with http:// or https://"
            raise Refusal(f"reward {cls.name!r}: {fault}; set url, such as {_EXAMPLE}, or OPENAI_BASE_URL")
        model = term.model or cls.default_model
        if not model:
            raise Refusal(f"reward {cls.name!r}: no model is named; set model to the name by which the server knows it")
        key = os.environ.get("OPENAI_API_KEY", "").strip()
        if not (key.isascii() and key.isprintable()):
            raise Refusal(f"reward {cls.name!r}: OPENAI_API_KEY has characters that no key has; set it anew")
        try:
            return cls(url, model, key, term.answer_timeout, term.network_batch_size)
        except httpx2.InvalidURL as error:
            raise Refusal(f"reward {cls.name!r}: the url is none ({error}); set one such as {_EXAMPLE}") from None

    def score(self, pictures_NHWC: np.ndarray, prompts: Sequence[Prompt]) -> list[Score]:
        return list(self._threads.map(self._score, pictures_NHWC, prompts))  # a Refusal stops it

    def close(self) -> None:
        self._threads.shutdown(cancel_futures=True)
        self._client.close()

    @abstractmethod
    def value(self, picture_HWC: np.ndarray, prompt: Prompt) -> float:
        """The score of a picture (uint8). ValueError where the model's answer gives none."""

    def ask(self, *parts: Part, system: str = "") -> str:
        """The model's answer to texts and pictures in this order, without what it thought first."""
        choice = self._choice(parts, system, {"max_tokens": self.max_tokens})
        return text_of(choice, self.max_tokens).rpartition("</think>")[2]

    def first_token(self, *parts: Part) -> Mapping[str, float]:
        """The probabilities of the likeliest first tokens of an answer, 20 at most, by their text."""
        return probabilities_of(self._choice(parts, "", {"max_tokens": 1, "logprobs": True, "top_logprobs": _TOP}))

    def _score(self, picture_HWC: np.ndarray, prompt: Prompt) -> Score:
        try:
            return Score(self.value(picture_HWC, prompt))
        except WrongAnswer as error:
            raise WrongAnswer(f"reward {self.name!r}: {error}") from None
        except Refusal:
            raise
        except ValueError as error:
            return Score(None, error=str(error))

    def _choice(self, parts: Sequence[Part], system: str, options: Mapping[str, object]) -> Mapping[str, Any]:
        """The choice of a completion. ValueError where there is none, Refusal where the user must mend that."""
        messages: list[dict[str, object]] = [{"role": "user", "content": [_content(part) for part in parts]}]
        if system:  # only where it is asked for: not every model has been taught other roles
            messages.insert(0, {"role": "system", "content": system})
        body = json.dumps({"model": self._model, "temperature": 0, "messages": messages, **options}).encode()
        try:
            response = send(self._client, "POST", "chat/completions", body, {"Content-Type": "application/json"})
        except httpx2.TimeoutException:
            raise ValueError(f"the server{self._way} did not answer in time") from None
        except httpx2.HTTPError as error:
            raise ValueError(f"the server{self._way} cannot be reached: {error}") from None
        text = response.text.replace(self._key, "***") if self._key else response.text  # some servers repeat the key
        if response.is_success:
            return read_choice(text)
        problem = f"the server{self._way} answered {response.status_code}: {short(text)}"
        if response.status_code in _MENDED_BY_THE_USER:
            raise Refusal(f"reward {self.name!r}: {problem}; check {_MENDED_BY_THE_USER[response.status_code]}")
        raise ValueError(problem)


def _content(part: Part) -> dict[str, object]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    return {"type": "image_url", "image_url": {"url": _data_url(part)}}


def _data_url(picture_HWC: np.ndarray) -> str:
    file = io.BytesIO()
    Image.fromarray(picture_HWC).save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


# --- reading a completion ---------------------------------------------------------------------------------------------


def read_choice(completion: str) -> Mapping[str, Any]:
    """The first choice of a completion. ValueError where there is none; WrongAnswer for the answer of another API."""
    try:
        answer = json.loads(completion)
        if not isinstance(answer, dict) or not answer.keys() & {"choices", "error"}:
            problem = f"the server's answer is no completion: {short(completion)}"
            raise WrongAnswer(f"{problem}; check that the url is such as {_EXAMPLE}")
        choice: Mapping[str, Any] = answer["choices"][0]
        choice["message"].get("content")
        return choice
    except WrongAnswer:
        raise
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise ValueError(f"the server's answer is no completion: {short(completion)}") from None


def text_of(choice: Mapping[str, Any], max_tokens: int) -> str:
    """The text of a choice. ValueError where it was refused, cut off, or is none."""
    message, finish_reason = choice["message"], choice.get("finish_reason")
    text, refusal = message.get("content"), message.get("refusal")
    if refusal or finish_reason == "content_filter":
        raise ValueError(f"the model refused: {short(str(refusal or text))}")
    if finish_reason == "length":
        raise ValueError(f"the answer was cut off at {max_tokens} tokens: {short(str(text))}")
    if not isinstance(text, str):
        raise ValueError("the answer has no text")
    return text


def probabilities_of(choice: Mapping[str, Any]) -> Mapping[str, float]:
    """The probabilities of a choice's likeliest first tokens, by their text. WrongAnswer where the server has none."""
    probabilities: dict[str, float] = defaultdict(float)
    try:
        for token in choice["logprobs"]["content"][0]["top_logprobs"]:
            probabilities[token["token"]] += math.exp(token["logprob"])
    except (LookupError, TypeError):
        raise WrongAnswer(
            "the server gives no log-probabilities of tokens, which this reward reads; ask one that does, such as vLLM"
        ) from None
    return dict(probabilities)


def short(text: str) -> str:
    line = " ".join(text.split())
    return f"{line[:200]}..." if len(line) > 200 else line
