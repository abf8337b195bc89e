"""Stage `hybrid`: which adapter a query is embedded with, by what the base model makes of it.

A detector tells the domains apart on the base model's embeddings of their queries. A query of a domain goes to the
domain's adapter; one of no domain that has an adapter, or of which the detector is not sure, to a common one. The
detector is linear, with probabilities calibrated on the validation split by a temperature (Guo et al. 2017,
arXiv:1706.04599).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax

from cachelora.config import BaseModelSource, Hybrid
from cachelora.errors import InputError
from cachelora.files import read_json, replacing, write_json
from cachelora.models import (
    DETECTOR_FILES,
    DETECTOR_WEIGHTS,
    encode_texts,
    load_model,
    remove_other_models,
    score_pairs,
    verify_adapter,
)

_BINS = 15


def logistic(vectors: np.ndarray, labels: np.ndarray, domains: int) -> tuple[np.ndarray, np.ndarray]:
    """Fit a multinomial logistic regression in which every domain counts the same.

    Parameters
    ----------
    vectors : numpy.ndarray, shape (n, d)
        Unit vectors of queries.
    labels : numpy.ndarray, shape (n,), int
        Number of each one's domain; each of the k occurs.
    domains : int
        k.

    Returns
    -------
    weights : numpy.ndarray, shape (k, d)
        Direction of each domain.
    bias : numpy.ndarray, shape (k,)
        What is added to the product with it.
    """
    from sklearn.linear_model import LogisticRegression

    # C: the highest likelihood of the default domains' validation queries, of .3, 1, 3, 10, 30 and 100.
    model = LogisticRegression(C=3.0, class_weight="balanced", max_iter=2000).fit(vectors, labels)
    if domains == 2:
        # Of two classes it fits one.
        return np.vstack([-model.coef_, model.coef_]) / 2, np.concatenate([-model.intercept_, model.intercept_]) / 2
    return model.coef_, model.intercept_


def centroid(vectors: np.ndarray, labels: np.ndarray, domains: int) -> tuple[np.ndarray, np.ndarray]:
    """Take the mean direction of each domain's queries; the nearest is the domain.

    Parameters and returns are those of :func:`logistic`; the bias is 0.
    """
    means = np.stack([vectors[labels == number].mean(axis=0) for number in range(domains)])
    return means / np.linalg.norm(means, axis=1, keepdims=True), np.zeros(domains)


DETECTORS: dict[str, Callable[[np.ndarray, np.ndarray, int], tuple[np.ndarray, np.ndarray]]] = {
    function.__name__: function for function in (logistic, centroid)
}


@dataclass(frozen=True)
class Detector:
    """Tells the domain of a query.

    Attributes
    ----------
    domains : tuple of str, length k
        What it tells apart.
    weights : numpy.ndarray, shape (k, d), float32
        A direction for each.
    bias : numpy.ndarray, shape (k,), float32
        What is added.
    """

    domains: tuple[str, ...]
    weights: np.ndarray
    bias: np.ndarray

    def probabilities(self, vectors: np.ndarray) -> np.ndarray:
        """Return the probability of each domain.

        Parameters
        ----------
        vectors : numpy.ndarray, shape (n, d)
            Unit vectors of queries, by the base model.

        Returns
        -------
        numpy.ndarray, shape (n, k), float64
            Rows that sum to 1.
        """
        return np.exp(log_softmax(vectors.astype(np.float64) @ self.weights.T + self.bias, axis=1))

    def save(self, folder: str | Path) -> None:
        """Write it as safetensors and JSON.

        Parameters
        ----------
        folder : str or Path
            An existing folder.
        """
        from safetensors.numpy import save

        # Safetensors writes an array that lies in memory by columns as if it lay by rows.
        arrays = {name: np.ascontiguousarray(value) for name, value in (("weights", self.weights), ("bias", self.bias))}
        remove_other_models(folder, DETECTOR_FILES)
        with replacing(Path(folder, DETECTOR_WEIGHTS)) as temporary:
            temporary.write_bytes(save(arrays))
        write_json(Path(folder, "detector.json"), {"domains": self.domains})


def fit_detector(train: Mapping[str, np.ndarray], validation: Mapping[str, np.ndarray], method: str) -> Detector:
    """Fit a detector on the training queries and calibrate it on those for validation.

    Parameters
    ----------
    train, validation : mapping of str to numpy.ndarray, shape (n, d)
        Unit vectors of the base model, of each domain's queries.
    method : str
        One of :data:`DETECTORS`.

    Returns
    -------
    Detector
        The fitted detector. The temperature, at which the validation queries' log-likelihood is highest, is in its
        weights. A query of a domain that has n of them counts as one of it with the probability (n + 1) / (n + 2)
        (Platt 1999, "Probabilistic outputs for support vector machines"), and as one of another domain otherwise, or
        a few queries that are all told apart would make it certain of everything.

    Raises
    ------
    InputError
        If there is one domain only, or one without queries.
    """
    domains = tuple(train)
    for domain in domains:
        if not len(train[domain]) or not len(validation[domain]):
            raise InputError(domain, "it has no query to learn from, or none to validate on", "Give more queries")
    if len(domains) < 2:
        raise InputError(domains[0], "there is no other domain to tell it from", "Remove `hybrids`")
    vectors, labels = stacked(train)
    weights, bias = DETECTORS[method](vectors, labels, len(domains))
    held_out, true = stacked(validation)
    logits = held_out @ weights.T + bias
    counts = np.bincount(true)
    each, sure = (1 / counts)[true], ((counts + 1) / (counts + 2))[true]
    wanted = np.repeat(((1 - sure) / (len(domains) - 1))[:, None], len(domains), axis=1)
    wanted[np.arange(len(true)), true] = sure

    def loss(log_temperature: float) -> float:
        return -float((each[:, None] * wanted * log_softmax(logits / np.exp(log_temperature), axis=1)).sum())

    temperature = float(np.exp(minimize_scalar(loss, bounds=(-7, 7), method="bounded").x))
    return Detector(domains, (weights / temperature).astype(np.float32), (bias / temperature).astype(np.float32))


def stacked(vectors: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Put the vectors of all domains together, with the numbers of their domains.

    Parameters
    ----------
    vectors : mapping of str to numpy.ndarray, shape (n, d)
        Of each of k domains.

    Returns
    -------
    vectors : numpy.ndarray, shape (sum of n, d)
        One domain after the other.
    labels : numpy.ndarray, shape (sum of n,), int
        Number of each one's domain, in [0, k).
    """
    return np.concatenate([*vectors.values()]), np.repeat(np.arange(len(vectors)), [len(v) for v in vectors.values()])


