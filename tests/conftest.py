"""What all tests share: no network, a cache of their own, and the real encoder opened once."""

import os
import socket

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny tensors: threads would only wait for each other

_connect = socket.socket.connect


def _local_only(self: socket.socket, address: object) -> None:
    """Refuse connections that leave the machine; notebook kernels talk over loopback."""
    if self.family == socket.AF_UNIX or (
        isinstance(address, tuple) and address[0] in {"127.0.0.1", "::1", "localhost"}
    ):
        return _connect(self, address)
    raise OSError(f"tests use no network, connection to {address} refused")


socket.socket.connect = _local_only  # type: ignore[method-assign]


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep the tests out of the user's cache; the texts that tests share are encoded once per session."""
    os.environ["WORKBENCH_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def encoder():
    """The real packaged encoder."""
    from workbench.encoders import TextEncoder

    return TextEncoder()


@pytest.fixture(scope="module")
def one_encoder(encoder):
    """Open the real encoder once instead of once per run of a module."""
    from workbench.encoders import TextEncoder

    assert encoder.fingerprint  # computed once, too
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TextEncoder, "__init__", lambda self, *_: self.__dict__.update(vars(encoder)))
        yield


@pytest.fixture(scope="module")
def browser():
    """The system's Chromium, for page tests."""
    from tests.browsing import chromium

    with chromium() as started:
        yield started


@pytest.fixture
def prepared():
    """Ask for a prepared data set: without WORKBENCH_DATA its test is skipped, else it must be there."""
    from workbench.manifests import locate

    def ask(name: str) -> None:
        if not os.environ.get("WORKBENCH_DATA"):
            pytest.skip(f"WORKBENCH_DATA is not set, and this test reads the prepared data set {name}")
        assert locate(name) is not None, f"WORKBENCH_DATA is set and holds no prepared data set {name}"

    return ask


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory):
    """One finished run of the tiny recipe, made once by the real code."""
    from workbench.runs import run_recipe

    return run_recipe("hyper_cl_bundled_tiny", out=tmp_path_factory.mktemp("reports"))


@pytest.fixture(scope="session")
def tiny_image_run(tmp_path_factory: pytest.TempPathFactory):
    """One finished run of the tiny image-text recipe, made once by the real code."""
    from workbench.runs import run_recipe

    return run_recipe("hyper_clip_scenes_tiny", out=tmp_path_factory.mktemp("image-reports"))


@pytest.fixture(scope="session")
def tiny_zoo_run(tmp_path_factory: pytest.TempPathFactory):
    """One finished run of the tiny recipe of a zoo of encoders, made once by the real code."""
    from workbench.runs import run_recipe

    return run_recipe("hyper_align_scenes_tiny", out=tmp_path_factory.mktemp("zoo-reports"))


@pytest.fixture(scope="session")
def tiny_family_run(tmp_path_factory: pytest.TempPathFactory):
    """One finished run of the tiny recipe of a family, made once by the real code."""
    from workbench.runs import run_recipe

    return run_recipe("family_aspect_tiny", out=tmp_path_factory.mktemp("family-reports"))


@pytest.fixture(scope="session")
def word_store():
    """An embedding store without an encoder: a text is the sum of its words, each a random direction."""
    from functools import cache

    import torch

    from workbench.store import EmbeddingStore

    @cache
    def direction(word: str) -> torch.Tensor:
        seed = int.from_bytes(word.encode("utf-8"), "little") % 2**63
        return torch.randn(384, generator=torch.Generator().manual_seed(seed))

    class WordStore(EmbeddingStore):
        def __init__(self) -> None:
            """Open nothing."""

        def to(self, device: str) -> EmbeddingStore:
            return self

        def prepare(self, texts: list[str]) -> int:
            return 0

        def embed(self, texts: list[str]) -> torch.Tensor:
            sums = torch.stack([sum(map(direction, text.split())) for text in texts])
            return torch.nn.functional.normalize(sums, dim=-1)

    return WordStore()


@pytest.fixture(scope="session")
def image_text_model(word_store):
    """Build small untrained image-text models with used norms, whose weights differ between tasks."""
    import torch

    from workbench.classifier import HyperCLIPModel
    from workbench.papers.hyper_clip import HyperCLIP, build_clip
    from workbench.papers.hyper_clip_settings import ClipModelSettings, ImageTower, TextTower

    def build(
        kind: str = "hyper", tower: str = "test_efficientnet", side: int = 32, **more
    ) -> HyperCLIPModel:
        torch.manual_seed(0)
        image = ImageTower(timm_model_name=tower, image_size=side)
        clip = build_clip(image, TextTower(hidden=24), 16, -4.0, 384)
        settings = {"name": kind, "kind": kind, "width": 16, "bottleneck": 4, **more}
        model = HyperCLIP(ClipModelSettings(**settings), clip, 16)
        if model.generator is not None:
            torch.nn.init.normal_(model.generator.head.weight, std=0.1)
        if model.adapter is not None:
            torch.nn.init.normal_(model.adapter[2].weight, std=0.1)
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                torch.nn.init.normal_(module.running_mean, std=0.1)
                torch.nn.init.uniform_(module.running_var, 0.5, 1.5)
        return HyperCLIPModel(model, side, word_store)

    return build


@pytest.fixture(scope="session")
def make_zoo():
    """Make zoos of small features whose encoders tell a known share of what their images show.

    Images and texts are names with a width and how much noise each encoder adds; every image has as many
    captions, and real features' fault, a mean.
    """
    import torch

    from workbench.features import Features
    from workbench.zoo import Zoo

    def make(
        images: dict[str, tuple[int, float]],
        texts: dict[str, tuple[int, float]],
        rows: tuple[int, int, int] = (96, 40, 40),
        captions: int = 2,
        **more,
    ) -> Zoo:
        draw, latent = torch.Generator().manual_seed(0), 12
        count = sum(rows)
        shown = torch.randn(count, latent, generator=draw)
        told = shown.repeat_interleave(captions, 0)

        def features(name: str, content: torch.Tensor, width: int, noise: float, mean: float) -> Features:
            values = content @ torch.randn(latent, width, generator=draw) / latent**0.5
            values += noise * torch.randn(values.shape, generator=draw)
            values += mean * torch.randn(width, generator=draw)
            return Features(name, values.numpy().astype("float16"), "rows", None, 1000 * width)

        splits = dict(zip(("train", "valid", "test"), torch.arange(count).split(rows), strict=True))
        return Zoo(
            {name: features(name, shown, *about, 0.5) for name, about in images.items()},
            {name: features(name, told, *about, 0.0) for name, about in texts.items()},
            torch.arange(count * captions).view(count, captions),
            splits,
            **more,
        )

    return make
