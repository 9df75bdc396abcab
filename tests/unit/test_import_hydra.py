"""Hydra's files, interpolations and overrides in shell scripts are read without running anything."""

from __future__ import annotations

from pathlib import Path

import pytest

from progrpo.imports.hydra_settings import read_hydra
from progrpo.imports.shell_settings import read_script


def hydra(folder: Path, **files: str):
    """Read `main`, beside the other files; two underscores in a name are a folder's end."""
    for name, content in files.items():
        file = folder / f"{name.replace('__', '/')}.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)
    return read_hydra(folder / "main.yaml")


def test_a_file_is_composed_of_those_that_its_defaults_name(tmp_path):
    reading = hydra(
        tmp_path,
        main="defaults: [base, optim: adam, model@policy.model: small, optional none: null, _self_]\nsteps: 3\n",
        base="steps: 1\nname: x\nnested: {a: 1, b: 2}\n",
        optim__adam="lr: 0.1\n",
        model__small="size: 4\n",
    )
    assert reading.settings == {
        **{"steps": 3, "name": "x", "nested.a": 1, "nested.b": 2},
        **{"optim.lr": 0.1, "policy.model.size": 4},
    }
    assert reading.unread == []


@pytest.mark.parametrize(("place", "expected"), [("_self_, base", 1), ("base, _self_", 2), ("base", 2)])
def test_the_file_itself_counts_where_it_stands(tmp_path, place, expected):
    assert hydra(tmp_path, main=f"defaults: [{place}]\nsteps: 2\n", base="steps: 1\n").settings == {"steps": expected}


def test_a_package_is_the_one_that_the_file_names(tmp_path):
    reading = hydra(
        tmp_path,
        main="defaults: [group: a, group/deep: b]\nx: 1\n",
        group__a="# @package _global_\ny: 2\n",
        group__deep__b="defaults: [/group: c]\nz: 3\n",
        group__c="# @package other\nw: 4\n",
    )
    assert reading.settings == {"x": 1, "y": 2, "group.deep.z": 3, "group.deep.other.w": 4}


@pytest.mark.parametrize("entry", ["missing", "group: missing", "${kind}_actor", "../outside", "{a: 1, b: 2}", "3"])
def test_what_defaults_cannot_name_here_is_listed(tmp_path, entry):
    text = entry if ":" in entry else f"'{entry}'"
    (row,) = hydra(tmp_path, main=f"defaults: [{text}]\nx: 1\n").unread
    assert (row.name, row.outcome.status) == ("defaults[0]", "could not be read")


def test_defaults_without_end_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"main\.yaml: its defaults name more than 64 files"):
        hydra(tmp_path, main="defaults: [main]\nx: 1\n")


@pytest.mark.parametrize("level", ["{{a: *l{0}, b: *l{0}}}", "[*l{0}, *l{0}]"], ids=["objects", "lists"])
def test_a_short_file_that_its_aliases_make_endless_is_refused(tmp_path, level):
    levels = "".join(f"l{i + 1}: &l{i + 1} {level.format(i)}\n" for i in range(60))
    with pytest.raises(ValueError, match=r"main\.yaml is no settings file: .*(without end|more than 10,000 settings)"):
        hydra(tmp_path, main=f"l0: &l0 {{a: 1}}\n{levels}")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("${b}", 2),
        ("${n.m}", 3),
        ("${c}", 2),
        ("run-${b}-${n.m}", "run-2-3"),
        ("${oc.env:NAME,some/model}", "some/model"),
        ("${oc.env:NAME,null}", None),
        ("${oc.env:A,${oc.env:B,${b}}}", 2),
        ("${oc.decode:${oc.env:NAME,true}}", True),
        ("${oc.select:n.m,9}", 3),
        ("${oc.select:n.k,9}", 9),
        ("${n}", "${n}"),
    ],
)
def test_an_interpolation_is_what_it_means(tmp_path, text, expected):
    assert hydra(tmp_path, main=f"b: 2\nc: '${{b}}'\nn: {{m: 3}}\na: '{text}'\n").settings["a"] == expected


def test_an_interpolation_may_start_at_its_place(tmp_path):
    reading = hydra(tmp_path, main="a: {b: {c: '${.d}', d: 1, e: '${..f}'}, f: [2, '${a.f_g}'], f_g: 3}\n")
    assert (reading.settings["a.b.c"], reading.settings["a.b.e"]) == (1, [2, 3])


