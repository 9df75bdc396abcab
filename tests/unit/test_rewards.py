"""Plain functions as rewards, and from a name to a reward."""

import asyncio
import functools
import inspect
import math
import re
import sys
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from progrpo.registry import load_named
from progrpo.rewards.base import Refusal, Reward, Score, WrongAnswer
from progrpo.rewards.cache import CachedReward
from progrpo.rewards.frames import FrameAverageReward
from progrpo.rewards.function import FunctionReward, adapted
from progrpo.rewards.load import load_reward
from progrpo.rewards.retrying import RetryingReward
from progrpo.rewards.settings import REWARDS, RewardSettings, RewardTerm
from progrpo.rewards.shapes import ShapesReward
from progrpo.types import Prompt
from progrpo.zoo.shapes import world
from progrpo.zoo.shapes.verifier import verify

PICTURES = np.random.default_rng(0).integers(0, 256, (3, 8, 6, 3), dtype=np.uint8)
PROMPTS = [Prompt("a", {"target": 1, "note": "x"}), Prompt("b", {"target": 2}), Prompt("c")]
HIGH: Any = "high"


@pytest.fixture(autouse=True)
def paths(monkeypatch):
    """`sys.path` and the modules as they were: load_reward adds the current folder."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name.startswith("my_reward"):
            del sys.modules[name]


# --- scores -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [None, math.nan, math.inf, -math.inf])
def test_a_score_that_is_no_number_is_missing(value):
    assert math.isnan(Score(value).number())


@pytest.mark.parametrize("value", [0.0, -1.5, 1e300])
def test_a_score_is_its_value(value):
    assert Score(value).number() == value


# --- functions --------------------------------------------------------------------------------------------------------


def test_a_function_gets_pil_pictures_and_texts():
    def reward(images, prompts):
        assert all(isinstance(i, Image.Image) and i.size == (6, 8) and i.mode == "RGB" for i in images)
        assert all(np.array_equal(np.asarray(i), p) for i, p in zip(images, PICTURES, strict=True))
        return [ord(p) for p in prompts]

    assert FunctionReward(reward).score(PICTURES, PROMPTS) == [Score(97.0), Score(98.0), Score(99.0)]


def test_a_column_comes_only_if_it_is_asked_for():
    given: list[dict] = []

    def plain(images, prompts):
        return [0.0] * 3

    def one(images, prompts, target):
        given.append({"target": target})
        return [0.0] * 3

    def keyword(images, prompts, *, note=None, unheard_of="default"):
        given.append({"note": note, "unheard_of": unheard_of})
        return [0.0] * 3

    def everything(images, prompts, **columns):
        given.append(columns)
        return [0.0] * 3

    for function in (plain, one, keyword, everything):
        FunctionReward(function).score(PICTURES, PROMPTS)
    assert given == [
        {"target": [1, 2, None]},
        {"note": ["x", None, None], "unheard_of": "default"},
        {"target": [1, 2, None], "note": ["x", None, None]},
    ]


def test_a_column_that_a_prompt_lacks_is_named_before_a_picture_is_scored_and_never_afterwards():
    def one(images, prompts, traget, note=None):
        return [0.0 if t is None else 1.0 for t in traget]

    reward = FunctionReward(one)
    with pytest.raises(Refusal, match=r"one takes 'traget', but the prompt 'a' has no column .*\(note, target\)"):
        reward.check(PROMPTS)
    whole = Prompt("a", {"traget": None})
    reward.check([whole])
    with pytest.raises(
        Refusal, match=r"the prompt 'last' has .*\(none at all\); give it to every prompt, or the param"
    ):
        reward.check([whole, whole, Prompt("last")])
    assert [s.value for s in reward.score(PICTURES[:1], [Prompt("last")])] == [0.0]


def test_columns_are_looked_at_before_anything_is_loaded():
    class Slow:
        def load(self):
            raise AssertionError("loaded")

        def score(self, images, prompts, target):
            return target

    with pytest.raises(Refusal, match=r"Slow\.score takes 'target', but the prompt 'c'"):
        FunctionReward(Slow()).check(PROMPTS)


def called(function):
    """The arguments of a reward function for two prompts with a target and a scale: "pictures", or the value."""
    given: dict[str, Any] = {}
    signature = inspect.signature(function)

    @functools.wraps(function)
    def noting(*arguments, **named):
        bound = signature.bind(*arguments, **named).arguments
        given.update({name: "pictures" if shows(value) else value for name, value in bound.items()})
        return [0.0, 0.0]

    def shows(value):
        return isinstance(value, list) and isinstance(value[0], Image.Image)

    prompts = [Prompt("a", {"target": 1, "scale": 3}), Prompt("b", {"target": 2, "scale": 4})]
    reward = FunctionReward(noting)
    reward.check(prompts)
    reward.score(PICTURES[:2], prompts)
    return given


BOTH = ["a", "b"]
COLUMNS = {"target": [1, 2], "scale": [3, 4]}


@pytest.mark.parametrize(
    ("function", "given"),
    [
        (lambda images, prompts: ..., {"images": "pictures", "prompts": BOTH}),
        (lambda prompts, images: ..., {"images": "pictures", "prompts": BOTH}),
        (lambda target, *, prompts, images: ..., {"images": "pictures", "prompts": BOTH, "target": [1, 2]}),
        (lambda images, target: ..., {"images": "pictures", "target": [1, 2]}),
        (lambda videos: ..., {"videos": "pictures"}),
        (lambda texts, pictures, scale: ..., {"pictures": "pictures", "texts": BOTH, "scale": [3, 4]}),
        (lambda pics: ..., {"pics": "pictures"}),
        (lambda pics, texts: ..., {"pics": "pictures", "texts": BOTH}),
        (lambda pics, texts, /, target: ..., {"pics": "pictures", "texts": BOTH, "target": [1, 2]}),
        (lambda pics, prompts: ..., {"pics": "pictures", "prompts": BOTH}),
        (lambda prompts, pics, scale: ..., {"pics": "pictures", "prompts": BOTH, "scale": [3, 4]}),
        (lambda *both, target: ..., {"both": ("pictures", BOTH), "target": [1, 2]}),
        (lambda images, **others: ..., {"images": "pictures", "others": {"prompts": BOTH, **COLUMNS}}),
        (lambda images, prompts, **others: ..., {"images": "pictures", "prompts": BOTH, "others": COLUMNS}),
        (lambda images, target=None, absent=7: ..., {"images": "pictures", "target": [1, 2]}),
    ],
)  # fmt: skip
def test_pictures_and_texts_are_given_by_name_or_else_to_the_first_two_parameters(function, given):
    arguments = called(function)
    if "both" in arguments:
        pictures, texts = arguments["both"]
        arguments["both"] = ("pictures" if isinstance(pictures[0], Image.Image) else None, texts)
    assert arguments == given


@pytest.mark.parametrize(
    ("function", "sentence"),
    [
        (lambda: ..., "takes no pictures; give it a parameter `images`"),
        (lambda prompts: ..., "takes no pictures; give it a parameter `images`"),
        (lambda *, target: ..., "takes no pictures; give it a parameter `images`"),
        (
            lambda completions, **others: ...,
            "takes `completions`, which are a language model's; pictures come as `images`",
        ),
        (lambda prompts, completions: ..., "takes `completions`, which are a language model's"),
        (max, "does not say what it takes; call it in a function of images and prompts"),
    ],
)
def test_what_cannot_be_given_pictures_is_refused_at_once(function, sentence):
    with pytest.raises(Refusal, match=f"^reward .* {sentence}"):
        FunctionReward(function)


def test_a_column_that_is_called_as_the_texts_may_be_is_not_taken_for_them():
    reward, prompts = FunctionReward(lambda images, texts: [0.0]), [Prompt("a", {"texts": "b"})]
    with pytest.raises(
        Refusal, match=r"'texts' would be given the pictures or the texts, and the prompts have a column"
    ):
        reward.check(prompts)


@pytest.mark.parametrize("function", [lambda pics, target: ..., lambda target, texts: ..., lambda prompts, target: ...])
def test_a_column_is_never_taken_for_the_pictures_or_the_texts(function):
    for ask in (FunctionReward(function).check, functools.partial(FunctionReward(function).score, PICTURES)):
        with pytest.raises(Refusal, match=r"'target' would be given .*; call .* `images` and `prompts`"):
            ask(PROMPTS)


def test_scores_may_be_of_any_number_type_or_missing():
    def reward(images, prompts):
        return [np.float32(0.5), None, True]

    def as_array(images, prompts):
        return np.arange(3.0)

    assert FunctionReward(reward).score(PICTURES, PROMPTS) == [Score(0.5), Score(None), Score(1.0)]
    assert FunctionReward(as_array).score(PICTURES, PROMPTS) == [Score(0.0), Score(1.0), Score(2.0)]


class Scorer:
    def __init__(self, count: int):
        self.count = count

    def measure(self, images, prompts, target):
        return target[: self.count]

    def __call__(self, images, prompts):
        return [1.0] * self.count


def test_methods_and_callable_objects_are_functions():
    assert [s.value for s in FunctionReward(Scorer(2).measure).score(PICTURES[:2], PROMPTS[:2])] == [1, 2]
    assert [s.value for s in FunctionReward(Scorer(3)).score(PICTURES, PROMPTS)] == [1, 1, 1]


def test_another_number_of_scores_is_refused_by_name():
    def shortened(images, prompts):
        return [1.0]

    with pytest.raises(ValueError, match=r"reward .*shortened returned 1 scores for 3 pictures; return one each"):
        FunctionReward(shortened).score(PICTURES, PROMPTS)
    with pytest.raises(ValueError, match=r"Scorer\.measure returned 1 scores"):
        FunctionReward(Scorer(1).measure).score(PICTURES[:2], PROMPTS[:2])
    with pytest.raises(ValueError, match="reward function returned 2 scores"):
        FunctionReward(Scorer(2)).score(PICTURES, PROMPTS)


@pytest.mark.parametrize("answer", ["123", {1: 0.1, 2: 0.2, 3: 0.3}, {0.1, 0.2, 0.3}])
def test_what_has_no_score_at_each_place_is_refused(answer):
    with pytest.raises(
        Refusal, match=rf"returned '{type(answer).__name__}', no scores for 3 pictures; return one each"
    ):
        FunctionReward(lambda images, prompts: answer).score(PICTURES, PROMPTS)


def test_a_score_may_be_returned_for_a_number():
    def strict(images, prompts):
        return [Score(0.5, True), Score(None, error="too dark"), 3]

    assert FunctionReward(strict).score(PICTURES, PROMPTS) == [
        Score(0.5, True),
        Score(None, error="too dark"),
        Score(3.0),
    ]


async def of_a_server(images, prompts, target):
    async def one(image, offset):
        await asyncio.sleep(0.001)
        return None if offset is None else float(np.asarray(image).mean()) + offset

    return await asyncio.gather(*(one(i, t) for i, t in zip(images, target, strict=True)))


def test_an_async_function_is_waited_for_also_where_a_loop_is_running():
    expected = [float(PICTURES[0].mean()) + 1, float(PICTURES[1].mean()) + 2, None]

    async def notebook():
        return FunctionReward(of_a_server).score(PICTURES, PROMPTS)

    assert [s.value for s in FunctionReward(of_a_server).score(PICTURES, PROMPTS)] == expected
    assert [s.value for s in asyncio.run(notebook())] == expected


def test_an_object_is_loaded_once_before_its_first_score_and_closed():
    events: list[str] = []

    class Whole:
        def load(self):
            events.append("load")

        def score(self, images, prompts, note):
            events.append("score")
            return [len(n or "") for n in note]

        def close(self):
            events.append("close")

    reward = FunctionReward(Whole())
    assert events == []
    assert [s.value for s in reward.score(PICTURES, PROMPTS)] == [1, 0, 0]
    reward.score(PICTURES, PROMPTS)
    reward.close()
    assert events == ["load", "score", "score", "close"]
    FunctionReward(of_a_server).close()  # a function has nothing to close


def test_pictures_come_in_batches_where_that_is_asked_for_with_their_columns():
    shown: list[tuple] = []

    def reward(images, prompts, target):
        shown.append((len(images), prompts, target))
        return [0.0] * len(images)

    assert len(FunctionReward(reward, batch_size=2).score(PICTURES, PROMPTS)) == 3
    assert shown == [(2, ["a", "b"], [1, 2]), (1, ["c"], [None])]  # `target` is known though the last prompt has none


def test_a_ranking_says_so_and_is_never_taken_apart():
    def ranking(images, prompts):
        return np.argsort(np.argsort([np.asarray(i).mean() for i in images]))

    assert not FunctionReward(ranking).groupwise
    ranking.groupwise = True  # type: ignore[attr-defined]
    reward = FunctionReward(ranking, batch_size=1)
    assert reward.groupwise and sorted(s.number() for s in reward.score(PICTURES, PROMPTS)) == [0, 1, 2]


@pytest.mark.parametrize("answer", [None, 0.5, iter(())])
def test_an_answer_that_is_no_sequence_is_refused(answer):
    with pytest.raises(Refusal, match=r"no scores for 3 pictures; return one each"):
        FunctionReward(lambda images, prompts: answer).score(PICTURES, PROMPTS)


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        (
            [[0.1], [0.2], [0.3]],
            r"returned \[0.1\], of type 'list', as the score of picture 0 of 3; return a number or None",
        ),
        (np.zeros((3, 2)), r"of type 'ndarray', as the score of picture 0 of 3; return a number or None for each"),
        (np.zeros((3, 1)), r"of type 'ndarray', as the score of picture 0"),
        (np.zeros((1, 3)), r"returned 1 scores for 3 pictures; return one each"),
        (np.float64(0.5), r"returned 'float64', no scores for 3 pictures; return one each"),
        (np.zeros(()), r"returned 'ndarray', no scores for 3 pictures"),
        (torch.zeros(()), r"returned 'Tensor', no scores for 3 pictures"),
        (torch.zeros(3, 2), r"of type 'Tensor', as the score of picture 0 of 3"),
        (b"abc", r"returned 'bytes', no scores for 3 pictures"),
        ([0.5, "0.5", 0.5], r"returned '0.5', of type 'str', as the score of picture 1 of 3"),
        ([0.5, None, {"score": 1.0}], r"of type 'dict', as the score of picture 2 of 3"),
        ([0.5, 1j, 0.5], r"returned 1j, of type 'complex', as the score of picture 1 of 3"),
        ([Score(HIGH), 0.5, 0.5], r"returned Score\(value='high'.*as the score of picture 0 of 3"),
        (
            ([0.1, 0.2, 0.3], {"seen": 3}, None),
            r"returned \[0.1, 0.2, 0.3\], of type 'list', as the score of picture 0",
        ),
    ],
    ids=str,
)
def test_a_score_of_another_type_or_shape_is_refused_at_once_with_what_was_expected(answer, sentence):
    asked = []

    def wrong(images, prompts):
        asked.append(len(images))
        return answer

    with pytest.raises(WrongAnswer, match=rf"^reward .*wrong .*{sentence}"):
        RetryingReward(FunctionReward(wrong), sleep=lambda seconds: None).score(PICTURES, PROMPTS)
    assert asked == [3]


def test_coroutines_that_nobody_awaits_are_refused_with_how_to_await_them():
    async def one(image):
        return 0.5

    with pytest.raises(
        WrongAnswer, match=r"of type 'coroutine', .*; await them: return await asyncio.gather\(\*them\)$"
    ):
        FunctionReward(lambda images, prompts: [one(image) for image in images]).score(PICTURES, PROMPTS)


def test_an_async_function_that_does_not_await_all_is_refused():
    async def one(image):
        return 0.5

    async def returns_too_soon(images, prompts):
        return asyncio.gather(*map(one, images))

    with pytest.raises(WrongAnswer, match=r"returned '_GatheringFuture', no scores for 3 pictures; await it$"):
        FunctionReward(returns_too_soon).score(PICTURES, PROMPTS)


@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad")
def test_scores_that_are_tensors_with_gradients_are_numbers():
    values = torch.tensor([0.25, 0.5, 0.75], requires_grad=True)
    assert [s.value for s in FunctionReward(lambda images, prompts: values).score(PICTURES, PROMPTS)] == [
        0.25,
        0.5,
        0.75,
    ]


def test_what_cannot_be_called_is_refused():
    with pytest.raises(Refusal, match="reward 3 is neither a function nor an object with a method score"):
        FunctionReward(3)


def test_an_error_in_the_users_function_is_the_users_to_see():
    def broken(images, prompts):
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        FunctionReward(broken).score(PICTURES, PROMPTS)


@pytest.mark.parametrize("name", ["pickscore", "ocr", "shapes"])
def test_a_model_that_a_reward_does_not_take_is_refused(name):
    with pytest.raises(Refusal, match=f"^reward '{name}' takes no other model"):
        load_reward(RewardTerm(name, model="somebody/other"))


@pytest.mark.parametrize("option", ["model", "sha256"])
def test_a_function_is_refused_with_what_it_does_not_take(option):
    options: dict[str, Any] = {option: "0" * 64}
    term = RewardTerm("operator:add", **options)
    with pytest.raises(Refusal, match=f"^reward 'operator:add' takes no {option}, which only a progrpo"):
        load_reward(term)


# --- the built-in one -------------------------------------------------------------------------------------------------


def test_shapes_is_the_verifier():
    prompts, pictures = world.examples("test", 24, seed=0)
    shuffled = prompts[1:] + prompts[:1]
    scores = ShapesReward().score(pictures, shuffled)
    assert [(s.value, s.passed) for s in scores] == [(v.graded, v.strict) for v in verify(pictures, shuffled)]


def test_shapes_refuses_prompts_of_another_world():
    with pytest.raises(Refusal, match=r"cannot read the prompt 'a cat'.*built-in prompts, `shapes`;.*module:function"):
        ShapesReward().score(PICTURES[:1], [Prompt("a cat")])


# --- names ------------------------------------------------------------------------------------------------------------


def write(folder, text, name="my_reward"):
    (folder / f"{name}.py").write_text(text, encoding="utf-8")


def test_a_built_in_reward_by_name():
    assert isinstance(load_reward(RewardTerm("shapes")), ShapesReward)


def test_a_function_of_a_module_in_the_current_folder(tmp_path, monkeypatch):
    write(tmp_path, "def score(images, prompts, target):\n    return [2 * (t or 0) for t in target]\n")
    monkeypatch.chdir(tmp_path)
    reward = load_reward(RewardTerm("my_reward:score"))
    assert [s.value for s in reward.score(PICTURES, PROMPTS)] == [2, 4, 0]


def test_a_module_in_a_package_of_the_current_folder(tmp_path, monkeypatch):
    package = tmp_path / "my_rewards"
    package.mkdir()
    (package / "__init__.py").touch()
    write(package, "def score(images, prompts):\n    return [7.0] * len(images)\n", "seven")
    monkeypatch.chdir(tmp_path)
    assert load_reward(RewardTerm("my_rewards.seven:score")).score(PICTURES, PROMPTS)[0] == Score(7.0)


def test_the_current_folder_hides_no_installed_module(tmp_path, monkeypatch):
    write(tmp_path, "raise RuntimeError('hidden')\n", "numpy")
    monkeypatch.chdir(tmp_path)
    load_reward(RewardTerm("numpy:mean"))


@pytest.mark.parametrize("name", ["shape", "", "my_reward.score"])
def test_an_unknown_name_is_refused(name):
    known = ", ".join(REWARDS)
    with pytest.raises(ValueError, match=rf"neither built in \({known}\) nor of the form module:function"):
        load_reward(RewardTerm(name))


def test_a_class_of_a_module_is_made_without_arguments(tmp_path, monkeypatch):
    write(
        tmp_path,
        "class Seven:\n    def score(self, images, prompts):\n        return [7.0] * len(images)\n",
        "my_reward_class",
    )
    monkeypatch.chdir(tmp_path)
    assert load_reward(RewardTerm("my_reward_class:Seven")).score(PICTURES, PROMPTS)[0] == Score(7.0)


OF_THE_BASE_CLASS = """
from progrpo.rewards.base import Reward, Score

