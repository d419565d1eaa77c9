"""Does an encoder that was trained on some tasks learn a new one better?

Claim C5 of Li et al. (2023). The new task must be none of the source's. Comparisons between sources
are paired: for one seed, all of them get the same examples in the same order, and a classifier that
begins with the same weights.
"""

import copy
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from fslib.data.tasks import Task, as_tasks
from fslib.errors import FslibError, check_among, check_count
from fslib.evaluation import Most, Score, evaluate
from fslib.model.multitask import Answer, MultiTaskModel, check_model
from fslib.similarity import representations
from fslib.training import History, make_settings, train

PARTS = ("full", "classifier")


@dataclass(frozen=True, eq=False)
class Transfer:
    """What came of a new task.

    Args:
        score: On the eval split.
        size: How many training examples it took.
        part: What was trained.
        history: Of the training, None for "classifier", which is solved and not stepped.
    """

    score: Score
    size: int
    part: str
    history: History | None = None


def transfer(
    source: MultiTaskModel, target: Task, *, size: Most = None, part: str = "full", **settings: Any
) -> Transfer:
    """Learn a task that the source was not trained on, from a copy of its encoder.

    The source stays as it is.

    Args:
        source: A model of other tasks.
        target: The new task.
        size: Training examples, chosen by `training_subset`; None for all.
        part: "full" fine-tunes encoder and new classifier. "classifier" leaves the encoder frozen:
            logistic (for regression: ridge) regression on its standardized text representations, L2
            penalty 1, which has one solution.
        settings: As `fslib.train` takes them, but 200 `steps` unless told otherwise. `seed` is for
            the subset and the new classifier, too; the others are for "full" alone.

    Raises:
        FslibError: For a target that the source knows, a size that is too small or too large, an
            unknown part, settings out of range, and, in "full", for a source whose heads are pruned
            around the call.
    """
    check_among("part to train", part, PARTS)
    settings = {"steps": 200, "seed": 0} | settings
    make_settings(settings)  # refuses what is out of range
    _refuse_known(source, target)
    task = training_subset(target, size, settings["seed"])
    if part == "classifier":
        return Transfer(_linear_score(source, task), len(task.train), part)
    model = fresh(source, task, settings["seed"])
    history = train(model, task, **settings)
    return Transfer(evaluate(model, task)[task.name], len(task.train), part, history)


def fresh(source: MultiTaskModel, target: Task, seed: int = 0) -> MultiTaskModel:
    """Return a model with a copy of the source's encoder and one new classifier.

    It is in evaluation mode. All its weights are trainable, and nothing done to one model's weights
    or heads reaches the other.

    Args:
        source: A model of other tasks.
        target: The task of the classifier.
        seed: For the classifier, the same for every source of one width.

    Raises:
        FslibError: For a target that the source knows, and for a source whose heads are pruned
            around the call.
    """
    _refuse_known(source, target)
    if source.control.gate is not None or source.control.tap is not None:
        # the copy would keep the gate after the block that ends it for the source
        raise FslibError("heads of the source are pruned or listened to: copy it outside of that")
    model = copy.deepcopy(source)  # hooks and head control go along, the copy's own
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model.set_classifiers({target.name: Answer.to(target)})
    return model.requires_grad_(True).eval()


def training_subset(task: Task, size: Most, seed: int = 0) -> Task:
    """Return the task with `size` of its training examples.

    Learning curves grow by adding, not by exchanging: for one seed, a smaller subset lies inside
    every larger one (32 in 128 in 512). The order is random but for one example of each class,
    which come first, so that no subset lacks a class.

    Args:
        task: The task.
        size: Number of examples; None for the task itself.
        seed: For the order.

    Raises:
        FslibError: For a size below 2 or the number of classes, or above the number of training
            examples.
    """
    check_count("seed", seed, 0)
    check_count(f"task {task.name}, size", size, none=True)
    if size is None:
        return task
    least, most = subset_sizes(task)
    if not least <= size <= most:
        wanted = f"{least} (one example of each class) to {most} (all its training examples)"
        raise FslibError(f"size {size} does not suit task {task.name}: give {wanted}")
    order = np.random.default_rng(seed).permutation(most)
    if not task.is_regression:
        first = np.unique(task.train.labels[order], return_index=True)[1]
        order = np.concatenate([order[first], np.delete(order, first)])
    return replace(task, train=task.train.take(np.sort(order[:size])))


def subset_sizes(task: Task) -> tuple[int, int]:
    """Return the smallest and the largest size of a `training_subset`.

    The smallest is 2 examples or one of each class.
    """
    classes = 1 if task.is_regression else len(np.unique(task.train.labels))
    return max(2, classes), len(task.train)


def _refuse_known(source: MultiTaskModel, target: Task) -> None:
    check_model(source)
    as_tasks(target)  # refuses what is no task
    if target.name in source.classifiers:
        raise FslibError(f"task {target.name!r} is one of the source's own: transfer needs another")


def _linear_score(source: MultiTaskModel, task: Task) -> Score:
    """Return the eval score of a linear model on frozen representations."""
    from sklearn.linear_model import LogisticRegression, Ridge  # every kernel would wait for them
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    train, test = (representations(source, part) for part in (task.train, task.eval))
    model = Ridge(alpha=1.0) if task.is_regression else LogisticRegression(C=1.0, max_iter=1000)
    # Without a common scale the same penalty would weigh differently on each source.
    predictions = make_pipeline(StandardScaler(), model).fit(train, task.train.labels).predict(test)
    predictions = predictions.astype(np.float32) if task.is_regression else predictions
    return Score(task.metric, predictions, task.eval.labels, task.doubts)
