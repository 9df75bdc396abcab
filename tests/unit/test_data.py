"""Prompt sources and their order."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest

from progrpo.data import PromptOrder, load_prompts
from progrpo.types import Prompt
from progrpo.zoo.shapes import world


def texts(prompts):
    return [p.text for p in prompts]


def of_file(tmp_path, name, content):
    file = tmp_path / name
    file.write_bytes(content)
    return load_prompts(str(file))[""]


def test_shapes_are_the_worlds_splits():
    assert load_prompts("shapes", "validation") == world.prompts("validation")


def test_text_files_hold_a_prompt_a_line(tmp_path):
    content = "\ufeffa red circle\r\n\r\n  ein grüner Würfel \u2028 daneben\n\t\n".encode()
    assert texts(of_file(tmp_path, "p.txt", content)) == ["a red circle", "ein grüner Würfel \u2028 daneben"]


def test_json_lines_hold_columns(tmp_path):
    content = b'{"prompt": " two dogs ", "count": 2, "tags": ["x"]}\n\n{"prompt": "a cat"}'
    assert of_file(tmp_path, "p.jsonl", content) == (
        Prompt("two dogs", {"count": 2, "tags": ["x"]}),
        Prompt("a cat"),
    )


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", "a\nb".encode("utf-16"), "line 1: not UTF-8 text; save the file as UTF-8"),
        ("p.txt", "a\nb".encode("utf-16-le"), "line 1: not UTF-8 text"),
        ("p.txt", b"fine\nbad \xff\n", "line 2: not UTF-8 text"),
        ("p.txt", b"fine\n\nbad \x00\n", "line 3: not UTF-8 text"),
        ("p.txt", b"", "holds no prompt"),
        ("p.txt", b"\n  \n", "holds no prompt"),
        ("p.jsonl", b'{"prompt": "a"}\n{"prompt"', "line 2: not JSON"),
        ("p.jsonl", b'"a"', "line 1: must be an object such as"),
        ("p.jsonl", b'{"text": "a", "n": 1}', "line 1: has no field named prompt, only text, n"),
        ("p.jsonl", b'{"prompt": 3}', "line 1: prompt must be a text that is not empty, not 3"),
        ("p.jsonl", b'{"prompt": " "}', "line 1: prompt must be a text that is not empty, not ' '"),
    ],
)
def test_wrong_files_are_refused_in_one_sentence_with_the_line(tmp_path, name, content, message):
    with pytest.raises(ValueError) as refused:
        of_file(tmp_path, name, content)
    assert message in str(refused.value) and str(tmp_path / name) in str(refused.value)
    assert "\n" not in str(refused.value)


def test_missing_files_are_refused_with_the_nearest(tmp_path):
    (tmp_path / "prompts.txt").write_text("a")
    with pytest.raises(ValueError, match=r"no prompt file .*promts.txt; did you mean .*prompts.txt\?"):
        load_prompts(str(tmp_path / "promts.txt"))
    with pytest.raises(ValueError, match="no prompt file"):
        load_prompts(str(tmp_path / "nowhere" / "p.txt"))


def test_other_sources_are_refused():
    with pytest.raises(ValueError, match=r"not 'shape'; did you mean shapes\?"):
        load_prompts("shape")
    with pytest.raises(ValueError, match=r"a \.txt or a \.jsonl file, not 'p.csv'"):
        load_prompts("p.csv")


@pytest.fixture
def of_ten():
    return {"": tuple(Prompt(str(i)) for i in range(10))}


@pytest.fixture
def of_two_kinds():
    return {"a": tuple(Prompt(f"a{i}") for i in range(3)), "b": tuple(Prompt(f"b{i}") for i in range(5))}


def test_every_epoch_deals_every_prompt_once_in_another_order(of_ten):
    dealt = [p.text for t in range(10) for p in PromptOrder(of_ten, seed=1).prompts_for(t, 4)]
    epochs = [dealt[start : start + 10] for start in range(0, 40, 10)]
    assert all(sorted(epoch) == sorted(texts(of_ten[""])) for epoch in epochs)
    assert all(one != other for one, other in pairwise(epochs))


def test_the_order_is_a_function_of_seed_and_iteration(of_ten):
    straight = [PromptOrder(of_ten, seed=1).prompts_for(t, 3) for t in range(8)]
    again = PromptOrder(of_ten, seed=1)
    assert [again.prompts_for(t, 3) for t in reversed(range(8))] == straight[::-1]
    assert [PromptOrder(of_ten, seed=2).prompts_for(t, 3) for t in range(8)] != straight


def test_kinds_come_in_turn_each_with_its_own_epochs(of_two_kinds):
    dealt = texts(PromptOrder(of_two_kinds, seed=0).prompts_for(0, 30))
    assert [text[0] for text in dealt] == ["a", "b"] * 15
    assert Counter(dealt) == {**dict.fromkeys(("a0", "a1", "a2"), 5), **{f"b{i}": 3 for i in range(5)}}


def test_more_prompts_than_there_are_go_round(of_ten):
    assert Counter(texts(PromptOrder(of_ten, seed=0).prompts_for(2, 20))) == {str(i): 2 for i in range(10)}


def test_shapes_come_kind_by_kind():
    dealt = PromptOrder(load_prompts("shapes"), seed=0).prompts_for(5, 12)
    assert [p.columns["kind"] for p in dealt] == list(world.KINDS) * 2
