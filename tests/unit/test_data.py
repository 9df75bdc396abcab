"""Prompt sources and their order."""

from __future__ import annotations

import json
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from progrpo.prompts.load import ignored_column_note, load_prompts, prompts_from_python, splits_from_python
from progrpo.prompts.order import BySignal, InTurn
from progrpo.prompts.pictures import source_picture
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


def test_a_text_file_has_no_field_to_name(tmp_path):
    (tmp_path / "p.txt").write_text("a red circle")
    with pytest.raises(ValueError, match=r"p\.txt holds texts alone, without a field caption; leave its column out$"):
        load_prompts(str(tmp_path / "p.txt"), column="caption")


def test_a_column_that_only_other_trainers_read_is_reported():
    rows = [{"prompt": "a cat", "kind": "x"}, {"prompt": "a dog", "negative_prompt": "blurred"}]
    assert ignored_column_note(prompts_from_python(rows[:1], "prompts")) is None
    note = ignored_column_note(prompts_from_python(rows, "prompts"))
    assert note is not None and note.startswith(
        "the prompts have a column negative_prompt, which only rewards receive:"
    )


def test_json_lines_hold_columns(tmp_path):
    content = b'{"prompt": " two dogs ", "count": 2, "tags": ["x"]}\n\n{"prompt": "a cat"}'
    assert of_file(tmp_path, "p.jsonl", content) == (
        Prompt("two dogs", {"count": 2, "tags": ["x"]}),
        Prompt("a cat"),
    )


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", "a\nb".encode("utf-16"), "line 1: not UTF-8 text but UTF-16; save the file as UTF-8"),
        ("p.txt", "a\nb".encode("utf-16-le"), "line 1: not UTF-8 text but UTF-16; save the file as UTF-8"),
        ("p.txt", b"fine\nbad \xff\x81\n", "line 2: not UTF-8 text; save the file as UTF-8"),
        (
            "p.txt",
            "fine\ncafé".encode("cp1252"),
            "line 2: not UTF-8 text but perhaps Windows-1252, in which it reads 'café'; save the file as UTF-8",
        ),
        ("p.csv", "prompt\ncafé\n".encode("cp1252"), "line 2: not UTF-8 text but perhaps Windows-1252"),
        ("p.json", '["a"]'.encode("utf-16"), "line 1: not UTF-8 text but UTF-16"),
        ("p.txt", b"fine\n\nbad \x00\n", "line 3: not UTF-8 text"),
        ("p.txt", b"", "holds no prompt"),
        ("p.txt", b"\n  \n", "holds no prompt"),
        ("p.jsonl", b'{"prompt": "a"}\n{"prompt"', "line 2: not JSON"),
        ("p.jsonl", b'"a"', "line 1: must be an object such as"),
        (
            "p.jsonl",
            b'{"text": "a", "n": 1}',
            "line 1: has no field named prompt, only text, n; prompts.column or eval.column names another",
        ),
        ("p.json", b'["a",\n3]', "row 1: must be a text or an object with a field prompt, not 3"),
        ("p.json", b'["a", {"n": 1}]', "row 1: has no field named prompt, only n"),
        ("p.json", b'["a", ""]', "row 1: prompt must be a text that is not empty, not ''"),
        ("p.json", b'["a",\n "b"', "not JSON (Expecting ',' delimiter, line 2, column 5)"),
        (
            "p.json",
            b'{"prompt": "a"}\n{"prompt": "b"}',
            "line 2, column 1); a file with one object per line is a .jsonl file",
        ),
        ("p.json", b'{"prompt": ["a", "b"]}', "must be a list of texts or of objects such as"),
        ("p.json", b"[]", "holds no prompt"),
        ("p.json", b'{"prompts": []}', "holds no prompt"),
        ("p.csv", b"", "holds no prompt"),
        ("p.csv", b"prompt,n\n", "holds no prompt"),
        ("p.csv", b"text,n\na,1\n", "line 2: has no field named prompt, only text, n"),
        ("p.csv", b"prompt;n\na;1\n", "line 1: columns are separated by ';'; save the file with commas"),
        ("p.csv", b"prompt,n,n\na,1,2\n", "line 1: two columns are called n"),
        (
            "p.csv",
            b'prompt\n"a\nb"\n\na cat, sitting\n',
            "line 5: 2 fields where there are 1 names; put a text that holds a comma",
        ),
        ("p.csv", b'prompt,n\n"a\nb",1\n,2\n', "line 4: prompt must be a text that is not empty, not ''"),
        ("p.csv", b'prompt\nfine\n"a "b" c"\n', "line 3: not CSV"),
        ("p.csv", b'prompt\nfine\n"never closed\n', "line 3: not CSV"),
        ("p.tsv", b"prompt\tn\na\tb\tc\n", "line 2: 3 fields where there are 2 names; a text cannot hold a tab"),
        ("p.tsv", b"text\tn\na\t1\n", "line 2: has no field named prompt, only text, n"),
        ("p.parquet", b"PAR1", "p.parquet: not a parquet file"),
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
    message = r"a file \(\.txt, \.jsonl, \.json, \.csv, \.tsv, \.parquet\) or dataset:NAME, not 'p.xlsx'"
    with pytest.raises(ValueError, match=message):
        load_prompts("p.xlsx")


