"""The settings of rewards: the section `reward` of a configuration, and its terms."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Literal

from progrpo.messages import quoted
from progrpo.registry import one_of
from progrpo.settings import DEVICE, FINITE, Rule, at_least, between, from_json, matches, read_settings, setting

_ONE_OR_MORE = at_least(1)

REWARDS = {
    "shapes": "progrpo.rewards.shapes:ShapesReward",
    "shapes_strict": "progrpo.rewards.shapes:StrictShapesReward",
    "shapes_mixed": "progrpo.rewards.shapes:MixedShapesReward",
    "shapes_match": "progrpo.rewards.shapes:MatchReward",
    "shapes_taste": "progrpo.rewards.shapes:TasteReward",
    "clipscore": "progrpo.rewards.clipscore:CLIPScore",
    "pickscore": "progrpo.rewards.pickscore:PickScore",
    "hpsv2": "progrpo.rewards.hpsv2:HPSv2",
    "imagereward": "progrpo.rewards.imagereward:ImageReward",
    "hpsv3": "progrpo.rewards.hpsv3:HPSv3",
    "videoalign": "progrpo.rewards.videoalign:VideoAlign",
    "videoalign_visual": "progrpo.rewards.videoalign:VideoAlignVisual",
    "videoalign_motion": "progrpo.rewards.videoalign:VideoAlignMotion",
    "videoalign_text": "progrpo.rewards.videoalign:VideoAlignText",
    "aesthetic": "progrpo.rewards.aesthetic:Aesthetic",
    "aesthetic_v2_5": "progrpo.rewards.aesthetic_v2_5:AestheticV25",
    "deqa": "progrpo.rewards.deqa:DeQA",
    "clip_similarity": "progrpo.rewards.clip_similarity:CLIPSimilarity",
    "dino_similarity": "progrpo.rewards.dino:DinoSimilarity",
    "lpips_similarity": "progrpo.rewards.lpips:LPIPSSimilarity",
    "ocr": "progrpo.rewards.ocr:OCR",
    "ocr_line": "progrpo.rewards.ocr_line:OCRLine",
    "geneval": "progrpo.rewards.geneval:GenEval",
    "geneval_flow_grpo": "progrpo.rewards.geneval:GenEvalFlowGRPO",
    "jpeg_compressibility": "progrpo.rewards.jpeg:JpegCompressibility",
    "jpeg_incompressibility": "progrpo.rewards.jpeg:JpegIncompressibility",
    "nsfw": "progrpo.rewards.nsfw:NSFW",
    "vlm": "progrpo.rewards.vlm:VLMJudge",
    "unifiedreward": "progrpo.rewards.unifiedreward:UnifiedReward",
    "unifiedreward2": "progrpo.rewards.unifiedreward:UnifiedReward2",
    "rationalrewards": "progrpo.rewards.rationalrewards:RationalRewards",
    "rationalrewards_edit": "progrpo.rewards.rationalrewards:RationalRewardsEdit",
    "editscore": "progrpo.rewards.editscore:EditScore",
    "soft_tifa": "progrpo.rewards.soft_tifa:SoftTIFA",
    "soft_tifa_am": "progrpo.rewards.soft_tifa:SoftTIFAMean",
    "votes": "progrpo.rewards.votes:VotesReward",
    "reward_model": "progrpo.rewards.reward_model:LearnedReward",
    "reward_model_variance": "progrpo.rewards.reward_model:LearnedRewardVariance",
}
"""The built-in rewards by name: subclasses of `rewards.base.Reward`."""
RewardDtype = Literal["auto", "float32", "bfloat16", "float16"]
ASK_A_MODEL = (
    *("vlm", "unifiedreward", "unifiedreward2", "rationalrewards", "rationalrewards_edit", "editscore"),
    *("soft_tifa", "soft_tifa_am"),
)
"""The rewards that ask a model behind an OpenAI-compatible server, which a term's url and model name."""

_AT_MOST_A_DAY = Rule(lambda seconds: 0 < seconds <= 86400, "above 0 and at most 86400 (a day)")


