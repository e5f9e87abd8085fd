"""Answers in a box."""


def in_box(answer: str) -> str:
    """An answer that ends as the benchmarks' prompts ask."""
    return rf"So the answer is $\boxed{{{answer}}}$."
