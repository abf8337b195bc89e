import shutil

import numpy as np
import pytest
from safetensors.numpy import save_file

from cachelora.config import BaseModelSource
from cachelora.errors import DamagedError, ModelError
from cachelora.models import base_folder, encode_texts, load_model


@pytest.fixture
def local(base, tmp_path):
    """The base model as a local folder, as one from a hub would lie in its cache."""
    shutil.copytree(base_folder(base), tmp_path / "model")
    return tmp_path / "model"


def test_package_and_local_folder_give_the_same_model(base, local):
    texts = ["symptoms of gout", "signs of gout"]
    from_package = encode_texts(load_model(base, None), texts, 2)
    from_folder = encode_texts(load_model(base.model_copy(update={"source": str(local)}), None), texts, 2)
    for text in texts:
        np.testing.assert_array_equal(from_package[text], from_folder[text])
        assert np.linalg.norm(from_package[text]) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("batch_tokens", [1, 12, 1536])
def test_a_text_has_the_same_vector_in_whatever_batch_it_is(base, batch_tokens):
    model = load_model(base, None)
    # The characters say nothing of the tokens, of which the model sees 256; some texts exceed the smaller batches.
    texts = ["", "gout", "signs of gout " * 9, "internationalization", "a b c d e f g h i", "pain " * 400, "gout"]
    vectors = encode_texts(model, texts, batch_tokens)
    assert vectors.keys() == set(texts)
    for text, vector in vectors.items():
        np.testing.assert_allclose(vector, model.encode(text, normalize_embeddings=True), atol=1e-6)


def test_no_texts_have_no_vectors(base):
    assert encode_texts(load_model(base, None), []) == {}


def test_other_weights_than_the_configs_are_refused(base, local):
    weights = local / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(ModelError, match=f"the config says {base.sha256}"):
        base_folder(base.model_copy(update={"source": str(local)}))
    assert base_folder(BaseModelSource(source=str(local), name="x")) == local


def test_a_truncated_base_model_is_refused(local):
    weights = local / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-2])
    with pytest.raises(DamagedError, match="its header promises"):
        base_folder(BaseModelSource(source=str(local), name="x"))


def test_weights_of_another_model_are_refused(local):
    save_file({"x": np.zeros(2, dtype=np.float32)}, local / "model.safetensors")
    with pytest.raises(ModelError, match=r"lacks \d+ of the \d+ weights"):
        load_model(BaseModelSource(source=str(local), name="x"), None)


@pytest.mark.parametrize("name", ["config.json", "modules.json", "tokenizer.json", "1_Pooling/config.json"])
def test_a_base_model_with_a_cut_file_is_refused(local, name):
    (local / name).write_text((local / name).read_text()[:20])
    with pytest.raises(ModelError, match="it cannot be loaded"):
        load_model(BaseModelSource(source=str(local), name="x"), None)


def test_pickled_weights_are_refused(local):
    (local / "model.safetensors").rename(local / "pytorch_model.bin")
    with pytest.raises(ModelError, match="safetensors"):
        base_folder(BaseModelSource(source=str(local), name="x"))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("hub:sentence-transformers/all-MiniLM-L12-v2@c004d8e3e901237d8fa7e9fff12774962e391ce5", "HF_HUB_OFFLINE"),
        ("package:no-such-package", "this package is not installed"),
        ("package:torch", r"holds 0 files of the form modules\.json"),
        ("no/such/folder", r"no modules\.json"),
    ],
)
def test_a_base_model_that_is_not_there_is_a_clear_error(source, message, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match=message):
        base_folder(BaseModelSource(source=source, name="x"))


def test_a_hub_model_is_loaded_from_the_cache_when_the_hub_is_off(base, local, tmp_path, monkeypatch):
    import huggingface_hub.constants

    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "cache/models--owner--name"
    (repository / "snapshots").mkdir(parents=True)
    local.rename(repository / "snapshots" / commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    source = base.model_copy(update={"source": f"hub:owner/name@{commit}"})
    assert base_folder(source) == repository / "snapshots" / commit
