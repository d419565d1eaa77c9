"""Which task a training step is for: drawn at random, by the sizes of the tasks."""

import numpy as np
from jaxtyping import Float, Num

from fslib.errors import FslibError, unknown

SAMPLINGS = ("proportional", "sqrt", "uniform", "annealed")


def sampling_weights(
    sizes: Num[np.ndarray, " tasks"], sampling: str, epoch: int = 1, epochs: int = 1
) -> Float[np.ndarray, " tasks"]:
    """Probability of each task in one step of `epoch` (1..epochs); sums to 1.

    proportional: n; sqrt: n**0.5; uniform: 1; annealed: n**a with a = 1 - 0.8 (epoch-1)/(epochs-1), from
    proportional towards even (Stickland and Murray, 2019); a = 1 when there is one epoch.
    """
    if sampling not in SAMPLINGS:
        raise unknown("sampling", sampling, SAMPLINGS)
    if not 1 <= epoch <= epochs:
        raise FslibError(f"epoch {epoch} is outside 1..{epochs}")
    annealed = 1.0 if epochs == 1 else 1 - 0.8 * (epoch - 1) / (epochs - 1)
    power = {"proportional": 1.0, "sqrt": 0.5, "uniform": 0.0, "annealed": annealed}[sampling]
    weights = np.asarray(sizes, dtype=float) ** power
    return weights / weights.sum()


def task_order(sizes: list[int], steps: int, sampling: str, epochs: int, seed: int) -> list[int]:
    """Index of the task of every step, drawn with `sampling_weights`; `steps` are cut into `epochs` equal parts."""
    if steps < 1 or epochs < 1 or seed < 0:
        raise FslibError(f"steps {steps} and epochs {epochs} must be at least 1, seed {seed} at least 0")
    rng = np.random.default_rng([seed, 0])
    order = []
    for step in range(steps):
        epoch = 1 + step * epochs // steps if epochs <= steps else 1 + step
        order.append(int(rng.choice(len(sizes), p=sampling_weights(np.array(sizes), sampling, epoch, epochs))))
    return order
