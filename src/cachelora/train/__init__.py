"""Stage `train`: an adapter from triplets, the best checkpoint chosen on the validation split.

A step sees groups of equivalent texts with their hard negatives (:mod:`cachelora.train.batches`), a loss of
:mod:`cachelora.train.losses` compares all of them, and :mod:`cachelora.train.validation` says which checkpoint is kept.
Checkpoints let a killed training go on where it was.
"""

import copy
import hashlib
import json
import logging
import math
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, TaskType, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import save
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.training_args import SentenceTransformerTrainingArguments
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, record
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from transformers import PrinterCallback, set_seed

from cachelora.config import BaseModelSource, Train
from cachelora.errors import TrainingError
from cachelora.files import replacing, sha256_of
from cachelora.models import (
    ADAPTER_WEIGHTS,
    FULL_WEIGHTS,
    base_digest,
    load_model,
    remove_other_models,
    save_adapter,
    use_bfloat16,
)
from cachelora.train.batches import BalancedSampler, GroupCollator, read_items
from cachelora.train.trainer import WHOLE, GroupLoss, GroupTrainer, TellEpoch, last_checkpoint
from cachelora.train.validation import BestCheckpoint, Clock, Validation, read_validation

_log = logging.getLogger(__name__)

_CHECKPOINTS_PER_EPOCH = 4
_LITTLE_SPACE = 2**24


@dataclass(frozen=True)
class Training:
    """What a training needs to know; it can be handed to another process.

    Attributes
    ----------
    base : BaseModelSource
        The base model.
    triplets : mapping of str to str
        Parquet files by domain, in the columns of :data:`cachelora.schemas.TRIPLETS`. Several domains are balanced.
    settings : Train
        The recipe.
    seed : int
        Seed of weights, batches, drawn texts and dropout.
    folder : str
        Where the trained model is saved: an adapter as peft does, or ``model.safetensors`` of a full fine-tune.
    state : str
        Where checkpoints are kept, until :func:`remove_checkpoints`. No two trainings may share it at a time.
    threads : int
        CPU threads, of all processes together.
    code : str
        A digest of the code: checkpoints of other code are not gone on from.
    start : str or None
        Folder of an adapter to go on from, in place of a fresh one.
    replayed : mapping of str to float
        Share of its groups that a domain gives each epoch, for those that are only there to keep what was learnt.
    """

    base: BaseModelSource
    triplets: Mapping[str, str]
    settings: Train
    seed: int
    folder: str
    state: str
    threads: int = 1
    code: str = ""
    start: str | None = None
    replayed: Mapping[str, float] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """What the checkpoints are valid for: 16 hexadecimal digits of settings, seed, code and input digests."""
        # How the work is cut up changes no result beyond rounding, and full fine-tunes have no adapter.
        without = {"mini_batch_size", "processes"}
        if self.settings.full:
            without |= {"rank", "alpha", "dropout", "target_modules"}
        content = {
            "settings": self.settings.model_dump(mode="json", exclude=without),
            "seed": self.seed,
            "base": base_digest(self.base),
            "triplets": {domain: sha256_of(path) for domain, path in self.triplets.items()},
            "code": self.code,
            "start": self.start and sha256_of(Path(self.start, ADAPTER_WEIGHTS)),
            "replayed": dict(self.replayed),
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def train_model(training: Training) -> dict[str, Any]:
    """Train a model, or go on training it, and save its best checkpoint.

    Parameters
    ----------
    training : Training
        What to train on what, and where.

    Returns
    -------
    dict
        The validation metrics at each evaluation (the base model's first), which one was kept, and the log.

    Raises
    ------
    TrainingError
        If ``target_modules`` fit no layer, there are too few groups, or the loss is not a number.
    ModelError, DamagedError
        As :func:`cachelora.models.load_model`; a TrainingError instead if there are several processes.
    """
    processes = training.settings.processes
    if torch.cuda.is_available() and processes > torch.cuda.device_count():
        raise TrainingError(
            "train.processes", f"{processes}, and there are {torch.cuda.device_count()} GPUs", "Ask for as many"
        )
    if not torch.cuda.is_available() and processes > (os.cpu_count() or 1):
        raise TrainingError("train.processes", f"{processes}, and there are {os.cpu_count()} CPUs", "Lower it")
    state = Path(training.state)
    mine = state / training.key
    mine.mkdir(parents=True, exist_ok=True)
    for other in state.iterdir():
        if other != mine and other.is_dir():
            remove_checkpoints(other)
    last = last_checkpoint(mine)
    for other in mine.iterdir():
        # What the batches are made of takes seconds to make again, and more to check.
        if other != last and other.is_dir():
            shutil.rmtree(other)
    if processes == 1:
        metrics = _train(training, mine)
    else:
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=processes,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            # Snakemake decides whether to try again.
            max_restarts=0,
            start_method="spawn",
        )
        try:
            metrics = elastic_launch(config, _train_as_one_of_several)(training, mine)[0]
        except ChildFailedError as error:
            rank, failure = error.get_first_failure()
            first = failure.message if isinstance(failure.message, str) else failure.message["message"]
            raise TrainingError("train", f"process {rank} of {processes} failed ({first})", "See the log") from error
    return metrics


