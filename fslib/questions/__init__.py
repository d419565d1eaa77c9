"""The questions, one per notebook: what it computes, its tables, its plots, its sentences. Each registers its plan."""

from collections.abc import Sequence

from fslib.questions import (
    q00_data,
    q01_multitask,
    q02_importance,
    q03_pruning,
    q04_models,
    q05_similarity,
    q06_iat,
    q07_transfer,
    q08_claims,
    q09_explore,
)

__all__ = [
    "main",
    "q00_data",
    "q01_multitask",
    "q02_importance",
    "q03_pruning",
    "q04_models",
    "q05_similarity",
    "q06_iat",
    "q07_transfer",
    "q08_claims",
    "q09_explore",
]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line (`fslib run | list | ...`), which needs the plans of all questions; return its exit code.

    Its modules are opened now: a notebook's kernel needs none of them, and some take seconds.
    """
    from fslib.study.cli import main as command

    return command(arguments)
