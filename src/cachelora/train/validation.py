"""The validation split: what is measured on it, and which checkpoint that chooses."""

import logging
import math
import time
from collections.abc import Mapping
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.evaluation import BaseEvaluator
from transformers import TrainerCallback

from cachelora.errors import TrainingError
from cachelora.files import iterate_table, read_json, write_json
from cachelora.metrics import (
    accuracy,
    average_precision,
    distributions,
    margin,
    p_chr_auc,
    pairs_of_triplets,
    positive_similarity,
)
from cachelora.models import score_triplets
from cachelora.schemas import TRIPLETS

_log = logging.getLogger(__name__)

# Means of AP and P-CHR AUC that differ by less are a tie. The standard error of the difference of two epochs of the
# default run is about that, see docs/recipe.md.
TIE = 0.002

METRICS = {
    "ap": average_precision,
    "p_chr_auc": p_chr_auc,
    "margin": margin,
    "accuracy": accuracy,
    "positive_similarity": positive_similarity,
}


def read_validation(path: str | Path, most_groups: int) -> pd.DataFrame:
    """Read the validation triplets of a domain.

    Either text of a pair may be the one that a cache holds, so both are anchors: the paraphrase, which shares few words
    with the negatives, and the canonical query, from which many of them differ in one word. Most of what a cache is
    asked is about something else, so each group also has the query of the group before it as a negative.

    Parameters
    ----------
    path : str or Path
        Parquet file in the columns of :data:`cachelora.schemas.TRIPLETS`.
    most_groups : int
        Read no more groups than that, so that neither memory nor time grows with the domain. Splits are drawn by hash,
        so the first are as good as any.

    Returns
    -------
    pandas.DataFrame
        Two triplets for each row and each negative, with columns anchor, positive, negative, kind, group.

    Raises
    ------
    DamagedError
        As :func:`cachelora.files.iterate_table`.
    TrainingError
        If there is none.
    """
    found, unrelated = [], []
    rows = (row for row in iterate_table(path, TRIPLETS) if row["split"] == "validation")
    for group, members in islice(groupby(rows, key=lambda row: row["group"]), most_groups):
        members = list(members)
        # Once for each pair, however many rows it has.
        pairs = dict.fromkeys((row["anchor"], row["positive"]) for row in members)
        negatives = [(*pair, negative) for pair in pairs for negative in unrelated]
        negatives += [(row["anchor"], row["positive"], negative) for row in members for negative in row["negatives"]]
        found += [
            (anchor, positive, negative["text"], negative["kind"], group)
            for one, other, negative in negatives
            for anchor, positive in ((one, other), (other, one))
        ]
        unrelated = [{"kind": "topic", "text": members[0]["positive"]}]
    if not found:
        raise TrainingError(str(path), "it has no validation triplet to choose by", "Give more queries")
    return pd.DataFrame(found, columns=["anchor", "positive", "negative", "kind", "group"])


def objective(metrics: Mapping[str, Any], base: Mapping[str, Any], most_lost: float) -> tuple[float, float, float]:
    """Return what checkpoints and settings are chosen by; the larger, the better.

    First, nothing is taken whose mean positive similarity lies further below the base model's than allowed: such a
    model needs another threshold than the one that a cache has. Then the mean of AP and P-CHR AUC, over all domains and
    `general` alike; then the margin. What is a tie, :func:`best_of` says.

    Parameters
    ----------
    metrics, base : mapping
        Validation metrics of a model and of its base model, as :class:`Validation` gives them.
    most_lost : float
        How much the mean positive similarity may fall.

    Returns
    -------
    tuple of float
        The similarity lost beyond what may be (0 or less), the mean of AP and P-CHR AUC, the margin.
    """
    lost = base["positive_similarity"] - metrics["positive_similarity"]
    return (min(0.0, most_lost - lost), (metrics["ap"] + metrics["p_chr_auc"]) / 2, metrics["margin"])


def in_the_running(scores: Mapping[Any, tuple[float, float, float]]) -> dict[Any, tuple[float, float, float]]:
    """Return what may be the best, now or once others have come; what is left out never will be.

    Parameters
    ----------
    scores : mapping
        What :func:`objective` returns, by name.

    Returns
    -------
    dict
        The part of `scores` within :data:`TIE` of the best mean of AP and P-CHR AUC.
    """
    least_lost = max(lost for lost, _, _ in scores.values())
    left = {name: score for name, score in scores.items() if score[0] == least_lost}
    enough = max(mean for _, mean, _ in left.values()) - TIE
    return {name: score for name, score in left.items() if score[1] >= enough}


def best_of(scores: Mapping[Any, tuple[float, float, float]]) -> Any:
    """Return the name of the best: the one with the largest margin of those that validation cannot tell apart.

    The margin is what is left to a threshold that was chosen on other queries.

    Parameters
    ----------
    scores : mapping
        What :func:`objective` returns, by name.

    Returns
    -------
    hashable
        A key of `scores`; of equals, the first.
    """
    left = in_the_running(scores)
    return max(left, key=lambda name: left[name][2])


class Clock:
    """How long a training has taken, its earlier attempts included.

    Parameters
    ----------
    validation : Validation
        The evaluator, which knows its own share.
    """

    def __init__(self, validation: "Validation") -> None:
        self._started = time.monotonic()
        self._validation = validation
        self._earlier = (0.0, 0.0)

    @property
    def seconds(self) -> float:
        """Duration in seconds, validation included."""
        return self._earlier[0] + time.monotonic() - self._started

    @property
    def validating(self) -> float:
        """Duration of the validation in seconds."""
        return self._earlier[1] + self._validation.seconds

    def go_on_from(self, seconds: float, validating: float) -> None:
        """Count earlier attempts in, up to their last checkpoint."""
        self._earlier = (seconds, validating)


