"""The user's own images and networks: from a raw folder to the report."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from conftest import REPOSITORY, cli, written
from PIL import Image
from torch import nn

from bitfront.cells import compose
from bitfront.cells.cell import Cell
from bitfront.cells.flow import build_task
from bitfront.cells.record import Record, read_all
from bitfront.data.identified import YOUNG, fingerprint
from bitfront.data.images import fault, opened
from bitfront.errors import BitfrontError
from bitfront.tasks.images import OwnImages

CLASSES = ["blue", "checks", "green", "red", "stripes"]
MODULE = """
from torch import nn

def small(classes, image_size):
    assert image_size == 16
    pooled = nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(256, classes)
    return nn.Sequential(nn.Conv2d(3, 16, 3, 2), nn.ReLU(), *pooled)

def wide(channels=3):
    return nn.Sequential(nn.Flatten(), nn.Linear(channels * 256, 7))

def nothing():
    return 3

def broken(classes):
    raise OSError("no such luck")
"""


def picture(label: int, rng: np.random.Generator, height: int, width: int) -> Image.Image:
    """A noisy image of a class."""
    pixels = rng.normal(90, 25, (height, width, 3))
    y, x = np.mgrid[:height, :width]
    if CLASSES[label] in ("blue", "green", "red"):
        pixels[..., ("red", "green", "blue").index(CLASSES[label])] += 100
    else:
        pixels += 120 * ((x // 4 + (y // 4 if CLASSES[label] == "checks" else 0)) % 2)[..., None]
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def pictures(root: Path, count: int) -> Path:
    """Class folders with images of several sizes and kinds."""
    rng = np.random.default_rng(0)
    for label, name in enumerate(CLASSES):
        (root / name).mkdir(parents=True)
        for i in range(count):
            image = picture(label, rng, 20 + i % 3, 18 + i % 4)
            image.save(root / name / f"{i:02}.{('png', 'jpg', 'bmp')[i % 3]}")
    return root


SMALL = ("task=images", "task.image_size=16", "trainer.accelerator=cpu")


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of images beside runs of four methods on it, by one command."""
    root = tmp_path_factory.mktemp("swept")
    pictures(root / "photos", 12)
    words = (*SMALL, f"data={root}/photos", "model=resnet8", f"data_root={root}/data", f"root={root}/runs")
    result = cli("run", "-m", *words, "quant=rtn,decoupleq,lsq,diffq")
    assert result.returncode == 0, result.stderr
    return root


def only(root: Path) -> Record:
    (record,) = read_all(root)
    return record


def test_from_a_folder_to_the_report(swept: Path) -> None:
    records = {record.method: record for record in read_all(swept / "runs")}
    assert set(records) == {"float", "rtn", "decoupleq", "lsq", "diffq"}
    assert {len(record.config["task"]["fingerprint"]) for record in records.values()} == {16}
    assert records["float"].primary.value >= 80 and records["lsq"].primary.value >= 60
    assert records["decoupleq"].sizes.file < records["float"].sizes.file / 2.5
    report = cli("report", str(swept / "runs"))
    assert all(method in report.stdout for method in records), report.stderr
    assert cli("report", str(swept / "runs"), "task=images").stdout == report.stdout  # whatever the data are called
    assert len(json.loads(next((swept / "data" / ".splits").glob("*.json")).read_text())) == 60


def test_moved_data_are_the_same_run_and_changed_data_another(swept: Path, tmp_path: Path) -> None:
    shutil.copytree(swept, tmp_path, dirs_exist_ok=True)
    (tmp_path / "photos").rename(tmp_path / "elsewhere")
    before = written(tmp_path / "runs")
    words = (*SMALL, "model=resnet8", f"root={tmp_path}/runs", "quant=rtn", f"data_root={tmp_path}")
    result = cli("run", *words, "data=elsewhere")
    assert "finished before" in result.stdout and written(tmp_path / "runs") == before, result.stderr
    word = f"data={tmp_path}/elsewhere"
    start = Cell([*words, word]).start
    assert start is not None and start.record() is not None
    picture(0, np.random.default_rng(1), 20, 20).save(tmp_path / "elsewhere" / "blue" / "more.png")
    start = Cell([*words, word]).start
    assert start is not None and start.record() is None