@dataclass(frozen=True)
class RewardTerm:
    """A reward and its weight. It is written as `NAME`, as `WEIGHT*NAME`, or as an object of these fields."""

    name: str = field(metadata={"rule": one_of(REWARDS, "function")})
    """A built-in reward (docs/rewards.md describes each), or your own `module:function` or `module:Class`."""
    weight: float = setting(1.0, FINITE)
    """The weight in the sum; a negative weight turns a reward into a penalty."""
    needs: str = ""
    """The name of an earlier reward; where that one is below `at_least`, this one counts as 0."""
    at_least: float = setting(0.5, FINITE)
    """The lowest value of the reward in `needs` at which this one counts."""
    model: str = ""
    """Another model in place of the reward's own: a hub id, a folder, or the name that a server knows.
    For `votes`: the folder of its pictures and votes."""
    url: str = ""
    """The address of a `progrpo serve-reward` that scores in place of this process.
    For a reward that asks a model (`vlm`, ...): the address of its OpenAI-compatible server."""
    device: str = setting("auto", DEVICE)
    """The device of the reward's network, by torch's name."""
    dtype: RewardDtype = "auto"
    """The dtype of the reward's network. `auto`: float16 on a GPU, float32 elsewhere."""
    batch_size: int | None = setting(None, _ONE_OR_MORE.or_empty())
    """The number of pictures in one call. Empty: 16 for a network or a server, all for a function."""
    retries: int = setting(2, between(0, 16))
    """The number of times that a failed call is repeated, after 1, 2, 4, ... seconds.
    If it still fails, each picture is scored alone, and the scores that fail then are missing."""
    timeout: float | None = setting(None, _AT_MOST_A_DAY.or_empty(" for no limit"))
    """The time limit of a call, in seconds. Empty: 60 for an answer of a server, otherwise no limit."""
    processes: int = setting(0, between(0, 256))
    """The number of separate processes that score, each with the reward loaded; 0: score in this process.
    This is for rewards that spend their time in Python."""
    cache: str = ""
    """A folder in which scores are stored by picture and prompt; empty: none.
    This is for judges that cost money."""
    from_python: bool = False
    """Whether the reward was given as an object in Python; `name` is then the object's name.
    `progrpo.train` writes this field."""
    sha256: str = setting("", matches("([0-9a-f]{64})?", "64 digits of 0-9 and a-f, as sha256sum prints them"))
    """The SHA-256 of the file in `model`, for a reward whose weights you bring (`aesthetic_v2_5`).
    A pickle needs it; a safetensors file does not."""

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
        return bool(self.url) and self.name not in ASK_A_MODEL

    @property
    def names_model_of_server(self) -> bool:
        """Whether `model` is a name that a server knows, and no path on this disk."""
        return bool(self.url) or self.name in ASK_A_MODEL

    @property
    def makes_folder(self) -> bool:
        """Whether `model` is a folder that the reward makes where it is missing."""
        return self.name == "votes"

    @classmethod
    def from_text(cls, text: str) -> RewardTerm:
        """The term of a text: `pickscore`, `0.5*ocr`, or a JSON object of the fields."""
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
        """The term as a text that `from_text` reads."""
        if replace(self, from_python=False) == RewardTerm(self.name, self.weight):
            return self.name if self.weight == 1 else f"{self.weight:g}*{self.name}"
        return json.dumps({f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default})


@dataclass(frozen=True)
class RewardSettings:
    terms: tuple[RewardTerm, ...] = setting((RewardTerm("shapes"),), Rule(len, "one reward or more"))
    """The rewards: one, or the weighted sum of several. Each is NAME, WEIGHT*NAME or a JSON object
    (docs/rewards.md).
    The built-in verifier: `shapes` (graded), `shapes_strict` (1 if all is right, otherwise 0), `shapes_mixed`
    (their mean). Continuous beside it: `shapes_match` (by the prompt), `shapes_taste` (large, centred, warm).
    For edits, with their source picture: clip_similarity, dino_similarity, lpips_similarity, editscore,
    rationalrewards_edit.
    For videos: videoalign, videoalign_visual, videoalign_motion, videoalign_text.
    Models behind a server: vlm, unifiedreward, unifiedreward2, rationalrewards, and soft_tifa, soft_tifa_am by the
    questions of GenEval 2.
    For any prompts: clipscore, pickscore, hpsv2, hpsv3, imagereward, aesthetic, aesthetic_v2_5, deqa, ocr,
    ocr_line, geneval, geneval_flow_grpo, jpeg_compressibility, jpeg_incompressibility, nsfw, reward_model,
    reward_model_variance, votes (docs/preferences.md), or your own `module:function`."""
    frames: int = setting(4, between(1, 1024))
    """The number of frames of a video that a picture reward scores; the video's score is their mean.
    The frames are evenly spaced and include the first and the last. 1: the middle frame.
    Your own function with `video = True` gets all frames."""
    quorum: float = setting(0.5, between(0, 1))
    """The smallest share of a group's survivors that must have a score; a group with fewer is skipped.
    At least two members are always needed."""
    max_missing: float = setting(0.5, between(0, 1))
    """The largest share of an iteration's pictures or scores that may be missing.
    Above it the run stops and reports the last error."""
    waves: int = setting(1, _ONE_OR_MORE)
    """The number of parts in which an iteration's prompts are sampled.
    The next part is sampled while the pictures of the previous one are scored.
    This is for slow rewards that compute elsewhere (a server, another device, other processes)."""
    noise: str = ""
    """The term, of weight 0, whose score is the variance of the noise of the sum; empty: it is not known.
    Members are then chosen by their expected rewards, which draws noisy ones to their group's mean.
    It matters where some scores are noisier than others.
    The variance without noise is estimated from the groups that are scored together: those of a process and a wave."""

    def check(self) -> None:
        """Raise ValueError for terms that cannot be mixed, and for a noise that none of them gives."""
        check_terms("reward.terms", self.terms)
        if not any(term.weight for term in self.terms):
            raise ValueError("reward.terms: every weight is 0, so that nothing is rewarded; give one of them another")
        if self.noise and self.noise not in (term.name for term in self.terms if not term.weight):
            raise ValueError(
                f"reward.noise must name one of the rewards whose weight is 0, not {quoted(self.noise)}; its score is"
                " the variance of the noise of the others' sum"
            )


def check_terms(path: str, terms: Sequence[RewardTerm]) -> None:
    """Raise ValueError for a reward that is named twice, or that needs a reward which is not listed before it."""
    for i, term in enumerate(terms):
        before = [other.name for other in terms[:i]]
        if term.name in before:
            raise ValueError(f"{path} names {term.name} twice; give it one weight")
        if term.needs and term.needs not in before:
            raise ValueError(
                f"{path}[{i}].needs must name a reward that is listed before {term.name}"
                f" ({', '.join(before) or 'there is none'}), not {quoted(term.needs)}"
            )
