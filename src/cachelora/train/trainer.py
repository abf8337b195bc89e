"""The trainer of sentence-transformers on batches of groups, with GradCache, small checkpoints, and clear ends."""

import copy
import logging
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from datasets import Dataset
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
from sentence_transformers.base.losses.gradcache import CachedLossMixin
from torch import Tensor, nn
from transformers import TrainerCallback

from cachelora.config import Train
from cachelora.errors import DamagedError, TrainingError
from cachelora.files import read_json, sha256_of, write_json
from cachelora.train.batches import BalancedSampler
from cachelora.train.losses import LOSSES, compare
from cachelora.train.validation import BestCheckpoint

_log = logging.getLogger(__name__)

WEIGHTS = "trained.safetensors"
# Written last; it names the other files of a checkpoint with their digests.
WHOLE = "whole.json"
_TEXTS_AT_ONCE = 48


class GroupLoss(CachedLossMixin, nn.Module):
    """The weighted sum of losses over the batches that :class:`cachelora.train.batches.GroupCollator` makes.

    Texts come sorted by length and are encoded a few at a time, so that little is padded. With ``mini_batch_size`` the
    activations of only so many texts are kept at once (GradCache, Gao et al. 2021, arXiv:2101.06983), at the price of a
    second forward pass.

    Parameters
    ----------
    model : SentenceTransformer
        The model in training.
    settings : Train
        ``losses`` and their settings, ``mini_batch_size``.
    base : SentenceTransformer or None
        The base model, for the losses that compare with it.
    bfloat16 : bool
        Whether to compute in bfloat16.
    """

    def __init__(
        self, model: SentenceTransformer, settings: Train, base: SentenceTransformer | None, bfloat16: bool = False
    ) -> None:
        super().__init__()
        self._bfloat16 = bfloat16
        self.model = model
        self._settings = settings
        # In a list, so that its weights are not taken for weights of this module.
        self._base = [] if base is None else [GroupLoss(base, settings, None)]
        self.mini_batch_size = settings.mini_batch_size or _TEXTS_AT_ONCE
        self.uses_gradient_cache = settings.mini_batch_size is not None

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor) -> Tensor:
        """Return the loss of a batch.

        Parameters
        ----------
        sentence_features : iterable of dict of str to torch.Tensor
            One entry: the tokens of the n texts.
        labels : torch.Tensor, shape (n, 3)
            Item, role and digest of each text.

        Returns
        -------
        torch.Tensor, shape ()
            The loss over the texts of all processes. Its gradient is that of this process's texts alone, times the
            number of processes, for they are averaged.
        """
        features = list(sentence_features)
        self._base_embeddings = None
        for base in self._base:
            base.mini_batch_size = self.mini_batch_size
            # The trainer sees to that for the model in training only.
            with torch.autocast(labels.device.type, torch.bfloat16, enabled=self._bfloat16):
                self._base_embeddings = torch.cat(base.embed(features[0], with_grad=False)).float()
        if self.uses_gradient_cache:
            return self.forward_cached(features, labels)
        return self.calculate_loss([self.embed(features[0], with_grad=True)], labels)

    def embed(self, features: dict[str, Tensor], with_grad: bool) -> list[Tensor]:
        """Return the embeddings of a batch, a few texts at a time."""
        return [embeddings for embeddings, _ in self.embed_minibatch_iter(features, with_grad, copy_random_state=False)]

    def calculate_loss(
        self, reps: list[list[Tensor]], labels: Tensor | None = None, *, with_backward: bool = False
    ) -> Tensor:
        """Return the loss of embeddings in mini-batches; with_backward, their gradients are computed at once."""
        embeddings = torch.cat(reps[0])
        base = self._base_embeddings
        processes = dist.get_world_size() if dist.is_initialized() else 1
        if processes > 1:
            embeddings, labels, base = _gather(embeddings, labels, base)
        cosines = compare(embeddings, labels, base)
        loss = sum(weight * LOSSES[name](cosines, self._settings) for name, weight in self._settings.losses.items())
        if not with_backward:
            return _scaled(loss, processes)
        _scaled(loss, processes).backward()
        return loss.detach()


def _scaled(loss: Tensor, factor: int) -> Tensor:
    """Return a loss of the same value whose gradient is a multiple."""
    return loss * factor - loss.detach() * (factor - 1)