def read_detector(base: BaseModelSource, folder: str | Path) -> Detector:
    """Read a detector.

    Parameters
    ----------
    base : BaseModelSource
        The base model, on whose embeddings it was fitted.
    folder : str or Path
        What :meth:`Detector.save` wrote, with its manifest, which is verified.

    Returns
    -------
    Detector
        The detector.

    Raises
    ------
    ModelError, DamagedError
        As :func:`cachelora.models.verify_adapter`.
    """
    from safetensors.numpy import load_file

    verify_adapter(base, folder, DETECTOR_FILES)
    arrays = load_file(Path(folder, DETECTOR_WEIGHTS))
    return Detector(tuple(read_json(Path(folder, "detector.json"))["domains"]), arrays["weights"], arrays["bias"])


def detector_metrics(probabilities: np.ndarray, label: int, reject: float) -> dict[str, float]:
    """Measure a detector on the queries of one domain.

    Parameters
    ----------
    probabilities : numpy.ndarray, shape (n, k)
        What it says of each query.
    label : int
        Number of their domain.
    reject : float
        Queries whose highest probability is lower are not assigned.

    Returns
    -------
    dict of str to float
        ``n``; ``accuracy``; ``assigned``, the share of the queries that are; ``assigned_wrong``, the share of all
        queries that are assigned to another domain; ``confidence``, the mean of the highest probability.
    """
    highest, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == label
    assigned = highest >= reject
    return {
        "n": len(right),
        "accuracy": float(right.mean()),
        "assigned": float(assigned.mean()),
        "assigned_wrong": float((assigned & ~right).mean()),
        "confidence": float(highest.mean()),
    }


def calibration_error(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Return the expected calibration error (Guo et al. 2017, arXiv:1706.04599, equation 3), in 15 bins.

    Parameters
    ----------
    probabilities : numpy.ndarray, shape (n, k)
        What a detector says of each query.
    labels : numpy.ndarray, shape (n,), int
        Number of each one's domain.

    Returns
    -------
    float
        Mean over the queries of how far the share of right ones in a query's bin is from the bin's mean probability.
    """
    highest, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    bins = np.minimum((highest * _BINS).astype(int), _BINS - 1)
    gaps = (abs(right[bins == b].sum() - highest[bins == b].sum()) for b in np.unique(bins))
    return float(sum(gaps) / len(labels))


def routes(probabilities: np.ndarray, detector: Detector, settings: Hybrid, models: Mapping[str, str]) -> list[str]:
    """Say which model each query goes to.

    Parameters
    ----------
    probabilities : numpy.ndarray, shape (n, k)
        What the detector says of each query.
    detector : Detector
        The detector.
    settings : Hybrid
        ``reject`` and ``otherwise``.
    models : mapping of str to str
        Model id of each domain that has one of its own.

    Returns
    -------
    list of str, length n
        Model ids.
    """
    return [
        models.get(detector.domains[number], settings.otherwise) if highest >= settings.reject else settings.otherwise
        for number, highest in zip(probabilities.argmax(axis=1), probabilities.max(axis=1), strict=True)
    ]


def score_hybrid(
    base: BaseModelSource,
    detector: Detector,
    settings: Hybrid,
    models: Mapping[str, str],
    adapters: Mapping[str, str | Path | None],
    pairs: pd.DataFrame,
    batch_tokens: int,
) -> pd.DataFrame:
    """Measure the similarities of pairs as a cache with one index for each model would see them.

    The query that comes in decides which model embeds it, and in that model's index it meets the
    stored texts. So a stored text is embedded once for each model, a query twice: for the detector, and by its model.

    Parameters
    ----------
    base : BaseModelSource
        The base model.
    detector : Detector
        The detector.
    settings : Hybrid
        ``reject`` and ``otherwise``.
    models : mapping of str to str
        Model id of each domain that has one of its own.
    adapters : mapping of str to (str, Path or None)
        Folder of each model, None for the base model.
    pairs : pandas.DataFrame
        With columns query and other.
    batch_tokens : int
        As for :func:`cachelora.models.encode_texts`.

    Returns
    -------
    pandas.DataFrame
        The pairs with similarity, a cosine in [-1, 1], and ``route``, the model.
    """
    found = encode_texts(load_model(base, None), pairs["query"], batch_tokens)
    vectors = np.stack([found[text] for text in pairs["query"]])
    route = np.asarray(routes(detector.probabilities(vectors), detector, settings, models))
    parts = [
        score_pairs(load_model(base, adapters[name]), pairs[route == name], batch_tokens) for name in np.unique(route)
    ]
    return pd.concat(parts).loc[pairs.index].assign(route=route)
