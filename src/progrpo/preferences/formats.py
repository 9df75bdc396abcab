"""Public data sets of preferences as pairs files, and back: Pick-a-Pic, HPDv2 and ImageRewardDB, by their own columns.

A ranking of a group becomes every two of its pictures; equal ranks are ties. Pictures that a file holds as bytes are
written beside the pairs file, named by their content.

Where the columns were seen:

- Pick-a-Pic v1 and v2 (arXiv 2305.01569): `trainer/datasetss/clip_hf_dataset.py` of github.com/yuvalkirstain/PickScore
  names caption, jpg_0, jpg_1, label_0, label_1, has_label, are_different and num_example_per_prompt, and the uids of
  pictures. The files also have ranking_id and user_id.
- HPDv2 (arXiv 2306.09341): the card huggingface.co/datasets/ymhao/HPDv2 has train.json (prompt, file_path,
  human_preference: 1 for the preferred one) and test.json (prompt, image_path, rank: an average, the best one lowest).
  `src/training/data.py` of github.com/tgxs002/HPSv2 reads the same.
- ImageRewardDB (arXiv 2304.05977): `ImageRewardDB.py` of huggingface.co/datasets/THUDM/ImageRewardDB has a row per
  picture (image or image_path, prompt_id, prompt, classification, image_amount_in_total, rank and ratings), its
  configurations `_group` the same as lists, and `_pair` img_better and img_worse. The best rank is the lowest.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from hashlib import sha256
from itertools import combinations
from pathlib import Path

from progrpo.durable import write_file, write_text
from progrpo.messages import FaultsError, named, quoted
from progrpo.preferences.pairs import PICTURES, Pair, read_pairs, write_pairs
from progrpo.prompts.files import READERS
from progrpo.prompts.load import TEXT, prompt_from_row
from progrpo.prompts.pictures import check_picture
from progrpo.types import Prompt

Row = Mapping[str, object]

_EXTENSIONS = ((b"\x89PNG\r\n\x1a\n", "png"), (b"\xff\xd8\xff", "jpg"), (b"RIFF", "webp"))


@dataclass(frozen=True)
class Converted:
    """The result of a conversion."""

    pairs: int
    notes: tuple[str, ...]
    """Sentences about what the other format does not have, or what the source lacks."""


def convert(source: Path, to: Path, read_as: str, write_as: str, images: Path | None = None) -> Converted:
    """Read a file of one format and write it in another. `read_as` may be `auto`; FORMATS are the others.

    Paths of pictures start at `images`, which is the source's folder if it is None. FaultsError lists every row at
    fault, and then nothing is written but pictures. ValueError for a file that is missing, empty or of no known format.
    """
    require_ending(to, write_as)
    if to.exists() and os.path.samefile(source, to):
        raise ValueError(f"--to is the source itself ({named(to)}); give another name")
    rows = _rows(source)
    name = _format_of(rows[0][0], source) if read_as == "auto" else read_as
    notes: list[str] = []
    if name == "progrpo":
        pairs = read_pairs(source)
    else:
        reading = _Reading(images or source.parent, to.parent / f"{to.stem}-pictures")
        READERS_OF_FORMATS[name](reading, rows)
        pairs, notes = reading.pairs(source)
    if not pairs:
        raise ValueError(f"{named(source)} holds no pair with a preference; nothing was written")
    written, more = WRITERS[write_as](to, pairs)
    return Converted(written, (*notes, *more))


def require_ending(path: Path, write_as: str) -> None:
    """Raise ValueError for a file's name that does not have the ending of its format."""
    ending = ENDINGS[write_as]
    if path.suffix.lower() != ending:
        raise ValueError(f"{write_as} is written as {ending}, not as {named(path.name)}; give --to that ending")


def _rows(source: Path) -> list[tuple[Row, str]]:
    kind = source.suffix.lower()
    if kind not in READERS or kind == ".txt":
        kinds = ", ".join(kind for kind in READERS if kind != ".txt")
        raise ValueError(f"the source must be a file ({kinds}), not {named(source)}")
    if not os.path.isfile(source):
        raise ValueError(f"no file {named(source)}")
    rows = [(row, where.removeprefix(f"{named(source)}, ")) for row, where in READERS[kind](source, TEXT)]
    if not rows:
        raise ValueError(f"{named(source)} holds no row")
    return rows


