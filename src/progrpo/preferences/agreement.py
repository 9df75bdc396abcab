"""The agreement of annotators who compared the same pictures, beyond what chance would give."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import combinations

from progrpo.preferences.pairs import Pair

Item = tuple[str, str, str]
"""The prompt and the two pictures, in the order in which their votes are counted."""


@dataclass(frozen=True)
class Agreement:
    """The agreement of annotators on the pairs that more than one of them compared."""

    annotators: int
    pairs: int
    """The pairs that two annotators or more compared."""
    equal: float
    """The share of equal votes among all two votes on the same pair."""
    measure: str
    """Cohen's kappa for two annotators, Krippendorff's alpha for more."""
    value: float | None
    """1: they always agree, 0: as often as by chance. None where all votes are the same, which chance explains."""

    def __str__(self) -> str:
        value = "undefined" if self.value is None else f"{self.value:.2f}"
        return (
            f"{100 * self.equal:.0f} % equal votes on {self.pairs:,} pairs of {self.annotators} annotators,"
            f" {self.measure} {value}"
        )


def agreement(pairs: Iterable[Pair]) -> Agreement | None:
    """The agreement of the pairs' annotators. None where no pair was compared by two."""
    votes: dict[Item, dict[str, str]] = {}
    for pair in pairs:
        item, vote = _item_and_vote(pair)
        votes.setdefault(item, {})[pair.annotator] = vote
    shared = [by for by in votes.values() if len(by) > 1]
    if not shared:
        return None
    annotators = sorted({name for by in shared for name in by})
    two = [votes for by in shared for votes in combinations(by.values(), 2)]
    equal = sum(a == b for a, b in two) / len(two)
    if len(annotators) == 2:
        value = cohens_kappa(*zip(*([by[name] for name in annotators] for by in shared), strict=True))
        return Agreement(2, len(shared), equal, "Cohen's kappa", value)
    value = krippendorffs_alpha([list(by.values()) for by in shared])
    return Agreement(len(annotators), len(shared), equal, "Krippendorff's alpha", value)


def cohens_kappa(first: Sequence[Hashable], second: Sequence[Hashable]) -> float | None:
    """Cohen's kappa of two annotators' labels of the same items (Cohen 1960): (p - e) / (1 - e).

    p is the share of equal labels, and e what annotators with these frequencies of labels would share by chance. None
    where e is 1.
    """
    count = len(first)
    p = sum(a == b for a, b in zip(first, second, strict=True)) / count
    of_first, of_second = Counter(first), Counter(second)
    e = sum(of_first[label] * of_second[label] for label in of_first) / count**2
    return None if e == 1 else (p - e) / (1 - e)


def krippendorffs_alpha(units: Iterable[Sequence[Hashable]]) -> float | None:
    """Krippendorff's alpha for nominal labels (Krippendorff 2011): 1 - D_o / D_e.

    A unit has the labels that any number of annotators gave one item. D_o is the observed disagreement, and D_e that of
    labels which are dealt at random. Units with less than two labels do not count. None where all labels are equal.
    """
    frequency: Counter[Hashable] = Counter()
    observed = 0.0
    for labels in units:
        if len(labels) < 2:
            continue
        frequency.update(labels)
        unequal = sum(a != b for a, b in combinations(labels, 2))
        observed += 2 * unequal / (len(labels) - 1)
    total = sum(frequency.values())
    expected = total**2 - sum(count**2 for count in frequency.values())
    return None if expected == 0 else 1 - (total - 1) * observed / expected


def counts(pairs: Sequence[Pair]) -> Mapping[str, int]:
    """The numbers of pairs, prompts, pictures, ties and annotators."""
    return {
        "pairs": len(pairs),
        "prompts": len({pair.prompt.text for pair in pairs}),
        "pictures": len({path for pair in pairs for path in (pair.image_a, pair.image_b)}),
        "ties": sum(pair.preference == 0.5 for pair in pairs),
        "annotators": len({pair.annotator for pair in pairs}),
    }


def _item_and_vote(pair: Pair) -> tuple[Item, str]:
    """The item of a pair, and the vote as `first`, `second` or `tie`.

    Which picture is first is drawn by a hash. By name, the better one of before and after would be first everywhere,
    and chance would seem to explain that annotators agree.
    """
    a, b = str(pair.image_a), str(pair.image_b)
    first, second = sorted((a, b))
    if sha256(f"{first}\n{second}".encode(errors="surrogateescape")).digest()[0] % 2:
        first, second = second, first
    share = pair.preference if first == a else 1 - pair.preference
    return (pair.prompt.text, first, second), "tie" if share == 0.5 else "first" if share > 0.5 else "second"
