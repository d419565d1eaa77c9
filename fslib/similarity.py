"""How alike are two tasks? Five measures.

For claim C2: the more alike the tasks, the weaker the specialization.

    importance_similarity   do they need the same heads: rank correlation of importance maps
    head_overlap            the same question of the top heads alone: Jaccard index
    task_similarity         do they pull at the same weights: TaskEmb, the Fisher information (Vu et
    al., 2020) cosine                  are their texts alike: TextEmb, the mean text embedding (Vu
    et al., 2020) linear_cka              do models trained on them see texts alike (Kornblith et
    al., 2019)

The first three and the last say something of a task's labels, TextEmb of its texts only. All of
them are measurements: the model leaves them exactly as it came.
"""

import re
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float

from fslib.data.tasks import Split, Task, as_tasks, check_texts
from fslib.errors import FslibError, check_among, check_count, finite_array, number_array
from fslib.evaluation import EVAL_BATCH, check_finite, length_batches, sample
from fslib.heads import overlap, top_heads
from fslib.importance import gradients_for, wide
from fslib.model.modes import in_mode
from fslib.model.multitask import POOLINGS, MultiTaskModel, check_model, pool
from fslib.scoring import rank_correlation

# {component: Fisher information of each of its parameters}
TaskEmbedding = dict[str, Float[np.ndarray, "_"]]
OUTSIDE = "outside"  # the component of what belongs to no layer


def importance_similarity(a: Float[np.ndarray, "_ _"], b: Float[np.ndarray, "_ _"]) -> float:
    """Return the Spearman correlation over heads of two importance maps.

    In [-1, 1], 0 if one is flat.

    Args:
        a: (layers, heads).
        b: Of the same shape.
    """
    return rank_correlation(*_matched(a, b, "importance maps"))


def head_overlap(
    a: Float[np.ndarray, "_ _"], b: Float[np.ndarray, "_ _"], fraction: float = 0.3
) -> float:
    """Return the Jaccard index of two maps' top heads, in [0, 1].

    About fraction / (2 - fraction) by chance.

    Args:
        a: (layers, heads).
        b: Of the same shape.
        fraction: Of all heads, in (0, 1], large enough for one.
    """
    a, b = _matched(a, b, "importance maps")
    tops = [top_heads(importance, fraction) for importance in (a, b)]
    if not tops[0].any():
        raise FslibError(f"fraction {fraction} of {a.size} heads is no head: use a larger one")
    return overlap(*tops)


def cosine(a: Float[np.ndarray, "..."], b: Float[np.ndarray, "..."]) -> float:
    """Return the cosine of two vectors (arrays of one shape), in [-1, 1].

    Of Fisher information, in [0, 1].

    Raises:
        FslibError: For different shapes, values that are not finite, and zero vectors, which have
            no direction.
    """
    a, b = _matched(a, b, "vectors")
    norms = float(np.linalg.norm(a)), float(np.linalg.norm(b))
    if not all(norms):
        raise FslibError("a vector of zeros has no cosine: measure on more examples")
    return float(np.clip(np.vdot(a / norms[0], b / norms[1]), -1, 1))


