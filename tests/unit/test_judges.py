"""Rewards that ask a trained judge: what it is asked, recorded forms of its answers, and the published formulas.

A server in this process plays the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from PIL import Image

from progrpo.rewards import editscore, rationalrewards, unifiedreward
from progrpo.rewards.base import Refusal, WrongAnswer
from progrpo.rewards.chat import ChatReward
from progrpo.rewards.load import load_reward
from progrpo.rewards.questions import question_text
from progrpo.rewards.settings import RewardTerm
from progrpo.rewards.soft_tifa import answer_probability
from progrpo.types import Prompt
from tests.support.chat import Server, completion, pictures_of, texts_of

PICTURE = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)
SOURCE = Image.fromarray(np.random.default_rng(1).integers(0, 256, (4, 5, 3), dtype=np.uint8))
EDIT = Prompt("make <image> {red}", {"image": SOURCE})


@pytest.fixture
def ask(monkeypatch) -> Iterator[Callable]:
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    opened: list = []

    def start(name: str, answer: Callable, prompt: Prompt) -> tuple:
        """The score of one picture, and what the server was asked."""
        server = Server(answer)
        reward = load_reward(RewardTerm(name, url=server.url, model="" if name != "editscore" else "editscore"))
        opened.extend((reward, server))
        reward.check([prompt])
        (score,) = reward.score(PICTURE[None], [prompt])
        return score, server.asked

    yield start
    for each in opened:
        each.close()


# --- UnifiedReward ----------------------------------------------------------------------------------------------------


def test_unifiedreward_is_its_final_score_over_5(ask):
    score, (request,) = ask("unifiedreward", lambda _: completion("Final Score: 3.5"), Prompt("two {dogs}"))
    assert score.value == pytest.approx(0.7)
    assert request["model"] == "CodeGoat24/UnifiedReward-7b-v1.5" and request["temperature"] == 0
    (text,) = texts_of(request)
    assert text.startswith("You are given a text caption") and text.endswith("Text Caption: [two {dogs}]")
    assert np.array_equal(pictures_of(request)[0], PICTURE)


ACS = (  # the example output of the published script
    "Alignment Score (1-5): 2.694700002670288\nCoherence Score (1-5): 2.371500015258789\n"
    "Style Score (1-5): 2.802500009536743"
)


def test_unifiedreward2_is_the_mean_of_its_three_marks_over_5(ask):
    score, (request,) = ask("unifiedreward2", lambda _: completion(ACS), Prompt("two dogs"))
    assert score.value == pytest.approx((2.694700002670288 + 2.371500015258789 + 2.802500009536743) / 15)
    assert texts_of(request)[0].endswith(
        "Style Score (1-5): Z\n\nYour task is provided as follows:\nText Caption: [two dogs]"
    )


@pytest.mark.parametrize(
    ("answer", "marks"),
    [
        ("dog (object): 1\ntwo (attribute): 0\nFinal Score: 2.4", [2.4]),
        ("**Final Score:** 4", [4]),
        ("Final Score: 3\nAgain, final score: 3.0", [3]),
        ("I cannot rate this.", "no Final Score"),
        ("Final Score: 3 or Final Score: 4", "several Final Score"),
        ("Final Score: 0", "not from 1 to 5"),
        ("Final Score: -2", "not from 1 to 5"),
        ("Final Score: 6.5", "not from 1 to 5"),
        ("Final Score: [X]", "no Final Score"),
    ],
)
def test_final_scores(answer, marks):
    if isinstance(marks, str):
        with pytest.raises(ValueError, match=marks):
            unifiedreward.parse_marks(answer, ["Final Score"])
    else:
        assert unifiedreward.parse_marks(answer, ["Final Score"]) == marks


def test_a_mark_that_is_not_there_is_a_missing_score(ask):
    score, _ = ask("unifiedreward2", lambda _: completion(ACS.rpartition("\n")[0]), Prompt("two dogs"))
    assert score.value is None and score.error.startswith("the answer has no Style Score: Alignment Score (1-5): 2.69")


# --- RationalRewards --------------------------------------------------------------------------------------------------


def judgement(*scores: str, titles=("Text Faithfulness", "Physical and Visual Quality", "Text Rendering")) -> str:
    """An answer in the form that the question asks for, with the scores of the first aspects."""
    parts = [
        f"{n}. {title}:\n## Justification: 9 of 10.\n## Score: {score}"
        for n, (title, score) in enumerate(zip(titles, scores, strict=False), 1)
    ]
    refinement = "# User Request Refinement:\n## Refined Request: 1. Text Faithfulness: two dogs. Score: 1"
    begin, end = "# User Request Analysis\nTwo dogs.\n# Detailed Judgement", f"# Summary: Good.\n\n{refinement}"
    return "\n".join([begin, *parts, end])


@pytest.mark.parametrize(
    ("scores", "value"),
    [
        (("4.0", "3.5", "N/A"), (3.75 - 1) / 3),
        (("1", "1", "1"), 0),
        (("4", "4", "4"), 1),
        (("**2.5**", "[3]", "n/a"), 1.75 / 3),
    ],
)
def test_rationalrewards_is_the_mean_of_its_marks_scaled(ask, scores, value):
    score, (request,) = ask("rationalrewards", lambda _: completion(judgement(*scores)), Prompt("{request} <image>"))
    assert score.value == pytest.approx(value)
    assert [m["role"] for m in request["messages"]] == ["system", "user"]
    assert request["messages"][0]["content"].startswith("You are an expert image generation evaluator.")
    kinds = [part["type"] for part in request["messages"][1]["content"]]
    assert kinds == ["text", "image_url", "text"]  # the prompt's own <image> is none
    assert texts_of(request)[0].startswith("User Instruction: {request} <image>\nYou are provided with one image:")
    assert request["max_tokens"] == 2048


def test_rationalrewards_of_an_edit_sees_the_source_first(ask):
    titles = ("Text Faithfulness", "Image Faithfulness", "Physical and Visual Quality", "Text Rendering")
    answer = judgement("4", "2", "3", "N/A", titles=titles)
    score, (request,) = ask("rationalrewards_edit", lambda _: completion(answer), EDIT)
    assert score.value == pytest.approx(2 / 3)
    assert [np.asarray(p).shape for p in pictures_of(request)] == [(4, 5, 3), (6, 9, 3)]
    assert texts_of(request)[:2] == [
        "User Instruction: make <image> {red}\nYou are provided with two images:\n1. Source Image ",
        "\n2. Edited Image ",
    ]


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        (judgement("4", "3"), "no score of Text Rendering"),
        (judgement("4", "", "N/A"), "no score of Physical and Visual Quality"),
        (judgement("N/A", "N/A", "N/A"), "no score at all"),
        (judgement("4", "5", "N/A"), "the score of Physical and Visual Quality is 5, which is not from 1 to 4"),
        (judgement("-4", "3", "N/A"), "the score of Text Faithfulness is -4"),
        ("It is a good picture.", "no score of Text Faithfulness"),
    ],
)
def test_judgements_without_a_mark(answer, problem):
    aspects = [rationalrewards.TEXT, rationalrewards.QUALITY, rationalrewards.RENDERING]
    with pytest.raises(ValueError, match=problem):
        rationalrewards.parse_aspects(answer, aspects)


# --- EditScore --------------------------------------------------------------------------------------------------------


def test_editscore_is_the_geometric_mean_of_its_least_marks(ask):
    def answer(request):
        of_edit = len(pictures_of(request)) == 2
        return completion('{\n"reasoning" : "well done",\n"score" : %s\n}' % ("[20, 24]" if of_edit else "[25, 16]"))

    score, (edit, quality) = ask("editscore", answer, EDIT)
    assert score.value == pytest.approx(math.sqrt(20 * 16) / 25)
    assert edit["model"] == "editscore"
    assert [p.shape for p in pictures_of(edit)] == [(4, 5, 3), (6, 9, 3)]
    assert np.array_equal(pictures_of(quality)[0], PICTURE)
    assert "Editing instruction: make <image> {red}" in texts_of(edit)[0]
    assert "From scale 0 to 25" in texts_of(edit)[0] and "[naturalness, artifacts]" in texts_of(quality)[0]


@pytest.mark.parametrize(
    ("answer", "marks"),
    [
        ('{"reasoning": "fine", "score": [0, 25]}', [0, 25]),
        ('Here it is: {"reasoning": "fine", "score": [7.5, 3]} I hope it helps.', [7.5, 3]),
        ('{"reasoning": "the word "STOP" is there", "score": [18, 20]}', [18, 20]),  # broken by quotation marks
        ("{'reasoning': 'fine', 'score': [18, 20]}", [18, 20]),
        ('{"reasoning": "fine", "score": [18]}', "no two marks"),
        ('{"reasoning": "fine", "score": 18}', "no two marks"),
        ('{"reasoning": "fine", "score": [true, 3]}', "no two marks"),
        ('{"reasoning": "fine", "score": ["many", "few"]}', "no two marks"),
        ('{"reasoning": "fine"}', "no two marks"),
        ("[18, 20]", "no two marks"),
        ("I'm sorry, but I can't assist with that request.", "no two marks"),
        ('{"reasoning": "fine", "score": [26, 3]}', "not from 0 to 25"),
        ('{"reasoning": "fine", "score": [-1, 3]}', "not from 0 to 25"),
        ('{"reasoning": "fine", "score": [NaN, 3]}', "not from 0 to 25"),
    ],
)
def test_marks_of_edits(answer, marks):
    if isinstance(marks, str):
        with pytest.raises(ValueError, match=marks):
            editscore.parse_marks(answer)
    else:
        assert editscore.parse_marks(answer) == marks


@pytest.mark.parametrize("name", ["editscore", "rationalrewards_edit"])
def test_an_edit_without_its_source_is_refused(ask, name):
    with pytest.raises(Refusal, match=f"^reward '{name}' compares with a source picture, but the prompt 'a cat'"):
        ask(name, lambda _: completion("4"), Prompt("a cat"))


# --- Soft-TIFA --------------------------------------------------------------------------------------------------------

BICYCLES = Prompt(
    "four white bicycles",
    {"vqa_list": [["How many bicycles are in the image?", "four"], ["Are the bicycles white?", "Yes"]]},
)
COUNTED = {"four": 0.5, " four": 0.125, "Four": 0.0625, "4": 0.25, "five": 0.03, "fourteen": 0.01}
AFFIRMED = {"Yes": 0.4, " yes": 0.1, "No": 0.3, "Yesterday": 0.1}


def first_token(request) -> dict:
    likely = COUNTED if texts_of(request)[0].startswith("How many") else AFFIRMED
    tokens = [{"token": token, "logprob": math.log(p), "bytes": None} for token, p in likely.items()]
    likeliest = {"token": tokens[0]["token"], "logprob": tokens[0]["logprob"], "top_logprobs": tokens}
    return completion(tokens[0]["token"], finish_reason="length", logprobs={"content": [likeliest]})


@pytest.mark.parametrize(("name", "value"), [("soft_tifa", math.sqrt(0.9375 * 0.5)), ("soft_tifa_am", 1.4375 / 2)])
def test_soft_tifa_is_the_mean_of_the_answers_probabilities(ask, name, value):
    score, asked = ask(name, first_token, BICYCLES)
    assert score.value == pytest.approx(value)
    assert [texts_of(request) for request in asked] == [
        ["How many bicycles are in the image? Answer in one word."],
        ["Are the bicycles white? Answer in one word."],
    ]
    assert all((r["max_tokens"], r["logprobs"], r["top_logprobs"], r["temperature"]) == (1, True, 20, 0) for r in asked)


def test_an_answer_that_is_not_among_the_likeliest_counts_as_0(ask):
    assert answer_probability({"No": 0.9}, "Are the bicycles white?", "Yes") == 0
    score, _ = ask("soft_tifa", first_token, Prompt("x", {"vqa_list": [["How many dogs are there?", "two"]]}))
    assert score.value == 0


def test_a_server_without_probabilities_is_refused_at_once(ask):
    with pytest.raises(WrongAnswer, match=r"^reward 'soft_tifa': the server gives no log-probabilities of tokens"):
        ask("soft_tifa", lambda _: completion("Yes", logprobs=None), BICYCLES)


@pytest.mark.parametrize("rows", [None, [], "How many?", [["How many?"]], [["How many?", 4]], [["a?", "b"], "c"]])
def test_prompts_without_questions_are_refused(ask, rows):
    with pytest.raises(Refusal, match=r"^reward 'soft_tifa': the column vqa_list of the prompt 'x' must be a list"):
        ask("soft_tifa", first_token, Prompt("x", {"vqa_list": rows}))


# --- all --------------------------------------------------------------------------------------------------------------


def test_every_question_has_its_places():
    places = {"unifiedreward": (1, 0), "unifiedreward2": (1, 0), "rationalrewards": (1, 1)}
    places |= {"rationalrewards_edit": (1, 2), "editscore_edit": (1, 0), "editscore_quality": (0, 0)}
    for name, (requests, images) in places.items():
        text = question_text(name)
        assert (text.count("{request}"), text.count("<image>")) == (requests, images)
        assert text.strip() == text.rstrip() and "\r" not in text


def test_without_a_model_the_published_one_is_asked_and_editscore_refuses(monkeypatch):
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:1/v1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    reward = load_reward(RewardTerm("rationalrewards"))
    assert isinstance(reward, ChatReward) and reward._model == "TIGER-Lab/RationalRewards-8B-T2I"
    reward.close()
    with pytest.raises(Refusal, match=r"^reward 'editscore': no model is named; set model to the name by which"):
        load_reward(RewardTerm("editscore"))
