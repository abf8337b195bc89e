"""Stage `deploy`: the chosen adapter merged into a plain sentence-transformers folder that needs no peft."""

from pathlib import Path

import numpy as np
from peft import PeftModel

from cachelora.config import BaseModelSource
from cachelora.errors import DamagedError
from cachelora.files import make_readable, write_text
from cachelora.models import encode_texts, load_model

_TOLERANCE = 1e-4
"""Largest difference, per coordinate of a unit vector, between adapter and merged weights in float32."""

_CARD = """---
library_name: sentence-transformers
pipeline_tag: sentence-similarity
base_model: {base}
---

# {model}, merged into {base}

An embedding model for semantic caches, made by cachelora. `manifest.json` says how.

```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("path/to/this/folder")
cached, paraphrase, lookalike = model.encode(
    ["symptoms of diabetes", "signs of diabetes mellitus", "treatment of diabetes"], normalize_embeddings=True
)
print("paraphrase", cached @ paraphrase, "look-alike", cached @ lookalike)
```
"""


def deploy_model(
    base: BaseModelSource, adapter: str | Path, model_id: str, probes: list[str], batch_tokens: int, folder: str | Path
) -> None:
    """Merge an adapter into its base model and save the result as a plain model.

    Parameters
    ----------
    base : BaseModelSource
        The base model.
    adapter : str or Path
        Folder of the adapter.
    model_id : str
        What the model card calls it.
    probes : list of str
        Texts whose embeddings must be the same before and after.
    batch_tokens : int
        As for :func:`cachelora.models.encode_texts`.
    folder : str or Path
        Where the model goes; it must not exist yet, or be empty.

    Raises
    ------
    DamagedError
        If the base model or the adapter is not what it should be, or the saved model's embeddings differ from the
        adapter's.
    """
    model = load_model(base, adapter, folded=False)
    expected = encode_texts(model, probes, batch_tokens)
    # A second, plain copy takes the merged weights: the one with the adapter has other layers in it.
    plain = load_model(base, None)
    merged = PeftModel.from_pretrained(plain.transformers_model, str(adapter)).merge_and_unload()
    plain.transformers_model.load_state_dict(merged.state_dict())
    plain.save(str(folder), create_model_card=False, safe_serialization=True)
    for member in Path(folder).rglob("*.safetensors"):
        make_readable(member)
    write_text(Path(folder) / "README.md", _CARD.format(base=base.name, model=model_id))
    found = encode_texts(load_model(BaseModelSource(source=str(folder), name=base.name), None), probes, batch_tokens)
    difference = max(float(np.abs(found[text] - expected[text]).max()) for text in expected)
    if difference > _TOLERANCE:
        raise DamagedError(
            str(folder),
            f"its embeddings differ from the adapter's by up to {difference:.1e}",
            "Delete it and run again",
        )
