"""``src.quantize``: a network of the user's, its weights and data as they lie, one packed file."""

from __future__ import annotations

import re
import runpy
import subprocess
from pathlib import Path

import pytest
import soundfile
import torch
import torch.nn.functional as F  # noqa: N812
import torchvision
import transformers
from conftest import cli
from test_images_task import CLASSES, pictures
from test_library import in_another_program
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor, nn

import bitfront

MODULE = """
import torch, torchvision
from torch import nn

def convnet():
    return torchvision.models.shufflenet_v2_x0_5(num_classes=5)

def predictor(vocabulary):
    return nn.Sequential(nn.Embedding(vocabulary, 64), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, vocabulary))

def listener():
    layers = nn.Conv1d(1, 32, 16, 8), nn.ReLU(), nn.Conv1d(32, 32, 16, 8), nn.ReLU(), nn.Conv1d(32, 8, 1)
    return nn.Sequential(*layers)

def loader():
    generator = torch.Generator().manual_seed(0)
    for _ in range(6):
        yield torch.randn(4, 3, 32, 32, generator=generator), torch.zeros(4)

def tensor():
    return torch.randn(56, 3, 32, 32)

def waves():
    return [(torch.randn(2, 1, 800),) for _ in range(4)]

def wrong():
    return {"x": torch.zeros(3)}

def broken():
    raise OSError("no such luck")
"""


def convnet() -> nn.Module:
    return torchvision.models.shufflenet_v2_x0_5(num_classes=len(CLASSES))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder: a module, photos in class folders, and a network that a plain loop has trained on them."""
    folder = tmp_path_factory.mktemp("user")
    (folder / "theirs.py").write_text(MODULE)
    pictures(folder / "photos", 12)
    view = torchvision.transforms.Compose(
        [
            torchvision.transforms.Resize((32, 32)),
            torchvision.transforms.ToTensor(),
            torchvision.transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        ]
    )
    images = torchvision.datasets.ImageFolder(str(folder / "photos"), view)
    torch.manual_seed(0)
    network = convnet()
    optimizer = torch.optim.AdamW(network.parameters(), 3e-3)
    for _ in range(25):
        for x, y in torch.utils.data.DataLoader(images, 20, shuffle=True):
            optimizer.zero_grad()
            F.cross_entropy(network(x), y).backward()
            optimizer.step()
    state = {f"module.{name}": t for name, t in network.state_dict().items()}
    torch.save({"epoch": 25, "state_dict": state}, folder / "mine.pth")
    return folder


@pytest.fixture
def quantize(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.syspath_prepend(str(place))
    return Run(place, tmp_path)


class Run:
    """The command, with the user's folder and a place for the file."""

    def __init__(self, place: Path, out: Path) -> None:
        self.place, self.out = place, out / "net.safetensors"

    def __call__(self, *words: str) -> subprocess.CompletedProcess[str]:
        return cli("quantize", *words, f"data_root={self.out.parent}", f"out={self.out}")

    def photos(self, *words: str) -> subprocess.CompletedProcess[str]:
        network = "model=torchvision.shufflenet_v2_x0_5", f"weights={self.place}/mine.pth"
        return self(*network, f"data={self.place}/photos", "task.image_size=32", *words)