def _gather(embeddings: Tensor, labels: Tensor, base: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Put the texts of all processes together; gradients flow to those of this process."""
    count = torch.tensor([len(labels)], device=labels.device)
    counts = [torch.zeros_like(count) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, count)
    most = int(max(counts))

    def gather(values: Tensor, fill: float) -> list[Tensor]:
        padded = torch.full((most, values.shape[1]), fill, dtype=values.dtype, device=values.device)
        padded[: len(values)] = values.detach()
        found = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(found, padded)
        return [part[: int(n)] for part, n in zip(found, counts, strict=True)]

    parts = gather(embeddings, 0.0)
    parts[dist.get_rank()] = embeddings
    return (
        torch.cat(parts),
        torch.cat(gather(labels, -1)),
        None if base is None else torch.cat(gather(base, 0.0)),
    )


class GroupTrainer(SentenceTransformerTrainer):
    """Trains on groups; see :class:`GroupLoss` for the rest of the arguments.

    Parameters
    ----------
    parameters : mapping of str to torch.nn.Parameter
        What is trained, and so what a checkpoint holds of the model.
    best : BestCheckpoint
        What a checkpoint holds of the evaluations.
    **arguments
        Those of ``SentenceTransformerTrainer``.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], best: BestCheckpoint, **arguments: Any) -> None:
        self._trained = parameters
        self._best = best
        super().__init__(**arguments, callbacks=[best, SealCheckpoint()])

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Return the loss, and stop with the batch's groups if it is no number."""
        items = inputs["label"][:, 0].unique()
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        if not torch.isfinite(loss):
            dataset: Dataset = self.train_dataset
            groups = ", ".join(dataset[int(item)]["group"] for item in items[:5])
            raise TrainingError(
                "train",
                f"the loss is {loss.item()} at step {self.state.global_step} (groups {groups}, ...)",
                "Lower train.learning_rate" if self.state.global_step else "Look at temperature, hardness and losses",
            )
        return loss

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """Do a step; where the device's memory is not enough, with fewer texts at once from here on."""
        while True:
            try:
                return super().training_step(model, copy.copy(inputs), *args, **kwargs)
            except torch.OutOfMemoryError as error:
                if dist.is_initialized() and dist.get_world_size() > 1:
                    raise TrainingError(
                        "train.mini_batch_size", "the GPU's memory is not enough", "Set it, or halve it"
                    ) from error
                loss = self.loss
                loss.mini_batch_size = min(loss.mini_batch_size, len(inputs["label"])) // (
                    2 if loss.uses_gradient_cache else 1
                )
                loss.uses_gradient_cache = True
                if loss.mini_batch_size < 1:
                    raise TrainingError(
                        "train.batch_size", "the memory is not enough for a single text", "Use a smaller base model"
                    ) from error
                _log.warning("out of memory: from here on %d texts at once, with GradCache", loss.mini_batch_size)
                model.zero_grad(set_to_none=True)
                torch.cuda.empty_cache()

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Write what is trained, instead of a model folder."""
        if not self.args.should_save:
            return
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        save_file(
            {name: value.detach().contiguous() for name, value in self._trained.items()}, Path(output_dir, WEIGHTS)
        )
        self._best.save(output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Read what :meth:`_save` wrote."""
        with torch.no_grad():
            for name, value in load_file(Path(resume_from_checkpoint, WEIGHTS)).items():
                self._trained[name].copy_(value)
        self._best.load(resume_from_checkpoint)


class TellEpoch(TrainerCallback):
    """Tells the sampler its epoch, which the trainer does not manage when it resumes with several processes.

    Parameters
    ----------
    sampler : BalancedSampler
        The source of the batches.
    steps : int
        Steps an epoch.
    """

    def __init__(self, sampler: BalancedSampler, steps: int) -> None:
        self._sampler = sampler
        self._steps = steps

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Set the epoch."""
        self._sampler.set_epoch(state.global_step // self._steps)


class SealCheckpoint(TrainerCallback):
    """Seals a checkpoint once all of it is written and on the disk, and logs how the training goes."""

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Seal the checkpoint of this step, when every process has written its part."""
        if dist.is_initialized():
            dist.barrier()
        if state.is_world_process_zero:
            folder = Path(args.output_dir, f"checkpoint-{state.global_step}")
            files = sorted(path for path in folder.iterdir() if path.is_file())
            for path in files:
                with path.open("rb") as stream:
                    os.fsync(stream.fileno())
            write_json(folder / WHOLE, {path.name: sha256_of(path) for path in files})

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        """Log the loss."""
        if "loss" in logs:
            found = (logs[name] for name in ("loss", "grad_norm", "learning_rate"))
            _log.info(
                "step %d of %d: loss %.4f, gradient norm %.2f, learning rate %.2e",
                state.global_step,
                state.max_steps,
                *found,
            )


def last_checkpoint(folder: str | Path) -> Path | None:
    """Find the last whole checkpoint.

    Parameters
    ----------
    folder : str or Path
        Where a trainer keeps them.

    Returns
    -------
    Path or None
        None if there is none.
    """
    found = [path for path in Path(folder).glob("checkpoint-*") if path.is_dir() and path.name[11:].isdecimal()]
    for path in sorted(found, key=lambda path: int(path.name[11:]), reverse=True):
        if is_whole(path):
            return path
        _log.warning("%s is not whole: not gone on from", path.name)
    return None


def is_whole(checkpoint: Path) -> bool:
    """Say whether a checkpoint is what was sealed.

    Parameters
    ----------
    checkpoint : Path
        Its folder.

    Returns
    -------
    bool
        Whether the seal is there and every file that it names has its content.
    """
    try:
        sealed = read_json(checkpoint / WHOLE)
        return bool(sealed) and all(sha256_of(checkpoint / name) == digest for name, digest in sealed.items())
    except (DamagedError, OSError, AttributeError):
        return False
