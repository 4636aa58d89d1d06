"""timm's weights: training reads them from this machine's caches, and only prefetch uses the network."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import timm
import torch
from huggingface_hub.utils import EntryNotFoundError, LocalEntryNotFoundError
from safetensors.torch import save_file
from torch import nn

from fedpeft_dist.backbones import hub
from fedpeft_dist.backbones.timm_backbone import build_backbone, prefetch_weights
from fedpeft_dist.config import schema
from fedpeft_dist.config.errors import ConfigError

NAME, REPOSITORY, CLASSES = "test_vit", "models--timm--test_vit.r160_in1k", 5
URL_FILE = "weights-1234.pth"


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fails a test that tries to reach the network, even if the tested code swallows the error."""
    tries: list[object] = []

    def refuse(*arguments: object, **_: object) -> None:
        tries.append(arguments)
        raise AssertionError(f"the network is used: {arguments}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    yield
    assert not tries


@pytest.fixture(autouse=True)
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Empty caches of the hub (`hub`) and of torch (`torch`)."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    return tmp_path


def config_of(name: str = NAME, **values: Any) -> schema.BackboneConfig:
    return schema.BackboneConfig(name=name, **values)


def build(config: schema.BackboneConfig, num_classes: int = CLASSES, image_size: int = 160) -> nn.Module:
    return build_backbone(config, num_classes, image_size, seed=1).model


def random_state(name: str = NAME, num_classes: int = 1000) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    model = timm.create_model(name, num_classes=num_classes)
    return {
        key: torch.rand(tensor.shape, generator=generator) if tensor.is_floating_point() else tensor
        for key, tensor in model.state_dict().items()
    }


def fill_cache(cache: Path, state: dict[str, torch.Tensor], file: str = "model.safetensors") -> Path:
    """Writes a download as the hub's client does: a blob, a link to the blob in a snapshot, and the branch's commit."""
    repository, commit = cache / REPOSITORY, "a" * 40
    for folder in ("blobs", "refs", f"snapshots/{commit}"):
        (repository / folder).mkdir(parents=True)
    blob = repository / "blobs" / ("b" * 64)
    save_file(state, blob) if file.endswith(".safetensors") else torch.save(state, blob)
    (repository / "refs" / "main").write_text(commit)
    link = repository / "snapshots" / commit / file
    link.symlink_to(Path("../../blobs") / blob.name)
    return link


@pytest.mark.parametrize("name", [NAME, f"{NAME}.r160_in1k"])
@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_loads_cached_weights_without_the_network(caches: Path, name: str, file: str) -> None:
    state = random_state()
    fill_cache(caches / "hub", state, file)
    loaded = build(config_of(name)).state_dict()
    fresh = build(config_of(name, pretrained=False)).state_dict()
    assert loaded.keys() == state.keys()
    for key, tensor in loaded.items():
        assert torch.equal(tensor, fresh[key] if key.startswith("head.") else state[key]), key


def test_the_fake_cache_has_the_layout_of_a_real_one(caches: Path) -> None:
    """The hub's client reads the fake cache. Its download function would use the network even for local files."""
    link = fill_cache(caches / "hub", random_state())
    cache = huggingface_hub.scan_cache_dir(caches / "hub")
    assert not cache.warnings
    assert [repository.repo_id for repository in cache.repos] == ["timm/test_vit.r160_in1k"]
    assert prefetch_weights(config_of()) == str(link)


def test_adapts_cached_weights_as_timm_does(caches: Path) -> None:
    """The image size and the channels are adapted. With the same classes the head is kept."""
    state = random_state()
    fill_cache(caches / "hub", state)
    model = build(config_of(model_args={"in_chans": 1}), num_classes=1000, image_size=64)
    overlay = {"file": str(next((caches / "hub").rglob("*.safetensors")))}
    expected = timm.create_model(NAME, pretrained=True, pretrained_cfg_overlay=overlay, in_chans=1, img_size=64)
    assert torch.equal(model.head.weight, state["head.weight"])
    for (key, mine), theirs in zip(model.state_dict().items(), expected.state_dict().values()):
        assert torch.equal(mine, theirs), key


def test_searches_the_cache_folder_that_timm_is_given(caches: Path) -> None:
    fill_cache(caches / "elsewhere", random_state())
    build(config_of(model_args={"cache_dir": str(caches / "elsewhere")}))


def stale_ref(cache: Path) -> None:
    """The cache knows a commit, but holds none of its files."""
    (fill_cache(cache, random_state())).unlink()


def dangling_link(cache: Path) -> None:
    fill_cache(cache, random_state())
    next((cache / REPOSITORY / "blobs").iterdir()).unlink()


def unfinished_download(cache: Path) -> None:
    stale_ref(cache)
    blob = next((cache / REPOSITORY / "blobs").iterdir())
    blob.rename(blob.with_suffix(".incomplete"))


def known_as_absent(cache: Path) -> None:
    """The client has recorded that the repository lacks the file."""
    stale_ref(cache)
    folder = cache / REPOSITORY / ".no_exist" / ("a" * 40)
    folder.mkdir(parents=True)
    (folder / "model.safetensors").touch()


@pytest.mark.parametrize("damage", [None, stale_ref, dangling_link, unfinished_download, known_as_absent])
def test_reports_absent_weights_without_the_network(caches: Path, damage: Any) -> None:
    if damage is not None:
        damage(caches / "hub")
    with pytest.raises(ConfigError) as error:
        build(config_of())
    message = str(error.value)
    assert message.startswith("backbone.pretrained: the weights of 'test_vit' (huggingface.co/timm/test_vit.r160_in1k)")
    for words in ("not on this machine", "`fedpeft prefetch CONFIG`", "backbone.checkpoint", "pretrained: false"):
        assert words in message
    assert "\n" not in message


def test_names_a_damaged_file_in_the_cache(caches: Path) -> None:
    link = fill_cache(caches / "hub", random_state())
    link.write_bytes(link.read_bytes()[:500])
    with pytest.raises(ConfigError, match=r"the weights of 'test_vit' in '.*model\.safetensors' cannot be loaded"):
        build(config_of())


def test_refuses_weights_that_do_not_fit_the_arguments(caches: Path) -> None:
    fill_cache(caches / "hub", random_state())
    with pytest.raises(ConfigError, match=r"in '.*model\.safetensors' cannot be loaded .*cls_token") as error:
        build(config_of(model_args={"embed_dim": 32, "num_heads": 2}))
    assert "\n" not in str(error.value)


def test_lists_the_known_pretrainings_for_an_unknown_one() -> None:
    for attempt in (build, prefetch_weights):
        with pytest.raises(ConfigError, match=r"backbone\.name: 'resnet10t\.nosuch': .*known: resnet10t\.c3_in1k"):
            attempt(config_of("resnet10t.nosuch"))


def test_shapes_alone_need_no_weights() -> None:
    assert build_backbone(config_of(), CLASSES, 160, 1, "meta").num_parameters


def test_refuses_an_architecture_without_weights() -> None:
    untrained = next(
        name
        for name in timm.list_models("vit_*")
        if not (cfg := timm.models.get_pretrained_cfg(name)) or not cfg.has_weights
    )
    for attempt in (lambda: build(config_of(untrained)), lambda: prefetch_weights(config_of(untrained))):
        with pytest.raises(ConfigError, match=rf"backbone\.pretrained: timm has no weights for '{untrained}'; give "):
            attempt()


# --- weights at an address of their own --------------------------------------------------------------------------


@pytest.fixture
def from_url() -> schema.BackboneConfig:
    """A model whose weights come from an address, as some of timm's do."""
    overlay = {"hf_hub_id": None, "url": f"https://example.invalid/folder/{URL_FILE}"}
    return config_of(model_args={"pretrained_cfg_overlay": overlay})


def test_finds_weights_from_an_address_in_torchs_folder(caches: Path, from_url: schema.BackboneConfig) -> None:
    with pytest.raises(ConfigError, match=r"\(https://example\.invalid/folder/weights-1234\.pth\) are not on this"):
        build(from_url)
    state = random_state()
    folder = caches / "torch" / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    torch.save(state, folder / URL_FILE)
    assert torch.equal(build(from_url).pos_embed, state["pos_embed"])
    assert prefetch_weights(from_url) == str(folder / URL_FILE)


def test_loads_the_file_that_timms_config_names(caches: Path) -> None:
    state = random_state()
    save_file(state, caches / "own.safetensors")
    config = config_of(model_args={"pretrained_cfg_overlay": {"file": str(caches / "own.safetensors")}})
    assert torch.equal(build(config).pos_embed, state["pos_embed"])
    assert prefetch_weights(config) == str(caches / "own.safetensors")
    (caches / "own.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"own\.safetensors\) are not on this machine"):
        build(config)
    with pytest.raises(ConfigError, match=r"own\.safetensors \(no such file\)"):
        prefetch_weights(config)


# --- prefetch ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [config_of("glyph_vit"), config_of(pretrained=False), config_of(checkpoint="w.pth")],
    ids=["embedded", "no weights", "checkpoint"],
)
def test_nothing_to_prefetch(config: schema.BackboneConfig) -> None:
    assert prefetch_weights(config) is None


