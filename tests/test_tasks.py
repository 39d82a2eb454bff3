"""Tasks: metrics at their extremes, fixed splits, order of the data, image folders."""

from __future__ import annotations

import copy
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from bitfront.cells import compose
from bitfront.cells.distillation import Distillation
from bitfront.cells.flow import build_task
from bitfront.data.images import class_folders, digits, shift_and_mirror
from bitfront.errors import BitfrontError
from bitfront.tasks.batches import EpochBatches, Loader
from bitfront.tasks.core import Task


def task(name: str, *words: str) -> Task:
    return build_task(compose.load([f"task={name}", *words]))


class Constant(nn.Module):
    """Gives the logits it was told, batch after batch."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits, self.at = logits, 0

    def forward(self, x: Tensor) -> Tensor:
        self.at += len(x)
        return self.logits[self.at - len(x) : self.at]


@pytest.mark.parametrize("name", ["vit", "vit_cifar10"])
def test_perfect_and_chance_predictors(name: str) -> None:
    vision = task(name, "smoke=true")
    labels = vision.dataset("test").labels
    perfect = vision.evaluate(Constant(nn.functional.one_hot(labels, 10) * 50.0), "test")
    assert perfect == pytest.approx({"top1": 100, "top5": 100, "loss": 0}, abs=1e-4)
    generator = torch.Generator().manual_seed(0)
    chance = vision.evaluate(Constant(torch.randn(len(labels), 10, generator=generator)), "test")
    assert chance["top1"] == pytest.approx(10, abs=8) and chance["top5"] == pytest.approx(50, abs=13)
    flat = vision.evaluate(Constant(torch.randn(len(labels), 10, generator=generator) * 1e-6), "test")
    assert flat["loss"] == pytest.approx(2.302585, abs=1e-4)


@pytest.mark.parametrize("name", compose.options("task"))
def test_smoke_mode_learns_without_files(name: str) -> None:
    smoke = task(name, "smoke=true", "data_root=/nowhere")
    torch.manual_seed(0)
    net = smoke.model().train()
    optimizer = smoke.recipe.optimizer(net.parameters(), smoke.decays)
    losses = []
    for _ in range(5):
        for batch in smoke.loader("train"):
            optimizer.zero_grad()
            loss = smoke.loss(net, batch)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert set(smoke.evaluate(net, "valid")) == set(smoke.evaluate(net, "test"))


def test_digits_are_split_once_and_by_class() -> None:
    counts = {split: torch.bincount(digits(split).labels, minlength=10) for split in ("train", "valid", "test")}
    assert [int(c.sum()) for c in counts.values()] == [1257, 180, 360]
    for c in counts.values():
        assert c.max() - c.min() <= 0.1 * c.sum()
    assert digits("test").labels[:12].tolist() == [7, 6, 3, 7, 7, 3, 2, 8, 9, 3, 2, 6]


def test_batches_depend_on_seed_and_epoch_alone() -> None:
    def order(seed: int | None, epoch: int) -> list[list[int]]:
        batches = EpochBatches(10, 4, seed)
        batches.set_epoch(epoch)
        assert len(list(batches)) == len(batches) == 3
        return list(batches)

    assert order(0, 1) == order(0, 1)
    assert order(0, 0) != order(0, 1) != order(1, 1)
    assert sorted(sum(order(0, 1), [])) == list(range(10))
    assert order(None, 5) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    states = {EpochBatches(10, 4, seed, rank, 2).generator.initial_seed() for seed in (0, 1) for rank in (0, 1)}
    assert len(states) == 4  # so that loader processes augment differently, too


def test_batches_come_in_equal_parts() -> None:
    parts = list(EpochBatches(11, 8, 0, parts=4))
    assert [len(part) for part in parts] == [2] * 8 and len(EpochBatches(11, 8, 0, parts=4)) == 8
    assert set(sum(parts, [])) == set(range(11))  # beside the last three are the first five


def test_no_batch_of_a_training_is_too_small_for_batch_norms() -> None:
    *whole, last = EpochBatches(9, 4, 0)
    assert (
        [len(batch) for batch in whole] == [4, 4] and last[1:] == whole[0][:1] and set(sum(whole, last)) == {*range(9)}
    )
    assert [len(batch) for batch in EpochBatches(9, 4, None)] == [4, 4, 1]  # nothing is measured twice
    assert [len(batch) for batch in EpochBatches(3, 1, 0)] == [1, 1, 1]  # as the user wants it
    assert [len(batch) for batch in EpochBatches(1, 4, 0)] == [2]


class Faulty:
    """Samples of which the last is not right."""

    def __init__(self, fault: Callable[[], object]) -> None:
        self.fault = fault

    def __len__(self) -> int:
        return 5

    def __getitem__(self, indices: list[int]) -> list[int]:
        if 4 in indices:
            self.fault()
        return indices


def unreadable() -> None:
    raise BitfrontError("could not read 'x'")


@pytest.mark.parametrize("workers", [0, 2])
def test_what_is_wrong_with_data_is_said_whoever_reads_them(workers: int) -> None:
    drawn = iter(Loader(Faulty(unreadable), sampler=EpochBatches(5, 2, None), num_workers=workers))
    assert [next(drawn), next(drawn)] == [[0, 1], [2, 3]]
    with pytest.raises(BitfrontError, match=r"^could not read 'x'$"):
        next(drawn)


def test_a_process_that_loads_data_and_dies_is_said() -> None:
    loader = Loader(
        Faulty(lambda: os.kill(os.getpid(), signal.SIGKILL)), sampler=EpochBatches(5, 2, None), num_workers=1
    )
    with pytest.raises(BitfrontError, match=r"has died.*fewer train\.workers"):
        list(loader)


def test_processes_share_the_data() -> None:
    shares = [sum(EpochBatches(11, 2, 3, rank, 2), []) for rank in (0, 1)]
    assert all(len(batch) <= 2 for batch in EpochBatches(11, 2, 3, 0, 2))
    assert len(shares[0]) == len(shares[1]) == 6 and set(shares[0] + shares[1]) == set(range(11))
    plain = [sum(EpochBatches(11, 2, None, rank, 2), []) for rank in (0, 1)]
    assert sorted(plain[0] + plain[1]) == list(range(11))
    with pytest.raises(BitfrontError, match="batch_size=32 does not divide among 1 processes and 3 parts"):
        task("vit").loader("train", parts=3)


def test_batches_of_like_length() -> None:
    lengths = np.random.default_rng(0).integers(1, 1000, 1003).tolist()
    batches = [list(EpochBatches(1003, 4, 3, rank, 2, lengths=lengths)) for rank in (0, 1)]
    spread = [np.ptp([lengths[i] for i in a + b]) for a, b in zip(*batches, strict=True)]
    assert np.median(spread) < 50 and spread != sorted(spread)
    drawn = sum(sum(batches, []), [])
    assert len(drawn) == 1004 and set(drawn) == set(range(1003))
    assert (
        list(EpochBatches(1003, 4, 3, 0, 2, lengths=lengths))
        == batches[0]
        != list(EpochBatches(1003, 4, 4, 0, 2, lengths=lengths))
    )
    fixed = sum(EpochBatches(1003, 4, None, lengths=lengths), [])
    assert sorted(fixed) == list(range(1003)) and [lengths[i] for i in fixed] == sorted(lengths)


def test_shifting_and_mirroring_moves_whole_images() -> None:
    x = torch.rand(64, 3, 6, 5)
    moved = shift_and_mirror(x, 2)
    assert moved.shape == x.shape
    padded = nn.functional.pad(x, (2, 2, 2, 2))
    for i in range(8):
        windows = [padded[i, :, r : r + 6, c : c + 5] for r in range(5) for c in range(5)]
        assert any(torch.equal(moved[i], w) or torch.equal(moved[i], w.flip(2)) for w in windows)
    assert not torch.equal(shift_and_mirror(x, 2), moved)


def test_the_learning_rate_rises_and_falls() -> None:
    recipe = task("vit").recipe
    factors = [recipe.lr_factor(step, 1000) for step in range(1001)]
    peak = factors.index(max(factors))
    assert peak == pytest.approx(1000 * recipe.warmup, abs=1) and 0.95 < factors[peak] <= 1
    assert factors[0] < 0.05 and factors[-1] == pytest.approx(0, abs=1e-9)
    assert factors[:peak] == sorted(factors[:peak]) and factors[peak:] == sorted(factors[peak:], reverse=True)


@pytest.mark.parametrize("name", compose.options("task"))
def test_a_network_is_as_far_from_another_as_their_answers(name: str) -> None:
    smoke = task(name, "smoke=true", "data_root=/nowhere")
    torch.manual_seed(0)
    teacher, batch = smoke.model().eval(), next(iter(smoke.loader("train")))
    student = copy.deepcopy(teacher)
    follow = Distillation(smoke, teacher, 1.0)
    assert follow(student, batch).item() == pytest.approx(0, abs=1e-6)
    with torch.no_grad():
        for p in student.parameters():
            p.add_(0.02 * torch.randn_like(p))
    far = follow(student, batch)
    assert 0 < far < float("inf")
    far.backward()
    assert any(p.grad.any() for p in student.parameters() if p.grad is not None)
    assert all(p.grad is None for p in teacher.parameters())
    mixed, labels = Distillation(smoke, teacher, 0.25)(student, batch), smoke.loss(student, batch)
    torch.testing.assert_close(mixed, 0.25 * far + 0.75 * labels)
    once, again = (smoke.drawn_loss(teacher, batch, torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.isfinite(once) and torch.equal(once, again)


def test_labels_are_drawn_as_likely_as_the_network_says() -> None:
    vision, logits = task("vit", "smoke=true"), torch.tensor([[2.0, 0.0, 1.0]]).repeat(20000, 1)
    loss = vision.drawn_loss(Constant(logits), (torch.rand(20000, 1), None), torch.Generator().manual_seed(0)) / 20000
    scores = logits[0].log_softmax(0)
    assert loss.item() == pytest.approx(-(scores.exp() * scores).sum().item(), rel=0.02)  # the entropy


def test_distillation_has_the_mean_relative_entropy() -> None:
    vision, x = task("vit", "smoke=true"), torch.rand(4, 3, 32, 32)
    wanted, got = torch.randn(4, 10), torch.randn(4, 10)
    p, q = wanted.softmax(1), got.softmax(1)
    torch.testing.assert_close(vision.divergence(got, wanted), (p * (p / q).log()).sum() / 4)
    for labels in (torch.zeros(4).long(), torch.arange(4)):  # which do not count
        follow = Distillation(vision, Constant(wanted), 1.0)
        torch.testing.assert_close(follow(Constant(got), (x, labels)), vision.divergence(got, wanted))


@pytest.mark.parametrize("word", ["task.heads=5", "task.patch_size=3", "seed=-1", "train.epochs=0"])
def test_impossible_tasks_are_refused(word: str) -> None:
    with pytest.raises(BitfrontError):
        task("vit", word)


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """CIFAR-10 as class folders, ten images each."""
    for split in ("train", "test"):
        for label in range(10):
            folder = tmp_path / "cifar10" / split / f"class{label}"
            folder.mkdir(parents=True)
            for i in range(10):
                Image.new("RGB", (32, 32), (25 * label, 10 * i, 0)).save(folder / f"{i:04}.png")
    return tmp_path


def test_image_folders_are_read_and_split(folders: Path) -> None:
    splits = {split: class_folders(folders / "cifar10", split, 10, 4) for split in ("train", "valid", "test")}
    assert [len(images) for images in splits.values()] == [90, 10, 100]
    assert splits["train"].crop == 4 and splits["test"].crop == splits["valid"].crop == 0
    assert torch.equal(splits["test"].pixels[:, 0, 0, 0], (25 * splits["test"].labels).to(torch.uint8))
    seen = {(int(p[0, 0, 0]), int(p[1, 0, 0])) for split in ("train", "valid") for p in splits[split].pixels}
    assert len(seen) == 100
    metrics = task("vit_cifar10", f"data_root={folders}", "task.depth=1").evaluate(
        Constant(torch.zeros(100, 10)), "test"
    )
    assert metrics["top1"] == pytest.approx(10)


def test_a_missing_or_broken_folder_says_where_it_is_expected(folders: Path) -> None:
    with pytest.raises(BitfrontError, match="data_root=<folder>"):
        task("vit_cifar10", "data_root=/nowhere").loader("train")
    with pytest.raises(BitfrontError, match="same 7 class folders"):
        class_folders(folders / "cifar10", "train", 7, 0)
    (folders / "cifar10" / "train" / "class0" / "0000.png").write_bytes(b"no image")
    with pytest.raises(BitfrontError, match="could not read"):
        class_folders(folders / "cifar10", "train", 10, 0)
    shutil.rmtree(folders / "cifar10" / "test" / "class3")
    with pytest.raises(BitfrontError, match="same 10 class folders"):
        class_folders(folders / "cifar10", "train", 10, 0)
    shutil.rmtree(folders / "cifar10" / "test")
    with pytest.raises(BitfrontError, match="no images"):
        class_folders(folders / "cifar10", "train", 10, 0)