ROW_PROMPTS = (
    Prompt('a "red" cat,\nsitting', {"tag": "x", "n": None}),
    Prompt("ein grüner Würfel", {"tag": None, "n": "2"}),
)


def as_rows(column):
    return [{column: prompt.text, **prompt.columns} for prompt in ROW_PROMPTS]


@pytest.mark.parametrize("column", ["prompt", "caption", "prompts"])
def test_every_format_holds_the_same_rows(tmp_path, column):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = as_rows(column)
    table = f'\ufeff {column} ,tag,n\r\n"a ""red"" cat,\nsitting",x,\r\n\r\nein grüner Würfel,,2\r\n'
    (tmp_path / "p.csv").write_bytes(table.encode())
    (tmp_path / "P.JSON").write_text(json.dumps(rows), "utf-8-sig")
    (tmp_path / "of key.json").write_text(json.dumps({"version": 1, "prompts": rows}, indent=1))
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "p.parquet")
    for file in tmp_path.iterdir():
        assert load_prompts(str(file), column=column) == {"": ROW_PROMPTS}, file
        assert prompts_from_python(file, "prompts", column) == ROW_PROMPTS
    (tmp_path / "texts.json").write_text(json.dumps([prompt.text for prompt in ROW_PROMPTS]))
    assert texts(load_prompts(str(tmp_path / "texts.json"), column=column)[""]) == texts(ROW_PROMPTS)
    with pytest.raises(ValueError, match=rf"row 0: has no field named other, only {column}, tag, n; prompts.column"):
        load_prompts(str(tmp_path / "p.parquet"), column="other")


def test_a_table_with_tabs_may_have_quotes_in_its_texts(tmp_path):
    lines = ["prompt\ttag", 'a sign that says "stop"\tx', '"a ""red"" cat"\t', '"a" beside "b"\ty']
    (tmp_path / "p.tsv").write_text("\r\n".join(lines) + "\r\n")
    prompts = load_prompts(str(tmp_path / "p.tsv"))[""]
    assert texts(prompts) == ['a sign that says "stop"', 'a "red" cat', '"a" beside "b"']
    assert [prompt.columns["tag"] for prompt in prompts] == ["x", None, "y"]


def test_rows_of_python_may_name_their_text_otherwise():
    given = [*as_rows("caption"), "a text", Prompt("a prompt", {"caption": "kept"})]
    prompts = prompts_from_python(given, "prompts", "caption")
    assert prompts == (*ROW_PROMPTS, Prompt("a text"), Prompt("a prompt", {"caption": "kept"}))
    with pytest.raises(ValueError, match=r"^prompts\[0\]: has no field named caption, only prompt"):
        prompts_from_python([{"prompt": "a"}], "prompts", "caption")
    with pytest.raises(ValueError, match=r"a prompt file is given as pathlib\.Path\('a/p\.csv'\)$"):
        prompts_from_python("a/p.csv", "prompts")


