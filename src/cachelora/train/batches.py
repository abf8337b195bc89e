"""Batches of groups: what a step sees, and in which order.

A batch holds groups, each with some of its equivalent texts and some of its hard negatives. Each text of a group
is encoded once, and every pair of equivalents meets every hard negative: the product of seed document 003 ("Convert to
triplet format") without its repetitions.
"""

import hashlib
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, Features, List, Value
from sentence_transformers.base.sampler import DefaultBatchSampler

from cachelora.config import Train
from cachelora.errors import TrainingError
from cachelora.files import iterate_table
from cachelora.schemas import TRIPLETS

_FEATURES = Features(
    {name: List(Value("string")) for name in ("texts", "negatives")}
    | {"group": Value("string"), "number": Value("int64")}
)
_MOST_REPEATS = 4


def read_items(
    triplets: Mapping[str, str | Path], grouped: bool, folder: str | Path
) -> tuple[Dataset, dict[str, range]]:
    """Read what batches are made of, without holding the rows in memory.

    Parameters
    ----------
    triplets : mapping of str to (str or Path)
        Parquet files by domain, in the columns of :data:`cachelora.schemas.TRIPLETS`, the rows of a group together.
    grouped : bool
        Whether an item is a group. Otherwise each row is an item of its own, and rows of one group can meet in a batch
        as false negatives of one another: a control.
    folder : str or Path
        Where the items are written to, to be read from disk.

    Returns
    -------
    items : datasets.Dataset
        The training split, with columns texts (the equivalent ones), negatives, group and number (of the item).
    members : dict of str to range
        The row numbers of each domain's items.

    Raises
    ------
    TrainingError
        If a domain has none.
    """
    members, first = {}, 0
    for domain, path in triplets.items():
        count = sum(1 for _ in _items({domain: path}, grouped))
        if count == 0:
            raise TrainingError("train", f"{domain} has no group to train on", "Give more queries")
        members[domain] = range(first, first + count)
        first += count
    items = Dataset.from_generator(
        _items,
        features=_FEATURES,
        cache_dir=str(folder),
        gen_kwargs={"triplets": dict(triplets), "grouped": grouped},
    )
    return items, members


def _items(triplets: Mapping[str, str | Path], grouped: bool) -> Iterator[dict[str, Any]]:
    """Go through the training rows of the files and put those of one group together."""
    number = 0
    for domain, path in triplets.items():
        train = (row for row in iterate_table(path, TRIPLETS) if row["split"] == "train")
        for group, rows in itertools.groupby(train, key=lambda row: row["group"]):
            for members in [list(rows)] if grouped else ([row] for row in rows):
                yield {
                    "texts": list(dict.fromkeys(text for row in members for text in (row["positive"], row["anchor"]))),
                    "negatives": list(dict.fromkeys(item["text"] for row in members for item in row["negatives"])),
                    "group": f"{domain} {group}",
                    "number": number,
                }
                number += 1


