"""Agreement of annotators, by hand and by published examples."""

from pathlib import Path

import pytest

from progrpo.preferences.agreement import agreement, cohens_kappa, krippendorffs_alpha
from progrpo.preferences.pairs import Pair
from progrpo.types import Prompt


def test_cohens_kappa_by_hand():
    # 20 times both yes, 5 yes and no, 10 no and yes, 15 both no: p = 0.7, e = 0.5 * 0.6 + 0.5 * 0.4 = 0.5
    first = ["yes"] * 25 + ["no"] * 25
    second = ["yes"] * 20 + ["no"] * 5 + ["yes"] * 10 + ["no"] * 15
    assert cohens_kappa(first, second) == pytest.approx(0.4)
    assert cohens_kappa("abab", "abab") == 1
    assert cohens_kappa("abab", "baba") == -1
    assert cohens_kappa("aaaa", "aaaa") is None


def test_krippendorffs_alpha_of_his_own_example():
    # Krippendorff (2011), "Computing Krippendorff's alpha-reliability", section C: four observers with missing values
    a = [1, 2, 3, 3, 2, 1, 4, 1, 2, None, None, None]
    b = [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, None, 3]
    c = [None, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, None]
    d = [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, None]
    units = [[value for value in unit if value is not None] for unit in zip(a, b, c, d, strict=True)]
    assert krippendorffs_alpha(units) == pytest.approx(0.743, abs=5e-4)


def test_krippendorffs_alpha_by_hand():
    # two units of two: one equal, one not. D_o = 2 / 4; labels a a a b: D_e = 2 * 3 * 1 / (4 * 3) = 1 / 2
    assert krippendorffs_alpha(["aa", "ab"]) == pytest.approx(0)
    assert krippendorffs_alpha(["aa", "bb", "c"]) == 1
    assert krippendorffs_alpha(["aa", "aa"]) is None


def pair(name, annotator, preference, turned=False):
    a, b = (Path(f"{name}-{side}.png") for side in ("yx" if turned else "xy"))
    return Pair(Prompt("a cat"), a, b, preference, 1.0, annotator)


def test_agreement_of_pairs_whichever_picture_is_named_first():
    pairs = [pair(i, "ann", float(i % 2)) for i in range(8)]
    assert agreement(pairs) is None
    same = agreement([*pairs, *(pair(i, "bob", float(1 - i % 2), turned=True) for i in range(6))])
    assert same is not None
    assert (same.annotators, same.pairs, same.equal, same.measure, same.value) == (2, 6, 1, "Cohen's kappa", 1)
    three = agreement([*pairs, pair(0, "bob", 0.0), pair(0, "eve", 1.0), pair(1, "eve", 1.0)])
    assert three is not None
    assert (three.annotators, three.pairs, three.measure) == (3, 2, "Krippendorff's alpha")
    assert three.equal == 0.5  # of the pairs' two votes: ann and bob, ann and eve, bob and eve; ann and eve
    assert "50 % equal votes on 2 pairs of 3 annotators, Krippendorff's alpha" in str(three)