def remove_checkpoints(state: str | Path) -> None:
    """Remove a folder of checkpoints, so that a kill in the middle leaves none that seems whole.

    Parameters
    ----------
    state : str or Path
        The folder; to be called when everything that a training makes has been written.
    """
    for mark in Path(state).rglob(WHOLE):
        mark.unlink(missing_ok=True)
    # Missing if somebody else has removed it, which is as good.
    shutil.rmtree(state, ignore_errors=True)


@record
def _train_as_one_of_several(training: Training, state: Path) -> dict[str, Any]:
    """Train in a process whose errors reach the one that started it, and of which the first one logs."""
    level = logging.INFO if os.environ["RANK"] == "0" else logging.ERROR
    logging.basicConfig(level=level, format="%(asctime)s %(levelname)s %(name)s: %(message)s", force=True)
    return _train(training, state)


def _train(training: Training, state: Path) -> dict[str, Any]:
    """Train in this process, alone or as one of several."""
    settings, seed = training.settings, training.seed
    processes = settings.processes
    torch.set_num_threads(max(1, training.threads // processes))
    set_seed(seed)
    model = load_model(training.base, None, device=_device())
    # Examples for a model card that nobody reads; they would encode a thousand rows.
    model.model_card_data.generate_widget_examples = False
    bfloat16 = use_bfloat16(settings.precision, model.device)
    _quicken(model)
    base = copy.deepcopy(model) if settings.guided or "distillation" in settings.losses else None
    parameters = _choose_parameters(model, settings, bfloat16)
    if training.start is not None:
        _copy_adapter(model, training.base, training.start)
    items, members = read_items(training.triplets, settings.grouped, state / "items")
    _check_items(items, settings)
    validation = Validation(
        {domain: read_validation(path, settings.validation_groups) for domain, path in training.triplets.items()},
        bfloat16,
    )
    sampler = BalancedSampler(members, settings.batch_size, seed, processes, settings.size_exponent, training.replayed)
    best = BestCheckpoint(model, parameters, validation, settings.most_lost_similarity)
    checkpoint = last_checkpoint(state)
    if checkpoint is not None:
        _log.info("going on from %s", checkpoint.name)
    trainer = GroupTrainer(
        parameters,
        best,
        model=model,
        args=_training_arguments(settings, sampler, seed, state, bfloat16, resumed=checkpoint is not None),
        train_dataset=items,
        data_collator=GroupCollator(model.preprocess, sampler, settings, seed),
        loss=GroupLoss(model, settings, base, bfloat16),
        evaluator=validation,
    )
    # It prints what is logged already.
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(TellEpoch(sampler, len(sampler) // processes))
    try:
        trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
        best.finish(trainer.state)
    except torch.OutOfMemoryError as error:
        raise TrainingError("train", "the device's memory is not enough", "Lower train.batch_size or rank") from error
    except (OSError, RuntimeError, SafetensorError) as error:
        # Torch's and safetensors' writers have errors of their own for a full disk.
        if shutil.disk_usage(state).free > _LITTLE_SPACE:
            raise
        raise TrainingError(str(state), "the disk is full", "Make room and run again: it goes on from there") from error
    best.restore()
    if trainer.is_world_process_zero():
        _save(model, settings, training.base.name, Path(training.folder))
    return {
        "items": len(items),
        "steps": trainer.state.global_step,
        "best_step": best.step,
        "validation": best.history,
        "log": [entry for entry in trainer.state.log_history if "loss" in entry],
        "device": _device_use(model.device, processes, best.clock),
    }


def _device() -> str:
    """Name this process's device: a GPU of its own, if there are any."""
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"


def _device_use(device: torch.device, processes: int, clock: Clock) -> dict[str, Any]:
    """Say what the training took of the devices: memory in MiB, time in seconds, and that of the steps alone."""
    use: dict[str, Any] = {
        "type": device.type,
        "processes": processes,
        "seconds": round(clock.seconds, 1),
        "step_seconds": round(clock.seconds - clock.validating, 1),
    }
    if device.type == "cuda":
        use["gpu_seconds"] = round(processes * clock.seconds, 1)
        use["gpu_memory_mb"] = round(torch.cuda.max_memory_allocated(device) / 2**20)
    return use


def _check_items(items: Dataset, settings: Train) -> None:
    """Refuse what no batch can be made of."""
    if len(items) < max(2, settings.processes):
        what = f"{len(items)} groups are not enough for a batch of {settings.processes} processes"
        if settings.processes == 1:
            what = "one group is not enough for negatives in a batch"
        raise TrainingError("train", what, "Give more queries")


def _training_arguments(
    settings: Train, sampler: BalancedSampler, seed: int, state: Path, bfloat16: bool, resumed: bool
) -> SentenceTransformerTrainingArguments:
    """Translate the recipe into the trainer's words."""
    per_epoch = len(sampler) // settings.processes
    every = max(1, per_epoch // _CHECKPOINTS_PER_EPOCH)
    schedules = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}
    cuda = torch.cuda.is_available()
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(state),
        num_train_epochs=settings.epochs,
        per_device_train_batch_size=sampler.batch_size,
        batch_sampler=lambda dataset, **options: sampler,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        warmup_steps=math.ceil(settings.warmup_share * per_epoch * settings.epochs),
        lr_scheduler_type=schedules[settings.schedule],
        max_grad_norm=settings.max_grad_norm,
        bf16=bfloat16,
        tf32=True if cuda and torch.cuda.get_device_capability()[0] >= 8 else None,
        use_cpu=not cuda,
        ddp_find_unused_parameters=False,
        seed=seed,
        eval_strategy="steps",
        eval_steps=max(1, per_epoch // settings.evaluations_per_epoch),
        eval_on_start=not resumed,
        # At the same steps, so that a resumed training logs the same means.
        save_strategy="steps",
        save_steps=every,
        save_total_limit=2,
        logging_steps=every,
        logging_nan_inf_filter=False,
        report_to="none",
        disable_tqdm=True,
    )
    # With several, the trainer would spread one process over all of them.
    arguments._n_gpu = min(1, arguments.n_gpu)
    return arguments


def _quicken(model: SentenceTransformer) -> None:
    """Spare a model what costs time in training and brings nothing; docs/recipe.md has the measurements."""
    # The base model's own dropout; that in front of the LoRA matrices is a setting.
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    # On CPUs, the fused kernel's backward pass is the slower one for texts of a few dozen tokens.
    if model.device.type == "cpu":
        model.transformers_model.set_attn_implementation("eager")


def _choose_parameters(model: SentenceTransformer, settings: Train, bfloat16: bool) -> dict[str, torch.nn.Parameter]:
    """Give a model a fresh adapter, or free its own weights, and return what is trained by name."""
    network = model.transformers_model
    # Also what lies outside the network, such as a dense layer behind it: an adapter does not hold it.
    model.requires_grad_(False)
    # BERT's pooler comes after the last layer, of which mean pooling reads the output.
    unused = sorted({name for name, _ in network.named_modules() if name.startswith("pooler.")})
    if settings.full:
        for name, parameter in network.named_parameters():
            parameter.requires_grad_(not name.startswith("pooler."))
    else:
        _add_adapter(model, settings, unused)
        if bfloat16:
            # What autocast would do with frozen weights at every step.
            for module in network.modules():
                if type(module) is torch.nn.Linear and not module.weight.requires_grad:
                    module.to(torch.bfloat16)
    return {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}


def _add_adapter(model: SentenceTransformer, settings: Train, unused: list[str]) -> None:
    """Give a model a fresh adapter."""
    linear = [name for name, module in model.transformers_model.named_modules() if type(module) is torch.nn.Linear]
    for target in settings.target_modules:
        if not any(f".{name}".endswith(f".{target}") for name in linear):
            known = sorted({name.rpartition(".")[2] for name in linear if name not in unused})
            raise TrainingError(
                "train.target_modules", f"'{target}' is no linear layer of the base model", f"Use some of {known}"
            )
    config = LoraConfig(
        task_type=TaskType.FEATURE_EXTRACTION,
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=settings.target_modules,
        exclude_modules=unused or None,
    )
    model.add_adapter(config)


def _copy_adapter(model: SentenceTransformer, base: BaseModelSource, start: str) -> None:
    """Give a model's fresh adapter the weights of another."""
    other = load_model(base, start).transformers_model
    mine, theirs = (network.peft_config["default"] for network in (model.transformers_model, other))
    for name, wanted, value in (
        ("rank", mine.r, theirs.r),
        ("alpha", mine.lora_alpha, theirs.lora_alpha),
        ("target_modules", sorted(mine.target_modules), sorted(theirs.target_modules)),
    ):
        if value != wanted:
            raise TrainingError(f"train.{name}", f"{wanted}, and {start} has {value}", "Make them the same")
    set_peft_model_state_dict(model.transformers_model, get_peft_model_state_dict(other, save_embedding_layers=False))


def _save(model: SentenceTransformer, settings: Train, base_name: str, folder: Path) -> None:
    """Save the adapter, or the weights of a full fine-tune."""
    network = model.transformers_model
    if settings.full:
        folder.mkdir(parents=True, exist_ok=True)
        remove_other_models(folder, (FULL_WEIGHTS,))
        with replacing(folder / FULL_WEIGHTS) as temporary:
            temporary.write_bytes(
                save({name: value.cpu().contiguous() for name, value in network.state_dict().items()})
            )
    else:
        weights = get_peft_model_state_dict(network, save_embedding_layers=False)
        # Half the size; peft computes with them in float32 again. docs/recipe.md has what it changes.
        half = {name: value.half() for name, value in weights.items()}
        if not all(bool(value.isfinite().all()) for value in half.values()):
            raise TrainingError("train", "the trained weights are not all numbers", "Lower train.learning_rate")
        save_adapter(half, network.peft_config["default"], base_name, folder)