def test_parquet_needs_its_library(tmp_path, monkeypatch):
    (tmp_path / "p.parquet").touch()
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(
        ValueError, match=r"p\.parquet: a parquet file needs pyarrow: pip install 'progrpo\[datasets\]'"
    ):
        load_prompts(str(tmp_path / "p.parquet"))


def test_python_gives_texts_prompts_and_rows():
    given = iter(["a cat", Prompt(" a dog ", {"n": 1}), {"prompt": "a cow", "n": 2}])
    assert prompts_from_python(given, "prompts") == (
        Prompt("a cat"),
        Prompt("a dog", {"n": 1}),
        Prompt("a cow", {"n": 2}),
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("a red cat", "prompts must be a list of texts, Prompts or rows with a field prompt, not 'a red cat'"),
        (None, "prompts must be a list of texts"),
        ({"prompt": "a"}, "prompts must be a list of texts"),
        ([], "prompts is empty; give at least one"),
        (["a", 3], "prompts[1] must be a text, a Prompt or a row with a field prompt, not 3"),
        (["a", " "], "prompts[1]: prompt must be a text that is not empty, not ' '"),
        ([Prompt(3)], "prompts[0]: prompt must be a text that is not empty, not 3"),  # type: ignore[arg-type]
        (["\ud800"], "prompts[0]: prompt must be a text without NUL and lone surrogates"),
        ([{"text": "a"}], "prompts[0]: has no field named prompt, only text"),
    ],
)
def test_what_is_no_list_of_prompts_is_refused(given, message):
    with pytest.raises(ValueError) as refused:
        prompts_from_python(given, "prompts")
    assert str(refused.value).startswith(message) and str(refused.value).isprintable()


UNORDERED = {"a", "b"}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            UNORDERED,
            "the order of a set differs between processes and between starts; give sorted(...) of it, or list(dict.fr",
        ),
        (frozenset("a"), "not frozenset({'a'}): the order of a set differs"),
        (iter(UNORDERED), "the order of a set differs"),
        ({"a": 1}.keys(), "not dict_keys(['a']); give list(...) of them if they are the prompts"),
        ({"a": 1}.items(), "give list(...) of them"),
        ({"train": ["a"], "test": ["b"]}, "; one of its values may be meant (prompts['train'], prompts['test'])"),
        (bytearray(b"a"), "not bytearray(b'a')"),
        (np.array("a"), "not array('a'"),
        (np.array([["a", "b"]]), "prompts[0] must be a text"),
        (np.array([b"a"]), "prompts[0] must be a text"),
        ([b"a"], "prompts[0] must be a text"),
        ([["a"]], "prompts[0] must be a text"),
        ([float("nan")], "prompts[0] must be a text, a Prompt or a row with a field prompt, not nan"),
        ([{"prompt": None}], "prompts[0]: prompt must be a text that is not empty, not None"),
        ([{"prompt": float("nan")}], "prompts[0]: prompt must be a text that is not empty, not nan"),
    ],
)
def test_what_has_no_order_or_holds_no_prompts_is_refused(given, message):
    with pytest.raises(ValueError, match=r"^prompts.*\b(must be|not)\b") as refused:
        prompts_from_python(given, "prompts")
    assert message in str(refused.value) and str(refused.value).isprintable()


def test_what_has_an_order_is_taken_in_it():
    texts_of = ["b", "a", "b"]
    for given in (
        tuple(texts_of),
        np.array(texts_of),
        (text for text in texts_of),
        map(str.strip, texts_of),
        dict(enumerate(texts_of)).values(),
    ):
        assert texts(prompts_from_python(given, "prompts")) == texts_of
    with pytest.raises(TypeError, match="of the generator's own"):
        prompts_from_python(failing(), "prompts")


def failing():
    yield "a"
    raise TypeError("of the generator's own")


