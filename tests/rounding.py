"""How far the logits of a rounded model are from those in float32."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def prompts(vocabulary: int) -> list[list[int]]:
    """Several short prompts: one rounded score may pick another expert, which moves all that comes after."""
    return np.random.default_rng(17).integers(3, vocabulary, (12, 24)).tolist()


def distance(rounded: Sequence[np.ndarray], exact: Sequence[np.ndarray]) -> dict[str, float]:
    """Three distances, each as a share of the largest logit.

    Args:
        rounded: logits [T, V] of each prompt by the model in bfloat16.
        exact: the same in float32.

    Returns:
        ``mean_rms``: over the vocabulary, the mean over positions (a square would count the few positions
        at which another expert was picked, and little else); ``typical_rms`` and ``typical_max``: over the
        vocabulary, at the median position.
    """
    expected = np.concatenate(exact)
    error = (np.concatenate(rounded) - expected).astype(np.float64) / np.abs(expected).max()
    by_position = np.sqrt((error**2).mean(axis=1))
    figures = {
        "mean_rms": by_position.mean(),
        "typical_rms": np.median(by_position),
        "typical_max": np.median(np.abs(error).max(axis=1)),
    }
    return {name: round(float(figure), 7) for name, figure in figures.items()}
