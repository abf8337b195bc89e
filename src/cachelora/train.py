"""Stage `train`: a LoRA adapter from triplets, the best checkpoint chosen on the validation split.

The loss is multiple negatives ranking (Henderson et al. 2017, arXiv:1705.00652; with the cosine divided by a
temperature as in seed document 000): for a row with anchor a and positive p, minus the log of the share that
exp(cos(a, p) / temperature) has in the sum over all positives and hard negatives of the batch.
"""

import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pandas as pd
import torch
from datasets import Dataset
from peft import LoraConfig, TaskType, get_peft_model_state_dict, set_peft_model_state_dict
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
from sentence_transformers.base.evaluation import BaseEvaluator
from sentence_transformers.base.sampler import DefaultBatchSampler
from sentence_transformers.sentence_transformer.data_collator import SentenceTransformerDataCollator
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.training_args import SentenceTransformerTrainingArguments
from transformers import PrinterCallback, TrainerCallback, set_seed

from cachelora.config import Train
from cachelora.errors import TrainingError
from cachelora.metrics import accuracy, average_precision, margin
from cachelora.models import save_adapter, score_triplets

_log = logging.getLogger(__name__)


def train_adapter(
    model: SentenceTransformer,
    triplets: Mapping[str, pd.DataFrame],
    settings: Train,
    seed: int,
    base_name: str,
    folder: str | Path,
) -> dict[str, Any]:
    """Train an adapter and save its best checkpoint.

    Parameters
    ----------
    model : SentenceTransformer
        The base model; it gets the adapter.
    triplets : mapping of str to pandas.DataFrame
        By domain, in the columns of :data:`cachelora.schemas.TRIPLETS`. Several domains are balanced.
    settings : Train
        The recipe.
    seed : int
        Seed of weights, batches, negatives and dropout.
    base_name : str
        What the adapter calls its base model.
    folder : str or Path
        Where the adapter is saved, as peft does.

    Returns
    -------
    dict
        The validation metrics at each evaluation (the base model's first), which one was kept, and the losses.

    Raises
    ------
    TrainingError
        If ``target_modules`` fit no layer, a batch would hold a single row, or the loss is not a number.
    """
    set_seed(seed)
    # Examples for a model card that nobody reads; they would encode a thousand rows.
    model.model_card_data.generate_widget_examples = False
    _quicken(model)
    _add_adapter(model, settings)
    train = {domain: table[table["split"] == "train"] for domain, table in triplets.items()}
    rows = pool_domains(train, seed)
    if rows["group"].nunique() < 2:
        raise TrainingError("train", "one group is not enough for negatives in a batch", "Give more queries")
    validation = Validation({domain: table[table["split"] == "validation"] for domain, table in triplets.items()})
    collator = NegativesCollator(
        preprocess_fn=model.preprocess, seed=seed, negatives_per_row=settings.negatives_per_row
    )
    best = BestCheckpoint(model, validation)
    sampler = GroupBatchSampler(rows["group"].tolist(), settings.batch_size, seed)
    with TemporaryDirectory() as scratch:
        trainer = SentenceTransformerTrainer(
            model=model,
            args=_training_arguments(settings, sampler, seed, scratch),
            train_dataset=Dataset.from_pandas(
                rows[["anchor", "positive", "negatives"]].assign(row=range(len(rows))), preserve_index=False
            ),
            data_collator=collator,
            loss=SortedRankingLoss(model, scale=1 / settings.temperature),
            evaluator=validation,
            callbacks=[collator.epoch_callback(), best, LossCheck()],
        )
        # It prints what LossCheck and BestCheckpoint log.
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    best.restore()
    save_adapter(_adapter_state(model), model.transformers_model.peft_config["default"], base_name, folder)
    return {
        "rows": len(rows),
        "steps": trainer.state.global_step,
        "best_step": best.step,
        "validation": best.history,
        "loss": [entry for entry in trainer.state.log_history if "loss" in entry],
    }