def test_prefetch_checks_the_name() -> None:
    with pytest.raises(ConfigError, match=r"backbone\.name: 'test_vitt' is no timm model; did you mean .*test_vit"):
        prefetch_weights(config_of("test_vitt"))


class FakeHub:
    """Downloads from a folder instead of the network."""

    def __init__(self, cache: Path, files: dict[str, dict[str, torch.Tensor]]):
        self.cache, self.files, self.asked = cache, files, []

    def __call__(self, repository: str, name: str, revision: str | None, cache_dir: str | None) -> str:
        self.asked.append((repository, name))
        if name not in self.files:
            raise EntryNotFoundError(f"{name} is not in {repository}")
        return str(fill_cache(self.cache, self.files[name], name))


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_prefetch_downloads_once_and_training_finds_the_file(
    caches: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    state = random_state()
    client = FakeHub(caches / "hub", {file: state})
    monkeypatch.setattr(hub, "hf_hub_download", client)
    path = prefetch_weights(config_of())
    assert Path(path).is_file()
    assert Path(path).name == file
    asked = list(client.asked)
    assert asked[0] == ("timm/test_vit.r160_in1k", "model.safetensors")
    assert prefetch_weights(config_of()) == path
    assert client.asked == asked
    assert torch.equal(build(config_of()).pos_embed, state["pos_embed"])


@pytest.mark.parametrize(
    "failure", [LocalEntryNotFoundError("no\nconnection"), OSError("disk full"), RuntimeError("?")]
)
def test_a_failed_download_is_reported_in_one_line(monkeypatch: pytest.MonkeyPatch, failure: Exception) -> None:
    def fail(*_: object, **__: object) -> str:
        raise failure

    monkeypatch.setattr(hub, "hf_hub_download", fail)
    with pytest.raises(ConfigError) as error:
        prefetch_weights(config_of())
    message = str(error.value)
    assert message.startswith("backbone.name: the weights of 'test_vit' cannot be downloaded from huggingface.co/timm/")
    assert " ".join(str(failure).split()) in message
    assert "\n" not in message


def test_a_failed_download_from_an_address_is_reported_in_one_line(
    monkeypatch: pytest.MonkeyPatch, from_url: schema.BackboneConfig, caches: Path
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError("name or service not known")

    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    with pytest.raises(ConfigError, match=r"cannot be downloaded from https://example\.invalid/.*service not known"):
        prefetch_weights(from_url)
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda url, path, **_: torch.save(random_state(), path))
    path = prefetch_weights(from_url)
    assert Path(path) == caches / "torch" / "hub" / "checkpoints" / URL_FILE
    build(from_url)


# --- what the model's config says about images -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "interpolation"),
    [
        (config_of("glyph_vit"), "bilinear"),
        (config_of(NAME, pretrained=False), "bicubic"),
        (config_of("vit_base_patch16_224.mae", pretrained=False, model_args={"depth": 1}), "bicubic"),
        (
            config_of(NAME, pretrained=False, model_args={"pretrained_cfg_overlay": {"interpolation": "bilinear"}}),
            "bilinear",
        ),
        (
            config_of(NAME, pretrained=False, model_args={"pretrained_cfg_overlay": {"interpolation": "random"}}),
            "bicubic",
        ),
    ],
)
def test_uses_the_interpolation_of_the_pretraining(config: schema.BackboneConfig, interpolation: str) -> None:
    backbone = build_backbone(config, CLASSES, 32, seed=1)
    assert backbone.interpolation == interpolation