def test_evaluate_finds_the_data_and_says_if_they_are_others(swept: Path, tmp_path: Path) -> None:
    artifact = next(record.artifact for record in read_all(swept / "runs") if record.method == "lsq")
    words = (f"artifact={artifact}", "accelerator=cpu", f"data_root={swept}/data")
    same = cli("evaluate", *words)
    assert "the same as in its record" in same.stdout and "not those" not in same.stdout, same.stderr
    shutil.copytree(swept / "photos", tmp_path / "photos")
    moved = cli("evaluate", *words, f"data={tmp_path}/photos")
    assert "the same as in its record" in moved.stdout and "not those" not in moved.stdout
    (tmp_path / "photos" / "red" / "00.png").unlink()
    assert "are not those of its run" in cli("evaluate", *words, f"data={tmp_path}/photos").stdout


def own(folder: Path, root: Path, *words: str) -> OwnImages:
    task = build_task(compose.load([*SMALL, f"data={folder}", f"data_root={root}", *words]))
    assert isinstance(task, OwnImages)
    return task


def test_weights_that_plain_pytorch_has_trained(tmp_path: Path) -> None:
    """Its float row is what an evaluation without this package says of them, and methods start from them."""
    folder = pictures(tmp_path / "photos", 10)
    task = own(folder, tmp_path)
    network = torchvision.models.shufflenet_v2_x0_5(num_classes=5)
    optimizer = torch.optim.SGD(network.parameters(), 0.1)
    for _ in range(3):
        for x, y in task.loader("train"):
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(x), y).backward()
            optimizer.step()
    torch.save({"epoch": 3, "state_dict": nn.DataParallel(network).state_dict()}, tmp_path / "mine.pth")
    model = ("model=torchvision.shufflenet_v2_x0_5", f"init_from={tmp_path}/mine.pth", f"root={tmp_path}/runs")
    words = (*SMALL, f"data={folder}", f"data_root={tmp_path}", *model)
    result = cli("run", *words, "quant=float", "train.epochs=0")
    assert result.returncode == 0, result.stderr
    record = only(tmp_path / "runs")
    assert record.history == [] and "train" not in record.stages
    test = task.found[1]["test"]
    pixels = [
        torchvision.transforms.functional.center_crop(
            torchvision.transforms.functional.resize(Image.open(path).convert("RGB"), 16), [16, 16]
        )
        for path, _ in test
    ]
    x = torch.stack([torchvision.transforms.functional.to_tensor(image) for image in pixels])
    x = (x - torch.tensor([0.485, 0.456, 0.406])[:, None, None]) / torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    with torch.no_grad():
        logits = network.eval()(x)
    labels = torch.tensor([CLASSES.index(path.parent.name) for path, _ in test])
    assert record.metrics["test"]["loss"] == pytest.approx(nn.functional.cross_entropy(logits, labels).item(), rel=1e-4)
    assert cli("run", *words, "quant=rtn", "bits=8").returncode == 0
    rtn = next(record for record in read_all(tmp_path / "runs") if record.method == "rtn")
    assert rtn.metrics["test"]["loss"] == pytest.approx(record.metrics["test"]["loss"], rel=0.05)


