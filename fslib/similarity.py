"""How alike are two tasks? Five measures.

For claim C2: the more alike the tasks, the weaker the specialization.

    importance_similarity   do they need the same heads: rank correlation of importance maps
    head_overlap            the same question of the top heads alone: Jaccard index
    task_similarity         do they pull at the same weights: TaskEmb, the Fisher information
                            (Vu et al., 2020)
    cosine                  are their texts alike: TextEmb, the mean text embedding
                            (Vu et al., 2020)
    linear_cka              do models trained on them see texts alike (Kornblith et al., 2019)

The first three and the last say something of a task's labels, TextEmb of its texts only. All of
them are measurements: the model leaves them exactly as it came.
"""

import re
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float

from fslib.data.tasks import Split, Task, as_tasks, check_texts
from fslib.errors import FslibError, check_among, finite_array
from fslib.evaluation import EVAL_BATCH, Most, check_finite, length_batches, sample
from fslib.heads import overlap, top_heads
from fslib.importance import gradients_for, wide
from fslib.model.modes import in_mode
from fslib.model.multitask import POOLINGS, MultiTaskModel, check_model, pool
from fslib.scoring import rank_correlation

# {component: Fisher information of each of its parameters}
TaskEmbedding = dict[str, Float[np.ndarray, "_"]]
Matrix = Float[np.ndarray, "_ _"]
Texts = Split | Sequence[str]
OUTSIDE = "outside"  # the component of what belongs to no layer


def importance_similarity(a: Matrix, b: Matrix) -> float:
    """Return the Spearman correlation over heads of two importance maps.

    In [-1, 1], 0 if one is flat.

    Args:
        a: (layers, heads).
        b: Of the same shape.
    """
    return rank_correlation(a, b)


def head_overlap(a: Matrix, b: Matrix, fraction: float = 0.3) -> float:
    """Return the Jaccard index of two maps' top heads, in [0, 1].

    About fraction / (2 - fraction) by chance.

    Args:
        a: (layers, heads).
        b: Of the same shape.
        fraction: Of all heads, in (0, 1], large enough for one.
    """
    tops = [top_heads(importance, fraction) for importance in (a, b)]
    if not tops[0].any():
        raise FslibError(
            f"fraction {fraction} of {tops[0].size} heads is no head: use a larger one"
        )
    return overlap(*tops)


def cosine(a: Float[np.ndarray, "..."], b: Float[np.ndarray, "..."]) -> float:
    """Return the cosine of two vectors (arrays of one shape), in [-1, 1].

    Of Fisher information, in [0, 1].

    Raises:
        FslibError: For different shapes, values that are not finite, and zero vectors, which have
            no direction.
    """
    a = finite_array("vectors", a)
    b = finite_array("vectors", b, a.shape)
    norms = float(np.linalg.norm(a)), float(np.linalg.norm(b))
    if not all(norms):
        raise FslibError("a vector of zeros has no cosine: measure on more examples")
    return float(np.clip(np.vdot(a / norms[0], b / norms[1]), -1, 1))


def task_embedding(
    model: MultiTaskModel, task: Task, *, split: str = "train", examples: Most = None, seed: int = 0
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
    if not (isinstance(a, dict) and isinstance(b, dict) and a and a.keys() == b.keys()):
        both = f"{a!r:.60} and {b!r:.60}"
        raise FslibError(f"no task embeddings, or of different encoders: {both}")
    return float(np.mean([cosine(a[component], b[component]) for component in a]))


def text_embedding(
    model: MultiTaskModel, task: Task, *, split: str = "train", examples: Most = None, seed: int = 0
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
    model: MultiTaskModel, texts: Texts, *, pooling: str | None = None, batch_size: int = EVAL_BATCH
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
    if not isinstance(texts, Split):
        check_texts("representations", texts)
        labels = np.zeros(len(texts), dtype=np.int64)
        texts = Split(tuple(texts), None, labels, tuple((text,) for text in texts))
    if not len(texts):
        raise FslibError("no text given: representations need at least one")
    rows = np.zeros((len(texts), model.encoder.config.hidden_size), dtype=np.float32)
    with in_mode(model, training=False), torch.inference_mode():
        for batch in length_batches(model, texts, batch_size):
            inputs = {k: v for k, v in batch.to(model.device).inputs.items() if k in model.accepts}
            hidden = model.encoder(**inputs).last_hidden_state  # (batch, seq, hidden)
            pooled = pool(hidden, batch.mask.to(model.device), pooling or model.pooling)
            rows[batch.indices] = pooled.float().cpu().numpy()
    if not np.isfinite(rows).all():
        raise FslibError("the model gives NaN or infinity for a text: its weights are broken")
    return rows


def linear_cka(x: Matrix, y: Matrix) -> float:
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
    x, y = _centred(x), _centred(y)
    if len(x) != len(y):
        raise FslibError(f"CKA compares the same texts in both: got {len(x)} and {len(y)}")
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
    given, features = features, finite_array("features for CKA", features)
    if features.ndim != 2 or not len(features):
        raise FslibError(f"CKA compares arrays (texts, features); got shape {features.shape}")
    centred = features - features.mean(0)
    # what rounding, in the precision given, leaves of constant features is no variation
    rounding = np.finfo(np.result_type(np.asarray(given), np.float32)).eps
    if np.abs(centred).max(initial=0) <= 4 * rounding * np.abs(features).max(initial=0):
        raise FslibError("CKA is undefined for features that are the same for every text")
    return centred / np.linalg.norm(centred)


def _component(name: str) -> str:
    """Return the layer of an encoder's parameter: its name up to the first number."""
    return numbered[0] if (numbered := re.match(r".*?\.\d+(?=\.)", name)) else OUTSIDE
