"""The settings of rewards: the part `reward` of a configuration, and each of its terms."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Literal

from progrpo.messages import quoted
from progrpo.registry import one_of
from progrpo.settings import DEVICE, FINITE, Rule, at_least, between, from_json, read_settings, setting

_ONE_OR_MORE = at_least(1)

REWARDS = {
    "shapes": "progrpo.rewards.shapes:ShapesReward",
    "shapes_strict": "progrpo.rewards.shapes:StrictShapesReward",
    "shapes_mixed": "progrpo.rewards.shapes:MixedShapesReward",
    "clipscore": "progrpo.rewards.clipscore:CLIPScore",
    "pickscore": "progrpo.rewards.pickscore:PickScore",
    "hpsv2": "progrpo.rewards.hpsv2:HPSv2",
    "imagereward": "progrpo.rewards.imagereward:ImageReward",
    "aesthetic": "progrpo.rewards.aesthetic:Aesthetic",
    "ocr": "progrpo.rewards.ocr:OCR",
    "geneval": "progrpo.rewards.geneval:GenEval",
    "geneval_flow_grpo": "progrpo.rewards.geneval:GenEvalFlowGRPO",
    "jpeg_compressibility": "progrpo.rewards.jpeg:JpegCompressibility",
    "jpeg_incompressibility": "progrpo.rewards.jpeg:JpegIncompressibility",
    "nsfw": "progrpo.rewards.nsfw:NSFW",
    "vlm": "progrpo.rewards.vlm:VLMJudge",
}
"""The built-in rewards by name: subclasses of `rewards.base.Reward`."""
_ASKS_ITS_OWN_SERVER = "vlm"

_AT_MOST_A_DAY = Rule(lambda seconds: 0 < seconds <= 86400, "above 0 and at most 86400 (a day)")


@dataclass(frozen=True)
class RewardTerm:
    """One reward. As a text `NAME` or `WEIGHT*NAME`, or as an object of these fields."""

    name: str = field(metadata={"rule": one_of(REWARDS, "function")})
    """Built in (docs/rewards.md says what each is), or `module:function` (or a class) of your own."""
    weight: float = setting(1.0, FINITE)
    """In the sum; a negative one turns a reward into a penalty."""
    needs: str = ""
    """The name of a reward before it: where that one is below `at_least`, this one counts as 0."""
    at_least: float = setting(0.5, FINITE)
    model: str = ""
    """Another model than the reward's own: a hub id, a folder, or the name that a server knows."""
    url: str = ""
    """Of a `progrpo serve-reward` that scores instead of this process; of `vlm`, its OpenAI-compatible server."""
    device: str = setting("auto", DEVICE)
    """Of its network, by torch's name."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """`auto`: float16 on a GPU, float32 elsewhere."""
    batch_size: int | None = setting(None, _ONE_OR_MORE.or_empty())
    """Pictures at once. Empty: 16 for a network or a server, all for a function."""
    retries: int = setting(2, between(0, 16))
    """Times that a failed call is tried again, after 1, 2, 4, ... seconds; what then fails is missing, picture by picture."""
    timeout: float | None = setting(None, _AT_MOST_A_DAY.or_empty(" for no limit"))
    """Seconds that a call may take. Empty: no limit, 60 for an answer of a server."""
    processes: int = setting(0, between(0, 256))
    """Score in so many processes of their own, each with the reward loaded: for rewards whose time goes into Python. 0: in this one."""
    cache: str = ""
    """A folder in which scores are kept by picture and prompt, for judges that cost money; empty: none."""
    from_python: bool = False
    """Written by `progrpo.train`: the reward was given as an object, of which this is the name."""

    @property
    def network_batch_size(self) -> int:
        """Pictures at once of a network or a server."""
        return 16 if self.batch_size is None else self.batch_size

    @property
    def answer_timeout(self) -> float:
        """Seconds for one answer of a server."""
        return 60.0 if self.timeout is None else self.timeout

    @property
    def is_served(self) -> bool:
        """Whether a `progrpo serve-reward` scores."""
        return bool(self.url) and self.name != _ASKS_ITS_OWN_SERVER

    @property
    def names_model_of_server(self) -> bool:
        """Whether `model` is a name that a server knows, and no path on this disk."""
        return bool(self.url) or self.name == _ASKS_ITS_OWN_SERVER

    @classmethod
    def from_text(cls, text: str) -> RewardTerm:
        """`pickscore`, `0.5*ocr`, or a JSON object of the fields."""
        if text.lstrip().startswith("{"):
            try:
                data = from_json(text)
            except ValueError as error:
                raise ValueError(f"reward.terms: {quoted(text)} is not JSON: {error}") from None
            return read_settings(cls, data, "reward.terms.")
        weight, star, name = text.rpartition("*")
        try:
            return cls(name.strip(), float(weight) if star else 1.0)
        except ValueError:
            raise ValueError(
                f"reward.terms: the weight in {quoted(text)} is no number; write NAME or WEIGHT*NAME, as in 0.5*ocr"
            ) from None

    def to_text(self) -> str:
        """As `from_text` reads it."""
        if replace(self, from_python=False) == RewardTerm(self.name, self.weight):
            return self.name if self.weight == 1 else f"{self.weight:g}*{self.name}"
        return json.dumps({f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default})


@dataclass(frozen=True)
class RewardMixSettings:
    terms: tuple[RewardTerm, ...] = setting((RewardTerm("shapes"),), Rule(len, "one reward or more"))
    """What is rewarded: one reward, or the weighted sum of several. Of the built-in verifier: `shapes` (graded), `shapes_strict` (1 where all is right, else 0)
    and `shapes_mixed` (their mean). For any prompts: clipscore, pickscore, hpsv2, imagereward, aesthetic, ocr, geneval, geneval_flow_grpo,
    jpeg_compressibility, jpeg_incompressibility, nsfw, vlm, or `module:function`. Each is NAME, WEIGHT*NAME or a JSON object: docs/rewards.md."""
    frames: int = setting(4, between(1, 1024))
    """Of a video, evenly spaced with the first and the last, that a reward of pictures scores; the video's score is their mean. 1: the
    middle one. A function of yours with `video = True` is given all."""
    quorum: float = setting(0.5, between(0, 1))
    """A group of which a smaller share of the survivors has a score is skipped; at least two members are needed always."""
    max_missing: float = setting(0.5, between(0, 1))
    """The run stops, with the last error, when a larger share of an iteration's pictures or scores is missing."""
    waves: int = setting(1, _ONE_OR_MORE)
    """In so many parts an iteration's prompts are sampled. While pictures of one wave are scored, the next is sampled: for rewards
    that are slow and busy elsewhere (a server, another device, other processes)."""

    def check(self) -> None:
        """ValueError for terms that cannot be mixed."""
        check_terms("reward.terms", self.terms)
        if not any(term.weight for term in self.terms):
            raise ValueError("reward.terms: every weight is 0, so that nothing is rewarded; give one of them another")


def check_terms(path: str, terms: Sequence[RewardTerm]) -> None:
    """ValueError for a reward that is named twice, or that needs one which does not stand before it."""
    for i, term in enumerate(terms):
        before = [other.name for other in terms[:i]]
        if term.name in before:
            raise ValueError(f"{path} names {term.name} twice; give it one weight")
        if term.needs and term.needs not in before:
            raise ValueError(
                f"{path}[{i}].needs must name a reward that is listed before {term.name}"
                f" ({', '.join(before) or 'there is none'}), not {quoted(term.needs)}"
            )
