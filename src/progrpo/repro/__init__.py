"""The tables of the paper (Pro-GRPO, arXiv 2512.15347), computed from this library's own objects."""
