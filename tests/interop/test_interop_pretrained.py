"""Finding a model: paths, the Hugging Face cache, our cache, and what to do where there is none."""

from pathlib import Path

import huggingface_hub.constants
import pytest
import small_checkpoints

from lora_jax.interop import load, pretrained


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    """An empty Hugging Face cache."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


@pytest.fixture
def gguf(tmp_path) -> Path:
    path = tmp_path / "cache" / "models" / "small.gguf"
    path.parent.mkdir(parents=True)
    return small_checkpoints.write_gguf(path, *small_checkpoints.small("smollm2"))


def cache_on_hub(hub: Path, name: str) -> Path:
    repository = hub / f"models--{name.replace('/', '--')}"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    return small_checkpoints.write_huggingface(snapshot, *small_checkpoints.small("smollm2"))


def test_gguf_path(gguf):
    assert load(gguf).name == load(str(gguf)).name == "small"


def test_folder_path(tmp_path):
    small_checkpoints.write_huggingface(tmp_path / "mine", *small_checkpoints.small("llama2"))
    assert load(tmp_path / "mine").name == "mine"


def test_default_is_fetched_where_the_hub_cache_has_none(hub, gguf, tmp_path, monkeypatch):
    monkeypatch.setenv("LORA_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(pretrained, "fetch", lambda folder: folder / "small.gguf")
    model = load()
    assert model.name == "smollm2-135m" and model.source == str(gguf)


def test_default_comes_from_the_hub_cache_first(hub):
    snapshot = cache_on_hub(hub, "HuggingFaceTB/SmolLM2-135M-Instruct")
    model = load()
    assert model.name == "smollm2-135m" and model.source == str(snapshot)


def test_hub_name_in_the_cache(hub):
    cache_on_hub(hub, "someone/small-llama")
    assert load("someone/small-llama").name == "someone/small-llama"


def test_hub_name_with_its_weights_not_cached(hub):
    (cache_on_hub(hub, "someone/small-llama") / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"`hf download someone/small-llama`, or give"):
        load("someone/small-llama")


def test_gated_hub_name_not_cached(hub):
    with pytest.raises(
        FileNotFoundError,
        match=r"not in the local .* cache.*hf download meta-llama/Llama-3\.1-8B`.*licence.*"
        r"hf auth login.*give the path of a local folder",
    ):
        load("meta-llama/Llama-3.1-8B")


def test_unknown_name():
    with pytest.raises(FileNotFoundError, match=r"'smollm3' is no model here; expected 'smollm2"):
        load("smollm3")


@pytest.mark.parametrize("name", ["nothing.gguf", "nothing.whl"])
def test_no_such_file(tmp_path, name):
    with pytest.raises(FileNotFoundError, match=r"nothing\.\w+: no such file"):
        load(tmp_path / name)


@pytest.mark.parametrize("name", ["consolidated.00.pth", "model.pt", "pytorch_model.bin"])
def test_pickles_are_refused_unread(tmp_path, name):
    """By their names, alone or in a folder; the way to convert them is named."""
    small_checkpoints.write_huggingface(tmp_path / "mine", *small_checkpoints.small("llama2"))
    (tmp_path / "mine" / "model.safetensors").unlink()
    (tmp_path / "mine" / name).touch()
    for source in (tmp_path / "mine", tmp_path / "mine" / name):
        with pytest.raises(ValueError, match=r"pickle.* refused\. .*save_pretrained\(new\)"):
            load(source)


def test_wheel_of_something_else(tmp_path):
    (tmp_path / "other.whl").write_bytes(b"PK")
    with pytest.raises(ValueError, match=r"other\.whl is truncated, corrupt or another wheel"):
        load(tmp_path / "other.whl")
