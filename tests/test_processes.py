"""Training in two processes: the same numbers as in one, files from the first alone."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from workbench import processes
from workbench.datasets.class_sets import Captioned
from workbench.errors import RunError
from workbench.papers.comparison import finished_or
from workbench.papers.hyper_clip import ClipLoss, HyperCLIP, build_clip
from workbench.papers.hyper_clip_settings import ClipModelSettings, ImageTower, TextTower
from workbench.training import Training, fit

IMAGES, TEXTS, WIDTH = 10, 7, 12


class Pixels(nn.Module):
    """An image tower without batch statistics, so that parts of a batch do not see each other."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(3 * 32 * 32, 8), nn.LayerNorm(8), nn.Linear(8, 6)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.last(self.norm(self.first(images.flatten(1))))


def content() -> tuple[Captioned, torch.Tensor]:
    draw = torch.Generator().manual_seed(3)
    pixels = torch.randint(0, 256, (IMAGES, 3, 32, 32), generator=draw, dtype=torch.uint8)
    choices = torch.randint(0, TEXTS, (IMAGES, 2), generator=draw)
    texts = [f"text {row}" for row in range(TEXTS)]
    data = Captioned(pixels, texts, choices, torch.zeros(2, dtype=torch.long), torch.arange(TEXTS))
    return data, nn.functional.normalize(torch.randn(TEXTS, WIDTH, generator=draw), dim=1)


def loss_of(text_set: str) -> ClipLoss:
    torch.manual_seed(0)
    settings = ClipModelSettings(
        name="hyper", kind="hyper", mode="residual", width=8, bottleneck=4, text_set=text_set
    )
    tower = ImageTower(timm_model_name="test_efficientnet", image_size=32)
    clip = build_clip(tower, TextTower(hidden=8), 6, -2.0, WIDTH)
    clip.visual = Pixels()
    model = HyperCLIP(settings, clip, 6)
    nn.init.normal_(model.generator.head.weight, std=0.1)
    data, inputs = content()
    return ClipLoss(model, data, inputs, captions_at_once=2, classes_at_once=3)


def trained(folder: Path, text_set: str = "gathered") -> tuple[list[dict], dict[str, torch.Tensor]]:
    """Two epochs of batches of 4, 4 and 2: the last one leaves a row to each of two processes."""
    loss = loss_of(text_set)
    settings = Training(epochs=2, batch_size=4, learning_rate=1e-2, clip=1.0)
    folder.mkdir(parents=True, exist_ok=True)
    history = fit(loss.model, loss, loss.count, settings, folder, seed=0, checkpoint_seconds=0.0)
    return history, {name: tensor.detach().clone() for name, tensor in loss.model.state_dict().items()}


def one_of_two(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    assert (processes.world(), processes.place(), processes.leads()) == (2, rank, rank == 0)
    assert [processes.own_part(count) for count in (5, 4, 1)] == [
        (slice(0, 3), slice(3, 5))[rank], (slice(0, 2), slice(2, 4))[rank], slice(0, 1)
    ]  # fmt: skip
    own = Path(folder) / f"own{rank}"
    for text_set in ("gathered", "local"):
        history, weights = trained(own / text_set, text_set)
        torch.save(weights, own / f"{text_set}.pt")
        (own / f"{text_set}.json").write_text(json.dumps(history))
    finished_or(Path(folder) / f"job{rank}", lambda _: ({"value": torch.ones(1)}, {}))
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def both(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("both")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GLOO_SOCKET_IFNAME", "lo")
        torch.multiprocessing.spawn(one_of_two, (str(folder),), nprocs=2)
    return folder


def test_two_processes_train_as_one_does(both, tmp_path):
    history, expected = trained(tmp_path)
    for rank in range(2):
        found = torch.load(both / f"own{rank}" / "gathered.pt", weights_only=True)
        for name, tensor in expected.items():
            if name.endswith("in_proj_bias"):
                continue  # a softmax does not see its keys' bias: Adam steps by the sign of a rounding error
            # Sums in another order, six steps of Adam.
            torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-5, msg=name)
        told = json.loads((both / f"own{rank}" / "gathered.json").read_text())
        assert [one["loss"] for one in told] == pytest.approx([one["loss"] for one in history], rel=1e-4)


def test_processes_agree_and_a_text_set_of_their_own_gives_other_weights(both):
    first, second = (torch.load(both / f"own{rank}" / "local.pt", weights_only=True) for rank in range(2))
    gathered = torch.load(both / "own0" / "gathered.pt", weights_only=True)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.allclose(first["generator.head.weight"], gathered["generator.head.weight"], atol=1e-4)


def test_only_the_first_process_writes(both):
    assert (both / "own0" / "gathered" / "checkpoint.safetensors").is_file()
    assert not (both / "own1" / "gathered" / "checkpoint.safetensors").exists()
    assert (both / "job0" / "card.json").is_file()
    assert not (both / "job1" / "card.json").exists()


def test_one_process_is_left_alone(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with processes.joined("cpu") as device:
        assert device == "cpu"
        assert processes.leads()
    assert processes.own_part(7) == slice(0, 7)
    rows = torch.arange(3)
    assert processes.gathered(rows, lambda part: part * 2.0).tolist() == [0, 2, 4]
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RunError, match="not on 'mps'"), processes.joined("mps"):
        pass
