"""Made-up predictions with known truth, for tests of what is drawn from them."""

from __future__ import annotations

import numpy as np
import torch

from remat.evaluation.predictions import Collector, Predictions, as_pair


def collected(*batches: tuple[torch.Tensor, torch.Tensor]) -> Predictions:
    """Collect batches of scores and targets, as an evaluation would."""
    collector = Collector()
    for batch in batches:
        collector.add(*as_pair(batch))
    found = collector.finish()
    assert found is not None
    return found


def classified(count: int, classes: int, seed: int, sharpness: float = 2.0) -> Predictions:
    """Draw labels from the very probabilities that are predicted: perfectly calibrated."""
    generator = np.random.default_rng(seed)
    scores = torch.from_numpy(generator.normal(0, sharpness, (count, classes))).softmax(dim=-1)
    labels = torch.tensor([generator.choice(classes, p=row / row.sum()) for row in scores.numpy()])
    return collected((scores, labels))


def right_or_wrong(right: np.ndarray) -> Predictions:
    """Predict class 0 of 2 with 0.8, rightly where told."""
    scores = torch.tensor([[0.8, 0.2]]).repeat(len(right), 1)
    return collected((scores, torch.from_numpy(1 - right.astype(np.int64))))
