"""Profiles: everything that a run can vary, fixed under a name."""

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field

from fslib.data.batches import SAMPLINGS
from fslib.data.loading import task_names
from fslib.errors import FslibError, unknown
from fslib.iat import IAT
from fslib.model.encoders import PRETRAINED
from fslib.study.records import checked, shown
from fslib.study.units import EncoderName, FineTuning, Steps, TaskNames

Fractions = Annotated[tuple[float, ...], Field(min_length=1)]
Seeds = Annotated[int, Field(le=10_000)]


class Profile(FineTuning):
    """Everything that a run can vary; `fslib run --set key=value` changes a field.

    Notebooks 01 to 03 study `encoder` for `steps` steps. Notebooks 04 to 07 train many models and use
    `small_encoder` (04: `encoders`), `small_steps` and `small_lr`.
    """

    tasks: TaskNames = ("bbc", "bbc-pair", "bbc-headline", "bbc-shift")
    lr_floor: float = Field(0.0, ge=0, lt=1)  # of all trainings; unlike a unit's, always among the settings
    seeds: Seeds = Field(2, ge=1)
    importance_examples: int = Field(ge=4)
    fractions: Fractions = (0.1, 0.2, 0.3, 0.4, 0.5)
    controls: int = Field(ge=1)
    draws: int = Field(9999, ge=99, le=100_000)  # relabellings of tasks
    threads: int = Field(1, ge=1, le=1024)  # of a unit, however many cores there are; no part of its key
    # 04 to 07
    encoders: tuple[EncoderName, ...] = Field(min_length=1)
    encoder_seeds: Seeds = Field(1, ge=1)
    pair_seeds: Seeds = Field(1, ge=1)
    small_encoder: EncoderName
    small_steps: Steps = Field(ge=10)
    small_lr: float = Field(gt=0, le=1)
    small_sampling: str = "uniform"  # a few hundred steps of sampling by size would starve the smaller tasks
    small_examples: int = Field(ge=4)
    small_eval_examples: int | None = Field(None, ge=2)
    small_fractions: Fractions = (0.1, 0.3)
    # 04, how heads are chosen
    selection_examples: int = Field(ge=1)
    selection_randoms: int = Field(ge=1)
    # 06, endings
    ending_seeds: Seeds = Field(5, ge=2)
    ending_examples: int | None = Field(None, ge=2)
    delta: float = 0.1
    alpha: float = 0.3
    other_deltas: tuple[float, ...] = (0.3,)
    other_alphas: tuple[float, ...] = (0.1, 0.5)
    # 07, transfer
    transfer_seeds: Seeds = Field(3, ge=2)
    transfer_target: str = "bbc-headline"
    transfer_sizes: tuple[Annotated[int, Field(ge=1)] | None, ...] = Field((32, 128, 512, None), min_length=1)
    transfer_passes: int = Field(2, ge=1)
    transfer_min_steps: Steps = Field(ge=1)
    transfer_max_steps: Steps = Field(ge=1)


PRETRAINED_SEVEN = (
    "bert-mini",
    "bert-small",
    "bert-medium",
    "bert-base",
    "bert-large",
    "roberta-base",
    "roberta-large",
)
MINILM_DEPTHS = ("minilm-l1", "minilm-l2", "minilm-l3", "minilm-l4", "minilm-l6", "minilm-l6-random")