def outputs(network: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return network.eval()(x)


def test_photos_from_class_folders_to_a_file_that_another_program_reads(quantize: Run) -> None:
    done = quantize.photos("quant=decoupleq", "bits=4")
    assert done.returncode == 0, done.stderr
    before, after = re.findall(r": loss [\d.]+, top1 ([\d.]+), top5", done.stdout)
    assert float(before) >= 80 and float(after) >= float(before) - 20
    size = quantize.out.stat().st_size
    assert "scaled to 32 x 32 (task.image_size=)" in done.stdout and ", on 10 samples for testing" in done.stdout
    assert "has no test part" in done.stdout
    assert bitfront.Artifact.load(quantize.out).about["images"]["image_size"] == 32
    assert f"file: {size:,} bytes" in done.stdout and f"{size:,} bytes of 1,419,924" in done.stdout
    x = torch.randn(3, 3, 32, 32)
    ours = bitfront.load(quantize.out, into=convnet())
    assert torch.equal(in_another_program(quantize.out, x), outputs(ours, x))
    packed = bitfront.Artifact.load(quantize.out).packed
    assert packed and all(int(p.bits.max()) == 4 for p in packed.values())
    again = quantize("model=theirs:convnet", f"weights={quantize.out}", "data=theirs:loader", "quant=rtn", "bits=8")
    assert again.returncode == 0, again.stderr  # a file of ours is a file of weights


def test_command_and_library_give_the_same_file(quantize: Run, place: Path) -> None:
    """Up to what the file says of itself."""
    words = "model=theirs:convnet", f"weights={place}/mine.pth", "data=theirs:loader", "quant=gptq", "bits=3"
    assert quantize(*words, "seed=3").returncode == 0
    network = convnet()
    state = torch.load(place / "mine.pth")["state_dict"]
    network.load_state_dict({name.removeprefix("module."): t for name, t in state.items()})
    import theirs

    model = bitfront.quantize(network, bitfront.GPTQ(bits=3), theirs.loader())
    command, library = bitfront.Artifact.load(quantize.out), model.artifact()
    assert command.packed.keys() == library.packed.keys()
    for name, packed in library.packed.items():
        assert torch.equal(command.packed[name].decode(), packed.decode()), name


def test_photos_without_labels_tell_by_how_much_outputs_change(quantize: Run, place: Path, tmp_path: Path) -> None:
    flat = tmp_path / "flat"
    flat.mkdir()
    for n, path in enumerate(sorted((place / "photos").rglob("*.*"))):
        (flat / f"{n}{path.suffix}").write_bytes(path.read_bytes())
    words = "model=theirs:convnet", f"weights={place}/mine.pth", f"data={flat}", "task.image_size=32"
    errors = []
    for bits in (2, 8):
        done = quantize(*words, "quant=gptq", f"bits={bits}", "quant.samples=40", "quant.batch_size=20")
        assert done.returncode == 0, done.stderr
        assert "2 batches to calibrate on, 1 others" in done.stdout and "was not calibrated on" in done.stdout
        errors.append(float(re.search(r"error is ([\d.e-]+) %", done.stdout)[1]))  # type: ignore[index]
    assert 0 < errors[1] < 0.1 * errors[0]
    labelled = quantize.photos("classes=7", "quant=rtn")
    assert labelled.returncode and "'fc.bias' is [5], not [7]" in labelled.stderr


def hf(folder: Path, kind: str) -> Path:
    """A folder as transformers saves it, with a tokenizer."""
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["<unk>", "<pad>", "<s>"]
    tokenizer.train_from_iterator([story()], trainers.WordLevelTrainer(vocab_size=60, special_tokens=special))
    wrapped = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>", bos_token="<s>"
    )
    wrapped.save_pretrained(folder)
    sizes = {"vocab_size": 60, "hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 128}
    torch.manual_seed(0)
    if kind == "encoder":
        network: nn.Module = transformers.BertModel(transformers.BertConfig(num_attention_heads=2, **sizes))
    else:
        config = transformers.LlamaConfig(num_attention_heads=2, bos_token_id=2, tie_word_embeddings=False, **sizes)
        network = transformers.LlamaForCausalLM(config)
    network.save_pretrained(folder)
    return folder


def story() -> str:
    words = [f"word{n}" for n in range(50)]
    return "\n".join(" ".join(words[(k * j + j) % 50] for j in range(2, 9 + k % 5)) for k in range(400)) + "\n"


def test_folders_of_transformers_are_quantized_on_text(quantize: Run, tmp_path: Path) -> None:
    (tmp_path / "story.txt").write_text(story())
    data = f"data={tmp_path}/story.txt"
    encoder = quantize(f"model=hf:{hf(tmp_path / 'bert', 'encoder')}", data, "quant=gptq", "bits=4", "quant.samples=64")
    assert encoder.returncode == 0, encoder.stderr
    assert "power of error" in encoder.stdout and "encoder.layer.1.output.dense.weight" in encoder.stdout
    model = f"model=hf:{hf(tmp_path / 'llama', 'decoder')}"
    decoder = quantize(model, data, "quant=gptq", "bits=4", "quant.samples=32", "task.context=32", "task.overlap=16")
    assert decoder.returncode == 0, decoder.stderr
    before, after = re.findall(r"ppl ([\d.]+)", decoder.stdout.replace("word_ppl", "word"))
    assert float(after) == pytest.approx(float(before), rel=0.1)


def test_networks_of_a_users_package_are_quantized_on_text_and_sound(quantize: Run, tmp_path: Path) -> None:
    (tmp_path / "story.txt").write_text(story())
    words = "model=theirs:predictor", f"data={tmp_path}/story.txt", "task.context=32", "task.overlap=16"
    text = quantize(*words, "task.vocabulary=300", "quant=rtn", "bits=4", "quant.min_size=0.001")
    assert text.returncode == 0, text.stderr
    assert len(re.findall(r"bpb [\d.]+", text.stdout)) == 2
    (tmp_path / "sounds").mkdir()
    for n in range(4):
        soundfile.write(tmp_path / "sounds" / f"{n}.wav", torch.randn(4000 + n, 2).numpy() / 8, 8000)
    words = "model=theirs:listener", f"data={tmp_path}/sounds", "quant=gptq", "bits=4", "quant.samples=3"
    sound = quantize(*words, "quant.min_size=0.001")
    assert sound.returncode == 0, sound.stderr
    assert "3 batches to calibrate on, 1 others" in sound.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data=theirs:loader"], "model= is needed"),
        (["model=theirs:convnet"], "data= is needed"),
        (["modle=theirs:convnet"], "no 'modle'; did you mean 'model'"),
        (["model=theirs:convnet", "data=theirs:loader", "bitz=3"], "no 'bitz'; did you mean 'bits'"),
        (["model=theirs:convnet", "data=theirs:loader", "quant=gptq", "bits=abc"], "bits"),
        (["model=theirs:convnet", "data=nowhere"], "there is no data=nowhere"),
        (["model=theirs:convnet", "data=theirs:broken"], "no such luck"),
        (["model=theirs:convnet", "data=theirs:wrong"], "must give batches"),
        (["model=theirs:convnet", "data=theirs:waves"], "does not run on data=theirs:waves"),
        (["model=theirs:convnet", "data=theirs:nothere"], "theirs has no 'nothere'; it has convnet, predictor"),
        (["model=theirs:nothere", "data=theirs:loader"], "theirs has no 'nothere'; it has convnet, predictor"),
        (["model=theirs.nets", "data=theirs:loader", "weights=pretrained"], "theirs.nets:<function>"),
        (["model=theirs:convnet", "data=theirs:loader", "quant=diffq", "bits=3"], "none of those after training"),
        (["model=theirs:convnet", "data=theirs:loader", "weights=nowhere.pth"], "weights=nowhere.pth: no such file"),
        (["model=theirs:convnet", "data=theirs:loader", "quant=lsq"], "none of those after training"),
        (["model=torchvision.shufflenet", "data=theirs:loader", "weights=pretrained"], "torchvision.shufflenet_v2"),
        (["model=torchvision.resnet18", "data=theirs:loader"], "needs weights=<file>"),
    ],
)
def test_mistakes_are_told_in_one_line(quantize: Run, words: list[str], message: str) -> None:
    done = quantize(*words)
    assert done.returncode == 1 and message in done.stderr.splitlines()[-1], done.stderr
    assert "Traceback" not in done.stderr and not quantize.out.exists()


