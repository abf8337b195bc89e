"""A cross-encoder, or a model of natural language inference, as judge."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cachelora.errors import ModelError
from cachelora.files import sha256_of
from cachelora.manifest import check_safetensors
from cachelora.models import hub_folder

_BATCH_SIZE = 32


class CrossEncoderJudge:
    """A model that reads both texts of a pair at once.

    Parameters
    ----------
    source : str
        A local folder, or ``hub:OWNER/NAME@COMMIT``.

    Attributes
    ----------
    name : str
        What tells it from others: the name of its folder and the first digits of its weights' SHA-256.

    Raises
    ------
    ModelError
        If it cannot be found or loaded, or tells classes apart of which none is ``entailment``.
    DamagedError
        If its weights are no whole safetensors file.
    """

    def __init__(self, source: str) -> None:
        from sentence_transformers import CrossEncoder

        prefix, _, name = source.partition(":")
        folder = hub_folder(source, name) if prefix == "hub" else Path(source)
        if not (folder / "model.safetensors").is_file():
            raise ModelError(source, "there is no model.safetensors in it", "Correct judge.cross_encoder")
        check_safetensors(folder / "model.safetensors")
        named = name if prefix == "hub" else folder.resolve().name
        self.name = f"{named} (sha256 {sha256_of(folder / 'model.safetensors')[:12]})"
        try:
            self._model: Any = CrossEncoder(str(folder), trust_remote_code=False, local_files_only=True)
        except (OSError, ValueError, TypeError, KeyError) as error:
            first = str(error).strip().partition("\n")[0]
            raise ModelError(source, f"it cannot be loaded ({first})", "Use a whole cross-encoder folder") from error
        labels = {str(label).lower(): number for number, label in self._model.config.id2label.items()}
        self._entailment = labels.get("entailment")
        if self._model.num_labels > 1 and self._entailment is None:
            raise ModelError(
                source,
                f"it tells {', '.join(labels)} apart, and none of them is entailment",
                "Use a cross-encoder with one score, or a model of natural language inference",
            )

    def scores(self, firsts: Sequence[str], seconds: Sequence[str]) -> np.ndarray:
        """Score pairs.

        Parameters
        ----------
        firsts, seconds : sequence of str, length n
            The two texts of each pair.

        Returns
        -------
        numpy.ndarray, shape (n,), float64
            In [0, 1]: the score of a cross-encoder; of an inference model, how probable it is that each text entails
            the other, by the less probable direction. The mean of the two directions of a cross-encoder with one
            score, so that the order does not matter.
        """
        import torch

        both = [*zip(firsts, seconds, strict=True), *zip(seconds, firsts, strict=True)]
        if not both:
            return np.zeros(0)
        function = torch.nn.Sigmoid() if self._entailment is None else torch.nn.Softmax(dim=1)
        found = np.asarray(
            self._model.predict(both, batch_size=_BATCH_SIZE, activation_fn=function, show_progress_bar=False),
            dtype=np.float64,
        )
        if self._entailment is None:
            return found.reshape(2, -1).mean(axis=0)
        return found[:, self._entailment].reshape(2, -1).min(axis=0)