def task_embedding(
    model: MultiTaskModel,
    task: Task,
    *,
    split: str = "train",
    examples: int | None = None,
    seed: int = 0,
) -> TaskEmbedding:
    """Return TaskEmb: which of the encoder's weights the task's loss depends on.

    The diagonal of the empirical Fisher information (Vu et al., 2020),

        F = (1/n) * sum over examples x of (d loss(x) / d weight)^2

    each example's own gradient, squared, with its true label (hence empirical: an example that is
    fitted badly weighs more). Squared error takes the place of the log-likelihood in regression,
    which scales F and leaves cosines as they are. The table of word embeddings is left out: its
    rows say which words occur, which TextEmb measures. Costs a backward pass for every single
    example.

    Args:
        model: As a rule fine-tuned on this task alone.
        task: The task.
        split: As in `fslib.head_importance`, and so are examples and seed.
        examples: A random part of the split, None for all of it.
        seed: For that part.

    Returns:
        {component: (parameters,) float32, >= 0}, a component for each layer and one, "outside", for
        the rest.
    """
    check_model(model, task)
    words = set(model.encoder.get_input_embeddings().parameters())
    chosen = {name: p for name, p in model.encoder.named_parameters() if p not in words}
    weights = list(chosen.values())
    part = sample(task, split, examples, seed)
    with gradients_for(model, weights), torch.enable_grad():
        sums = [torch.zeros_like(wide(weight)) for weight in weights]
        # One by one: the square of a batch's gradient is not the sum of its examples' squares.
        for batch in length_batches(model, part, 1):
            loss = check_finite(model.losses(batch.to(model.device), task.name).sum(), task.name)
            gradients = torch.autograd.grad(loss, weights, allow_unused=True)
            for total, grad in zip(sums, gradients, strict=True):
                if grad is not None:  # else no example reaches it: no information
                    total.addcmul_(wide(grad), wide(grad))
    components: dict[str, list[np.ndarray]] = {}
    for name, total in zip(chosen, sums, strict=True):
        components.setdefault(_component(name), []).append(total.flatten().cpu().numpy())
    return {c: np.concatenate(parts) / np.float32(len(part)) for c, parts in components.items()}


def task_similarity(a: TaskEmbedding, b: TaskEmbedding) -> float:
    """Return the mean over components of the cosine of two TaskEmbs, in [0, 1].

    Component by component, since a cosine over all weights at once would be that of the layers
    whose Fisher information is largest.

    Raises:
        FslibError: For embeddings of different encoders, and for a component without any gradient.
    """
    for embedding in (a, b):
        if not isinstance(embedding, dict):
            raise FslibError(f"{embedding!r:.60} is no task embedding: task_embedding returns one")
    if a.keys() != b.keys() or not a:
        both = f"{list(a)} and {list(b)}"
        raise FslibError(f"task embeddings of different encoders cannot be compared: {both}")
    return float(np.mean([cosine(a[component], b[component]) for component in a]))


def text_embedding(
    model: MultiTaskModel,
    task: Task,
    *,
    split: str = "train",
    examples: int | None = None,
    seed: int = 0,
) -> Float[np.ndarray, " hidden"]:
    """Return TextEmb (Vu et al., 2020), (hidden,): where a task's texts lie.

    A mean over texts of means over tokens. Compare with `cosine`: encoders put all texts in a
    narrow cone, so cosines are high, and their order says more than their values.

    Args:
        model: The pre-trained encoder as it was loaded, the same for all tasks.
        task: The task.
        split: As in `fslib.head_importance`, and so are examples and seed.
        examples: A random part of the split, None for all of it.
        seed: For that part.
    """
    as_tasks(task)  # refuses what is no task
    found = representations(model, sample(task, split, examples, seed), pooling="mean")
    return found.mean(0, dtype=np.float64)


