"""Votes as a live reward: the run shows the pictures of a group to people, and waits for them.

`progrpo label FOLDER` runs beside the run and asks what lies in the folder's `waiting`. Pictures are named by their
content, so a run that is resumed finds the votes that were given before it was stopped.
"""

from __future__ import annotations

import math
import os
import random
import time
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

import numpy as np
from PIL import Image

from progrpo.durable import write_file
from progrpo.messages import named
from progrpo.preferences.questions import ALIVE, WAITING, Question, plain_columns, write_waiting
from progrpo.preferences.votes import VOTES, votes_on
from progrpo.rewards.base import Refusal, Reward, Score
from progrpo.rewards.settings import RewardTerm
from progrpo.types import Prompt

NEIGHBOURS = 2
"""The pictures with which each picture of a group is compared: those nearest to it on a ring in random order."""
PRIOR_STD = 1.0
"""The standard deviation of strengths before any vote, in log odds. It keeps a picture that always wins finite."""
_LOOK = 0.2  # seconds between two looks at the votes
_STEPS = 50

Vote = tuple[int, int, float]
"""The numbers of two pictures, and the share for the first one."""


class VotesReward(Reward):
    """The strength of each picture in its group by people's votes, in log odds (Bradley and Terry 1952).

    A group of G pictures is G questions (1 for G = 2). A picture without a vote when `timeout` is over is missing, and
    so is one that has no other picture to be compared with.
    """

    groupwise = True
    waits_for_people = True
    takes_model = True
    parameters = 0

    def __init__(self, folder: Path, timeout: float | None = None) -> None:
        """`timeout`: the seconds to wait for the votes on a group; None: for ever."""
        self._folder = folder
        self._timeout = timeout

    @classmethod
    def make(cls, term: RewardTerm) -> VotesReward:
        if not term.model:
            raise Refusal(
                "reward 'votes': no folder is named; set model to one for pictures and votes, as in"
                ' \'{"name": "votes", "model": "votes-of-ann"}\', and start progrpo label on it'
            )
        return cls(Path(term.model), term.timeout)

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Make the folder, so that people can open its page before the first picture is there."""
        try:
            for name in (WAITING, "pictures"):
                (self._folder / name).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise Refusal(
                f"reward 'votes': the folder {named(self._folder)} cannot be made: {error.strerror}; give another"
            ) from None

    def score(self, pictures_NHWC: np.ndarray, prompts: Sequence[Prompt]) -> list[Score]:
        files = [self._saved(picture, prompt) for picture, prompt in zip(pictures_NHWC, prompts, strict=True)]
        distinct = sorted(set(files))
        if len(distinct) < 2:
            return [Score(None, error="a picture without another one of its group cannot be compared")] * len(files)
        prompt = Prompt(prompts[0].text, plain_columns(prompts[0]))
        pairs = ring(len(distinct), "".join(path.name for path in distinct))
        votes = self._votes([Question(prompt, distinct[a], distinct[b]) for a, b in pairs])
        number = {path.name: i for i, path in enumerate(distinct)}
        strength_G = strengths(len(distinct), [(number[a], number[b], share) for a, b, share in votes])
        by_file = {path: _score(strength) for path, strength in zip(distinct, strength_G.tolist(), strict=True)}
        return [by_file[file] for file in files]

    def _saved(self, picture_HWC: np.ndarray, prompt: Prompt) -> Path:
        content = f"{prompt.text}\n{picture_HWC.shape}".encode(errors="surrogateescape") + picture_HWC.tobytes()
        path = self._folder / "pictures" / f"{sha256(content).hexdigest()[:24]}.png"
        if not path.exists():
            write_file(path, lambda file: Image.fromarray(picture_HWC).save(file, "PNG"))
        return path

    def _votes(self, questions: Sequence[Question]) -> list[tuple[str, str, float]]:
        """Ask, and wait until each question has a vote or the time is over; the votes by names of files."""
        names = {path.name for question in questions for path in question.pictures}
        open_pairs = {frozenset(path.name for path in question.pictures) for question in questions}
        end = math.inf if self._timeout is None else time.monotonic() + self._timeout
        key = sha256("\n".join(sorted(names)).encode()).hexdigest()[:16]
        asking = self._folder / WAITING / f"{os.getpid()}-{key}.jsonl"
        write_waiting(asking, questions)
        try:
            touched, stamp = time.monotonic(), None
            votes: list[tuple[str, str, float]] = []
            while open_pairs - {frozenset((a, b)) for a, b, _ in votes} and time.monotonic() < end:
                if time.monotonic() - touched > ALIVE / 6:
                    os.utime(asking)
                    touched = time.monotonic()
                if (now := _stamp(self._folder / VOTES)) != stamp:
                    votes, stamp = votes_on(self._folder, names), now
                else:
                    time.sleep(_LOOK)
            return votes
        finally:
            asking.unlink(missing_ok=True)


def ring(count: int, seed: str) -> list[tuple[int, int]]:
    """The pairs of NEIGHBOURS of `count` pictures in a circle, in an order that is drawn by the seed."""
    order = list(range(count))
    draw = random.Random(seed)
    draw.shuffle(order)
    hops = range(1, NEIGHBOURS // 2 + 1)
    pairs = {frozenset((order[i], order[(i + hop) % count])): None for hop in hops for i in range(count)}
    asked = [(a, b) if draw.random() < 0.5 else (b, a) for a, b in map(sorted, pairs)]
    draw.shuffle(asked)
    return asked


def strengths(count: int, votes: Sequence[Vote], prior_std: float = PRIOR_STD) -> np.ndarray:
    """The strengths (G,) of `count` pictures that make the votes most likely; NaN for a picture without a vote.

    The probability of a vote for a over b is sigmoid(s_a - s_b) (Bradley and Terry 1952), and each strength has a
    normal prior of mean 0. The maximum is unique, and is found by Newton's method.
    """
    strength_G = np.zeros(count)
    compared = sorted({number for a, b, _ in votes for number in (a, b)})
    for _ in range(_STEPS if votes else 0):
        gradient_G = -strength_G / prior_std**2
        hessian_GG = np.eye(count) / prior_std**2
        for a, b, share in votes:
            p = 1 / (1 + math.exp(strength_G[b] - strength_G[a]))
            gradient_G[[a, b]] += (share - p) * np.array([1.0, -1.0])
            hessian_GG[np.ix_([a, b], [a, b])] += p * (1 - p) * np.array([[1.0, -1.0], [-1.0, 1.0]])
        step_G = np.linalg.solve(hessian_GG, gradient_G)
        strength_G = strength_G + step_G
        if np.abs(step_G).max() < 1e-12:
            break
    return np.where(np.isin(np.arange(count), compared), strength_G, np.nan)


def _score(strength: float) -> Score:
    return Score(None, error="nobody voted in time") if math.isnan(strength) else Score(strength)


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns
