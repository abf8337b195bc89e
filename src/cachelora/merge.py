"""Stage `merge`: one adapter out of several, by weight arithmetic, without training.

An adapter's update of a layer is the product B·A of its two factors, scaled. All methods but ``linear`` combine updates
and re-compress the result to a rank by a truncated singular value decomposition (``cat`` only if its full rank is not
wanted); all are peft's (``LoraModel.add_weighted_adapter``). Weights and densities are chosen on the validation split,
as checkpoints are (:func:`cachelora.train.validation.best_of`).
"""

import logging
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from sentence_transformers import SentenceTransformer

from cachelora.config import BaseModelSource, Merge
from cachelora.errors import ModelError
from cachelora.models import check_all_loaded, load_model, save_adapter, verify_adapter
from cachelora.train.validation import best_of, objective

_log = logging.getLogger(__name__)

MERGED = "merged"


def svd(tuner: PeftModel, weights: Mapping[str, float], density: float, rank: int) -> None:
    """Add the weighted sum of the updates, cut to a rank: task arithmetic (Ilharco et al. 2023, arXiv:2212.04089).

    Parameters
    ----------
    tuner : PeftModel
        Holds the adapters; the merged one is added as :data:`MERGED`.
    weights : mapping of str to float
        Weight of each adapter, by its name in the tuner.
    density : float
        Share of an update's values that is kept, in (0, 1]; for the methods that drop some.
    rank : int
        Rank of the result.
    """
    _combine(tuner, weights, "svd", svd_rank=rank)


def linear(tuner: PeftModel, weights: Mapping[str, float], density: float, rank: int) -> None:
    """Add the weighted sums of the factors A and of the factors B, which brings products of strangers in.

    Parameters are those of :func:`svd`.
    """
    # Peft gives each factor the root of the weight, so that one adapter merged with itself would come out doubled.
    _combine(tuner, {name: weight * abs(weight) for name, weight in weights.items()}, "linear")


def cat(tuner: PeftModel, weights: Mapping[str, float], density: float, rank: int) -> None:
    """Put the factors side by side: the exact sum, of the adapters' ranks together; cut to a rank if a lower is wanted.

    Parameters are those of :func:`svd`.
    """
    if rank < sum(tuner.peft_config[name].r for name in weights):
        # The same sum, and the same cut.
        svd(tuner, weights, density, rank)
    else:
        _combine(tuner, weights, "cat")


def ties(tuner: PeftModel, weights: Mapping[str, float], density: float, rank: int) -> None:
    """Add the mean of the largest values that agree in sign (TIES, Yadav et al. 2023, arXiv:2306.01708).

    Parameters are those of :func:`svd`.
    """
    _combine(tuner, weights, "ties_svd", svd_rank=rank, density=density)


def dare_ties(tuner: PeftModel, weights: Mapping[str, float], density: float, rank: int) -> None:
    """Do as :func:`ties` with values drawn at random and scaled up (DARE, Yu et al. 2024, arXiv:2311.03099).

    Parameters are those of :func:`svd`.
    """
    _combine(tuner, weights, "dare_ties_svd", svd_rank=rank, density=density)


def magnitude_prune(tuner: PeftModel, weights: Mapping[str, float], density: float, rank: int) -> None:
    """Add the weighted sum of the largest values of each update.

    Parameters are those of :func:`svd`.
    """
    _combine(tuner, weights, "magnitude_prune_svd", svd_rank=rank, density=density)


METHODS: dict[str, Callable[[PeftModel, Mapping[str, float], float, int], None]] = {
    function.__name__: function for function in (svd, linear, cat, ties, dare_ties, magnitude_prune)
}
_PRUNE = frozenset({"ties", "dare_ties", "magnitude_prune"})


def _combine(tuner: PeftModel, weights: Mapping[str, float], how: str, **options: Any) -> None:
    """Let peft add an adapter."""
    with warnings.catch_warnings():
        # That a density of 1 drops nothing.
        warnings.filterwarnings("ignore", message="The density")
        tuner.add_weighted_adapter(
            adapters=[*weights],
            weights=[*weights.values()],
            adapter_name=MERGED,
            combination_type=how,
            svd_full_matrices=False,
            **options,
        )


