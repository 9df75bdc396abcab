"""The text cache: each prompt is encoded once, and can be asked for after the text encoders are gone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property

import torch
from torch import Tensor

from progrpo.messages import quoted
from progrpo.policies.family import ModelFamily
from progrpo.policies.tokens import Truncation, truncation
from progrpo.prompts.pictures import source_key, source_picture
from progrpo.types import Condition, Prompt


class TextCache:
    """A family's encoded texts, and the encoded pictures of a family that edits, on the CPU in the model's dtype."""

    def __init__(self, family: ModelFamily) -> None:
        self._family = family
        self._texts: dict[str, dict[str, Tensor]] = {}
        self._pictures: dict[str, dict[str, Tensor]] = {}
        self._both: dict[tuple[str, str], dict[str, Tensor]] = {}
        self._released = False
        self.readers = family.text_readers()  # asked now, while the text encoders are there

    def encode(self, prompts: Sequence[Prompt]) -> Condition:
        """One row a prompt on the policy's device: see `Policy.encode`."""
        rows = [self._row(prompt) for prompt in prompts]
        return Condition({name: torch.stack([row[name] for row in rows]).to(self._family.device) for name in rows[0]})

    @cached_property
    def unconditional(self) -> Condition:
        """One row of what guidance leads away from. What it does not name is the prompt's own in both branches."""
        row = self._negative_row
        if self._family.zero_embeddings_for_no_prompt and not self._family.context.guide_away_from:
            row = {name: torch.zeros_like(tensor) for name, tensor in row.items()}
        return Condition({name: tensor[None].to(self._family.device) for name, tensor in row.items()})

    def truncation(self, texts: Sequence[str]) -> Truncation:
        """The number of texts, the negative prompt among them, that the encoders cut."""
        return truncation(self.readers, [*texts, *filter(None, [self._family.context.guide_away_from])])

    def release(self) -> None:
        """Encode no new text from now on."""
        _ = self._negative_row  # it may be asked for later than now
        self._released = True

    @cached_property
    def _negative_row(self) -> dict[str, Tensor]:
        """The row of the negative prompt."""
        text = self._family.negative_prompt
        self._require_encoders(text)
        with torch.no_grad():
            encoded = self._family.encode_negative(text)
        return self._finite(quoted(text), encoded)

    def _require_encoders(self, text: str) -> None:
        if self._released:
            raise ValueError(f"{text!r} is new and the text encoders are released; encode all prompts before that")

    def _row(self, prompt: Prompt) -> dict[str, Tensor]:
        if not self._family.edits:
            return self._text_row(prompt.text)
        key = source_key(prompt)
        if key not in self._pictures:
            with torch.no_grad():
                encoded = self._family.encode_picture(source_picture(prompt))
            self._pictures[key] = self._finite("the picture of a prompt", encoded)
        row = self._text_row(prompt.text) | self._pictures[key]
        return row | self._row_of_both(prompt, key) if self._family.reads_both else row

    def _row_of_both(self, prompt: Prompt, key: str) -> dict[str, Tensor]:
        """The row of what a text and the picture of this key give together."""
        if (prompt.text, key) not in self._both:
            self._require_encoders(prompt.text)
            with torch.no_grad():
                encoded = self._family.encode_both(prompt.text, source_picture(prompt))
            self._both[prompt.text, key] = self._finite(quoted(prompt.text), encoded)
        return self._both[prompt.text, key]

    def _text_row(self, text: str) -> dict[str, Tensor]:
        if text not in self._texts:
            self._require_encoders(text)
            # alone in its batch, so that a text's embedding never depends on the company it was first met in
            with torch.no_grad():
                encoded = self._family.encode_text(text)
            self._texts[text] = self._finite(quoted(text), encoded)
        return self._texts[text]

    def _finite(self, subject: str, encoded: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The encoded row as the network gets it. ValueError where the dtype does not hold its numbers."""
        dtype = self._family.dtype
        row = {name: t[0].to("cpu", dtype if t.is_floating_point() else t.dtype) for name, t in encoded.items()}
        for name, tensor in row.items():
            if not tensor.isfinite().all():
                kept = str(dtype).removeprefix("torch.")
                raise ValueError(
                    f"what {subject} is encoded as ({name}) is not finite in {kept}; take another model.dtype"
                    " (bfloat16, float32), or look at the model's encoder"
                )
        return row
