"""Stage `merge`: one adapter out of the domains' adapters, by weight arithmetic, without training.

``svd`` adds up the weighted updates B·A of the adapters and re-compresses the sum to their rank by a truncated singular
value decomposition. ``linear`` adds up the factors A and B apart from one another, which brings in cross terms. Both
are peft's (``LoraModel.add_weighted_adapter``).
"""

from collections.abc import Mapping
from pathlib import Path

from peft import PeftModel, get_peft_model_state_dict
from sentence_transformers import SentenceTransformer

from cachelora.config import Merge
from cachelora.errors import ModelError
from cachelora.manifest import verify
from cachelora.models import ADAPTER_FILES, save_adapter

MERGED = "merged"


def merge_adapters(
    model: SentenceTransformer, adapters: Mapping[str, str | Path], settings: Merge, folder: str | Path
) -> None:
    """Merge adapters of one base model and save the result.

    Parameters
    ----------
    model : SentenceTransformer
        The base model, without an adapter; afterwards it holds the merged one, in use.
    adapters : mapping of str to (str or Path)
        Folders of the adapters, by domain; each is verified first.
    settings : Merge
        Method, and the weight of each adapter.
    folder : str or Path
        Where the merged adapter is saved, as peft does.

    Raises
    ------
    DamagedError
        If an adapter is not what its manifest says.
    ModelError
        If the adapters do not fit one another.
    """
    tuner: PeftModel | None = None
    # Names of our own: peft puts them into module dictionaries, where not every domain's name would do.
    names = [f"adapter_{number}" for number in range(len(adapters))]
    for name, adapter in zip(names, adapters.values(), strict=True):
        verify(adapter, ADAPTER_FILES)
        if tuner is None:
            tuner = PeftModel.from_pretrained(model.transformers_model, str(adapter), adapter_name=name)
        else:
            tuner.load_adapter(str(adapter), adapter_name=name)
    configs = [tuner.peft_config[name] for name in names]
    ranks = {config.r for config in configs}
    targets = {tuple(sorted(config.target_modules)) for config in configs}
    bases = {config.base_model_name_or_path for config in configs}
    for what, values in (("ranks", ranks), ("target modules", targets), ("base models", bases)):
        if len(values) > 1:
            raise ModelError(
                ", ".join(map(str, adapters.values())),
                f"the adapters have different {what}: {', '.join(sorted(map(str, values)))}",
                "Merge adapters of one recipe and one base model",
            )
    tuner.add_weighted_adapter(
        adapters=names,
        weights=[settings.weight] * len(adapters),
        adapter_name=MERGED,
        combination_type=settings.method,
        svd_rank=max(ranks),
        svd_full_matrices=False,
    )
    tuner.set_adapter(MERGED)
    weights = get_peft_model_state_dict(tuner, adapter_name=MERGED, save_embedding_layers=False)
    save_adapter(weights, tuner.peft_config[MERGED], bases.pop(), folder)