def test_a_network_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = pictures(tmp_path / "photos", 10)
    (tmp_path / "my_nets.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    words = (*SMALL, f"data={folder}", f"data_root={tmp_path}", f"root={tmp_path}/runs", "model=my_nets:small")
    result = cli("run", *words, "quant=float", "train.epochs=2")
    assert result.returncode == 0, result.stderr
    record = only(tmp_path / "runs")
    assert record.sizes.parameters == 16 * 28 + 257 * 5
    evaluated = ("evaluate", f"artifact={record.artifact}", f"data_root={tmp_path}", "accelerator=cpu")
    refused = cli(*evaluated)  # a file does not say which code runs
    assert refused.returncode == 1 and "give task.network=<place> yourself" in refused.stderr
    assert "the same as in its record" in cli(*evaluated, "task.network=my_nets:small").stdout
    for model, answer in {
        "my_nets:wide": r"gives \[1, 7\], where \[1, 5\] is needed",
        "my_nets:nothing": "gives int, and must give a torch.nn.Module",
        "my_nets:broken": "fails with OSError: no such luck",
        "torchvision.vit_b_32": r"does not take inputs of shape \[1, 3, 16, 16\].*task.image_size=",
    }.items():
        with pytest.raises(BitfrontError, match=answer):
            own(folder, tmp_path, f"model={model}").model()


def test_a_network_in_a_folder_brings_its_weights(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.ViTConfig(**sizes, image_size=16, patch_size=8, num_labels=5)
    network = transformers.ViTForImageClassification(config)
    network.save_pretrained(tmp_path / "vit")
    folder = pictures(tmp_path / "photos", 4)
    words = (*SMALL, f"data={folder}", f"data_root={tmp_path}", f"root={tmp_path}/runs", f"model=hf:{tmp_path}/vit")
    result = cli("run", *words, "quant=rtn", "quant.min_size=0", "bits=8")
    assert result.returncode == 0, result.stderr
    records = {record.method: record for record in read_all(tmp_path / "runs")}
    assert records["float"].history == []  # measured only
    task = own(folder, tmp_path, f"model=hf:{tmp_path}/vit")
    expected = task.evaluate(network, "test")
    assert records["float"].metrics["test"] == pytest.approx(expected, rel=1e-4)
    assert records["rtn"].metrics["test"]["loss"] == pytest.approx(expected["loss"], rel=0.05)
    cell = Cell([*words, "quant=float"])
    assert cell.record() is not None
    nn.init.zeros_(network.classifier.weight)
    network.save_pretrained(tmp_path / "vit")
    assert Cell([*words, "quant=float"]).record() is None  # other weights


def test_a_sweep_names_the_same_setting_as_a_run() -> None:
    """Hydra escapes what it gives to the cells of a sweep."""
    assert (
        compose.load([*SMALL, r"model=my_nets\:small"]).setting == compose.load([*SMALL, "model=my_nets:small"]).setting
    )


def test_images_of_all_kinds_become_colours_of_one_size(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "photos", 3)
    Image.new("L", (40, 9), 128).save(folder / "red" / "00.png")
    Image.new("RGBA", (7, 30)).save(folder / "red" / "01.jpg", format="PNG")
    picture(3, np.random.default_rng(0), 16, 16).convert("P").save(folder / "red" / "02.bmp")
    task = own(folder, tmp_path, "train.batch_size=15")
    for split in ("train", "valid", "test"):
        (batch,) = task.loader(split)
        assert batch[0].shape == (5, 3, 16, 16) and sorted(batch[1].tolist()) == [0, 1, 2, 3, 4]
    data = task.dataset("train")
    assert not torch.equal(data[[0, 1]][0], data[[0, 1]][0])
    plain = task.undisturbed(data)
    assert torch.equal(plain[[0, 1]][0], plain[[0, 1]][0])


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        ((), "error: task=images needs data=<folder>"),
        (("data=nowhere",), "there is no data=nowhere"),
        (("data={}", "model=timm.resnet1"), "choices: timm.resnet10t"),
        (("data={}", "model=resnet21"), "choices: resnet20"),
        (("data={}", "model=not_there:net"), "could not import not_there"),
        (("data={}", "model=torch:net"), "torch has no 'net'"),
        (("data={}", "model=hf:nowhere"), "there is no model=hf:nowhere: neither"),
        (("data={}", "task.mean=[0.5]"), "task.mean=[0.5] and task.std="),
        (("data={}", "task.fingerprint=x"), "has no option 'task.fingerprint'"),
        (("data={}", "train.epochs=0"), "give init_from=<file>"),
        (("data={}", "init_from=nowhere.pth"), "no such file"),
    ],
)  # fmt: skip
def test_mistakes_on_the_command_line(swept: Path, tmp_path: Path, words: tuple[str, ...], answer: str) -> None:
    told = [word.format(swept / "photos") for word in words]
    result = cli("run", *SMALL, *told, f"root={tmp_path}", f"data_root={tmp_path}")
    assert result.returncode == 1 and answer in result.stderr and "Traceback" not in result.stderr, result.stderr