def merge_adapters(
    base: BaseModelSource,
    adapters: Mapping[str, str | Path],
    settings: Merge,
    folder: str | Path,
    validate: Callable[[SentenceTransformer], Mapping[str, float]],
    most_lost: float,
    seed: int,
) -> tuple[SentenceTransformer, dict[str, Any]]:
    """Merge adapters of one base model, with the weights that are best on validation, and save the result.

    Parameters
    ----------
    base : BaseModelSource
        The base model.
    adapters : mapping of str to (str or Path)
        Folders of the adapters, by model id; each is verified first.
    settings : Merge
        Method, weights and densities.
    folder : str or Path
        Where the merged adapter is saved, as peft does, in float32.
    validate : callable
        Returns the validation metrics of a model (:class:`cachelora.train.validation.Validation`).
    most_lost : float
        How much the mean positive similarity may fall (:func:`cachelora.train.validation.objective`).
    seed : int
        Seed of what ``dare_ties`` drops.

    Returns
    -------
    model : SentenceTransformer
        The base model with the merged adapter in use.
    found : dict
        The ``weights`` and the ``density`` that were chosen (which some methods do not use), their ``validation``
        metrics, those of the ``base`` model, and all that was ``tried``.

    Raises
    ------
    DamagedError
        If an adapter is not what its manifest says, or not an adapter of the base model.
    ModelError
        If the adapters do not fit one another, or the result is not finite.
    """
    for path in adapters.values():
        verify_adapter(base, path)
    model = load_model(base, None)
    before = dict(validate(model))
    # Names of our own: peft puts them into module dictionaries, where not every model id would do.
    inner = {name: f"adapter_{number}" for number, name in enumerate(adapters)}
    tuner: PeftModel | None = None
    for name, path in adapters.items():
        if tuner is None:
            tuner = PeftModel.from_pretrained(model.transformers_model, str(path), adapter_name=inner[name])
        else:
            tuner.load_adapter(str(path), adapter_name=inner[name])
        check_all_loaded(model, path, inner[name])
    _check_fit(tuner, adapters, inner, settings.method)
    ranks = [tuner.peft_config[name].r for name in inner.values()]
    rank = settings.rank or (sum(ranks) if settings.method == "cat" else max(ranks))
    if settings.method != "cat" or rank < sum(ranks):
        # A matrix has no higher rank than rows or columns.
        rank = min(rank, _smallest_layer(tuner))

    tried: list[dict[str, Any]] = []

    def merge(weights: Mapping[str, float], density: float) -> None:
        named = {inner[name]: weight for name, weight in weights.items()}
        _merge(tuner, named, settings.method, density, rank, seed)

    def attempt(weights: dict[str, float], density: float) -> dict[str, Any]:
        unusable = ModelError(str(folder), f"with weights {weights} the embeddings are not numbers", "Lower them")
        try:
            merge(weights, density)
        except torch.linalg.LinAlgError as error:
            raise unusable from error
        metrics = dict(validate(model))
        if not math.isfinite(metrics["margin"]):
            raise unusable
        _log.info("weights %s, density %s: AP %.4f, margin %.4f", weights, density, metrics["ap"], metrics["margin"])
        tried.append({"weights": weights, "density": density, "validation": metrics})
        return tried[-1]

    def score(entry: Mapping[str, Any]) -> tuple[float, float, float]:
        return objective(entry["validation"], before, most_lost)

    def best_tried(entries: list[dict[str, Any]]) -> dict[str, Any]:
        return entries[best_of({number: score(entry) for number, entry in enumerate(entries)})]

    best = best_tried([attempt(weights, density) for weights, density in _grid(settings, adapters)])
    for name in adapters if settings.factors else ():
        others = [best["weights"] | {name: best["weights"][name] * factor} for factor in settings.factors]
        best = best_tried([best, *(attempt(weights, best["density"]) for weights in others)])
    if best_of({"merged": score(best), "base": objective(before, before, most_lost)}) == "base":
        _log.warning("no merge was better than the base model: look at the adapters and the weights")
    if best is not tried[-1]:
        merge(best["weights"], best["density"])
    weights = get_peft_model_state_dict(tuner, adapter_name=MERGED, save_embedding_layers=False)
    if not all(bool(value.isfinite().all()) for value in weights.values()):
        raise ModelError(str(folder), "the merged weights are not all numbers", "Lower the weights of the merge")
    save_adapter(weights, tuner.peft_config[MERGED], _bases(tuner, inner.values()).pop(), folder)
    return model, {**best, "base": before, "tried": tried}


def _smallest_layer(tuner: PeftModel) -> int:
    """Return the smaller dimension of the smallest layer that has an update."""
    sizes = (
        min(module.in_features, module.out_features) for module in tuner.modules() if isinstance(module, LoraLayer)
    )
    return min(sizes)


def _merge(tuner: PeftModel, weights: Mapping[str, float], method: str, density: float, rank: int, seed: int) -> None:
    """Merge anew, in place of what was merged before, and put it in use."""
    if MERGED in tuner.peft_config:
        tuner.set_adapter(next(iter(weights)))
        tuner.delete_adapter(MERGED)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        METHODS[method](tuner, weights, density, rank)
    tuner.set_adapter(MERGED)


def _grid(settings: Merge, names: Iterable[str]) -> Iterator[tuple[dict[str, float], float]]:
    """Go through the common weights and densities to try."""
    done = []
    for weight in settings.weight:
        for density in settings.density if settings.method in _PRUNE else settings.density[:1]:
            weights = {name: settings.weights.get(name, weight) for name in names}
            if (weights, density) not in done:
                done.append((weights, density))
                yield weights, density


def _bases(tuner: PeftModel, names: Iterable[str]) -> set[str]:
    """Return what the adapters call their base model."""
    return {tuner.peft_config[name].base_model_name_or_path for name in names}


def _check_fit(tuner: PeftModel, adapters: Mapping[str, str | Path], inner: Mapping[str, str], method: str) -> None:
    """Refuse adapters that cannot be added up."""
    configs = [tuner.peft_config[name] for name in inner.values()]
    differing = {
        "base models": _bases(tuner, inner.values()),
        "target modules": {" ".join(sorted(config.target_modules)) for config in configs},
        "ranks": {config.r for config in configs} if method == "linear" else set(),
    }
    for what, values in differing.items():
        if len(values) > 1:
            raise ModelError(
                ", ".join(map(str, adapters.values())),
                f"the adapters have different {what}: {', '.join(sorted(map(str, values)))}",
                "Merge adapters of one recipe and one base model",
            )