class BalancedSampler(DefaultBatchSampler):
    """Batches of items in an order of their own each epoch, domains balanced.

    Of n items of a domain, and m of the largest, n^a m^(1-a) are drawn each epoch: by a temperature of 1 / a, as in
    Conneau et al. 2020 (arXiv:1911.02116, section 3.1), only that a = 0 stands for infinity. So every domain gives all
    of its items, and a smaller one gives them again, with a sample for the rest, but at most four times: what is
    repeated more often is learnt by heart. A domain that is replayed gives a sample instead. The copies of an item are
    spread over the epoch, and no batch holds an item twice. Batches are full: what is left over at the end of an epoch
    comes in another place in the next.

    Parameters
    ----------
    members : mapping of str to sequence of int
        The item numbers of each domain.
    batch_size : int
        Items a step. All items make one batch if they are fewer.
    seed : int
        Seed of the order.
    processes : int
        Data-parallel processes that share a step: a batch is cut into as many parts, which follow one another.
    size_exponent : float
        The power a above, in [0, 1].
    replayed : mapping of str to float
        Share of its items that a domain gives, in (0, 1], for those that are only replayed.
    """

    def __init__(
        self,
        members: Mapping[str, Sequence[int]],
        batch_size: int,
        seed: int,
        processes: int = 1,
        size_exponent: float = 0.0,
        replayed: Mapping[str, float] | None = None,
    ) -> None:
        replayed = replayed or {}
        largest = max(len(numbers) for domain, numbers in members.items() if domain not in replayed)
        self._draws = {
            domain: math.ceil(replayed[domain] * len(numbers))
            if domain in replayed
            else min(round(largest * (len(numbers) / largest) ** size_exponent), _MOST_REPEATS * len(numbers))
            for domain, numbers in members.items()
        }
        distinct = sum(min(self._draws[domain], len(numbers)) for domain, numbers in members.items())
        part = max(1, min(batch_size, distinct) // processes)
        super().__init__(range(sum(map(len, members.values()))), batch_size=part, drop_last=True, seed=seed)
        self._members = {domain: np.asarray(numbers) for domain, numbers in members.items()}
        self._processes = processes

    def __iter__(self) -> Iterator[list[int]]:
        """Yield the batches of the current epoch, or their parts, as item numbers."""
        random = np.random.default_rng([self.seed, self.epoch])
        numbers, places = [], []
        for domain, members in self._members.items():
            copies, rest = divmod(self._draws[domain], len(members))
            for copy in range(copies + (rest > 0)):
                drawn = random.permutation(members)[: rest if copy == copies else None]
                numbers.append(drawn)
                places.append((copy + random.random(len(drawn))) / (copies + (rest > 0)))
        order = np.concatenate(numbers)[np.argsort(np.concatenate(places), kind="stable")].tolist()
        whole = self.batch_size * self._processes
        # Copies that would meet themselves wait for the next batch. Should the order not do for the last ones, others
        # fill them: an epoch has the same number of batches each time, for a resumed training counts on it.
        everything = np.concatenate(list(self._members.values()))
        spare = (number for _ in itertools.count() for number in random.permutation(everything).tolist())
        following = itertools.chain(order, spare)
        waiting: list[int] = []
        for _ in range(len(self) // self._processes):
            batch: dict[int, None] = {}
            again, waiting = waiting, []
            while len(batch) < whole:
                number = again.pop(0) if again else next(following)
                if number in batch:
                    waiting.append(number)
                batch[number] = None
            waiting = again + waiting
            yield from self._parts(list(batch))

    def _parts(self, batch: list[int]) -> Iterator[list[int]]:
        """Cut a batch into the parts of the processes."""
        for start in range(0, len(batch), self.batch_size):
            yield batch[start : start + self.batch_size]

    def __len__(self) -> int:
        """Return the number of batches of an epoch, or of their parts."""
        return sum(self._draws.values()) // (self.batch_size * self._processes) * self._processes


class GroupCollator:
    """Draws the texts of each group anew each epoch and tokenises a batch, sorted by length so that little is padded.

    Parameters
    ----------
    preprocess : callable
        The model's tokenisation of a list of texts.
    sampler : BalancedSampler
        The source of the batches; it knows the epoch.
    settings : Train
        ``equivalents`` and ``negatives``: the texts drawn of each group.
    seed : int
        Seed of the draw.
    """

    # Columns that hold the labels of pairs; a batch of groups has none.
    valid_label_columns = ()

    def __init__(self, preprocess: Any, sampler: BalancedSampler, settings: Train, seed: int) -> None:
        self._preprocess = preprocess
        self._sampler = sampler
        self._settings = settings
        self._seed = seed

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        """Make a batch.

        Parameters
        ----------
        items : list of dict
            Rows of the items, with their ``number``.

        Returns
        -------
        dict
            The tokens of the n texts, and as ``label`` for each of them, shape (n, 3), the number of its item, 1 for an
            equivalent text or 0 for a hard negative, and a digest of the text, for one may stand in two groups.
        """
        drawn = []
        for item in items:
            random = np.random.default_rng([self._seed, self._sampler.epoch, item["number"]])
            for name, most, role in (
                ("texts", self._settings.equivalents, 1),
                ("negatives", self._settings.negatives, 0),
            ):
                chosen = random.permutation(len(item[name]))[:most]
                drawn += [(item[name][place], item["number"], role) for place in chosen]
        drawn.sort(key=lambda entry: len(entry[0]))
        tokens = self._preprocess([text for text, _, _ in drawn])
        label = torch.tensor([(number, role, _digest(text)) for text, number, role in drawn])
        return {f"text_{name}": value for name, value in tokens.items()} | {"label": label}


def _digest(text: str) -> int:
    """Return 63 bits that tell a text from others, in every process the same."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