@pytest.mark.parametrize(
    ("spoil", "answer"),
    [
        (lambda folder: (folder / "red" / "00.png").write_bytes(b"no image"), "1 of 15 images cannot be read, as"),
        (lambda folder: (folder / "pink").mkdir(), "pink' holds no file of"),
        (lambda folder: [shutil.rmtree(folder / name) for name in CLASSES[1:]], "has 1 class folders, and two are"),
        (lambda folder: [path.rename(path.with_suffix(".txt")) for path in folder.rglob("*.*")], "holds no file of"),
    ],
)  # fmt: skip
def test_mistakes_in_a_folder(tmp_path: Path, spoil: object, answer: str) -> None:
    folder = pictures(tmp_path / "photos", 3)
    spoil(folder)  # type: ignore[operator]
    result = cli("run", *SMALL, f"data={folder}", f"root={tmp_path}/runs", f"data_root={tmp_path}")
    assert result.returncode == 1 and answer in result.stderr and "Traceback" not in result.stderr, result.stderr


def test_missing_data_is_said_before_torch_is_there() -> None:
    code = "import sys\nfrom bitfront.commands import start\ntry:\n    start('run', ['task=images', 'data=nowhere'])\n"
    code += "except SystemExit as end:\n    assert 'nowhere' in str(end) and 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY).returncode == 0


def spoil_an_end(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def spoil_a_check(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[content.index(b"IDAT") + 20] ^= 255
    path.write_bytes(content)


def huge(path: Path) -> None:
    Image.new("1", (20_000, 20_000)).save(path)  # 50 kB


def wide(path: Path) -> None:
    Image.new("F", (20, 20)).save(path.with_suffix(".tif"))
    path.unlink()


@pytest.mark.parametrize("spoil", [spoil_an_end, spoil_a_check, huge, wide])
def test_one_bad_image_among_many_is_left_out_with_a_word_before_the_training(
    spoil: Callable[[Path], None],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = pictures(tmp_path / "photos", 20)
    spoil(folder / "red" / "00.png")
    task = own(folder, tmp_path)
    assert sum(map(len, task.found[1].values())) == 99
    assert "1 of 100 images cannot be read" in (told := capsys.readouterr().err) and "red/00." in told
    assert sum(len(batch[1]) for split in ("train", "valid", "test") for batch in task.loader(split)) == 99
    time.sleep(YOUNG / 1e9)  # until the files may be remembered
    assert own(folder, tmp_path).found == task.found
    monkeypatch.setattr("bitfront.tasks.images.fault", lambda path: pytest.fail(f"{path} is read again"))
    assert own(folder, tmp_path).found == task.found
    spoil_an_end(next((folder / "red").glob("01.*")))
    monkeypatch.setattr("bitfront.tasks.images.fault", fault)
    with pytest.raises(BitfrontError, match=r"2 of 100 images cannot be read.*more than 1%"):
        _ = own(folder, tmp_path).found


def test_what_systems_leave_in_folders_is_no_data(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "photos", 3)
    found, known = own(folder, tmp_path).found, fingerprint(folder, str(tmp_path))
    for name in ("__MACOSX/red/._00.png", ".ipynb_checkpoints/a.png", "red/._00.png", "red/Thumbs.db", "@eaDir/a.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"no image")
    assert own(folder, tmp_path).found == found and fingerprint(folder, str(tmp_path)) == known


def test_images_have_the_colours_and_the_side_up_that_people_see(tmp_path: Path) -> None:
    wanted = np.add.outer(np.arange(12) * 16, np.arange(6) * 8).astype(np.uint8)
    Image.fromarray(wanted.astype(np.uint16) * 256 + 255).save(tmp_path / "deep.png")
    assert Image.open(tmp_path / "deep.png").mode == "I;16"
    Image.fromarray(wanted).save(tmp_path / "deep.tif")
    Image.merge("CMYK", [Image.new("L", (6, 12))] * 3 + [Image.fromarray(255 - wanted)]).save(tmp_path / "print.tif")
    for name in ("deep.png", "deep.tif", "print.tif"):
        assert np.array_equal(opened(tmp_path / name), np.stack([wanted] * 3, 2)), name
    turned = Image.Exif()
    turned[0x0112] = 6  # the camera stood on its right side
    Image.fromarray(np.rot90(wanted)).save(tmp_path / "photo.png", exif=turned)
    assert np.array_equal(np.asarray(opened(tmp_path / "photo.png", upright=True))[..., 0], wanted)
    assert np.array_equal(np.asarray(opened(tmp_path / "photo.png"))[..., 0], np.rot90(wanted))
