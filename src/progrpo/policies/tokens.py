"""The texts that are longer than the text encoders read, in one sentence instead of diffusers' warnings."""

from __future__ import annotations

from array import array
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerBase

from progrpo.messages import quoted

_TOGETHER = 1024  # texts; a tokenizer shares them out among threads


@dataclass(frozen=True, eq=False)
class Reader:
    """A text encoder by its name in the pipeline, with its tokenizer and the number of tokens that it takes.

    Special tokens count. `settable` says whether `model.max_sequence_length` is the limit, `tokenizer_text` gives the
    text that the tokenizer gets.
    """

    name: str
    tokenizer: PreTrainedTokenizerBase
    limit: int
    settable: bool = False
    tokenizer_text: Callable[[str], str] = str

    def tokens(self, texts: Sequence[str]) -> list[list[int]]:
        """All tokens of each text, also those beyond the limit."""
        inputs = [self.tokenizer_text(text) for text in texts]
        batches = [inputs[i : i + _TOGETHER] for i in range(0, len(inputs), _TOGETHER)]
        return [ids for batch in batches for ids in self.tokenizer(batch, verbose=False).input_ids]

    def cut(self, text: str) -> list[int]:
        """The tokens that are left of a text that is too long."""
        ids: list[int] = self.tokenizer(self.tokenizer_text(text), truncation=True, max_length=self.limit).input_ids
        return ids


@dataclass(frozen=True)
class Truncation:
    """The texts, of `count` different ones, that an encoder cuts: by encoder, and how many become equal to another."""

    count: int
    cut: tuple[str, ...] = ()
    by_reader: Mapping[Reader, int] = field(default_factory=dict)
    equal: int = 0

    def in_words(self) -> str | None:
        """One sentence, or None where nothing is cut."""
        if not self.cut:
            return None
        first, *others = self.by_reader.items()
        counts = [f"{first[0].name} reads {first[0].limit} tokens: {first[1]}"]
        counts += [f"{reader.name} {reader.limit}: {count}" for reader, count in others]
        equal = f", so that {self.equal} are read like another one" * bool(self.equal)
        raised = " or raise model.max_sequence_length" * any(reader.settable for reader in self.by_reader)
        return (
            f"{len(self.cut)} of {self.count} prompts {'is' if len(self.cut) == 1 else 'are'} longer than the text"
            f" encoders read, and cut ({', '.join(counts)}){equal}, though a reward may read them whole; shorten"
            f" them{raised}; the first is {quoted(self.cut[0])}"
        )


def truncation(readers: Sequence[Reader], texts: Sequence[str]) -> Truncation:
    """Count the cut texts, each text once."""
    texts = list(dict.fromkeys(texts))
    read: dict[str, list[bytes]] = {text: [] for text in texts}  # as bytes, since there may be many
    cut_by: dict[Reader, list[str]] = {}
    for reader in readers:
        for text, ids in zip(texts, reader.tokens(texts), strict=True):
            too_long = len(ids) > reader.limit
            if too_long:
                cut_by.setdefault(reader, []).append(text)
            read[text].append(array("L", reader.cut(text) if too_long else ids).tobytes())
    cut = set[str]().union(*cut_by.values())
    alike = defaultdict[tuple[bytes, ...], list[str]](list)
    for text, tokens in read.items():
        alike[tuple(tokens)].append(text)
    equal = sum(len(group) for group in alike.values() if len(group) > 1 and not cut.isdisjoint(group))
    counts = {reader: len(cut_texts) for reader, cut_texts in cut_by.items()}
    return Truncation(len(texts), tuple(text for text in texts if text in cut), counts, equal)
