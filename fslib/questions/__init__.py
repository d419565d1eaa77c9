"""The questions, one per notebook: what it computes, its tables, its plots, its sentences. Each registers its plan.

`main` is the command line (`fslib run | list | verify`), which needs the plans of all questions.
"""

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
from fslib.study.cli import main

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