def _format_of(row: Row, source: Path) -> str:
    for name, is_of in _MARKS.items():
        if is_of(row.keys()):
            return name
    raise ValueError(
        f"{named(source)} has the fields {named(', '.join(map(str, row)))}, which are those of no known format"
        f" ({', '.join(_MARKS)}); --from-format names one, and docs/preferences.md their columns"
    )


# --- reading ----------------------------------------------------------------------------------------------------------


@dataclass
class _Reading:
    """The reading of one file: pairs, rows without a label, and faults so far."""

    images: Path
    """The folder at which paths start."""
    folder: Path
    """The folder for pictures that the file holds as bytes."""
    unlabelled: int = 0
    faults: list[str] = field(default_factory=list)
    _votes: dict[tuple[str, frozenset[Path], str], list[Pair]] = field(default_factory=dict)

    def pairs(self, source: Path) -> tuple[list[Pair], list[str]]:
        """The pairs, and notes. Several votes of one annotator on the same pictures are one pair with their share."""
        if self.faults:
            raise FaultsError(f"{named(source)}: {len(self.faults):,} rows cannot be read", self.faults)
        pairs = [_one_pair(votes) for votes in self._votes.values()]
        several = sum(len(votes) > 1 for votes in self._votes.values())
        notes = []
        if self.unlabelled:
            notes.append(f"{self.unlabelled:,} rows have no label and are left out")
        if several:
            notes.append(f"{several:,} pairs were compared more than once by the same annotator: each is one pair")
        return pairs, notes

    def add(self, prompt: Prompt, pictures: tuple[Path, Path], preference: float, annotator: str = "") -> None:
        if pictures[0] == pictures[1]:
            return  # the same content twice: nothing can be preferred
        pair = Pair(prompt, *pictures, preference, annotator=annotator)
        self._votes.setdefault((prompt.text, frozenset(pictures), annotator), []).append(pair)

    def add_ranking(self, prompt: Prompt, pictures: Sequence[Path], ranks: Sequence[float]) -> None:
        """Add every two pictures of a group, of which the best one has the lowest rank. ValueError for other counts."""
        if len(pictures) != len(ranks):
            raise ValueError(f"{len(pictures)} pictures have {len(ranks)} ranks")
        for (a, of_a), (b, of_b) in combinations(zip(pictures, ranks, strict=True), 2):
            self.add(prompt, (a, b), 0.5 if of_a == of_b else float(of_a < of_b))

    def picture(self, value: object, name: str) -> Path:
        """The file of a picture: a path, the bytes of one, or both as `datasets` stores them. ValueError for others."""
        if isinstance(value, Mapping):
            value = value.get("bytes") or value.get("path")
        if isinstance(value, bytes):
            return self._written(value, name)
        if not isinstance(value, str) or not value:
            raise ValueError(f"{name} holds no picture but {quoted(value)}; take the data set with pictures")
        tried = (self.images / value, self.images / Path(value).name)
        path = next((path for path in tried if path.is_file()), None)
        if path is None:
            raise ValueError(f"{name}: no picture {named(tried[0])}; --images names the folder of the pictures")
        check_picture(path, name)
        return path

    def _written(self, data: bytes, name: str) -> Path:
        extension = next((extension for start, extension in _EXTENSIONS if data.startswith(start)), None)
        if extension is None:
            raise ValueError(f"{name} holds neither PNG nor JPEG nor WebP")
        check_picture(data, name)
        path = self.folder / f"{sha256(data).hexdigest()[:32]}.{extension}"
        if not path.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            write_file(path, lambda file: file.write(data))
        return path

    @contextmanager
    def noting(self, place: str) -> Iterator[None]:
        """Note the fault of what is done with the row at this place."""
        try:
            yield
        except ValueError as error:
            self.faults.append(f"{place}: {str(error).removeprefix(': ')}")


def _one_pair(votes: Sequence[Pair]) -> Pair:
    first = votes[0]
    if len(votes) == 1:
        return first
    shares = [vote.preference if vote.image_a == first.image_a else 1 - vote.preference for vote in votes]
    return replace(first, preference=sum(shares) / len(shares), strength=float(len(votes)))


def _prompt(row: Row, column: str) -> Prompt:
    return prompt_from_row({TEXT: row.get(column)}, f"{column}")


