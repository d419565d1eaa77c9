"""fslib: functional specialization of attention heads under multi-task learning.

A companion to Li, Wang, Zhang, Zhang and Zong, *Interpreting and Exploiting Functional
Specialization in Multi-Head Attention under Multi-task Learning*, EMNLP 2023,
doi 10.18653/v1/2023.emnlp-main.1026.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# public name -> the module that defines it, imported when the name is first used
_HOME = {
    "load_tasks": "data.loading",
    "make_task": "data.tasks",
    "glue_task": "data.loading",
    "task_names": "data.loading",
    "MultiTaskModel": "model.multitask",
    "load_released": "model.released",
    "check": "checks",
    "train": "training",
    "branch": "training",
    "IAT": "iat",
    "PCGrad": "endings",
    "Stop": "endings",
    "evaluate": "evaluation",
    "head_importance": "importance",
    "mean_context": "importance",
    "top_heads": "heads",
    "random_heads": "heads",
    "overlap": "heads",
    "pruned": "model.attention",
    "lesion_heads": "lesions",
    "prune_important_heads": "pruning",
    "IAP": "iap",
    "dissociation": "iap",
    "rank_correlation": "scoring",
    "transfer": "finetuning",
    "explore": "explorer.widget",
    "Study": "study.study",
    "FslibError": "errors",
}
__all__ = [*_HOME, "similarity"]


def __dir__() -> list[str]:
    """List what completion offers, imported or not."""
    return sorted({*__all__, *globals()})


def __getattr__(name: str) -> Any:
    """Import the module of a public name when the name is first used (PEP 562)."""
    if name == "similarity":  # a module of measures, used by its name
        return import_module("fslib.similarity")
    if name not in _HOME:
        raise AttributeError(f"module 'fslib' has no attribute {name!r}")
    globals()[name] = getattr(import_module(f"fslib.{_HOME[name]}"), name)
    return globals()[name]
