"""Profiles: everything that a run can vary, fixed under a name."""

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field

from fslib.data.batches import SAMPLINGS
from fslib.data.bbc import EMBEDDED
from fslib.data.loading import task_names
from fslib.errors import FslibError, unknown
from fslib.iat import IAT
from fslib.model.encoders import PRETRAINED
from fslib.study.config import checked, shown
from fslib.study.units import EncoderName, FineTuning, LesionedOn, Precision, Steps, TaskNames

Fractions = Annotated[tuple[float, ...], Field(min_length=1)]
Seeds = Annotated[int, Field(le=10_000)]
OTHER_ENDINGS = ("IAT, least heads", "PCGrad", "mixed batches", "IAT, others frozen", "IAT, leaky")


class Profile(FineTuning):
    """Everything that a run can vary; `fslib run --set key=value` changes a field.

    Notebooks 01 to 03 study `encoder` for `steps` steps. Notebooks 04 to 07 train many models and use
    `small_encoder` (04: `encoders`), `small_steps` and `small_lr`.
    """

    tasks: TaskNames = ("bbc", "bbc-pair", "bbc-headline", "bbc-shift")
    lr_floor: float = Field(
        0.0, ge=0, lt=1
    )  # of all trainings; unlike a unit's, always among the settings
    precision: Precision = "float32"  # likewise
    seeds: Seeds = Field(2, ge=1)
    first_seed: int = Field(0, ge=0, le=1_000_000)  # added to the study's own
    alone_seeds: Seeds | None = Field(
        None, ge=1
    )  # 01, every task alone; None: as many as seeds, and in 06 as well
    importance_examples: int = Field(ge=4)
    fractions: Fractions = (0.1, 0.2, 0.3, 0.4, 0.5)
    controls: int = Field(ge=1)
    lesioned_on: LesionedOn = "all"
    lesion_seeds: Seeds = Field(
        1, ge=0
    )  # models of which every head is switched off alone, 02 and 09; 0: none
    lesion_examples: int | None = Field(None, ge=2)  # of those that pruning is scored on; None: all
    draws: int = Field(9999, ge=99, le=100_000)  # relabellings of tasks
    threads: int = Field(
        1, ge=1, le=1024
    )  # of a unit, however many cores there are; no part of its key
    # 04 to 07
    encoders: tuple[EncoderName, ...] = Field(min_length=1)
    encoder_seeds: Seeds = Field(1, ge=1)
    # an encoder that is named in one of these has models of its own in 04, also if it is the one of 01 to 03
    encoder_lrs: dict[EncoderName, Annotated[float, Field(gt=0, le=1)]] = Field(
        {}
    )  # where it is not small_lr
    encoder_seeds_of: dict[EncoderName, Annotated[Seeds, Field(ge=1)]] = Field(
        {}
    )  # where it is not encoder_seeds
    pair_seeds: Seeds = Field(1, ge=1)
    pair_tasks: TaskNames | None = None  # notebook 05; None: tasks
    small_encoder: EncoderName
    small_steps: Steps = Field(ge=10)
    small_lr: float = Field(gt=0, le=1)
    small_sampling: str = (
        "uniform"  # a few hundred steps of sampling by size would starve the smaller tasks
    )
    small_examples: int = Field(ge=4)
    small_eval_examples: int | None = Field(None, ge=2)
    small_fractions: Fractions = (0.1, 0.3)
    # 04, how heads are chosen
    selection_examples: int = Field(ge=1)
    selection_randoms: int = Field(ge=1)
    # 06, endings
    ending_tasks: TaskNames | None = None  # None: tasks
    ending_seeds: Seeds = Field(5, ge=2)
    ending_examples: int | None = Field(None, ge=2)
    ending_fractions: Fractions | None = None  # None: alpha
    prune_examples: int | None = Field(
        None, ge=4
    )  # of evaluation, for D after endings; None: eval_examples
    delta: float = 0.1
    alpha: float = 0.3
    other_deltas: tuple[float, ...] = (0.3,)
    other_alphas: tuple[float, ...] = (0.1, 0.5)
    other_endings: tuple[str, ...] = OTHER_ENDINGS
    doses: tuple[
        float, ...
    ] = ()  # deltas at which random heads stand beside IAT's, and D is measured
    dose_seeds: Seeds | None = Field(
        None, ge=2
    )  # of trunks with more than the endings that decide; None: all
    floor_delta: float = 0.3  # of the endings of trunks with a floor
    dose_floors: tuple[
        Annotated[float, Field(gt=0, lt=1)], ...
    ] = ()  # learning rates, as a share of lr
    # 07, transfer
    transfer_seeds: Seeds = Field(3, ge=2)
    transfer_targets: TaskNames = ("bbc-headline",)
    transfer_sizes: tuple[Annotated[int, Field(ge=1)] | None, ...] = Field(
        (32, 128, 512, None), min_length=1
    )
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
_MINI: dict[str, Any] = {
    "encoder": "minilm-l6",
    "seeds": 4,
    "alone_seeds": 1,
    "steps": 500,
    "lr": 1e-4,
    "sampling": "annealed",
    "eval_examples": 400,
    "curve_points": 4,
    "curve_examples": 100,
    "lesioned_on": "scored",
    "importance_examples": 256,
    "fractions": (0.1, 0.3),
    "controls": 3,
    "encoders": ("minilm-l3", "minilm-l6"),
    "small_encoder": "minilm-l3",
    "small_steps": 500,
    "small_lr": 2e-4,  # chosen on training data
    "small_sampling": "annealed",  # as above, so that 04 takes the models of 01 to 03
    "small_examples": 64,
    "small_eval_examples": 200,
    "selection_examples": 32,
    "selection_randoms": 2,
    # two tasks that a pilot learned in as few steps, and one for transfer that they leave out
    "ending_tasks": ("bbc-headline", "bbc-shift"),
    "ending_seeds": 4,
    "ending_examples": 400,
    "ending_fractions": (0.1, 0.3),
    "prune_examples": 200,
    "delta": 0.9,  # as in "evidence": what begins later changes too few predictions to be a treatment
    "other_deltas": (),
    "other_alphas": (),
    "other_endings": ("IAT, leaky",),
    "dose_seeds": 2,
    "doses": (0.3,),
    "transfer_seeds": 3,
    "transfer_targets": ("bbc",),
    "transfer_sizes": (512,),
    "transfer_passes": 3,
    "transfer_min_steps": 48,
    "transfer_max_steps": 96,
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
    # A real pre-trained encoder on real text, in three quarters of an hour on a laptop's processor. The default.
    "mini": _MINI,
    # What the claims are decided on: ten tasks, many seeds, hours. Fixed before it was run.
    "evidence": {
        "first_seed": 100,  # those before were for pilots, on training data held out
        "max_length": 80,
        "lesioned_on": "scored",
        # C1: questions and texts are crossed, and every task was learned in the pilot
        "tasks": ("sst-2", "sst-shift", "qnli", "bbc", "bbc-headline", "bbc-shift"),
        "encoder": "minilm-l6",
        "seeds": 12,
        "alone_seeds": 1,
        "steps": 1050,  # 175 for each task, here and below
        "lr": 1e-4,
        "sampling": "uniform",
        "eval_examples": 1000,
        "curve_points": 6,
        "curve_examples": 100,
        "importance_examples": 256,
        "fractions": (0.1, 0.3),
        "controls": 2,
        "encoders": ("minilm-l3", "minilm-l4", "minilm-l6", "minilm-l6-random"),
        "encoder_seeds": 8,
        "encoder_seeds_of": {"minilm-l6-random": 2},
        "encoder_lrs": {"minilm-l4": 1.5e-4, "minilm-l6-random": 1e-4},
        "small_encoder": "minilm-l3",
        "small_steps": 1050,
        "small_lr": 2e-4,
        "small_examples": 256,
        "small_eval_examples": 400,
        "selection_examples": 64,
        "selection_randoms": 3,
        # C2
        "pair_tasks": (*EMBEDDED, "sst-2", "sst-shift", "qnli", "ag-pair"),
        "pair_seeds": 2,
        # C3, C4: of the doses tried in the pilot (with other tasks, tests/benchmarks/pilot.py), the smallest that
        # changed 3 % of predictions decides
        "ending_tasks": ("sst-shift", "qnli", "bbc-headline", "bbc-shift"),
        "ending_seeds": 20,
        "ending_examples": 1000,
        "ending_fractions": (0.1, 0.3),
        "prune_examples": 400,
        "delta": 0.9,
        "other_deltas": (),
        "other_alphas": (),
        "other_endings": ("IAT, leaky",),
        "dose_seeds": 4,
        "doses": (0.1, 0.3, 0.5),
        "dose_floors": (0.3,),
        # C5: what the endings' tasks leave out of C1's
        "transfer_seeds": 15,
        "transfer_targets": ("sst-2", "bbc"),
        "transfer_sizes": (512, 1024),
        "transfer_passes": 3,
        "transfer_min_steps": 96,
        "transfer_max_steps": 192,
    },
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
        "lesion_examples": 1000,
        "controls": 5,
        "encoders": tuple(PRETRAINED),
        "small_encoder": "bert-base",
        "small_steps": 30_000,
        "small_lr": 3e-5,
        "small_examples": 10_000,
        "small_fractions": (0.1, 0.2, 0.3, 0.4, 0.5),
        "selection_examples": 512,
        "selection_randoms": 5,
        "transfer_targets": ("mrpc",),
        "transfer_passes": 3,
        "transfer_min_steps": 100,
        "transfer_max_steps": 3000,
    },
}