def _numbers(row: Row, name: str) -> list[float]:
    return [_number(value, name) for value in _list(row, name)]


def _number(value: object, name: str) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise ValueError(f"{name} must be a number, not {quoted(value)}")
    return float(value)


def _list(row: Row, name: str) -> list[object]:
    values = row.get(name)
    if not isinstance(values, list) or len(values) < 2:
        raise ValueError(f"{name} must be a list of two or more, not {quoted(values)}")
    return values


def _pickapic(reading: _Reading, rows: Iterable[tuple[Row, str]]) -> None:
    for row, place in rows:
        labels = row.get("label_0"), row.get("label_1")
        if not row.get("has_label", True) or None in labels:
            reading.unlabelled += 1
            continue
        with reading.noting(place):
            if labels not in ((1, 0), (0, 1), (0.5, 0.5)):
                raise ValueError(f"label_0 and label_1 must be 1 and 0, or 0.5 both, not {quoted(labels)}")
            pictures = reading.picture(row.get("jpg_0"), "jpg_0"), reading.picture(row.get("jpg_1"), "jpg_1")
            user = row.get("user_id")
            reading.add(_prompt(row, "caption"), pictures, float(labels[0]), "" if user is None else str(user))


def _hpdv2(reading: _Reading, rows: Iterable[tuple[Row, str]]) -> None:
    for row, place in rows:
        ranked = row.get("rank") is not None
        if not ranked and row.get("human_preference") is None:
            reading.unlabelled += 1
            continue
        with reading.noting(place):
            name = "file_path" if "file_path" in row else "image_path"
            pictures = [reading.picture(value, name) for value in _list(row, name)]
            ranks = _numbers(row, "rank") if ranked else [-value for value in _numbers(row, "human_preference")]
            reading.add_ranking(_prompt(row, "prompt"), pictures, ranks)


def _imagereward(reading: _Reading, rows: Iterable[tuple[Row, str]]) -> None:
    groups: dict[object, tuple[Prompt, list[Path], list[float]]] = {}
    for row, place in rows:
        rank = row.get("rank")
        if rank is None and "img_better" not in row:
            reading.unlabelled += 1
            continue
        with reading.noting(place):
            prompt = _prompt(row, "prompt")
            name = "image_path" if "image_path" in row else "image"
            if "img_better" in row:
                better, worse = (reading.picture(row.get(name), name) for name in ("img_better", "img_worse"))
                reading.add(prompt, (better, worse), 1.0)
            elif isinstance(rank, list):
                pictures = [reading.picture(value, name) for value in _list(row, name)]
                reading.add_ranking(prompt, pictures, _numbers(row, "rank"))
            else:
                _, pictures, ranks = groups.setdefault(row.get("prompt_id", prompt.text), (prompt, [], []))
                picture, number = reading.picture(row.get(name), name), _number(rank, "rank")
                pictures.append(picture)
                ranks.append(number)
    for group in groups.values():
        reading.add_ranking(*group)


READERS_OF_FORMATS: dict[str, Callable[[_Reading, Iterable[tuple[Row, str]]], None]] = {
    "pickapic": _pickapic,
    "hpdv2": _hpdv2,
    "imagereward": _imagereward,
}
_MARKS: dict[str, Callable[[Iterable[object]], bool]] = {
    "progrpo": {*PICTURES}.issubset,
    "pickapic": {"caption", "label_0"}.issubset,
    "imagereward": lambda names: {"prompt_id", "rank"} <= {*names} or "img_better" in names,
    "hpdv2": lambda names: bool({"human_preference", "rank"} & {*names} and {"file_path", "image_path"} & {*names}),
}
"""Tests of the names of columns that tell the formats apart."""

# --- writing ----------------------------------------------------------------------------------------------------------


Written = tuple[int, list[str]]
"""The number of pairs, and notes about what their format does not have."""


def _write_progrpo(path: Path, pairs: Sequence[Pair]) -> Written:
    write_pairs(path, pairs)
    return len(pairs), []


