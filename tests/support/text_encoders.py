"""Tokenizers and text encoders of the true classes: a vocabulary of letters, and random weights."""

from __future__ import annotations

import re
import string
from typing import Any

WIDTH = 16  # of the T5, of the joined CLIPs and of the tokens: diffusers pads or crops silently if they differ
CLIP_TOKENS = 16


def clip_tokenizer() -> Any:
    from transformers import CLIPTokenizer

    letters = [*string.ascii_lowercase, *(f"{letter}</w>" for letter in string.ascii_lowercase)]
    vocabulary = {token: i for i, token in enumerate(["<|startoftext|>", "<|endoftext|>", *letters])}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=CLIP_TOKENS)


def clip_encoder(tokenizer: Any, size: float = 8.0) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH // 2,
            intermediate_size=WIDTH,
            projection_dim=WIDTH // 2,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=CLIP_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            initializer_factor=size,  # random, but not blind to the text
        )
    )


def t5_tokenizer() -> Any:
    from transformers import T5Tokenizer

    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), ("▁", -1.0)]
    return T5Tokenizer(vocab=[*special, *((letter, -2.0) for letter in string.ascii_lowercase)], extra_ids=0)


def t5_encoder(tokenizer: Any) -> Any:
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(
        T5Config(vocab_size=len(tokenizer), d_model=WIDTH, d_kv=4, d_ff=WIDTH, num_layers=1, num_heads=2)
    )


QWEN_IMAGE_WORDS = (
    "Describe the image by detailing the color, shape, size, texture, quantity, text,"
    " spatial relationships of the objects and background:"
)
"""The system prompt that Qwen-Image's pipeline puts before every text and drops again as 34 tokens.

Each word and comma is one token.
"""


def qwen_tokenizer() -> Any:
    """Letters, and as whole words those of the chat and of `QWEN_IMAGE_WORDS`."""
    from transformers import Qwen2Tokenizer

    words = ["system", "user", "assistant", " cat", " dog", *re.findall(r" ?\w+", QWEN_IMAGE_WORDS)]
    words = [word.replace(" ", "Ġ") for word in words]  # as byte-level tokens write a space
    pieces = dict.fromkeys((word[:end], word[end]) for word in words for end in range(1, len(word)))
    tokens = dict.fromkeys([*string.ascii_letters, *".,:<>/Ġ", "Ċ", *("".join(piece) for piece in pieces)])
    tokenizer = Qwen2Tokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=list(pieces))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "<|im_start|>assistant\n"
    )
    return tokenizer


def llm(kind: str, tokenizer: Any, layers: int = 2, **more: Any) -> Any:
    """A decoder of the transformers class `kind`, as text encoder: hidden states of `WIDTH` numbers."""
    import transformers

    model = getattr(transformers, kind)
    config = model.config_class(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.3,  # random, but not blind to the text
        **more,
    )
    return model(config)


def umt5_encoder(tokenizer: Any) -> Any:
    from transformers import UMT5Config, UMT5EncoderModel

    return UMT5EncoderModel(
        UMT5Config(vocab_size=len(tokenizer), d_model=WIDTH, d_kv=4, d_ff=WIDTH, num_layers=1, num_heads=2)
    )


def gemma_tokenizer() -> Any:
    """Letters, after a token of the beginning."""
    from tokenizers.processors import TemplateProcessing
    from transformers import GemmaTokenizer

    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *string.printable[:95]]
    tokenizer = GemmaTokenizer(vocab={token: i for i, token in enumerate(dict.fromkeys(tokens))}, merges=[])
    first = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", tokenizer.bos_token_id)])
    tokenizer._tokenizer.post_processor = first
    return tokenizer


def mistral(tokenizer: Any) -> Any:
    """A Mistral 3 of 30 layers, which FLUX.2 dev reads at the tenth, the twentieth and the last."""
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration

    text = {"hidden_size": 8, "intermediate_size": 4, "head_dim": 4, "num_attention_heads": 1}
    more = {"num_hidden_layers": 30, "num_key_value_heads": 1, "initializer_range": 0.3, "model_type": "mistral"}
    eyes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "head_dim": 8}
    config = Mistral3Config(
        text_config={**text, **more, "vocab_size": len(tokenizer)}, vision_config={**eyes, "model_type": "pixtral"}
    )
    return Mistral3ForConditionalGeneration(config)


def qwen_vl(tokenizer: Any, layers: int = 1) -> Any:
    """A Qwen 2.5 VL, which reads pictures too."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    marks = {f"{name}_token_id": tokenizer.convert_tokens_to_ids(token) for name, token in VISION.items()}
    parts = _qwen_vl_parts(tokenizer, layers)
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**parts, **marks))


def _qwen_vl_parts(tokenizer: Any, layers: int, **more: Any) -> dict[str, dict[str, Any]]:
    """The settings of a Qwen VL's decoder, with `more`, and of its vision tower."""
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": WIDTH,
        "intermediate_size": WIDTH,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
        **more,
    }
    vision = {"depth": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 2, "out_hidden_size": WIDTH}
    return {"text_config": text, "vision_config": vision}


VISION = {
    "vision_start": "<|vision_start|>",
    "vision_end": "<|vision_end|>",
    "image": "<|image_pad|>",
    "video": "<|video_pad|>",
}
"""The tokens around a picture, and in its place, of a tokenizer that has them."""


def qwen3_vl(tokenizer: Any, layers: int = 2) -> Any:
    """A Qwen 3 VL with its head."""
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    parts = _qwen_vl_parts(tokenizer, layers, head_dim=8, initializer_range=0.3)  # random, but not blind to the text
    return Qwen3VLForConditionalGeneration(Qwen3VLConfig(**parts))


def qwen_vl_processor(tokenizer: Any) -> Any:
    """The tokenizer, which gets the tokens of `VISION`, with what cuts a picture into patches: 4 tokens of one."""
    from transformers import ProcessorMixin, Qwen2VLImageProcessorPil, Qwen2VLProcessor

    class WithoutVideos(Qwen2VLProcessor):  # whose part needs torchvision
        def __init__(self, image_processor: Any, tokenizer: Any) -> None:
            self.image_token = VISION["image"]
            self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
            ProcessorMixin.__init__(self, image_processor, tokenizer)

    tokenizer.add_tokens(list(VISION.values()), special_tokens=True)
    side = 2 * 28  # of a picture; a token is of 28 pixels
    pictures = Qwen2VLImageProcessorPil(size={"shortest_edge": side**2, "longest_edge": side**2})
    return WithoutVideos(pictures, tokenizer)