_MINI: dict[str, Any] = {
    "encoder": "minilm-l6",
    "steps": 600,
    "lr": 1e-4,
    "eval_examples": 200,
    "curve_points": 6,
    "curve_examples": 100,
    "importance_examples": 512,
    "controls": 2,
    "encoders": MINILM_DEPTHS,
    "small_encoder": "minilm-l3",
    "small_steps": 280,
    "small_lr": 2e-4,  # chosen on training data
    "small_examples": 128,
    "small_eval_examples": 100,
    "selection_examples": 64,
    "selection_randoms": 3,
    "ending_examples": 200,
    "transfer_passes": 1,
    "transfer_min_steps": 20,
    "transfer_max_steps": 48,
}
PROFILES: dict[str, dict[str, Any]] = {
    # Small enough to run every notebook from scratch inside the tests; its numbers mean nothing.
    "smoke": {
        "encoder": "tiny-random",
        "steps": 40,
        "lr": 1e-3,
        "eval_examples": 48,
        "curve_points": 4,
        "curve_examples": 32,
        "importance_examples": 32,
        "controls": 2,
        "draws": 199,
        "encoders": ("tiny-random",),
        "small_encoder": "tiny-random",
        "small_steps": 20,
        "small_lr": 1e-3,
        "small_examples": 16,
        "small_eval_examples": 32,
        "selection_examples": 8,
        "selection_randoms": 2,
        "ending_seeds": 2,
        "ending_examples": 48,
        "transfer_seeds": 2,
        "transfer_sizes": (8, 16),
        "transfer_min_steps": 2,
        "transfer_max_steps": 3,
    },
    # A real pre-trained encoder on real text, in an hour on a laptop's processor. The default.
    "mini": _MINI,
    # The same encoder on tasks of the paper, from FSLIB_DATA or the Hub.
    "glue-mini": _MINI
    | {"tasks": ("sst-2", "qnli", "ag-pair"), "seeds": 1, "steps": 400, "eval_examples": 150, "ending_examples": 150}
    | {"ending_seeds": 3, "transfer_target": "ag-pair"},
    # The paper's scale, for GPUs: seven pre-trained encoders and tasks of GLUE's size, from the Hub.
    "paper": {
        "tasks": ("mnli", "qnli", "qqp", "sst-2", "ag-pair"),
        "encoder": "bert-base",
        "seeds": 3,
        "steps": 30_000,
        "batch_size": 32,
        "lr": 3e-5,
        "eval_examples": None,
        "curve_points": 20,
        "curve_examples": 1000,
        "importance_examples": 10_000,
        "controls": 5,
        "encoders": tuple(PRETRAINED),
        "small_encoder": "bert-base",
        "small_steps": 30_000,
        "small_lr": 3e-5,
        "small_examples": 10_000,
        "small_fractions": (0.1, 0.2, 0.3, 0.4, 0.5),
        "selection_examples": 512,
        "selection_randoms": 5,
        "transfer_target": "mrpc",
        "transfer_passes": 3,
        "transfer_min_steps": 100,
        "transfer_max_steps": 3000,
    },
}


def make_profile(name: str, changes: Mapping[str, Any]) -> Profile:
    """Return a profile with some fields changed. Raises FslibError for unknown names, fields, tasks, and bad values."""
    if not isinstance(name, str) or name not in PROFILES:
        raise unknown("profile", name, PROFILES)
    if not isinstance(changes, Mapping):
        raise FslibError(f"settings {shown(changes)}: give them as {{field: value}}, such as {{'steps': 100}}")
    profile: Profile = checked(Profile, PROFILES[name] | dict(changes), "setting")
    for sampling in (profile.sampling, profile.small_sampling):
        if sampling not in SAMPLINGS:
            raise unknown("sampling", sampling, SAMPLINGS)
    if len(profile.tasks) < 2:
        raise FslibError(f"tasks={list(profile.tasks)}: a multi-task study needs at least two tasks")
    _refuse_repeats(profile)
    for fraction in (*profile.fractions, *profile.small_fractions):
        if not 0 < fraction <= 1:
            raise FslibError(f"fraction {fraction} is outside (0, 1]: 0.3 means the top 30 % of all heads")
    known = [*task_names(hub_too=True), "xnli"]
    for what, task in (*(("task", t) for t in profile.tasks), ("transfer_target", profile.transfer_target)):
        if task.lower() not in known:
            raise unknown(what, task, known)
    for delta in (profile.delta, *profile.other_deltas):
        IAT(delta=delta)  # refuses what is out of range
    for alpha in (profile.alpha, *profile.other_alphas):
        IAT(alpha=alpha)
    return profile


def _refuse_repeats(profile: Profile) -> None:
    """Raise FslibError for what is named twice, and would be computed or counted as if it were two."""
    if repeated := _repeated(profile.tasks):
        raise FslibError(f"two tasks are called {repeated[0]!r}: rename one")
    for field in ("fractions", "small_fractions", "encoders", "other_deltas", "other_alphas", "transfer_sizes"):
        if repeated := _repeated(getattr(profile, field)):
            raise FslibError(f"setting {field}: {repeated[0]} stands there twice, leave one out")


def _repeated(values: tuple[Any, ...]) -> list[Any]:
    return [v for v in values if values.count(v) > 1]