def test_one_image_is_no_data_and_a_folder_without_tokenizer_no_language(quantize: Run, tmp_path: Path) -> None:
    image = next((quantize.place / "photos").rglob("*.png"))
    done = quantize("model=theirs:convnet", f"data={image}", "quant=rtn")
    assert done.returncode == 1 and "one image; give the folder" in done.stderr and "Traceback" not in done.stderr
    (tmp_path / "story.txt").write_text(story())
    folder = hf(tmp_path / "bert", "encoder")
    for file in folder.glob("tokenizer*"):
        file.unlink()
    done = quantize(f"model=hf:{folder}", f"data={tmp_path}/story.txt", "quant=gptq")
    assert done.returncode == 1 and "no tokenizer" in done.stderr and "Traceback" not in done.stderr


def test_one_tensor_of_samples_is_cut_into_batches(quantize: Run) -> None:
    done = quantize(
        "model=theirs:convnet", "data=theirs:tensor", "quant=gptq", "quant.samples=40", "quant.batch_size=8"
    )
    assert done.returncode == 0, done.stderr
    assert "5 batches to calibrate on, 2 others" in done.stdout


@pytest.mark.parametrize("quant", ["rtn", "gptq"])
def test_a_size_is_kept_by_the_file(quantize: Run, quant: str) -> None:
    done = quantize.photos(f"quant={quant}", "max_size=0.4", "raw_dtype=float16")
    assert done.returncode == 0, done.stderr
    assert 0.97 * 0.4 * 2**20 <= quantize.out.stat().st_size <= 0.4 * 2**20
    reader = quantize.out.parent / "reader.py"
    assert cli("export", f"artifact={quantize.out}", "format=torch", f"out={reader}").returncode == 0
    network, x = convnet(), torch.randn(3, 3, 32, 32)
    network.load_state_dict(runpy.run_path(str(reader))["load"](quantize.out))
    assert torch.equal(outputs(network, x), outputs(bitfront.load(quantize.out, into=convnet()), x))


def test_a_folder_is_no_place_for_a_file(quantize: Run) -> None:
    quantize.out.mkdir()
    done = quantize("model=theirs:convnet", "data=theirs:loader", "quant=rtn")
    assert done.returncode == 1 and "is a folder" in done.stderr and "Traceback" not in done.stderr


def test_no_file_but_ours_is_written_over(quantize: Run) -> None:
    quantize.out.write_bytes(b"theirs")
    done = quantize("model=theirs:convnet", "data=theirs:loader", "quant=rtn")
    assert done.returncode == 1 and "none of our files" in done.stderr
    assert quantize.out.read_bytes() == b"theirs"