def _training_arguments(
    settings: Train, sampler: "GroupBatchSampler", seed: int, scratch: str
) -> SentenceTransformerTrainingArguments:
    """Translate the recipe into the trainer's words."""
    steps = len(sampler) * settings.epochs
    schedules = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}
    return SentenceTransformerTrainingArguments(
        output_dir=scratch,
        num_train_epochs=settings.epochs,
        per_device_train_batch_size=settings.batch_size,
        batch_sampler=lambda dataset, **options: sampler,
        learning_rate=settings.learning_rate,
        warmup_steps=math.ceil(settings.warmup_share * steps),
        lr_scheduler_type=schedules[settings.schedule],
        max_grad_norm=settings.max_grad_norm,
        bf16=_use_bfloat16(settings.precision),
        use_cpu=not torch.cuda.is_available(),
        seed=seed,
        eval_strategy="steps",
        eval_steps=max(1, len(sampler) // settings.evaluations_per_epoch),
        eval_on_start=True,
        # The best adapter is kept in memory (BestCheckpoint).
        save_strategy="no",
        logging_steps=max(1, len(sampler) // 4),
        logging_nan_inf_filter=False,
        report_to="none",
        disable_tqdm=True,
    )


_MOST_REPEATS = 4


def pool_domains(triplets: Mapping[str, pd.DataFrame], seed: int) -> pd.DataFrame:
    """Pool the rows of several domains so that a large one does not drown a small one.

    Every domain gives all of its rows. A smaller one gives them again, and a sample for the rest, until it has as many
    as the largest, but at most four times: what is repeated more often is learnt by heart.

    Parameters
    ----------
    triplets : mapping of str to pandas.DataFrame
        By domain, in the columns of :data:`cachelora.schemas.TRIPLETS`.
    seed : int
        Seed of the samples.

    Returns
    -------
    pandas.DataFrame
        The pooled rows. Groups of different domains stay different.
    """
    largest = max(len(table) for table in triplets.values())
    random = np.random.default_rng(seed)
    parts = []
    for domain, table in triplets.items():
        whole, rest = divmod(min(largest, _MOST_REPEATS * len(table)), len(table))
        chosen = np.concatenate([np.tile(np.arange(len(table)), whole), random.permutation(len(table))[:rest]])
        parts.append(table.iloc[chosen].assign(group=domain + " " + table["group"].iloc[chosen]))
    return pd.concat(parts, ignore_index=True)


class GroupBatchSampler(DefaultBatchSampler):
    """Batches that never hold two rows of one group, so that no paraphrase meets its sibling as a negative.

    Each batch draws its groups at random, weighted by the rows that they have left, and a row of each. A group with as
    many rows left as batches can still follow is taken in any case, so an epoch has no more batches than it must. Rows
    of a last group that has no other left to be told from are left out of the epoch.

    Parameters
    ----------
    groups : sequence of str, length n
        Group of each row.
    batch_size : int
        Most rows a batch.
    seed : int
        Seed of the order; each epoch has another one.
    """

    def __init__(self, groups: Sequence[str], batch_size: int, seed: int) -> None:
        super().__init__(range(len(groups)), batch_size=batch_size, drop_last=False, seed=seed)
        self._members: dict[str, list[int]] = {}
        for row, group in enumerate(groups):
            self._members.setdefault(group, []).append(row)
        most = max(map(len, self._members.values()))
        self._batches = max(math.ceil(len(groups) / batch_size), most)

    def __iter__(self) -> Iterator[list[int]]:
        """Yield the batches of the current epoch, as row numbers."""
        random = np.random.default_rng([self.seed, self.epoch])
        rows = [random.permutation(members).tolist() for members in self._members.values()]
        left = np.array([len(members) for members in rows])
        for following in reversed(range(self._batches)):
            having = np.flatnonzero(left)
            if len(having) < 2:
                return
            # Weighted sampling without replacement: the largest of u^(1/w), here by their logarithm (Efraimidis and
            # Spirakis 2006). The groups that would not fit into the batches that follow come first.
            keys = np.log(random.random(len(having))) / left[having]
            keys[left[having] > following] = np.inf
            groups = having[np.argsort(-keys, kind="stable")[: self.batch_size]]
            left[groups] -= 1
            yield [rows[group].pop() for group in groups]

    def __len__(self) -> int:
        """Return the number of batches of an epoch; it has fewer if one group alone is left at its end."""
        return self._batches


class NegativesCollator(SentenceTransformerDataCollator):
    """Makes batches whose rows bring the same number of hard negatives, drawn anew each epoch.

    The texts of a batch are dealt out to its columns by length, so that little is padded: in a column of mixed lengths,
    half of what is computed is padding. The label of a row says where its anchor, positive and negatives went;
    :class:`SortedRankingLoss` puts them back.

    Parameters
    ----------
    preprocess_fn : callable
        The model's tokenisation.
    seed : int
        Seed of the draw.
    negatives_per_row : int
        Hard negatives a row brings. A row with fewer repeats some: a column more in the softmax, no new text.
    """

    def __init__(self, preprocess_fn: Any, seed: int, negatives_per_row: int) -> None:
        super().__init__(preprocess_fn=preprocess_fn)
        self._seed = seed
        self._number = negatives_per_row
        self._epoch = 0

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        """Draw the negatives and tokenise the batch."""
        rows = []
        for feature in features:
            random = np.random.default_rng([self._seed, self._epoch, feature["row"]])
            texts = [negative["text"] for negative in feature["negatives"]]
            order = random.permutation(len(texts))
            drawn = [texts[order[k % len(texts)]] for k in range(self._number)]
            rows.append([feature["anchor"], feature["positive"], *drawn])
        flat = [text for row in rows for text in row]
        by_length = sorted(range(len(flat)), key=lambda number: len(flat[number]))
        place = np.empty(len(flat), dtype=np.int64)
        place[by_length] = np.arange(len(flat))
        columns = [by_length[start : start + len(rows)] for start in range(0, len(flat), len(rows))]
        return super().__call__(
            [
                {f"text_{k}": flat[column[row]] for k, column in enumerate(columns)}
                | {"label": torch.from_numpy(place.reshape(len(rows), -1)[row])}
                for row in range(len(rows))
            ]
        )

    def epoch_callback(self) -> TrainerCallback:
        """Return the callback that tells this collator the epoch."""
        collator = self

        class TellEpoch(TrainerCallback):
            def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                collator._epoch = round(state.epoch or 0)

        return TellEpoch()


class SortedRankingLoss(MultipleNegativesRankingLoss):
    """Multiple negatives ranking on batches whose texts :class:`NegativesCollator` has sorted by length."""

    def forward(self, sentence_features: Iterable[dict[str, torch.Tensor]], labels: torch.Tensor) -> torch.Tensor:
        """Return the loss of a batch of n rows.

        Parameters
        ----------
        sentence_features : iterable of dict of str to torch.Tensor
            The tokens of each column of n texts.
        labels : torch.Tensor, shape (n, c)
            Where the anchor, positive and negatives of each row stand among all texts.

        Returns
        -------
        torch.Tensor, shape ()
            The loss.
        """
        embeddings = torch.cat([self.model(features)["sentence_embedding"] for features in sentence_features])
        return self.compute_loss_from_embeddings([embeddings[column] for column in labels.T], labels)


class Validation(BaseEvaluator):
    """Measures a model on the validation split.

    Parameters
    ----------
    triplets : mapping of str to pandas.DataFrame
        Validation rows by domain, in the columns of :data:`cachelora.schemas.TRIPLETS`.
    """

    def __init__(self, triplets: Mapping[str, pd.DataFrame]) -> None:
        super().__init__()
        self._triplets = {domain: explode_negatives(table) for domain, table in triplets.items()}
        self.primary_metric = "ap"

    def __call__(
        self, model: SentenceTransformer, output_path: str | None = None, epoch: float = -1, steps: int = -1
    ) -> dict[str, float]:
        """Return AP, margin and accuracy: the mean over domains, so that each counts the same."""
        metrics: dict[str, list[float]] = {"ap": [], "margin": [], "accuracy": []}
        for triplets in self._triplets.values():
            scores = score_triplets(model, triplets, batch_size=64)
            pair = scores["positive_similarity"].to_numpy(), scores["negative_similarity"].to_numpy()
            once = np.ones((1, len(scores)))
            for name, metric in (("ap", average_precision), ("margin", margin), ("accuracy", accuracy)):
                metrics[name].append(float(metric(*pair, once)[0]))
        return {name: float(np.mean(values)) for name, values in metrics.items()}


def explode_negatives(triplets: pd.DataFrame) -> pd.DataFrame:
    """Make a triplet of each row and each of its negatives.

    Parameters
    ----------
    triplets : pandas.DataFrame
        In the columns of :data:`cachelora.schemas.TRIPLETS`.

    Returns
    -------
    pandas.DataFrame
        With columns anchor, positive, negative, kind, group.
    """
    rows = [
        (row.anchor, row.positive, negative["text"], negative["kind"], row.group)
        for row in triplets.itertuples()
        for negative in row.negatives
    ]
    return pd.DataFrame(rows, columns=["anchor", "positive", "negative", "kind", "group"])


class BestCheckpoint(TrainerCallback):
    """Keeps the adapter weights of the evaluation with the highest validation AP; a tie goes to the higher margin.

    The weights of an adapter are small, so they stay in memory; the base model at step 0 is not a candidate.

    Parameters
    ----------
    model : SentenceTransformer
        The model in training.
    validation : Validation
        The evaluator whose metrics decide.
    """

    def __init__(self, model: SentenceTransformer, validation: Validation) -> None:
        self._model = model
        self._validation = validation
        self._weights: dict[str, torch.Tensor] | None = None
        self._best = (-math.inf, -math.inf)
        self.step = 0
        self.history: list[dict[str, float]] = []

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **kwargs: Any) -> None:
        """Keep the weights if they are the best so far."""
        if self.history and self.history[-1]["step"] == state.global_step:
            return
        found = {name: metrics[f"eval_{name}"] for name in ("ap", "margin", "accuracy")}
        if not math.isfinite(found["margin"]):
            raise TrainingError(
                "train", f"the embeddings are not numbers at step {state.global_step}", "Lower train.learning_rate"
            )
        self.history.append({"step": state.global_step, **found})
        _log.info(
            "step %d of %d: validation AP %.4f, margin %.4f, accuracy %.4f",
            state.global_step, state.max_steps, found["ap"], found["margin"], found["accuracy"],
        )  # fmt: skip
        score = (found["ap"], found["margin"])
        if state.global_step > 0 and score > self._best:
            self._best, self.step = score, state.global_step
            self._weights = {name: value.detach().cpu().clone() for name, value in _adapter_state(self._model).items()}

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Evaluate the last step, unless that was done."""
        if self.history[-1]["step"] != state.global_step:
            found = self._validation(self._model)
            self.on_evaluate(args, state, control, {f"eval_{name}": value for name, value in found.items()})

    def restore(self) -> None:
        """Put the kept weights back into the model."""
        if self._best[0] < self.history[0]["ap"]:
            _log.warning("no evaluation reached the base model's validation AP: look at data and learning rate")
        set_peft_model_state_dict(self._model.transformers_model, self._weights)


class LossCheck(TrainerCallback):
    """Stops when the loss is not a number."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        """Look at the logged loss."""
        loss = logs.get("loss")
        if loss is None:
            return
        _log.info(
            "step %d of %d: loss %.4f, learning rate %.2e",
            state.global_step,
            state.max_steps,
            loss,
            logs["learning_rate"],
        )
        if not math.isfinite(loss):
            raise TrainingError("train", f"the loss is {loss} at step {state.global_step}", "Lower train.learning_rate")


def _use_bfloat16(precision: str) -> bool:
    """Say whether the forward pass runs in bfloat16; ``auto`` does where the hardware multiplies in it."""
    if precision != "auto":
        return precision == "bfloat16"
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def _quicken(model: SentenceTransformer) -> None:
    """Spare a model what costs time in training and brings nothing; docs/recipe.md has the measurements."""
    # The base model's own dropout; that in front of the LoRA matrices is a setting.
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    # On CPUs, the fused kernel's backward pass is the slower one for texts of a few dozen tokens.
    if model.device.type == "cpu":
        model.transformers_model.set_attn_implementation("eager")


def _add_adapter(model: SentenceTransformer, settings: Train) -> None:
    """Give a model a fresh adapter."""
    config = LoraConfig(
        task_type=TaskType.FEATURE_EXTRACTION,
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=settings.target_modules,
    )
    try:
        model.add_adapter(config)
    except ValueError as error:
        first = str(error).strip().partition("\n")[0]
        raise TrainingError(
            "train.target_modules", f"{settings.target_modules} do not fit the base model ({first})", "Name its layers"
        ) from error


def _adapter_state(model: SentenceTransformer) -> dict[str, torch.Tensor]:
    """Return the weights of the adapter by name."""
    return get_peft_model_state_dict(model.transformers_model, save_embedding_layers=False)