class Shifted(Reward):
    takes_model = True

    def __init__(self, model):
        self.model = model

    @classmethod
    def make(cls, term):
        return cls(term.model)

    def score(self, pictures_NHWC, prompts):
        return [Score(float(picture.mean())) for picture in pictures_NHWC]


class Needy(Shifted):
    @classmethod
    def make(cls, term):
        return {}["x"]
"""


def test_a_class_of_the_base_class_is_made_from_its_term_and_sees_arrays(tmp_path, monkeypatch):
    write(tmp_path, OF_THE_BASE_CLASS, "my_reward_base")
    monkeypatch.chdir(tmp_path)
    reward: Any = load_reward(RewardTerm("my_reward_base:Shifted", model="a folder"))
    assert reward.model == "a folder"
    assert [s.value for s in reward.score(PICTURES, PROMPTS)] == [float(p.mean()) for p in PICTURES]
    with pytest.raises(Refusal, match=r"^reward 'my_reward_base:Needy': .* my_reward_base.py, line 21: KeyError: 'x'"):
        load_reward(RewardTerm("my_reward_base:Needy"))


class Whole(Reward):
    groupwise, video, needed = True, True, ("target",)

    def score(self, pictures_NHWC, prompts):
        return [Score(1.0)] * len(prompts)


def test_a_reward_is_its_own_adapter_and_wrappers_have_its_attributes(tmp_path):
    reward = Whole()
    assert adapted(reward) is reward
    for wrapper in (RetryingReward(reward), CachedReward(reward, "whole", tmp_path)):
        assert (wrapper.groupwise, wrapper.video, wrapper.needed) == (True, True, ("target",))
    videos = FrameAverageReward(reward, 2)
    assert (videos.groupwise, videos.video, videos.needed) == (True, True, ("target",))


def test_a_ranking_is_not_spread_over_processes(tmp_path, monkeypatch):
    write(
        tmp_path,
        "def score(images, prompts):\n    return [0.0] * len(images)\nscore.groupwise = True\n",
        "my_reward_rank",
    )
    monkeypatch.chdir(tmp_path)
    ranks: Any = load_reward(RewardTerm("my_reward_rank:score"))
    assert ranks.groupwise
    with pytest.raises(Refusal, match="ranks a group, which processes would take apart"):
        load_reward(RewardTerm("my_reward_rank:score", processes=2))


@pytest.mark.parametrize("name", ["no_such_module:score", "no.such.module:score"])
def test_a_missing_module_is_refused(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"there is no module 'no[._]such[._]module' in this folder or installed"):
        load_reward(RewardTerm(name))


@pytest.mark.parametrize(("attribute", "shown"), [("scroe", "'scroe'"), ("WEIGHT", "'WEIGHT'"), ("", "''")])
def test_a_missing_function_is_refused(attribute, shown, tmp_path, monkeypatch):
    write(tmp_path, "WEIGHT = 2\n\ndef score(images, prompts):\n    return [0.0] * len(images)\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f"the module 'my_reward' has no function or class {shown}"):
        load_reward(RewardTerm(f"my_reward:{attribute}"))


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("import no_such_dependency\n", ", line 1: ModuleNotFoundError: No module named 'no_such_dependency'"),
        ("\ndef score(:\n", ", line 2: SyntaxError: invalid syntax"),
        ("def score(images, prompts):\nreturn 1\n", ", line 2: IndentationError: expected an indented block "),
        ("def f():\n    raise OSError('no\\nfile')\n\nf()\n", ", line 2: OSError: no file"),
        ("import json\n\njson.loads('{')\n", ", line 3: JSONDecodeError: Expecting property name"),
        ("assert not 1\n", ", line 1: AssertionError"),
        ("import sys\nsys.exit(3)\n", ", line 2: SystemExit: 3"),
    ],
)
def test_a_module_that_cannot_be_imported_is_refused_with_its_line(text, sentence, tmp_path, monkeypatch):
    write(tmp_path, text, "my_reward_broken")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Refusal) as refused:
        load_reward(RewardTerm("my_reward_broken:score"))
    start = "reward 'my_reward_broken:score': its module cannot be imported: my_reward_broken.py"
    assert str(refused.value).startswith(start + sentence) and str(refused.value).isprintable()


CLASSES = """
class Needy:
    def __init__(self, threshold):
        pass

