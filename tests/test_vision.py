"""Image classification: the papers' networks and sizes, ImageNet's layouts and recipes."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from conftest import cli, torchrun
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from bitfront.cells import compose
from bitfront.cells.cell import Cell
from bitfront.cells.check import check_values
from bitfront.cells.flow import build_task
from bitfront.cells.record import Record, read_all
from bitfront.commands import start
from bitfront.errors import BitfrontError
from bitfront.models.images import NETWORKS
from bitfront.quant.methods.diffq import DiffQ
from bitfront.quant.methods.ste import STE
from bitfront.quant.storage.artifact import Artifact
from bitfront.sweeps.beforehand import refuse
from bitfront.tasks.batches import EpochBatches
from bitfront.tasks.core import Task
from bitfront.tasks.vision import ImageNet

large = pytest.mark.slow
# Sizes by the papers' rule in MB: float, then 2, 3, 4, 5 and 8 bits, DiffQ at its start in groups of 8 and 16
SIZES: list[Any] = [
    ("resnet18", 10, 11_173_962, [42.625, 2.705, 4.035, 5.366, 6.697, 10.689, 11.188, 10.938]),
    ("resnet18", 100, 11_220_132, [42.801, 2.716, 4.052, 5.388, 6.725, 10.733, 11.234, 10.984]),
    ("mobilenet", 10, 3_217_226, [12.273, 0.884, 1.263, 1.643, 2.023, 3.162, 3.304, 3.233]),
    ("mobilenet", 100, 3_309_476, [12.625, 0.906, 1.297, 1.687, 2.078, 3.250, 3.396, 3.323]),
    ("vit", 10, 9_786_378, [37.332, 2.420, 3.583, 4.747, 5.911, 9.402, 9.839, 9.620]),
    pytest.param(
        "wrn28_10", 10, 36_489_290, [139.196, 8.811, 13.157, 17.503, 21.849, 34.888, 36.518, 35.703], marks=large
    ),
    pytest.param(
        "wrn28_10", 100, 36_546_980, [139.416, 8.825, 13.178, 17.531, 21.884, 34.943, 36.576, 35.759], marks=large
    ),
]


def sizes(network: nn.Module, widths: tuple[int, ...] = (2, 3, 4, 5, 8), **options: Any) -> list[float]:
    methods = [STE(bits=bits, **options) for bits in widths]
    methods += [DiffQ(group_size=size, **options) for size in (8, 16)]
    sizes = [method.attach(network).megabytes().item() for method in methods]
    return [round(v, 3) for v in (sum(p.numel() for p in network.parameters()) * 4 / 2**20, *sizes)]


@pytest.mark.parametrize(("name", "classes", "parameters", "expected"), SIZES)
def test_the_papers_networks_have_the_papers_sizes(
    name: str, classes: int, parameters: int, expected: list[float]
) -> None:
    network = NETWORKS[name](3, classes)
    assert sum(p.numel() for p in network.parameters()) == parameters
    assert sizes(network) == expected
    with torch.no_grad():
        assert network.eval()(torch.zeros(2, 3, 32, 32)).shape == (2, classes)


def test_resnet20_with_its_preset_has_the_papers_size() -> None:
    network = NETWORKS["resnet20"](3, 10)
    assert sum(p.numel() for p in network.parameters()) == 269_722
    preset: dict[str, Any] = {"min_size": 0.0, "exclude": ["*bias"], "include": ["*"]}
    assert sizes(network, **preset) == [1.029, 0.067, 0.099, 0.131, 0.163, 0.260, 0.272, 0.266]
    assert round(STE(bits=1, **preset).attach(network).megabytes().item(), 3) == 0.035


@large
@pytest.mark.parametrize(
    ("name", "parameters", "min_size", "expected"),
    [
        ("vit_imagenet", 86_567_656, 0.1, [330.229, 21.083, 31.388, 41.693, 51.997, 82.912, 86.777, 84.844]),
        ("efficientnet_imagenet", 12_233_232, 0.1, [46.666, 5.051, 6.438, 7.825, 9.212, 13.374, 13.894, 13.634]),
    ],
)
def test_the_papers_imagenet_networks_have_the_papers_sizes(
    name: str, parameters: int, min_size: float, expected: list[float]
) -> None:
    network = build_task(compose.load([f"task={name}"])).model()
    assert sum(p.numel() for p in network.parameters()) == parameters
    assert sizes(network, min_size=min_size) == expected
    if name == "efficientnet_imagenet":
        usual = sizes(network)
        assert [usual[3], usual[5], *usual[6:]] == [6.271, 12.042, 12.583, 12.313]


def imagenet(*words: str, name: str = "vit_imagenet") -> ImageNet:
    task = build_task(compose.load([f"task={name}", *words]))
    assert isinstance(task, ImageNet)
    return task


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """ImageNet in small: 3 classes of 8 training and 4 validation photos of differing sizes."""
    rng = np.random.default_rng(0)
    for part, n in (("train", 8), ("val", 4)):
        for label in range(3):
            folder = tmp_path / "imagenet" / part / f"n0000000{label}"
            folder.mkdir(parents=True)
            for i in range(n):
                pixels = rng.integers(0, 80, (40 + 4 * i, 50, 3)) + 85 * np.eye(3, dtype=int)[label]
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"ILSVRC2012_{part}_{i:08}.JPEG")
    return tmp_path


SMALL = ("task.classes=3", "task.image_size=32", "task.held_out=4", "train.workers=0", "train.batch_size=8")


def test_imagenet_folders_are_read_split_and_transformed(root: Path) -> None:
    task = imagenet(f"data_root={root}", *SMALL)
    splits = {split: task.dataset(split) for split in ("train", "valid", "test")}
    assert {split: len(part) for split, part in splits.items()} == {"train": 20, "valid": 4, "test": 12}
    assert not {path for path, _ in splits["train"].files} & {path for path, _ in splits["valid"].files}
    x, y = splits["test"][list(range(12))]
    assert x.shape == (12, 3, 32, 32) and y.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert (x.mean((2, 3)).argmax(1) == y).all()  # each class has its colour
    assert torch.equal(x, splits["test"][list(range(12))][0])
    mixed, shares = splits["train"][[0, 1, 2, 3, 4]]
    assert mixed.shape == (5, 3, 32, 32) and shares.shape == (5, 3)
    torch.testing.assert_close(shares.sum(1), torch.ones(5))
    assert not torch.equal(mixed, splits["train"][[0, 1, 2, 3, 4]][0])
    calm = task.undisturbed(splits["train"])
    assert torch.equal(calm[[5]][0], calm[[5]][0]) and calm[[5]][1].dtype == torch.int64


def test_missing_or_damaged_photos_are_named(root: Path) -> None:
    with pytest.raises(BitfrontError, match=r"no ImageNet in '/nowhere/imagenet'.*image-net\.org"):
        imagenet("data_root=/nowhere").loader("train")
    with pytest.raises(BitfrontError, match=r"needs the same 1000 classes in train and val, and has \[3, 3\]"):
        imagenet(f"data_root={root}").dataset("test")
    with pytest.raises(BitfrontError, match="held_out=24 leaves no image"):
        imagenet(f"data_root={root}", *SMALL, "task.held_out=24").dataset("train")
    (root / "imagenet" / "val" / "n00000002" / "ILSVRC2012_val_00000003.JPEG").write_bytes(b"cut off")
    with pytest.raises(BitfrontError, match=r"could not read '.*val_00000003\.JPEG'"):
        imagenet(f"data_root={root}", *SMALL).dataset("test")[[11]]
    (root / "imagenet" / "ILSVRC2012_devkit_t12.tar.gz").write_bytes(b"no archive")
    with pytest.raises(BitfrontError, match="no ImageNet in"):
        imagenet(f"data_root={root}", *SMALL).dataset("test")


def test_test_images_of_a_part_of_the_classes(root: Path) -> None:
    """They keep the numbers that training gave them; the full set has all of them."""
    shutil.rmtree(root / "imagenet" / "val" / "n00000001")
    part = imagenet(f"data_root={root}", *SMALL, name="imagenet_small")
    x, y = part.dataset("test")[list(range(8))]
    assert y.tolist() == [0] * 4 + [2] * 4 and (x.mean((2, 3)).argmax(1) == y).all()
    assert {int(part.dataset("train")[[i]][1]) for i in range(20)} == {0, 1, 2}
    with pytest.raises(BitfrontError, match=r"needs the same 3 classes in train and val, and has \[3, 2\]"):
        imagenet(f"data_root={root}", *SMALL).dataset("test")
    with pytest.raises(BitfrontError, match=r"needs 4 classes in train, no more in val, and has \[3, 2\]"):
        imagenet(f"data_root={root}", *SMALL, "task.classes=4", name="imagenet_small").dataset("test")
    (root / "imagenet" / "val" / "n00000002").rename(root / "imagenet" / "val" / "n00000003")
    with pytest.raises(BitfrontError, match=r"needs 3 classes in train, no more in val, and has \[3, 2\]"):
        part.dataset("test")


def test_a_file_of_weights_is_measured_and_started_from(root: Path) -> None:
    """Of the full set by its name, of the small one by itself; its content counts, not where it lies."""
    network = timm.create_model("test_efficientnet", num_classes=3)
    file = root / "efficientnet_lite0" / "model.safetensors"
    file.parent.mkdir()
    save_file(network.state_dict(), file)
    torch.save({"state_dict": network.state_dict()}, root / "mine.pth")
    words = [
        "model=timm.test_efficientnet",
        *SMALL[:3],
        f"data_root={root}",
        "wandb=disabled",
        "trainer.accelerator=cpu",
    ]

    def cell(task: str, *more: str, runs: str = "runs") -> Record:
        return Cell([f"task={task}", *words, f"root={root}/{runs}", *more]).execute()

    mine = ("init_from=mine.pth", "train.workers=0")
    records = [cell("imagenet_small", "quant=float"), cell("resnet_imagenet", "quant=float", *mine, "train.epochs=0")]
    for record in records:
        assert record.history == [] and "train" not in record.stages
        found = timm.create_model("test_efficientnet", num_classes=3)
        Artifact.load(Path(record.artifact)).load_into(found)
        assert all(torch.equal(t, found.state_dict()[name]) for name, t in network.state_dict().items())
    for record, more in zip(records, ((), mine), strict=True):
        rounded = cell(record.task, "quant=rtn", "bits=8", "quant.reestimate_bn=false", *more)
        assert rounded.metrics["test"]["loss"] == pytest.approx(record.metrics["test"]["loss"], rel=0.05)
    assert len(read_all(root / "runs")) == 4  # rounding has the float cell to start from, or the file
    file.rename(root / "elsewhere.safetensors")
    moved = cell("imagenet_small", "quant=float", f"init_from={root}/elsewhere.safetensors", runs="again")
    assert moved.id == records[0].id
    save_file(timm.create_model("test_efficientnet", num_classes=3).state_dict(), root / "elsewhere.safetensors")
    assert cell("imagenet_small", "quant=float", "init_from=elsewhere.safetensors", runs="again").id != moved.id
    with pytest.raises(BitfrontError, match=r"no such file, nor .*`.*fetch efficientnet_lite0` downloads it"):
        cell("imagenet_small", "quant=gptq", runs="new")


@pytest.mark.parametrize("words", [["quant=diffq"], ["quant=lsq"], ["quant=ste"], ["quant=gptq", "quant.sft=true"]])
def test_what_trains_is_refused_where_nothing_is_there_to_train_on(words: list[str], root: Path) -> None:
    cells = [Cell(["task=imagenet_small", f"data_root={root}", *some]) for some in (["quant=rtn"], words)]
    with pytest.raises(
        BitfrontError, match=rf"1 of 2 .*\n{words[-1]} needs training, and train.epochs=0 of .* is none"
    ):
        refuse(cells)
    for more in ("train.epochs=1", "smoke=true"):
        check_values(compose.load([*cells[1].words, more]))
    assert list(root.iterdir()) == [root / "imagenet"]


@pytest.mark.parametrize(
    ("name", "network", "processes"),
    [
        ("vit_imagenet", "timm.test_vit", 2),
        ("efficientnet_imagenet", "timm.test_efficientnet", 1),
        ("resnet_imagenet", "torchvision.mobilenet_v2", 1),
        pytest.param("vit_imagenet", "timm.deit_base_patch16_224", 1, marks=large),
        pytest.param("efficientnet_imagenet", "timm.efficientnet_b3", 1, marks=large),
    ],
)
def test_the_imagenet_recipes_run_on_the_official_layout(root: Path, name: str, network: str, processes: int) -> None:
    words = (f"task={name}", f"model={network}", *SMALL, "train.epochs=3", "quant=diffq", f"data_root={root}")
    size = {"timm.test_vit": 160, "timm.deit_base_patch16_224": 224}.get(network, 32)
    more = (f"task.image_size={size}", f"root={root}/runs", f"trainer.devices={processes}", "trainer.accelerator=cpu")
    if processes > 1:
        torchrun(root, start, "run", (*words, *more, "wandb=disabled"))
    else:
        result = cli("run", *words, *more)
        assert result.returncode == 0, result.stderr
    (record,) = read_all(root / "runs")
    assert len(record.history) == 3 and record.processes == processes
    assert set(record.metrics) == {"valid", "test"}


def test_the_recipes_schedules() -> None:
    deit = imagenet().recipe
    steps = 300 * 100
    factors = [deit.lr_factor(step, steps) for step in range(0, steps + 1, 50)]
    assert factors.index(max(factors)) == 10 and max(factors) == pytest.approx(1, abs=1e-3)  # after 5 epochs
    assert factors[-1] == pytest.approx(1e-5 / 5e-4)
    resnet = imagenet(name="resnet_imagenet").recipe
    epochs = [resnet.lr_factor(epoch * 100, 9000) for epoch in (0, 29, 30, 59, 60, 89)]
    assert epochs == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])
    b3 = imagenet(name="efficientnet_imagenet").recipe
    assert b3.lr_factor(350 * 240, 350 * 1000) == pytest.approx(0.97 ** math.floor(84 / 2.4))
    paper = build_task(compose.load(["task=resnet_cifar10_paper"])).recipe
    assert [paper.lr_factor(e, 200) for e in (0, 59, 60, 120, 180)] == pytest.approx([1, 1, 0.2, 0.04, 0.008])


def test_the_papers_cifar_recipe() -> None:
    for quant, init, lr, widths in (("diffq", None, 0.1, 1e-3), ("ste", None, 0.1, None), ("lsq", "float", 0.01, 0.0)):
        values = compose.load(["task=resnet_cifar10_paper", f"quant={quant}"]).values
        assert (values["init_from"], values["train"]["lr"], values["quant"].get("lr")) == (init, lr, widths)
        train = values["train"]
        assert (train["epochs"], train["batch_size"], train["weight_decay"]) == (200, 128, 5e-4)


def optimizer(task: Task, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return task.recipe.optimizer(parameters, task.decays)


def test_the_recipes_optimizers() -> None:
    deit = imagenet()
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in ((1, 1, 8), (1, 5, 8), (8, 8), (8,))]
    decays = {id(p): g["weight_decay"] for g in optimizer(deit, parameters).param_groups for p in g["params"]}
    assert [decays[id(p)] for p in parameters] == [0, 0, 0.05, 0]
    sgd = optimizer(build_task(compose.load(["task=resnet"])), parameters)
    assert isinstance(sgd, torch.optim.SGD) and sgd.defaults["nesterov"]
    assert {len(g["params"]) for g in sgd.param_groups} == {4}
    plain = optimizer(imagenet(name="resnet_imagenet"), parameters)
    assert isinstance(plain, torch.optim.SGD) and not plain.defaults["nesterov"]
    w = nn.Parameter(torch.zeros(2, 2))
    rmsprop = optimizer(imagenet(name="efficientnet_imagenet"), [w])
    w.grad = torch.full((2, 2), 2.0)
    rmsprop.step()  # the mean square starts at 1: 0.9 + 0.1 * 2**2 = 1.3, and epsilon is inside the root
    torch.testing.assert_close(w.detach(), torch.full((2, 2), -0.256 * 2 / (1.3 + 1e-3) ** 0.5))


def test_repeated_augmentation_draws_the_same_images_in_a_row() -> None:
    draws = EpochBatches(10, 5, 0, repeats=3).indices()
    assert len(draws) == 10 and len(set(draws)) == 4 and draws[0] == draws[1] == draws[2] != draws[3]
    shares = [EpochBatches(12, 2, 0, rank, 3, repeats=3).indices() for rank in range(3)]
    assert shares[0] == shares[1] == shares[2]  # each process its own augmentation of the same images


def test_an_unknown_network_is_refused_with_what_there_is() -> None:
    with pytest.raises(BitfrontError, match=r"no model=timm\.deit_bas; choices: .*timm\.deit_base_patch16_224"):
        imagenet("model=timm.deit_bas")
    with pytest.raises(BitfrontError, match=r"model=timm\.vgg11 does not fit this task"):
        imagenet("model=timm.vgg11").model()
    with pytest.raises(BitfrontError, match="is for images of 32 x 32"):
        build_task(compose.load(["task=resnet", "model=vit"]))
    with pytest.raises(BitfrontError, match=r"no model=resnet19; choices: .*resnet18"):
        build_task(compose.load(["task=resnet", "model=resnet19"]))


def test_pretrained_networks_are_measured_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a network as torchvision keeps it once it is downloaded."""
    from torchvision.models import mobilenet_v2

    for part in ("train", "val"):
        for label in range(1000):
            folder = tmp_path / "imagenet" / part / f"n{label:08}"
            folder.mkdir(parents=True)
            Image.new("RGB", (8, 8), (label % 256, 100, 50)).save(folder / f"{part}.JPEG")
    cache = tmp_path / "torch" / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    published = mobilenet_v2()
    torch.save(published.state_dict(), cache / "mobilenet_v2-b0353104.pth")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    model = ("task=resnet_imagenet", "model=torchvision.mobilenet_v2", "task.pretrained=true", "task.image_size=8")
    words = (*model, "task.held_out=100", "quant=float", f"data_root={tmp_path}", f"root={tmp_path}/runs")
    result = cli("run", *words, "train.workers=0")
    assert result.returncode == 0, result.stderr
    (record,) = read_all(tmp_path / "runs")
    assert record.history == [] and "train" not in record.stages
    network = mobilenet_v2()
    Artifact.load(Path(record.artifact)).load_into(network)
    for name, tensor in published.state_dict().items():
        assert torch.equal(tensor, network.state_dict()[name])
    (cache / "mobilenet_v2-b0353104.pth").unlink()
    assert cli("evaluate", f"artifact={record.artifact}", f"data_root={tmp_path}").returncode == 0
    if not (cache / "mobilenet_v2-b0353104.pth").exists():  # no network, no weights
        with pytest.raises(BitfrontError, match=r"no pretrained weights for torchvision\.mobilenet_v2.*init_from="):
            imagenet(*model[1:], name="resnet_imagenet").initial()


def test_a_damaged_photo_is_no_traceback(root: Path) -> None:
    for path in (root / "imagenet" / "train").glob("*/*"):
        path.write_bytes(path.read_bytes()[:200])
    words = ("task=resnet_imagenet", "model=torchvision.mobilenet_v2", *SMALL, f"data_root={root}", f"root={root}/r")
    result = cli("run", *words, "train.workers=1")
    assert result.returncode == 1
    assert "could not read" in result.stderr and "Traceback" not in result.stderr