ROWS_WITH_GAPS = [{"prompt": " a ", "n": 1.0, "tag": None}, {"prompt": "b", "n": None, "tag": "t"}]
PROMPTS_WITH_GAPS = (Prompt("a", {"n": 1.0, "tag": None}), Prompt("b", {"n": None, "tag": "t"}))


def test_a_table_is_its_rows():
    pandas, pyarrow, datasets = (pytest.importorskip(name) for name in ("pandas", "pyarrow", "datasets"))
    table = pyarrow.Table.from_pylist(ROWS_WITH_GAPS)
    for given in (
        pandas.DataFrame(ROWS_WITH_GAPS),  # what is missing is NaN there
        table,
        *table.to_batches(),
        datasets.Dataset.from_list(ROWS_WITH_GAPS),
        datasets.Dataset.from_list(ROWS_WITH_GAPS).to_iterable_dataset(),
    ):
        assert prompts_from_python(given, "prompts") == PROMPTS_WITH_GAPS
    for column in (pandas.DataFrame(ROWS_WITH_GAPS)["prompt"], table["prompt"], table["prompt"].chunk(0)):
        assert texts(prompts_from_python(column, "prompts")) == ["a", "b"]
    for given, message in (
        (pandas.DataFrame({"text": ["a"]}), "prompts[0]: has no field named prompt, only text"),
        (pandas.DataFrame({"prompt": ["a", None]}), "prompts[1]: prompt must be a text that is not empty, not None"),
        (pandas.Series(["a", None]), "prompts[1] must be a text, a Prompt or a row with a field prompt, not "),
        (pandas.DataFrame({"prompt": []}), "prompts is empty"),
        (datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS_WITH_GAPS)), "may be meant (prompts['train'])"),
    ):
        with pytest.raises(ValueError, match=r"^prompts") as refused:
            prompts_from_python(given, "prompts")
        assert message in str(refused.value)


def test_python_gives_prompts_by_split_or_the_same_ones_for_all():
    def texts_by_split(given):
        splits = splits_from_python(given, eval_column="caption")
        return texts(splits.train), texts(splits.test), texts(splits.validation)

    given = {"train": iter(["a"]), "test": [{"caption": "b"}], "validation": ("c",)}
    assert texts_by_split(iter(["a"])) == (["a"], ["a"], ["a"])
    assert texts_by_split(given) == (["a"], ["b"], ["c"])
    assert texts_by_split({"train": ["a"], "test": ["b"]}) == (["a"], ["b"], ["b"])
    assert texts_by_split({"train": ["a"], "validation": ["c"]}) == (["a"], ["a"], ["c"])
    datasets = pytest.importorskip("datasets")
    splits = {name: datasets.Dataset.from_list([{"prompt": name}]) for name in ("train", "test")}
    by_split = splits_from_python(datasets.DatasetDict(splits))
    assert (texts(by_split.train), texts(by_split.test)) == (["train"], ["test"])


@pytest.mark.parametrize("given", [{"train": ["a"], "dev": ["b"]}, {"test": ["a"]}, {"prompt": "a"}, {}, {1: ["a"]}])
def test_prompts_of_other_splits_are_refused(given):
    with pytest.raises(ValueError) as refused:
        splits_from_python(given)
    assert str(refused.value) == (
        "prompts as a mapping must have the split train, and may have test and validation and no other, not"
        f" {list(given)}"
    )


def test_a_split_that_holds_no_prompts_is_refused_by_its_name():
    for given, message in (
        ({"train": []}, "prompts['train'] is empty"),
        ({"train": ["a"], "test": [{"text": "b"}]}, "prompts['test'][0]: has no field named prompt, only text"),
        ({"train": ["a"], "validation": {"b"}}, "prompts['validation'] must be a list of texts"),
        ({"train": {"x": ["a"]}}, "prompts['train'] must be a list of texts"),
    ):
        with pytest.raises(ValueError) as refused:
            splits_from_python(given)
        assert str(refused.value).startswith(message)


