"""Rules of rewards."""

from __future__ import annotations

from progrpo.imports.outcome import Outcome, Setting
from progrpo.imports.shared_rules import NearestReward, reward_outcome

REWARDS = {
    "pickscore": NearestReward("pickscore"),
    "imagereward": NearestReward("imagereward"),
    "aesthetic": NearestReward("aesthetic"),
    "hpsv2_score": NearestReward("hpsv2"),
    "ocr": NearestReward("ocr"),
    "geneval": NearestReward("geneval_flow_grpo"),
    "unifiedreward": NearestReward(
        "unifiedreward",
        difference="there pictures are first resized to 512 by 512, and an answer without a score counts as 0; ours"
        " asks the server in OPENAI_BASE_URL, or in the term's url",
    ),
    "deqa": NearestReward(
        "deqa",
        1 / 5,
        "theirs asks a server, which sees JPEGs; ours sees the pictures, and needs 17 GB of memory itself",
    ),
    "image_similarity": NearestReward(
        "clip_similarity", difference="ours first crops the source to the picture's shape, as FLUX.1 Kontext sees it"
    ),
    "jpeg_compressibility": NearestReward("jpeg_compressibility", 1 / 500),
    "jpeg_incompressibility": NearestReward("jpeg_incompressibility"),
    "clipscore": NearestReward(
        "clipscore",
        100 / 30 / 2.5,
        "theirs is 100 / 30 of the cosine with the prompt; ours puts 'A photo depicts ' before the prompt, and is never"
        " below 0",
    ),
}
_NOT_BUILT_IN = {
    "video_ocr": "the mean over every fourth frame that shows something of the text",
    "qwenvl": "Qwen2.5-VL-7B's mark of 1 to 5 for aesthetics, over 5; the prompt is not read",
}


def reward(setting: Setting) -> Outcome:
    name = setting.name[len("reward_fn[") : -1]
    index = [other for other in setting.all if other.startswith("reward_fn[")].index(setting.name)
    nearest = REWARDS.get(name)
    own = nearest.name if nearest else f"my_rewards:{name if name.isidentifier() else 'reward'}"
    return reward_outcome(f"reward.terms[{index}]", own, nearest, setting.number(), _NOT_BUILT_IN.get(name, ""))
