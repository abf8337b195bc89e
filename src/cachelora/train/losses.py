"""Losses on the cosines of a batch: a function each, to be used alone or mixed.

The anchors are the equivalent texts of the batch's groups. The positives of an anchor are the other equivalent texts of
its group; its negatives the hard negatives of its group and all texts of the other groups.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from cachelora.config import Train

_NEVER = -1e4


@dataclass(frozen=True)
class Cosines:
    """The cosines of a batch with a anchors and n texts.

    Attributes
    ----------
    values : torch.Tensor, shape (a, n)
        Cosine of each anchor with each text.
    positive, hard, other : torch.Tensor, shape (a, n), bool
        Which texts are an anchor's positives, its own hard negatives, and texts of other groups. The anchor itself is
        none of them.
    base : torch.Tensor, shape (a, n), or None
        The same cosines by the base model, for the losses that want them.
    """

    values: Tensor
    positive: Tensor
    hard: Tensor
    other: Tensor
    base: Tensor | None = None


def ranking(cosines: Cosines, settings: Train) -> Tensor:
    """Return the multiple negatives ranking loss (Henderson et al. 2017, arXiv:1705.00652) of every positive pair.

    For an anchor a and one of its positives p, minus the log of the share that exp(cos(a, p) / temperature) has in the
    sum over p and all negatives of a (temperature: seed document 000). With ``hardness``, the logit of a hard negative
    is raised by hardness times its cosine (Schechter Vera et al. 2025, arXiv:2509.20354). With ``calibration``, the sum
    also holds calibration times what the hard negatives of the batch's anchors add to their own sums on average: every
    positive pair must beat the hard pairs of *all* anchors, for a cache has one threshold. With ``guided``, texts of
    other groups that the base model finds nearer to the anchor than its positive are left out as possible false
    negatives (Solatorio 2024, arXiv:2402.16829); hard negatives never are.

    Parameters
    ----------
    cosines : Cosines
        The batch.
    settings : Train
        ``temperature``, ``hardness``, ``calibration`` and ``guided``.

    Returns
    -------
    torch.Tensor, shape ()
        The mean over the positive pairs.
    """
    logits = cosines.values / settings.temperature
    if settings.hardness:
        logits = logits + settings.hardness * cosines.values.detach() * cosines.hard
    anchors, positives = cosines.positive.nonzero(as_tuple=True)
    if settings.guided:
        kept = cosines.other[anchors] & (cosines.base[anchors] < cosines.base[anchors, positives].unsqueeze(1))
        rest = logits[anchors].masked_fill(~(cosines.hard[anchors] | kept), _NEVER).logsumexp(dim=1)
    else:
        rest = logits.masked_fill(~(cosines.hard | cosines.other), _NEVER).logsumexp(dim=1)[anchors]
    if settings.calibration and cosines.hard.any():
        shared = logits[cosines.hard].logsumexp(dim=0) + math.log(settings.calibration / len(logits))
        rest = torch.logaddexp(rest, shared)
    return functional.softplus(rest - logits[anchors, positives]).mean()


def cosent(cosines: Cosines, settings: Train) -> Tensor:
    """Return the CoSENT loss (Su 2022, https://kexue.fm/archives/8847) over all labelled pairs of the batch.

    log(1 + sum of exp((cos of a hard pair - cos of a positive pair) / temperature) over all such pairs): one threshold
    for all anchors is what it asks for, as a cache has it.

    Parameters and returns are those of :func:`ranking`.
    """
    hard, positive = cosines.values[cosines.hard], cosines.values[cosines.positive]
    gaps = ((hard.unsqueeze(1) - positive) / settings.temperature).flatten()
    return functional.pad(gaps, (0, 1)).logsumexp(dim=0)


def online_contrastive(cosines: Cosines, settings: Train) -> Tensor:
    """Return the online contrastive loss (sentence-transformers, ``OnlineContrastiveLoss``) of the labelled pairs.

    With distances 1 - cos and a margin of 0.5: the squared distance of the positive pairs that are farther than the
    nearest hard pair, and the squared lack of distance of the hard pairs that are nearer than the farthest positive.

    Parameters and returns are those of :func:`ranking`.
    """
    positive, hard = 1 - cosines.values[cosines.positive], 1 - cosines.values[cosines.hard]
    far, near = positive[positive > hard.min()], hard[hard < positive.max()]
    return (far.square().sum() + functional.relu(0.5 - near).square().sum()) / (len(positive) + len(hard))


def bce(cosines: Cosines, settings: Train) -> Tensor:
    """Return the binary cross-entropy of the labelled pairs, which wants one threshold for all anchors.

    The logit of a pair is its cosine less the middle between the mean cosines of positive and hard pairs, divided by
    the temperature; the two weigh the same. arXiv:2606.19719 compares such a loss to :func:`ranking`.

    Parameters and returns are those of :func:`ranking`.
    """
    positive, hard = cosines.values[cosines.positive], cosines.values[cosines.hard]
    middle = (positive.mean() + hard.mean()).detach() / 2
    hits, false_hits = (positive - middle) / settings.temperature, (hard - middle) / settings.temperature
    return (functional.softplus(-hits).mean() + functional.softplus(false_hits).mean()) / 2


def distillation(cosines: Cosines, settings: Train) -> Tensor:
    """Return the mean squared change of the cosines between texts of different groups from the base model's.

    It holds in place what the triplets say nothing of.

    Parameters and returns are those of :func:`ranking`.
    """
    return (cosines.values - cosines.base)[cosines.other].square().mean()


LOSSES: dict[str, Callable[[Cosines, Train], Tensor]] = {
    function.__name__: function for function in (ranking, cosent, online_contrastive, bce, distillation)
}


def compare(embeddings: Tensor, label: Tensor, base: Tensor | None) -> Cosines:
    """Make the cosines of a batch and say which pairs are what.

    Parameters
    ----------
    embeddings : torch.Tensor, shape (n, d)
        The embeddings of the texts.
    label : torch.Tensor, shape (n, 3)
        Item, role and digest of each text, as :class:`cachelora.train.batches.GroupCollator` gives them; items of -1
        are no texts at all.
    base : torch.Tensor, shape (n, d), or None
        The base model's embeddings.

    Returns
    -------
    Cosines
        Of the equivalent texts with all texts.
    """
    item, role, text = label.T
    anchor = (role == 1) & (item >= 0)
    same = item[anchor].unsqueeze(1) == item
    itself = torch.arange(len(item), device=item.device)[anchor].unsqueeze(1) == torch.arange(
        len(item), device=item.device
    )
    return Cosines(
        values=_cosines(embeddings, anchor),
        positive=same & anchor & ~itself,
        hard=same & (role == 0),
        other=~same & (item >= 0) & (text[anchor].unsqueeze(1) != text),
        base=None if base is None else _cosines(base, anchor),
    )


def _cosines(embeddings: Tensor, anchor: Tensor) -> Tensor:
    """Return the cosine of each anchor with each text."""
    unit = functional.normalize(embeddings.float(), dim=1)
    return unit[anchor] @ unit.T