def test_lines_are_counted_whatever_ends_them(tmp_path):
    assert texts(of_file(tmp_path, "p.txt", b"a\rb\r\nc\nd")) == ["a", "b", "c", "d"]
    with pytest.raises(ValueError, match=r"p.txt, line 3: not UTF-8 text"):
        of_file(tmp_path, "p.txt", b"a\rb\r\n\xff\nd")
    with pytest.raises(ValueError, match=r"p.txt, line 2: over 1 MB long; write one prompt per line$"):
        of_file(tmp_path, "p.txt", b"a\n" + b"x" * 1_000_001)
    assert len(texts(of_file(tmp_path, "p.txt", b"a\n" + b"x" * 999_999 + b"\nb"))) == 3


@pytest.fixture
def of_ten():
    return {"": tuple(Prompt(str(i)) for i in range(10))}


@pytest.fixture
def of_two_kinds():
    return {"a": tuple(Prompt(f"a{i}") for i in range(3)), "b": tuple(Prompt(f"b{i}") for i in range(5))}


def test_every_epoch_deals_every_prompt_once_in_another_order(of_ten):
    dealt = [p.text for t in range(10) for p in InTurn(of_ten, seed=1).prompts_for(t, 4)]
    epochs = [dealt[start : start + 10] for start in range(0, 40, 10)]
    assert all(sorted(epoch) == sorted(texts(of_ten[""])) for epoch in epochs)
    assert all(one != other for one, other in pairwise(epochs))


def test_the_order_is_a_function_of_seed_and_iteration(of_ten):
    straight = [InTurn(of_ten, seed=1).prompts_for(t, 3) for t in range(8)]
    again = InTurn(of_ten, seed=1)
    assert [again.prompts_for(t, 3) for t in reversed(range(8))] == straight[::-1]
    assert [InTurn(of_ten, seed=2).prompts_for(t, 3) for t in range(8)] != straight


def test_kinds_come_in_turn_each_with_its_own_epochs(of_two_kinds):
    dealt = texts(InTurn(of_two_kinds, seed=0).prompts_for(0, 30))
    assert [text[0] for text in dealt] == ["a", "b"] * 15
    assert Counter(dealt) == {**dict.fromkeys(("a0", "a1", "a2"), 5), **{f"b{i}": 3 for i in range(5)}}


def test_more_prompts_than_there_are_go_round(of_ten):
    assert Counter(texts(InTurn(of_ten, seed=0).prompts_for(2, 20))) == {str(i): 2 for i in range(10)}


def test_shapes_come_kind_by_kind():
    dealt = InTurn(load_prompts("shapes"), seed=0).prompts_for(5, 12)
    assert [p.columns["kind"] for p in dealt] == list(world.KINDS) * 2


# --- by signal --------------------------------------------------------------------------------------------------------


@pytest.fixture
def of_easy_and_hard():
    return {"easy": tuple(Prompt(f"easy {i}") for i in range(4)), "hard": tuple(Prompt(f"hard {i}") for i in range(40))}


def teach(order, iterations, count, signal_of):
    """Let the order observe groups whose rewards differ by `signal_of(text)`, and return the prompts that it chose."""
    dealt = []
    for t in range(iterations):
        prompts = texts(order.prompts_for(t, count))
        order.observe(t, [signal_of(text) for text in prompts])
        dealt += prompts
    return dealt


def test_by_signal_starts_with_kinds_alike_whatever_their_size(of_easy_and_hard):
    kinds = Counter(
        text.split()[0] for seed in range(400) for text in texts(BySignal(of_easy_and_hard, seed).prompts_for(0, 1))
    )
    assert kinds["easy"] == pytest.approx(200, abs=4 * 10)  # four standard deviations


def test_by_signal_goes_where_rewards_differ_and_forgets_nobody(of_easy_and_hard):
    order = BySignal(of_easy_and_hard, 0)
    dealt = Counter(t.split()[0] for t in teach(order, 200, 2, lambda text: 0.2 if "hard" in text else 0.0)[100:])
    assert dealt["hard"] > 4 * dealt["easy"] > 0
    metrics = order.metrics()
    assert metrics["prompts/signal@hard"] == pytest.approx(0.2) and metrics["prompts/signal@easy"] == 0
    # floor 0.25 of the average 0.1, against that and 0.2
    assert metrics["prompts/share@easy"] == pytest.approx(0.025 / 0.25)
    assert metrics["prompts/share@hard"] == pytest.approx(0.9)
    assert metrics["prompts/seen"] == 44


