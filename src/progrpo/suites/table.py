"""The suites: where the prompts of each come from, how their rows are read, and what is measured on them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

SuiteName = Literal[
    "shapes", "words", "geneval", "geneval2", "drawbench", "partiprompts", "hpdv2", "ocr", "t2i-compbench", "dpg"
]

_QUALITY = ("imagereward", "pickscore", "hpsv2", "aesthetic", "clipscore")
"""Rewards that score any prompt. A suite has those that can be had on the machine."""


@dataclass(frozen=True)
class Published:
    """The place of a suite's published prompts: a dataset of the hub, or files of it, or files at an address."""

    files: tuple[str, ...] = ()
    """Paths in the repository; empty: the dataset as a whole, read by `datasets`."""
    dataset: str = ""
    """The hub id of the dataset; empty: the files are at `address`."""
    revision: str = "main"
    address: str = ""

    def in_words(self) -> str:
        """The place as a person would look for it."""
        if not self.dataset:
            return " ".join(f"{self.address}/{name}" for name in self.files)
        files = f" ({', '.join(self.files)})" if self.files else ""
        return f"the dataset {self.dataset} of the hub{files}"


@dataclass(frozen=True)
class Suite:
    """A benchmark: its prompts, the kinds that results are told apart by, and its rewards."""

    name: SuiteName
    paper: str
    """The paper that introduced it."""
    published: Published | None = None
    """None for prompts that are part of progrpo."""
    text: str = "prompt"
    """The field of a row that holds the text."""
    kind: str = ""
    """The field of a row that holds its kind; empty: there is none, or it is the file's name (`kind_is_file`)."""
    kind_is_file: bool = False
    one_of: str = ""
    """The field that rows of one prompt share; empty: each row is a prompt."""
    per_prompt: int = 1
    """The number of pictures per prompt of its protocol."""
    rewards: tuple[str, ...] = ()
    """The rewards that it needs; the first one's verdict is its accuracy."""
    optional: tuple[str, ...] = _QUALITY
    """Rewards that are left out, with a note, where they cannot be had."""
    features: str = "dino"
    """The features by which the likeness of pictures is measured, unless the user names others."""
    mean_of_kinds: bool = False
    """Whether its score is the mean over kinds, and not over pictures."""
    not_measured: str = ""
    """A clause on why the published metric is not built in; empty: it is."""


_RAW = "https://raw.githubusercontent.com"
_HPD_STYLES = ("anime", "concept-art", "paintings", "photo")
_COMPOSITIONS = ("color", "shape", "texture", "spatial", "3d_spatial", "numeracy", "non_spatial", "complex")
_SUITES = (
    Suite(
        name="shapes",
        paper="this project; kinds after arXiv 2310.11513",
        kind="kind",
        per_prompt=4,
        rewards=("shapes",),
        optional=("shapes_match",),
        features="shapes",
    ),
    Suite(
        name="words",
        paper="this project; the reward after arXiv 2505.05470",
        kind="kind",
        per_prompt=4,
        rewards=("ocr",),
        optional=(),
        features="pixels",
    ),
    Suite(
        name="geneval",
        paper="arXiv 2310.11513",
        published=Published(
            files=("evaluation_metadata.jsonl",),
            address=f"{_RAW}/djghosh13/geneval/af4902f24d3ca90ebbb446dd9891a59e0f82725f/prompts",
        ),
        kind="tag",
        per_prompt=4,
        rewards=("geneval",),
        mean_of_kinds=True,
    ),
    Suite(
        name="geneval2",
        paper="arXiv 2512.16853",
        published=Published(
            files=("geneval2_data.jsonl",),
            address=f"{_RAW}/facebookresearch/GenEval2/a6e82d2289e8d418f27f0adee77908b07060eea3",
        ),
        kind="atom_count",
        optional=("soft_tifa", "soft_tifa_am", *_QUALITY),
    ),
    Suite(
        name="drawbench",
        paper="arXiv 2205.11487",
        published=Published(dataset="sayakpaul/drawbench"),
        text="Prompts",
        kind="Category",
    ),
    Suite(
        name="partiprompts",
        paper="arXiv 2206.10789",
        published=Published(
            files=("PartiPrompts.tsv",),
            dataset="nateraw/parti-prompts",
            revision="944b156abfdad7627c3221b5ec4f6a6fb060a197",
        ),
        text="Prompt",
        kind="Category",
    ),
    Suite(
        name="hpdv2",
        paper="arXiv 2306.09341",
        published=Published(
            files=tuple(f"benchmark/{style}.json" for style in _HPD_STYLES),
            dataset="zhwang/HPDv2",
            revision="a3e9f957e13df611f5e8f7560d15ae9168c8b8f5",
        ),
        kind_is_file=True,
        rewards=("hpsv2",),
        optional=("imagereward", "pickscore", "aesthetic", "clipscore"),
        mean_of_kinds=True,
    ),
    Suite(
        name="ocr",
        paper="arXiv 2505.05470",
        published=Published(
            files=("test.txt",),
            address=f"{_RAW}/yifan123/flow_grpo/879042cf5707f8b90daa98d147d7deac2317c5da/dataset/ocr",
        ),
        rewards=("ocr",),
    ),
    Suite(
        name="t2i-compbench",
        paper="arXiv 2307.06350",
        published=Published(
            files=tuple(f"{kind}_val.txt" for kind in _COMPOSITIONS),
            address=f"{_RAW}/Karine-Huang/T2I-CompBench/fc2c9b9f8ec357dcf1bb1b382c0df017afe9cd8c/examples/dataset",
        ),
        kind_is_file=True,
        per_prompt=10,
        mean_of_kinds=True,
        not_measured="BLIP-VQA, UniDet and the 3-in-1 metric are networks of its own",
    ),
    Suite(
        name="dpg",
        paper="arXiv 2403.05135",
        published=Published(
            files=("dpg_bench.csv",),
            address=f"{_RAW}/TencentQQGYLab/ELLA/025f650e9b36b9603d606042635d98da09e870de/dpg_bench",
        ),
        text="text",
        one_of="item_id",
        per_prompt=4,
        not_measured="mPLUG is asked the questions of the column questions",
    ),
)
SUITES: dict[str, Suite] = {suite.name: suite for suite in _SUITES}
"""The suites by name."""
