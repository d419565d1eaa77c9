"""fslib: functional specialization of attention heads under multi-task learning.

A companion to Li, Wang, Zhang, Zhang and Zong, *Interpreting and Exploiting Functional Specialization in
Multi-Head Attention under Multi-task Learning*, EMNLP 2023, doi 10.18653/v1/2023.emnlp-main.1026.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fslib import similarity
from fslib.data.loading import glue_task, load_tasks, task_names
from fslib.data.tasks import Split, Task, make_task
from fslib.dissociation import IAP, Dissociation, dissociation
from fslib.endings import PCGrad, Stop
from fslib.errors import FslibError
from fslib.evaluation import evaluate
from fslib.heads import overlap, random_heads, top_heads
from fslib.iat import IAT
from fslib.importance import contributions, head_importance, mean_context
from fslib.lesions import HeadLesions, lesion_heads
from fslib.model.attention import pruned
from fslib.model.multitask import MultiTaskModel
from fslib.model.released import load_released
from fslib.pruning import prune_important_heads
from fslib.scoring import Score, rank_correlation
from fslib.training import History, branch, train
from fslib.transfer import transfer

if TYPE_CHECKING:
    from fslib.study.compatibility import check
    from fslib.study.explorer import explore
    from fslib.study.profiles import PROFILES, Profile
    from fslib.study.study import Study

__version__ = "0.1.0"

__all__ = [
    "FslibError",
    "load_tasks",
    "make_task",
    "glue_task",
    "task_names",
    "Task",
    "Split",
    "MultiTaskModel",
    "load_released",
    "train",
    "branch",
    "IAT",
    "PCGrad",
    "Stop",
    "History",
    "evaluate",
    "Score",
    "head_importance",
    "contributions",
    "mean_context",
    "top_heads",
    "random_heads",
    "pruned",
    "overlap",
    "lesion_heads",
    "HeadLesions",
    "prune_important_heads",
    "IAP",
    "dissociation",
    "Dissociation",
    "rank_correlation",
    "similarity",
    "transfer",
    "check",
    "explore",
    "Study",
    "Profile",
    "PROFILES",
]


# names of the studies, and the modules that define them
_LATER = {
    "check": "compatibility",
    "explore": "explorer",
    "Study": "study",
    "Profile": "profiles",
    "PROFILES": "profiles",
}


def __dir__() -> list[str]:
    """Name what completion offers: what is public, opened or not."""
    return sorted({*__all__, *globals()})


def __getattr__(name: str) -> Any:
    """Open the studies and their questions when they are first asked for: the method alone needs no plots."""
    if name not in _LATER:
        raise AttributeError(f"module 'fslib' has no attribute {name!r}")
    if name != "check":
        from fslib import questions  # noqa: F401 - registers what each notebook needs
    return getattr(import_module(f"fslib.study.{_LATER[name]}"), name)