class Fails:
    def __init__(self):
        open("no such file")

class Unloaded:
    def load(self):
        raise OSError("no weights at /x")

    def score(self, images, prompts):
        return [0.0] * len(images)
"""


def test_a_class_that_cannot_be_made_or_loaded_is_refused_with_its_line(tmp_path, monkeypatch):
    write(tmp_path, CLASSES, "my_reward_classes")
    monkeypatch.chdir(tmp_path)
    for name, sentence in (
        ("Needy", r"made without arguments: TypeError: Needy.__init__\(\) missing 1 .* argument: 'threshold'$"),
        ("Fails", r"made without arguments: my_reward_classes.py, line 8: FileNotFoundError: .*'no such file'$"),
    ):
        with pytest.raises(Refusal, match=f"^reward 'my_reward_classes:{name}': the class cannot be {sentence}"):
            load_reward(RewardTerm(f"my_reward_classes:{name}"))
    reward = load_reward(RewardTerm("my_reward_classes:Unloaded"))
    for ask in (reward.check, functools.partial(reward.score, PICTURES[:0])):
        with pytest.raises(
            Refusal, match=r"its load\(\) failed: my_reward_classes.py, line 12: OSError: no weights at /x$"
        ):
            ask([])


@pytest.mark.parametrize("name", REWARDS)
def test_every_built_in_name_stands_for_a_reward(name):
    kind = load_named(name, {name: REWARDS[name]}, "reward")
    assert issubclass(kind, Reward)


def test_the_help_text_names_every_built_in_reward():
    words = set(re.findall(r"\w+", inspect.getsource(RewardSettings)))
    assert set(REWARDS) <= words


@pytest.mark.parametrize(("name", "strict_share"), [("shapes", 0.0), ("shapes_strict", 1.0), ("shapes_mixed", 0.5)])
def test_shapes_rewards_are_graded_strict_or_between(name, strict_share):
    prompts, drawn = world.examples("validation", 24, seed=3)
    drawn[::2] = drawn[::-2]  # some that do not show what is asked for
    expected = [(1 - strict_share) * v.graded + strict_share * v.strict for v in verify(drawn, prompts)]
    scores = load_reward(RewardTerm(name)).score(drawn, prompts)
    assert [s.value for s in scores] == pytest.approx(expected)
    assert {s.passed for s in scores} == {True, False}


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("my_reward.py:score", r"a module is named as Python imports it; write my_reward:score$"),
        ("./my_reward.py:score", r"write my_reward:score$"),
        ("rewards/my_reward.py:score", r"write rewards.my_reward:score$"),
        ("rewards/my_reward:score", r"write rewards.my_reward:score$"),
        ("my_reward.py", r"write my_reward:function$"),
        ("/else/where/my_reward.py:score", r"write my_reward:score, and add /else/where to PYTHONPATH$"),
        ("my_reward.score", r"nor of the form module:function; a function score of a module is my_reward:score$"),
        ("pickscroe", r"nor of the form module:function; did you mean pickscore\?$"),
        ("my_reward:scroe", r"has no function or class 'scroe' \(its file is .*my_reward.py\); did you mean score\?$"),
        ("my_reward:score()", r"has no function or class 'score\(\)' .*; did you mean score\?$"),
        (
            "__main__:absent",
            r"'absent' belongs to the script or notebook that named it, .* put it into a module of its own",
        ),
    ],
)
def test_a_name_that_is_nearly_right_is_refused_with_the_right_one(name, sentence, tmp_path, monkeypatch):
    write(tmp_path, "def score(images, prompts):\n    return [0.0] * len(images)\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Refusal, match=sentence):
        load_reward(RewardTerm(name))


def test_a_function_in_place_of_a_name_is_refused():
    wrong: Any = lambda images: [0.0] * len(images)  # noqa: E731
    with pytest.raises(
        Refusal, match=r"named by a text such as my_module:redness, not <function .*progrpo.train takes functions"
    ):
        load_reward(RewardTerm(wrong))


def test_a_module_that_starts_a_run_where_it_is_imported_is_refused_with_the_guard(tmp_path, monkeypatch):
    text = (
        "import progrpo\n\ndef score(images, prompts):\n    return [0.0] * len(images)\n\n"
        "progrpo.train(None, ['a'], score)\n"
    )
    write(tmp_path, text, "my_reward_script")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        Refusal, match=r"^reward 'my_reward_script:score': importing its module starts a run; put .* `if __name__"
    ):
        load_reward(RewardTerm("my_reward_script:score"))


def test_a_module_may_load_another_reward_where_it_is_imported(tmp_path, monkeypatch):
    text = (
        "from progrpo.rewards.load import load_reward\nfrom progrpo.rewards.settings import RewardTerm\n"
        "jpeg = load_reward(RewardTerm('jpeg_compressibility'))\n\n"
        "def score(images):\n    return [0.0] * len(images)\n"
    )
    write(tmp_path, text, "my_reward_of_others")
    monkeypatch.chdir(tmp_path)
    load_reward(RewardTerm("my_reward_of_others:score"))
