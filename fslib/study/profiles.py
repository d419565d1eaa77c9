"""Profiles: everything that a run can vary, fixed under a name in profiles.yaml."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import yaml
from pydantic import AfterValidator, Field

from fslib.data.loading import task_names
from fslib.errors import FslibError, unknown
from fslib.study.config import PlainLoader, checked
from fslib.study.units import EncoderName, FineTuning, LesionedOn, Precision, Sampling, Steps
from fslib.study.units import TaskNames as AnyTaskNames

OtherEnding = Literal[
    "IAT, least heads", "PCGrad", "mixed batches", "IAT, others frozen", "IAT, leaky"
]
T = TypeVar("T")


def _no_repeats(values: tuple[T, ...]) -> tuple[T, ...]:
    """Refuse what is named twice: it would be computed or counted as if it were two."""
    for value in values:
        if values.count(value) > 1:
            raise FslibError(f"{value!r} stands there twice: leave one out, or rename it")
    return values


def _known_tasks(names: tuple[str, ...]) -> tuple[str, ...]:
    known = task_names(hub_too=True)
    for name in names:
        if name.lower() not in known:
            raise unknown("task", name, known)
    return _no_repeats(names)


DISTINCT = AfterValidator(_no_repeats)
TaskNames = Annotated[AnyTaskNames, AfterValidator(_known_tasks)]
SeveralTasks = Annotated[TaskNames, Field(min_length=2)]
Share = Annotated[float, Field(gt=0, lt=1)]
Shares = Annotated[tuple[Share, ...], DISTINCT]
ShareOrAll = Annotated[float, Field(gt=0, le=1)]
SharesOrAll = Annotated[tuple[ShareOrAll, ...], DISTINCT]
Fractions = Annotated[SharesOrAll, Field(min_length=1)]
Size = Annotated[int, Field(ge=1)]
Sizes = Annotated[tuple[Size | None, ...], Field(min_length=1), DISTINCT]
Seeds = Annotated[int, Field(ge=1, le=10_000)]
SomeSeeds = Annotated[int, Field(ge=2, le=10_000)]


class Profile(FineTuning):
    """Everything that a run can vary; `fslib run --set key=value` changes a field.

    Notebooks 01 to 03 study `encoder` for `steps` steps. Notebooks 04 to 07 train many models and
    use `small_encoder` (04: `encoders`), `small_steps` and `small_lr`.
    """

    tasks: SeveralTasks = ("bbc", "bbc-pair", "bbc-headline", "bbc-shift")
    # of all trainings; unlike a unit's, these two are always among the settings
    lr_floor: float = Field(0.0, ge=0, lt=1)
    precision: Precision = "float32"
    decides: bool = True  # whether its table of claims has verdicts
    seeds: Seeds = 2
    first_seed: int = Field(0, ge=0, le=1_000_000)  # added to the study's own
    # 01, every task alone, and in 06 as well; None: as many as seeds
    alone_seeds: Seeds | None = None
    importance_examples: int = Field(ge=4)
    fractions: Fractions = (0.1, 0.2, 0.3, 0.4, 0.5)
    controls: int = Field(ge=1)
    lesioned_on: LesionedOn = "all"
    # models of which every head is switched off alone, 02 and 09
    lesion_seeds: int = Field(1, ge=0, le=10_000)
    lesion_examples: int | None = Field(None, ge=2)  # of those that pruning is scored on; None: all
    draws: int = Field(9999, ge=99, le=100_000)  # relabellings of tasks
    threads: int = Field(1, ge=1, le=1024)  # of a unit, however many cores; no part of its key
    # 04 to 07
    encoders: Annotated[tuple[EncoderName, ...], Field(min_length=1), DISTINCT]
    encoder_seeds: Seeds = 1
    # where it is not small_lr, or not encoder_seeds; an encoder that is named in one of these has
    # models of its own in 04, also if it is the one of 01 to 03
    encoder_lrs: dict[EncoderName, ShareOrAll] = Field({})
    encoder_seeds_of: dict[EncoderName, Seeds] = Field({})
    pair_seeds: Seeds = 1
    pair_tasks: SeveralTasks | None = None  # notebook 05; None: tasks
    small_encoder: EncoderName
    small_steps: Steps = Field(ge=10)
    small_lr: ShareOrAll
    # a few hundred steps of sampling by size would starve the smaller tasks
    small_sampling: Sampling = "uniform"
    small_examples: int = Field(ge=4)
    small_eval_examples: int | None = Field(None, ge=2)
    small_fractions: Fractions = (0.1, 0.3)
    # 04, how heads are chosen
    selection_examples: int = Field(ge=1)
    selection_randoms: int = Field(ge=1)
    # 06, endings
    ending_tasks: SeveralTasks | None = None  # None: tasks
    ending_seeds: SomeSeeds = 5
    ending_examples: int | None = Field(None, ge=2)
    ending_fractions: Fractions | None = None  # None: alpha
    # of evaluation, for D after endings; None: eval_examples
    prune_examples: int | None = Field(None, ge=4)
    delta: Share = 0.1
    alpha: ShareOrAll = 0.3
    other_deltas: Shares = (0.3,)
    other_alphas: SharesOrAll = (0.1, 0.5)
    other_endings: Annotated[tuple[OtherEnding, ...], DISTINCT] = get_args(OtherEnding)
    doses: Shares = ()  # deltas at which random heads stand beside IAT's, and D is measured
    dose_seeds: SomeSeeds | None = None  # of trunks with more than what decides; None: all
    floor_delta: Share = 0.3  # of the endings of trunks with a floor
    # learning rates, as a share of lr
    dose_floors: Shares = ()
    # 07, transfer
    transfer_seeds: SomeSeeds = 3
    transfer_targets: TaskNames = ("bbc-headline",)
    # in training examples; None: all
    transfer_sizes: Sizes = (32, 128, 512, None)
    transfer_passes: int = Field(2, ge=1)
    transfer_min_steps: Steps = Field(ge=1)
    transfer_max_steps: Steps = Field(ge=1)


_SETTINGS = Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8")
PROFILES: dict[str, dict[str, Any]] = yaml.load(_SETTINGS, Loader=PlainLoader)

# What each of ten tasks asks, and of whose text: they are crossed, so that two tasks may share the
# one, the other, both or neither.
QUESTION_AND_TEXT = {
    "sst-2": ("sentiment", "film reviews"),
    "sst-shift": ("wording", "film reviews"),
    "qnli": ("belonging", "Wikipedia"),
    "ag-pair": ("topic", "AG news"),
    "bbc": ("topic", "BBC news"),
    "bbc-pair": ("topic", "BBC news"),
    "bbc-headline": ("belonging", "BBC news"),
    "bbc-next": ("belonging", "BBC news"),
    "bbc-shift": ("wording", "BBC news"),
    "bbc-somo": ("wording", "BBC news"),
}
SHARED = ("question and text", "question", "text", "neither")


def question_of(task: str) -> str:
    """Return what a task asks, such as "topic"; "" where that is not known."""
    return QUESTION_AND_TEXT.get(task, ("", ""))[0]


def shared_by(a: str, b: str) -> str | None:
    """Return what two tasks share, one of `SHARED`; None where that is not known."""
    if not {a, b} <= QUESTION_AND_TEXT.keys():
        return None
    one, other = QUESTION_AND_TEXT[a], QUESTION_AND_TEXT[b]
    return SHARED[2 * (one[0] != other[0]) + (one[1] != other[1])]


def make_profile(name: str, changes: Mapping[str, Any]) -> Profile:
    """Return a profile with some fields changed.

    Args:
        name: one of `PROFILES`.
        changes: {field: value}.

    Raises:
        FslibError: for unknown names, fields and tasks, and for bad values.
    """
    if not isinstance(name, str) or name not in PROFILES:
        raise unknown("profile", name, PROFILES)
    if not isinstance(changes, Mapping):
        form = "give them as {field: value}, such as {'steps': 100}"
        raise FslibError(f"settings {changes!r:.80}: {form}")
    # which tasks are paired, or get an ending, the profile says of its own tasks alone
    follow = {"pair_tasks": None, "ending_tasks": None} if "tasks" in changes else {}
    profile = checked(Profile, PROFILES[name] | follow | dict(changes), "setting")
    trained = {profile.small_encoder, *profile.encoders}
    for encoder in (*profile.encoder_lrs, *profile.encoder_seeds_of):
        if encoder not in trained:
            raise unknown("encoder in encoder_lrs or encoder_seeds_of", encoder, trained)
    if profile.delta in profile.doses or profile.lr_floor in profile.dose_floors:
        there = "leave out the dose that decides (delta, lr_floor), which is there anyway"
        raise FslibError(f"doses and dose_floors: {there}")
    return profile
