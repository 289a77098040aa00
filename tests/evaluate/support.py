"""Subjects that are no model: one that knows the answers, one that says nothing."""

from collections.abc import Callable

from memjax.evaluate.subjects import Answers, Query, Subject


def oracle(knows: Callable[[Query], str], name: str = "oracle") -> Subject:
    """Answers each query with what `knows` says."""
    return Subject(name, lambda queries, max_tokens: Answers([knows(query) for query in queries]))


def silent(name: str = "silent") -> Subject:
    """Answers nothing."""
    return oracle(lambda query: "", name)