def representations(
    model: MultiTaskModel,
    texts: Split | Sequence[str],
    *,
    pooling: str | None = None,
    batch_size: int = EVAL_BATCH,
) -> Float[np.ndarray, "n hidden"]:
    """Return what the classifiers see of each text, (n, hidden) float32, dropout off.

    Heads pruned around the call stay pruned.

    Args:
        model: The model.
        texts: In the order of the rows that come back.
        pooling: first, mean or last; None for the model's own.
        batch_size: Texts at once.

    Raises:
        FslibError: For no text or an unknown pooling.
    """
    check_among("pooling", pooling, POOLINGS, none=True)
    check_model(model)
    check_count("batch_size", batch_size)
    if not isinstance(texts, Split):
        check_texts("representations", texts)
    if not len(texts):
        raise FslibError("no text given: representations need at least one")
    if isinstance(texts, Split):
        split = texts
    else:
        labels = np.zeros(len(texts), dtype=np.int64)
        split = Split(tuple(texts), None, labels, tuple((text,) for text in texts))
    rows = np.zeros((len(split), model.encoder.config.hidden_size), dtype=np.float32)
    batches = length_batches(model, split, batch_size)
    with in_mode(model, training=False), torch.inference_mode():
        for batch in batches:
            inputs = {k: v for k, v in batch.to(model.device).inputs.items() if k in model.accepts}
            hidden = model.encoder(**inputs).last_hidden_state  # (batch, seq, hidden)
            pooled = pool(hidden, batch.mask.to(model.device), pooling or model.pooling)
            rows[batch.indices] = pooled.float().cpu().numpy()
    if not np.isfinite(rows).all():
        raise FslibError("the model gives NaN or infinity for a text: its weights are broken")
    return rows


def linear_cka(x: Float[np.ndarray, "_ _"], y: Float[np.ndarray, "_ _"]) -> float:
    """Return linear centred kernel alignment of two representations, in [0, 1].

    |y'x|^2 / (|x'x| |y'y|), Frobenius norms, of centred features (Kornblith et al., 2019). Blind to
    rotation, reflection, shift and uniform scale of either. Unrelated representations have about
    sqrt(p q / ((n + p) (n + q))), not 0, so use many more texts than features, and the same texts
    wherever values are compared.

    Args:
        x: (n, p), a row per text; centred here.
        y: (n, q), of the same texts.

    Raises:
        FslibError: For different n, fewer than 2 texts, values that are not finite, and features
            that are the same for every text.
    """
    for features in (x, y):
        if len(shape := number_array("features for CKA", features).shape) != 2:
            raise FslibError(f"CKA compares arrays (texts, features); got one of shape {shape}")
    x, y = np.asarray(x), np.asarray(y)  # of their own precision, which says what rounding is
    if len(x) != len(y) or len(x) < 2:
        sizes = f"got {len(x)} and {len(y)}"
        raise FslibError(f"CKA compares the same texts, at least 2, in both: {sizes}")
    x, y = _centred(x), _centred(y)
    if len(x) > x.shape[1] + y.shape[1]:
        shared, own = np.sum((y.T @ x) ** 2), [np.linalg.norm(z.T @ z) for z in (x, y)]
    else:  # fewer texts than features: the same numbers from (n, n) products
        grams = x @ x.T, y @ y.T
        shared, own = np.vdot(*grams), [np.linalg.norm(gram) for gram in grams]
    return float(np.clip(shared / (own[0] * own[1]), 0, 1))


def _centred(features: np.ndarray) -> Float[np.ndarray, "_ _"]:
    """Return features as float64, mean 0 over texts, Frobenius norm 1.

    With that norm no scale under- or overflows.
    """
    rounding = np.finfo(np.result_type(features, np.float32)).eps
    features = features.astype(np.float64)
    if not np.isfinite(features).all():
        raise FslibError("features must be finite for CKA: drop texts that give NaN or infinity")
    centred = features - features.mean(0)
    # what rounding leaves of constant features is no variation
    if np.abs(centred).max(initial=0) <= 4 * rounding * np.abs(features).max(initial=0):
        raise FslibError("CKA is undefined for features that are the same for every text")
    return centred / np.linalg.norm(centred)


def _matched(a: np.ndarray, b: np.ndarray, what: str) -> tuple[np.ndarray, np.ndarray]:
    a, b = finite_array(what, a), finite_array(what, b)
    if a.shape != b.shape:
        raise FslibError(f"{what} of different shapes cannot be compared: {a.shape} and {b.shape}")
    return a, b


def _component(name: str) -> str:
    """Return the layer of an encoder's parameter: its name up to the first number."""
    numbered = re.match(r".*?\.\d+(?=\.)", name)
    return numbered[0] if numbered else OUTSIDE
