"""Evaluation suites: the benchmarks of text-to-image models, with their prompts, rewards, statistics and pages."""