def _write_pickapic(path: Path, pairs: Sequence[Pair]) -> Written:
    """Write the columns that PickScore's own training reads, and those that say who preferred what."""
    labelled = [pair for pair in pairs if pair.preference in (0, 0.5, 1)]
    names = _names(labelled)
    numbers = all(name.isdecimal() for name in names)
    users = {name: int(name) if numbers else number for number, name in enumerate(names)}
    per_prompt = Counter(pair.prompt.text for pair in labelled)
    rows = []
    for number, pair in enumerate(labelled):
        pictures = [image.read_bytes() for image in (pair.image_a, pair.image_b)]
        uids = [sha256(picture).hexdigest()[:32] for picture in pictures]
        best = {1.0: uids[0], 0.0: uids[1]}.get(pair.preference, "tie")
        rows.append(
            {
                "are_different": uids[0] != uids[1],
                "best_image_uid": best,
                "caption": pair.prompt.text,
                "has_label": True,
                "image_0_uid": uids[0],
                "image_1_uid": uids[1],
                "jpg_0": pictures[0],
                "jpg_1": pictures[1],
                "label_0": pair.preference,
                "label_1": 1 - pair.preference,
                "ranking_id": number,
                "user_id": users.get(pair.annotator),
                "num_example_per_prompt": per_prompt[pair.prompt.text],
            }
        )
    _write_parquet(path, rows)
    renamed = [str(user) for user in users.values()] != names
    return len(labelled), [*_left_out(pairs, labelled, "shares"), *_lost(labelled, renamed)]


def _write_hpdv2(path: Path, pairs: Sequence[Pair]) -> Written:
    decided = [pair for pair in pairs if pair.preference in (0, 1)]
    rows = [
        {
            "human_preference": [int(pair.preference), int(1 - pair.preference)],
            "prompt": pair.prompt.text,
            "file_path": [os.path.relpath(image, path.parent) for image in (pair.image_a, pair.image_b)],
        }
        for pair in decided
    ]
    write_text(path, json.dumps(rows, ensure_ascii=False, indent=1) + "\n")
    return len(decided), [*_left_out(pairs, decided, "ties and shares"), *_lost(decided, bool(_names(decided)))]


def _write_imagereward(path: Path, pairs: Sequence[Pair]) -> Written:
    """Write the columns of the configurations `_pair`: pairs in general are no ranking of a group."""
    decided = [pair for pair in pairs if pair.preference in (0, 1)]
    rows = []
    for pair in decided:
        better, worse = (pair.image_a, pair.image_b) if pair.preference == 1 else (pair.image_b, pair.image_a)
        rows.append(
            {
                "prompt_id": sha256(pair.prompt.text.encode()).hexdigest()[:16],
                "prompt": pair.prompt.text,
                "classification": "",
                "img_better": {"bytes": better.read_bytes(), "path": better.name},
                "img_worse": {"bytes": worse.read_bytes(), "path": worse.name},
            }
        )
    _write_parquet(path, rows)
    return len(decided), [*_left_out(pairs, decided, "ties and shares"), *_lost(decided, bool(_names(decided)))]


WRITERS: dict[str, Callable[[Path, Sequence[Pair]], Written]] = {
    "progrpo": _write_progrpo,
    "pickapic": _write_pickapic,
    "hpdv2": _write_hpdv2,
    "imagereward": _write_imagereward,
}
ENDINGS = {"progrpo": ".jsonl", "pickapic": ".parquet", "hpdv2": ".json", "imagereward": ".parquet"}


def _write_parquet(path: Path, rows: Sequence[Row]) -> None:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise ValueError(f"{named(path)}: a parquet file needs pyarrow: pip install 'progrpo[datasets]'") from None
    table = pyarrow.Table.from_pylist(list(rows))
    write_file(path, lambda file: parquet.write_table(table, file))


def _left_out(pairs: Sequence[Pair], written: Sequence[Pair], what: str) -> Iterator[str]:
    if len(written) < len(pairs):
        yield f"{len(pairs) - len(written):,} pairs are left out, since the format has no {what}"


def _lost(pairs: Sequence[Pair], names: bool) -> Iterator[str]:
    """Notes about what the format does not keep of these pairs; `names`: whether those of annotators."""
    if any(pair.strength != 1 for pair in pairs):
        yield "the format has no strength: each pair counts once"
    if names:
        yield "the format has no names of annotators"
    if any(pair.prompt.columns for pair in pairs):
        yield "the format has no other columns of prompts"


def _names(pairs: Sequence[Pair]) -> list[str]:
    return sorted({pair.annotator for pair in pairs} - {""})
