"""Stage `sweep`: which settings of the recipe are best, on the validation split alone."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from cachelora.train.validation import METRICS, TIE, best_of, objective


def sweep_table(
    trials: Mapping[str, Mapping[str, Any]], results: Mapping[str, Mapping[str, Any]], most_lost: float
) -> pd.DataFrame:
    """Compare the combinations of a sweep, the best first.

    Parameters
    ----------
    trials : mapping of str to mapping
        What each trial changed of the recipe, by model id. Trials that changed the same are the seeds of one
        combination, whose means are compared.
    results : mapping of str to mapping
        What :func:`cachelora.train.train_model` returned for each.
    most_lost : float
        How much the mean positive similarity may fall (:func:`cachelora.train.validation.objective`).

    Returns
    -------
    pandas.DataFrame
        A row for each combination: what it changed, as JSON, the number of seeds, the means of the metrics of the kept
        checkpoints, AP by domain (``ap domain``), the change of the mean positive similarity from the base model's, and
        the mean time of a training in seconds.
    """
    combinations: dict[str, list[str]] = {}
    for name, changed in trials.items():
        combinations.setdefault(json.dumps(changed, sort_keys=True), []).append(name)
    rows = []
    for names in combinations.values():
        kept = [_kept(results[name]) for name in names]
        base = _mean([results[name]["validation"][0] for name in names])
        found = _mean(kept)
        rows.append(
            {
                "changed": json.dumps(trials[names[0]]),
                "seeds": len(names),
                **found,
                **{
                    f"ap {domain}": _mean([row["domains"][domain] for row in kept])["ap"]
                    for domain in kept[0]["domains"]
                },
                "positive_change": found["positive_similarity"] - base["positive_similarity"],
                "seconds": sum(results[name]["device"]["seconds"] for name in names) / len(names),
                "score": objective(found, base, most_lost),
            }
        )
    best = rows.pop(best_of({number: row["score"] for number, row in enumerate(rows)}))
    rows.sort(key=lambda row: row["score"], reverse=True)
    return pd.DataFrame([best, *rows]).drop(columns="score")


def _kept(result: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the evaluation of the checkpoint that was kept."""
    return next(row for row in result["validation"] if row["step"] == result["best_step"])


def _mean(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the mean of each metric."""
    return {name: sum(row[name] for row in rows) / len(rows) for name in METRICS}


def chosen_settings(table: pd.DataFrame, recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of the first row of a table, as an overlay of the configuration.

    Parameters
    ----------
    table : pandas.DataFrame
        What :func:`sweep_table` returns.
    recipe : mapping
        The section `train` that the trials changed.

    Returns
    -------
    dict
        With the key ``train``. A loss of the recipe that the choice does without is null, for overlays are merged.
    """
    chosen = json.loads(table["changed"].iloc[0])
    if "losses" in chosen:
        chosen["losses"] = dict.fromkeys(recipe["losses"]) | chosen["losses"]
    return {"train": chosen}


def sweep_report(table: pd.DataFrame, base_name: str) -> str:
    """Write the table for people.

    Parameters
    ----------
    table : pandas.DataFrame
        What :func:`sweep_table` returns.
    base_name : str
        What the base model is called.

    Returns
    -------
    str
        Markdown.
    """
    shown = table.rename(columns={"p_chr_auc": "P-CHR AUC", "ap": "AP", "positive_change": "Δ positive similarity"})
    return (
        f"# Sweep on {base_name}\n\n"
        "Validation split only; the first row is chosen. Order: no mean positive similarity too far below the base "
        "model's, then the mean of AP and P-CHR AUC over the domains; of those within "
        f"{TIE} of the best in that mean, the one with the largest margin comes first.\n\n"
        + shown.round(4).to_markdown(index=False)
        + "\n"
    )
