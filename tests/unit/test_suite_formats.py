"""The prompts of suites, from files in their published formats, and what is said where they cannot be fetched."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import get_args

import pytest

from progrpo.suites import fetch
from progrpo.suites.fetch import read_published
from progrpo.suites.formats import local_sources, read_suite, spread_over_kinds
from progrpo.suites.table import SUITES, SuiteName
from progrpo.types import Prompt

GENEVAL = [
    {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"},
    {
        "tag": "counting",
        "include": [{"class": "clock", "count": 2}],
        "exclude": [{"class": "clock", "count": 3}],
        "prompt": "a photo of two clocks",
    },
    {
        "tag": "position",
        "include": [{"class": "cup", "count": 1}, {"class": "dog", "count": 1, "position": ["left of", 0]}],
        "prompt": "a photo of a dog left of a cup",
    },
]


def read(suite, path):
    sources, lacking = local_sources(SUITES[suite], str(path))
    assert lacking == []
    return [(prompt.text, prompt.columns.get("kind")) for prompt in read_suite(SUITES[suite], sources)]


def test_the_names_of_the_command_line_are_those_of_the_table():
    assert get_args(SuiteName) == tuple(SUITES)


def test_geneval_keeps_what_its_reward_reads(tmp_path):
    from progrpo.rewards.geneval_rules import parse_requirements

    path = tmp_path / "evaluation_metadata.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in GENEVAL))
    prompts = read_suite(SUITES["geneval"], [str(path)])
    assert [prompt.columns["kind"] for prompt in prompts] == ["single_object", "counting", "position"]
    for prompt in prompts:
        parse_requirements(prompt, {"bench", "clock", "cup", "dog"})


def test_geneval2_has_a_kind_per_number_of_atoms(tmp_path):
    row = {
        "prompt": "four white bicycles in front of three plastic cows",
        "atom_count": 7,
        "vqa_list": [["How many bicycles are in the image?", "four"]],
        "skills": ["count"],
    }
    (tmp_path / "geneval2_data.jsonl").write_text(json.dumps(row) + "\n")
    assert read("geneval2", tmp_path) == [(row["prompt"], "7")]
    (prompt,) = read_suite(SUITES["geneval2"], [str(tmp_path / "geneval2_data.jsonl")])
    assert prompt.columns["vqa_list"] == row["vqa_list"]


def test_drawbench_and_partiprompts_are_tables_with_categories(tmp_path):
    (tmp_path / "drawbench.csv").write_text(
        'Prompts,Category\nA red colored car.,Colors\n"A stack of 3 plates. A blue plate is on the top.",DALL-E\n'
        "A pear cut into seven pieces.,Gary Marcus et al. \n"
    )
    assert read("drawbench", tmp_path / "drawbench.csv") == [
        ("A red colored car.", "Colors"),
        ("A stack of 3 plates. A blue plate is on the top.", "DALL-E"),
        ("A pear cut into seven pieces.", "Gary Marcus et al."),
    ]
    (tmp_path / "PartiPrompts.tsv").write_text(
        "Prompt\tCategory\tChallenge\tNote\nbond\tAbstract\tBasic\tBiology\n"
        'The words "Fly an airplane" on a wall\tOutdoor Scenes\tComplex\t\n'
    )
    assert read("partiprompts", tmp_path) == [
        ("bond", "Abstract"),
        ('The words "Fly an airplane" on a wall', "Outdoor Scenes"),
    ]


def test_hpdv2_and_t2i_compbench_have_a_file_per_kind(tmp_path):
    for style, texts in {"anime": ["a fox"], "photo": ["a dog", "a cat"]}.items():
        (tmp_path / f"{style}.json").write_text(json.dumps(texts))
    sources, lacking = local_sources(SUITES["hpdv2"], str(tmp_path))
    assert lacking == ["concept-art.json", "paintings.json"]
    prompts = read_suite(SUITES["hpdv2"], sources)
    assert [(p.text, p.columns["kind"]) for p in prompts] == [
        ("a fox", "anime"),
        ("a dog", "photo"),
        ("a cat", "photo"),
    ]
    (tmp_path / "color_val.txt").write_text("a green bench and a blue bowl\na blue bench and a green bowl\n")
    rows = read("t2i-compbench", tmp_path / "color_val.txt")
    assert rows == [(text, "color") for text in ("a green bench and a blue bowl", "a blue bench and a green bowl")]


def test_dpg_has_rows_of_questions_or_a_file_per_prompt(tmp_path):
    (tmp_path / "dpg_bench.csv").write_text(
        "item_id,text,keywords,proposition_id,dependency,category_broad,category_detailed,tuple,"
        "question_natural_language\n"
        "p1,a long prompt,,1,0,entity,whole,entity - whole (car),Is there a car?\n"
        "p1,a long prompt,,2,1,attribute,color,attribute - color (car),Is the car red?\n"
        "p2,another,,1,0,entity,whole,entity - whole (dog),Is there a dog?\n"
    )
    prompts = read_suite(SUITES["dpg"], [str(tmp_path / "dpg_bench.csv")])
    assert [(prompt.text, prompt.columns["item_id"]) for prompt in prompts] == [
        ("a long prompt", "p1"),
        ("another", "p2"),
    ]
    questions = prompts[0].columns["questions"]
    assert [row["question_natural_language"] for row in questions] == ["Is there a car?", "Is the car red?"]
    assert questions[1]["dependency"] == "1"
    folder = tmp_path / "prompts"
    folder.mkdir()
    for name, text in {"2": "second", "10": "third\nwith a line", "1": "first"}.items():
        (folder / f"{name}.txt").write_text(text)
    sources, _ = local_sources(SUITES["dpg"], str(folder))
    assert [p.text for p in read_suite(SUITES["dpg"], sources)] == ["first", "second", "third with a line"]


def test_a_file_of_another_format_is_refused_with_its_line(tmp_path):
    (tmp_path / "p.csv").write_text("prompt,Category\na,b\n")
    with pytest.raises(ValueError, match=r"p\.csv, line 2: has no field named Prompts, only prompt, Category"):
        read("drawbench", tmp_path / "p.csv")
    (tmp_path / "d.csv").write_text("text\na\n")
    with pytest.raises(ValueError, match="row 1: has no field item_id"):
        read("dpg", tmp_path / "d.csv")
    with pytest.raises(ValueError, match=r"holds none of the files of ocr: test\.txt"):
        local_sources(SUITES["ocr"], str(tmp_path))


def test_a_part_of_a_suite_takes_kinds_in_turn_and_keeps_their_places():
    prompts = [Prompt(str(n), {"kind": kind}) for n, kind in enumerate("aaaabbc")]
    assert [item.place for item in spread_over_kinds(prompts, 4)] == [0, 1, 4, 6]
    assert [item.place for item in spread_over_kinds(prompts, None)] == list(range(7))
    assert spread_over_kinds(prompts, 100) == spread_over_kinds(prompts, None)
    plain = [Prompt(str(n)) for n in range(5)]
    assert [item.place for item in spread_over_kinds(plain, 2)] == [0, 1]


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("geneval", "prompts/evaluation_metadata.jsonl elsewhere"),
        ("hpdv2", "the dataset zhwang/HPDv2 of the hub (benchmark/anime.json, "),
        ("drawbench", "the dataset sayakpaul/drawbench of the hub elsewhere"),
    ],
)
def test_without_a_network_the_error_names_what_to_download(name, place, tmp_path, monkeypatch):
    def unreachable(*args, **options):
        raise OSError("no route to host.")

    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(fetch, "urlopen", unreachable)
    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", unreachable)
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path))
    with pytest.raises(ValueError) as refused:
        read_published(SUITES[name])
    said = str(refused.value)
    assert said.startswith(f"the prompts of {name} could not be fetched: ") and "no route to host; download" in said
    assert said.endswith("as --prompts") and place in said and "\n" not in said


def test_fetched_files_are_kept(tmp_path, monkeypatch):
    (tmp_path / "served").mkdir()
    (tmp_path / "served" / "test.txt").write_text('a sign that says "stop"\n')
    suite = SUITES["ocr"]
    assert suite.published is not None
    here = replace(suite, published=replace(suite.published, address=(tmp_path / "served").as_uri()))
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "home"))
    first = read_published(here)
    (tmp_path / "served" / "test.txt").unlink()
    assert read_published(here) == first and [prompt.text for prompt in first] == ['a sign that says "stop"']
