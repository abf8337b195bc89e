"""Vectors of texts, and the nearest of them."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from cachelora.models import encode_texts

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

# Up to so many vectors, all are compared.
_MOST_COMPARED = 20_000
_CELLS_LOOKED_AT = 8
_SEED = 1234


class Vectors:
    """The unit vectors of texts, each encoded once.

    Parameters
    ----------
    model : SentenceTransformer
        The model.
    bfloat16 : bool
        Whether to compute in bfloat16.
    """

    def __init__(self, model: "SentenceTransformer", bfloat16: bool) -> None:
        self._model = model
        self._bfloat16 = bfloat16
        self._rows: dict[str, int] = {}
        self._matrix = np.zeros((0, model.get_embedding_dimension()), dtype=np.float32)

    def add(self, texts: Sequence[str]) -> None:
        """Encode the texts that are new.

        Parameters
        ----------
        texts : sequence of str
            Texts, repetitions allowed.
        """
        import torch

        new = [text for text in dict.fromkeys(texts) if text not in self._rows]
        if not new:
            return
        with torch.autocast(self._model.device.type, torch.bfloat16, enabled=self._bfloat16):
            vectors = encode_texts(self._model, new)
        self._rows |= {text: len(self._rows) + number for number, text in enumerate(vectors)}
        self._matrix = np.concatenate([self._matrix, np.stack([*vectors.values()]).astype(np.float32)])

    def of(self, texts: Sequence[str]) -> np.ndarray:
        """Return the vectors of texts that were added.

        Parameters
        ----------
        texts : sequence of str, length n
            Texts.

        Returns
        -------
        numpy.ndarray, shape (n, d), float32
            Their vectors.
        """
        return self._matrix[[self._rows[text] for text in texts]]

    def similarities(self, ones: Sequence[str], others: Sequence[str]) -> np.ndarray:
        """Return the cosines of pairs of texts that were added.

        Parameters
        ----------
        ones, others : sequence of str, length n
            The two texts of each pair.

        Returns
        -------
        numpy.ndarray, shape (n,), float64
            Cosines in [-1, 1].
        """
        return np.clip(np.einsum("ij,ij->i", self.of(ones), self.of(others)), -1, 1).astype(np.float64)


def nearest_of_others(
    vectors: np.ndarray, owners: np.ndarray, pool: np.ndarray, pool_owners: np.ndarray, neighbours: int
) -> np.ndarray:
    """Find how near each vector is to the nearest of the pool that has another owner.

    Parameters
    ----------
    vectors : numpy.ndarray, shape (n, d), float32
        Unit vectors.
    owners : numpy.ndarray, shape (n,), int64
        Whose each is.
    pool : numpy.ndarray, shape (m, d), float32
        Unit vectors to look among.
    pool_owners : numpy.ndarray, shape (m,), int64
        Whose each is.
    neighbours : int
        So many of the nearest are looked at; one more than an owner has in the pool finds one of another owner.

    Returns
    -------
    numpy.ndarray, shape (n,), float64
        The highest cosine; -1 where there is none. Above 20,000 vectors in the pool, an inverted file (faiss) is
        searched in its 8 likeliest cells: time grows with n times the square root of m, and a neighbour that is
        nearly equal may be missed (in the test, less than one of a hundred is).
    """
    if not len(vectors) or not len(pool):
        return np.full(len(vectors), -1.0)
    import faiss

    if len(pool) <= _MOST_COMPARED:
        index = faiss.IndexFlatIP(pool.shape[1])
    else:
        cells = int(4 * np.sqrt(len(pool)))
        index = faiss.IndexIVFFlat(faiss.IndexFlatIP(pool.shape[1]), pool.shape[1], cells, faiss.METRIC_INNER_PRODUCT)
        index.nprobe = _CELLS_LOOKED_AT
        index.cp.seed = _SEED
        # Near faiss' least, 39: more change the cells little and take time.
        index.cp.max_points_per_centroid = 40
        index.train(pool)
    index.add(pool)
    found, rows = index.search(vectors, min(neighbours, len(pool)))
    other = (rows >= 0) & (pool_owners[rows] != owners[:, None])
    return np.where(other, found, -1.0).max(axis=1).astype(np.float64)