def test_by_signal_tells_prompts_of_one_kind_apart():
    order = BySignal({"": tuple(Prompt(str(i)) for i in range(6))}, 0)
    dealt = Counter(teach(order, 300, 2, lambda text: 0.3 if text == "3" else 0.0)[200:])
    assert dealt["3"] > 2 * max(count for text, count in dealt.items() if text != "3")
    assert set(order.metrics()) == {"prompts/signal@all", "prompts/share@all", "prompts/seen"}


def test_by_signal_a_prompt_comes_twice_only_when_there_are_no_others(of_ten):
    order = BySignal(of_ten, 0)
    assert max(Counter(texts(order.prompts_for(3, 10))).values()) == 1
    assert set(Counter(texts(order.prompts_for(3, 25))).values()) == {2, 3}


def test_by_signal_what_is_not_known_changes_nothing_and_no_signal_at_all_is_no_error(of_ten):
    order = BySignal(of_ten, 0)
    order.observe(0, [float("nan")] * 4)
    assert order.metrics() == {"prompts/seen": 0}
    teach(order, 5, 4, lambda text: 0.0)
    assert len(order.prompts_for(5, 4)) == 4


def test_by_signal_resumes_exactly(of_easy_and_hard):
    straight, stopped, other = (BySignal(of_easy_and_hard, seed) for seed in (1, 1, 2))

    def signal(text):
        return len(text) % 3 / 10

    dealt = teach(straight, 8, 5, signal)
    assert teach(stopped, 4, 5, signal) == dealt[:20]
    resumed = BySignal(of_easy_and_hard, 1)
    resumed.load_state_dict(json.loads(json.dumps(stopped.state_dict())))
    for t in range(4, 8):
        prompts = texts(resumed.prompts_for(t, 5))
        assert prompts == dealt[5 * t : 5 * t + 5]
        resumed.observe(t, [signal(text) for text in prompts])
    assert resumed.metrics() == straight.metrics() and teach(other, 8, 5, signal) != dealt
    assert set(texts(straight.possible_prompts(8, 9, 5))) >= set(texts(straight.prompts_for(8, 5)))


def test_a_files_pictures_are_found_from_its_folder(tmp_path, monkeypatch):
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path)
    for path in ("folder/a.png", "b.png"):
        Image.new("RGB", (3, 2)).save(path)
    rows: list[dict[str, Any]] = [
        {"image": "a.png"},
        {"image": "../b.png"},
        {"image": str(tmp_path / "b.png")},
        {"image": None},
        {},
    ]
    lines = "".join(json.dumps({"prompt": "a", **row}) + "\n" for row in rows)
    Path("folder/prompts.jsonl").write_text(lines)
    (prompts,) = load_prompts("folder/prompts.jsonl").values()
    assert [source_picture(prompt).size for prompt in prompts[:3]] == [(3, 2)] * 3
    assert [prompt.columns.get("image") for prompt in prompts[3:]] == [None, None]
    for given, message in (
        (3, "image must be the path of a picture, not 3"),
        ("b.png", "image: no picture folder/b.png"),
    ):
        Path("folder/prompts.jsonl").write_text(lines + json.dumps({"prompt": "a", "image": given}))
        with pytest.raises(ValueError, match=rf"folder/prompts\.jsonl, line 6: {message}"):
            load_prompts("folder/prompts.jsonl")