REPEATS_REFUSED = (
    "pair_tasks", "ending_tasks", "transfer_targets", "fractions", "small_fractions", "ending_fractions", "encoders",
    "other_deltas", "doses", "other_alphas", "other_endings", "dose_floors", "transfer_sizes",
)  # fmt: skip


# What each of ten tasks asks, and of whose text: they are crossed, so that two tasks may share the one, the other, both
# or neither.
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


def shared_by(a: str, b: str) -> str | None:
    """Return what two tasks share, one of `SHARED`; None where it is not known of one of them."""
    if not {a, b} <= QUESTION_AND_TEXT.keys():
        return None
    question, text = (
        x == y for x, y in zip(QUESTION_AND_TEXT[a], QUESTION_AND_TEXT[b], strict=True)
    )
    return SHARED[0 if question and text else 1 if question else 2 if text else 3]


def make_profile(name: str, changes: Mapping[str, Any]) -> Profile:
    """Return a profile with some fields changed. Raises FslibError for unknown names, fields, tasks, and bad values."""
    if not isinstance(name, str) or name not in PROFILES:
        raise unknown("profile", name, PROFILES)
    if not isinstance(changes, Mapping):
        raise FslibError(
            f"settings {shown(changes)}: give them as {{field: value}}, such as {{'steps': 100}}"
        )
    # which tasks are paired, or get an ending, the profile says of its own tasks alone
    follow: dict[str, Any] = (
        {"pair_tasks": None, "ending_tasks": None} if "tasks" in changes else {}
    )
    profile: Profile = checked(Profile, PROFILES[name] | follow | dict(changes), "setting")
    for sampling in (profile.sampling, profile.small_sampling):
        if sampling not in SAMPLINGS:
            raise unknown("sampling", sampling, SAMPLINGS)
    for field in ("tasks", "pair_tasks", "ending_tasks"):
        names = getattr(profile, field)
        if names is not None and len(names) < 2:
            raise FslibError(f"{field}={list(names)}: a multi-task study needs at least two tasks")
    _refuse_repeats(profile)
    for fraction in (
        *profile.fractions,
        *profile.small_fractions,
        *(profile.ending_fractions or ()),
    ):
        if not 0 < fraction <= 1:
            raise FslibError(
                f"fraction {fraction} is outside (0, 1]: 0.3 means the top 30 % of all heads"
            )
    known = [*task_names(hub_too=True), "xnli"]
    for field in ("tasks", "pair_tasks", "ending_tasks", "transfer_targets"):
        for task in getattr(profile, field) or ():
            if task.lower() not in known:
                raise unknown("task" if field == "tasks" else field, task, known)
    trained = {profile.small_encoder, *profile.encoders}
    for field in ("encoder_lrs", "encoder_seeds_of"):
        for encoder in getattr(profile, field):
            if encoder not in trained:
                raise unknown(f"encoder in {field}", encoder, trained)
    if profile.delta in profile.doses or profile.lr_floor in profile.dose_floors:
        raise FslibError(
            "doses and dose_floors: leave out the dose that decides (delta, lr_floor), which is there anyway"
        )
    for ending in profile.other_endings:
        if ending not in OTHER_ENDINGS:
            raise unknown("other_endings", ending, OTHER_ENDINGS)
    for delta in (profile.delta, profile.floor_delta, *profile.other_deltas, *profile.doses):
        IAT(delta=delta)  # refuses what is out of range
    for alpha in (profile.alpha, *profile.other_alphas):
        IAT(alpha=alpha)
    return profile


def _refuse_repeats(profile: Profile) -> None:
    """Raise FslibError for what is named twice, and would be computed or counted as if it were two."""
    if repeated := _repeated(profile.tasks):
        raise FslibError(f"two tasks are called {repeated[0]!r}: rename one")
    for field in REPEATS_REFUSED:
        if repeated := _repeated(getattr(profile, field) or ()):
            raise FslibError(f"setting {field}: {repeated[0]} stands there twice, leave one out")


def _repeated(values: tuple[Any, ...]) -> list[Any]:
    return [v for v in values if values.count(v) > 1]