class Validation(BaseEvaluator):
    """Measures a model on the validation split.

    Parameters
    ----------
    triplets : mapping of str to pandas.DataFrame
        Validation triplets by domain, as :func:`read_validation` gives them.
    bfloat16 : bool
        Whether to compute in bfloat16, as training does.
    """

    def __init__(self, triplets: Mapping[str, pd.DataFrame], bfloat16: bool) -> None:
        super().__init__()
        self._triplets = triplets
        self._bfloat16 = bfloat16
        self.primary_metric = "ap"
        self.by_domain: dict[str, dict[str, float]] = {}
        self.seconds = 0.0

    def __call__(
        self, model: SentenceTransformer, output_path: str | None = None, epoch: float = -1, steps: int = -1
    ) -> dict[str, float]:
        """Return the mean of each metric over the domains, so that each counts the same."""
        started = time.monotonic()
        self.by_domain = {}
        with torch.autocast(model.device.type, torch.bfloat16, enabled=self._bfloat16):
            for domain, triplets in self._triplets.items():
                scores = score_triplets(model, triplets)
                pairs = pairs_of_triplets(
                    scores["positive_similarity"].to_numpy(), scores["negative_similarity"].to_numpy()
                )
                found = distributions(pairs, METRICS, resamples=0, seed=0)
                self.by_domain[domain] = {name: float(values[0]) for name, values in found.items()}
        self.seconds += time.monotonic() - started
        return {name: float(np.mean([found[name] for found in self.by_domain.values()])) for name in METRICS}


class BestCheckpoint(TrainerCallback):
    """Keeps the trained weights of the evaluation that :func:`best_of` chooses.

    The weights of an adapter are small, so those that may still be chosen stay in memory. The base model at step 0 is
    not a candidate.

    Parameters
    ----------
    model : SentenceTransformer
        The model in training.
    parameters : mapping of str to torch.nn.Parameter
        What is trained of it.
    validation : Validation
        The evaluator whose metrics decide.
    most_lost : float
        See :func:`objective`.
    """

    def __init__(
        self,
        model: SentenceTransformer,
        parameters: Mapping[str, torch.nn.Parameter],
        validation: Validation,
        most_lost: float,
    ) -> None:
        self._model = model
        self._parameters = parameters
        self._validation = validation
        self._most_lost = most_lost
        self._weights: dict[int, dict[str, torch.Tensor]] = {}
        self._scores: dict[int, tuple[float, float, float]] = {}
        self.clock = Clock(validation)
        self.history: list[dict[str, Any]] = []

    @property
    def step(self) -> int:
        """The step whose weights are the best so far."""
        return best_of(self._scores)

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **kwargs: Any) -> None:
        """Keep the weights if they may be the best, and drop those that no longer may."""
        if self.history and self.history[-1]["step"] == state.global_step:
            return
        found = {name: metrics[f"eval_{name}"] for name in METRICS}
        if not math.isfinite(found["margin"]):
            raise TrainingError(
                "train", f"the embeddings are not numbers at step {state.global_step}", "Lower train.learning_rate"
            )
        self.history.append({"step": state.global_step, **found, "domains": self._validation.by_domain})
        _log.info(
            "step %d of %d: validation AP %.4f, P-CHR AUC %.4f, margin %.4f, accuracy %.4f",
            state.global_step, state.max_steps, found["ap"], found["p_chr_auc"], found["margin"], found["accuracy"],
        )  # fmt: skip
        if state.global_step == 0:
            return
        self._scores[state.global_step] = objective(found, self.history[0], self._most_lost)
        self._weights[state.global_step] = {
            name: value.detach().cpu().clone() for name, value in self._parameters.items()
        }
        self._scores = in_the_running(self._scores)
        self._weights = {step: self._weights[step] for step in self._scores}

    def finish(self, state: Any) -> None:
        """Evaluate the last step, unless that was done."""
        if self.history[-1]["step"] != state.global_step:
            found = self._validation(self._model)
            self.on_evaluate(None, state, None, {f"eval_{name}": value for name, value in found.items()})

    def restore(self) -> None:
        """Put the kept weights back into the model."""
        start = objective(self.history[0], self.history[0], self._most_lost)
        if best_of({"kept": self._scores[self.step], "start": start}) == "start":
            _log.warning("no evaluation was better than the model at the start: look at data and learning rate")
        with torch.no_grad():
            for name, value in self._weights[self.step].items():
                self._parameters[name].copy_(value)

    def save(self, folder: str | Path) -> None:
        """Write what is kept into a checkpoint.

        Parameters
        ----------
        folder : str or Path
            The checkpoint's folder.
        """
        # A number has no slash in it, so step and name come apart again.
        weights = {f"{step}/{name}": value for step, kept in self._weights.items() for name, value in kept.items()}
        if weights:
            save_file(weights, Path(folder, "best.safetensors"))
        seconds = self.clock.seconds, self.clock.validating
        kept = {"scores": list(self._scores.items()), "history": self.history, "seconds": seconds}
        write_json(Path(folder, "best.json"), kept)

    def load(self, folder: str | Path) -> None:
        """Read what :meth:`save` wrote.

        Parameters
        ----------
        folder : str or Path
            The checkpoint's folder.
        """
        kept = read_json(Path(folder, "best.json"))
        self.history = kept["history"]
        self.clock.go_on_from(*kept["seconds"])
        self._scores = {step: tuple(score) for step, score in kept["scores"]}
        self._weights = {step: {} for step in self._scores}
        if self._scores:
            for key, value in load_file(Path(folder, "best.safetensors")).items():
                step, name = key.split("/", 1)
                self._weights[int(step)][name] = value