# --- the datasets library ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folders of one split, of several, and of a file that the library reads by itself."""
    datasets = pytest.importorskip("datasets")
    folder = tmp_path_factory.mktemp("datasets")
    rows = [{"prompt": f" a cat {i} ", "target": f"t{i}", "n": i} for i in range(3)]
    one = datasets.Dataset.from_list(rows)
    one.save_to_disk(folder / "one")
    splits = {"train": one, "test": one.select([2]), "validation": one.select([1])}
    datasets.DatasetDict(splits).save_to_disk(folder / "splits")
    datasets.DatasetDict({"train": one}).save_to_disk(folder / "train")
    (folder / "files").mkdir()
    one.to_parquet(folder / "files" / "train.parquet")
    datasets.Dataset.from_list([{"text": "no prompt"}]).save_to_disk(folder / "wrong")
    return folder


ROWS = tuple(Prompt(f"a cat {i}", {"target": f"t{i}", "n": i}) for i in range(3))


@pytest.mark.parametrize("name", ["one", "splits", "train", "files"])
def test_a_datasets_rows_are_prompts_with_columns(saved, name):
    assert load_prompts(f"dataset:{saved / name}") == {"": ROWS}


def test_a_datasets_pictures_stay_files_until_they_are_asked_for(tmp_path):
    datasets = pytest.importorskip("datasets")
    drawn = Image.new("RGB", (3, 2), (9, 8, 7))
    rows = {"prompt": ["a", "b"], "image": [drawn, None]}
    features = datasets.Features({"prompt": datasets.Value("string"), "image": datasets.Image()})
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "edits")
    one, other = load_prompts(f"dataset:{tmp_path / 'edits'}")[""]
    assert isinstance(one.columns["image"], bytes) and other.columns["image"] is None
    assert source_picture(one).tobytes() == drawn.tobytes()


def test_a_dataset_has_splits_and_train_serves_where_one_lacks(saved):
    assert load_prompts(f"dataset:{saved / 'splits'}", "test") == {"": ROWS[2:]}
    assert load_prompts(f"dataset:{saved / 'splits'}", "validation") == {"": ROWS[1:2]}
    assert load_prompts(f"dataset:{saved / 'train'}", "test") == {"": ROWS}


def test_a_dataset_has_configurations(tmp_path):
    pytest.importorskip("datasets")
    folder = tmp_path / "several"
    folder.mkdir()
    parts = "".join(f"- config_name: {name}\n  data_files: {name}.csv\n" for name in ("cats", "dogs"))
    (folder / "README.md").write_text(f"---\nconfigs:\n{parts}---\n")
    for name in ("cats", "dogs"):
        (folder / f"{name}.csv").write_text(f"caption\ntwo {name}\n")
    for split in ("train", "test"):
        assert texts(load_prompts(f"dataset:{folder}:dogs", split, "caption")[""]) == ["two dogs"]
    with pytest.raises(ValueError, match=rf"\['cats', 'dogs'\].*; name one as dataset:{folder}:CONFIG$"):
        load_prompts(f"dataset:{folder}", column="caption")
    with pytest.raises(ValueError, match=rf"^dataset:{folder}:cows could not be loaded: .*cows"):
        load_prompts(f"dataset:{folder}:cows", column="caption")


def test_datasets_that_hold_no_prompts_are_refused_in_a_sentence(saved, monkeypatch):
    with pytest.raises(ValueError, match=r"wrong, row 0: has no field named prompt, only text; prompts.column"):
        load_prompts(f"dataset:{saved / 'wrong'}")
    with pytest.raises(ValueError, match=r"^dataset:.*one:x: a saved dataset has no configurations; leave x out$"):
        load_prompts(f"dataset:{saved / 'one'}:x")
    with pytest.raises(ValueError, match=r"^dataset:.*absent could not be loaded: [^\n]*$"):
        load_prompts(f"dataset:{saved / 'absent'}")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"need datasets: pip install 'progrpo\[datasets\]'"):
        load_prompts(f"dataset:{saved / 'one'}")


def test_a_picture_that_is_a_url_is_named_as_one(tmp_path):
    (file := tmp_path / "urls.jsonl").write_text('{"prompt": "a cat", "image": "https://example.org/a.png"}\n')
    with pytest.raises(
        ValueError, match=r"urls\.jsonl, line 1: image: https://example\.org/a\.png is a URL, .*download"
    ):
        load_prompts(str(file), "train")