@pytest.mark.parametrize("text", ["${oc.env:NAME}", "${now:%Y}", "${missing}", "${a}", "${b", "x${n}", "${eval:1}"])
def test_another_interpolation_could_not_be_read(tmp_path, text):
    reading = hydra(tmp_path, main=f"b: 2\nn: {{m: 3}}\na: '{text}'\n")
    assert [row.name for row in reading.unread] == ["a"] and "a" not in reading.settings
    assert reading.unread[0].value == text


# --- scripts ----------------------------------------------------------------------------------------------------------


def script(folder: Path, text: str):
    file = folder / "run.sh"
    file.write_text(text)
    return read_script(file)


def test_overrides_are_read_with_the_variables_before_them(tmp_path):
    reading = script(
        tmp_path,
        """#!/usr/bin/env bash
set -euo pipefail   # a comment
DATA=${DATA:-$HOME/data}
model='a/b' GPUS=8
TP=2
EXTRA=(+x.y=1 "z=[1, 2]")
if [ "$GPUS" = 1 ]; then TP=1; BACKEND=a; fi
log() { echo "$1"; }
python3 - <<PY
print("it's no override: a.b=1")
PY
CUDA=0 python3 -m pkg.main \\
    train=$DATA/train.txt "model=$model" quoted='{% if x["a"] %}' \\
    workers=$((GPUS / 2 + 1)) tp=$TP backend=${BACKEND:-b} made=$(date) \\
    "${EXTRA[@]}" ~gone --config-name=other "$@" 2>&1 | tee log.txt
""",
    )
    assert reading.program == "pkg.main"
    assert reading.settings == {
        **{"train": "~/data/train.txt", "model": "a/b", "quoted": '{% if x["a"] %}', "workers": "5"},
        **{"x.y": "1", "z": "[1, 2]"},
    }
    assert {name: value.text for name, value in reading.unread.items()} == {
        **{"tp": "$TP", "backend": "${BACKEND:-b}", "made": "$(date)"},
        **{"~gone": "~gone", "--config-name": "other"},
    }
    assert {value.line for value in reading.unread.values()} == {12}


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("a'b'\"c\"", "abc"),
        ('"\\"a\\""', '"a"'),
        ("'it'\\''s'", "it's"),
        ("$((2 * (3 + 4) % 5))", "4"),
        ("${A:-${B:-c d}}", "c d"),
        ("${A-1}", "1"),
        ("x\\\n", "x"),
    ],
)
def test_a_word_is_what_the_shell_makes_of_it(tmp_path, value, expected):
    assert script(tmp_path, f"python -m main a={value} b=1\n").settings["a"] == expected


@pytest.mark.parametrize("value", ["$UNSET", "`date`", "$((1 / 0))", "$((2 ** 99))", "${A:?no}", "${A//x/y}", "$1"])
def test_a_value_that_would_have_to_be_run_could_not_be_read(tmp_path, value):
    reading = script(tmp_path, f"python -m main a={value} b=1\n")
    assert reading.settings == {"b": "1"} and reading.unread["a"].text == value


def test_the_last_of_two_overrides_counts(tmp_path):
    reading = script(tmp_path, "python -m main a=$(x) a=1 b=1 b=$(x)\n")
    assert (reading.settings, set(reading.unread)) == ({"a": "1"}, {"b"})


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("echo hello\n", "starts no program with settings"),
        ("python -m a x=1\npython -m b y=2\n", "starts 2 programs with settings"),
        ("python -m a x='1\n", "is no script that can be read: a quotation has no end"),
        ("python -m a x=${1\n", "is no script that can be read: a bracket has no end"),
        ("A=(1; 2)\n", "the array A has no end"),
        ("python -m a x=" + "${A:-" * 3000 + "\n", "is no script that can be read"),
        ("x " * 10_001, "it has more than 10,000 words"),
    ],
)
def test_a_script_that_cannot_be_read_is_refused_in_one_sentence(tmp_path, text, sentence):
    with pytest.raises(ValueError) as refused:
        script(tmp_path, text)
    assert sentence in str(refused.value) and "\n" not in str(refused.value)


def test_nothing_of_a_script_is_run(tmp_path):
    script(tmp_path, f"python -m main a=$(touch {tmp_path}/made) b=`touch {tmp_path}/made` c=1\n")
    assert not (tmp_path / "made").exists()
