"""Generated norms under DistributedDataParallel; a file of its own, since each process imports all of it."""

from pathlib import Path

import torch
from torch import Tensor, nn

from workbench.hypernetworks import Affines


class Conditioned(nn.Module):
    """A small tower whose norms a linear layer generates from a condition."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tower = nn.Sequential(
            nn.Conv2d(3, 4, 3),
            nn.GroupNorm(2, 4),
            nn.ReLU(),
            nn.Flatten(),
            nn.LayerNorm(4 * 4),
            nn.Linear(16, 2),
        )
        self.affines = Affines.wrap(self.tower)
        self.generator = nn.Linear(5, self.affines.spec().numel)

    def forward(self, images: Tensor, condition: Tensor) -> Tensor:
        self.affines.use(self.affines.spec().compose(self.generator(condition)))
        return self.tower(images)


def batch() -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(1)
    return torch.randn(4, 3, 4, 4, generator=draw), torch.randn(1, 5, generator=draw)


def train_part(rank: int, folder: str) -> None:
    """One of two processes: its half of the batch, gradients averaged by DistributedDataParallel."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    model = nn.parallel.DistributedDataParallel(Conditioned())
    images, condition = batch()
    model(images[2 * rank : 2 * rank + 2], condition).square().sum(1).mean().backward()
    torch.save([part.grad for part in model.parameters()], f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_get_the_gradients_of_the_joined_batch(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    torch.multiprocessing.spawn(train_part, (str(tmp_path),), nprocs=2)
    model = Conditioned()
    images, condition = batch()
    model(images, condition).square().sum(1).mean().backward()
    expected = [part.grad for part in model.parameters()]
    assert len(expected) == 2 + 2 + 2 + 2 + 2  # convolution, two norms, linear layer, generator
    assert all(part.abs().sum() > 0 for part in expected)
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for one, other in zip(found, expected, strict=True):
            # Sums in another order.
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
