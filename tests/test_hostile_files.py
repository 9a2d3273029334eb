"""Files made by an adversary: nothing in them runs, nothing is written beyond the given folder, and the file is named.

Every payload here makes a marker when it runs; `armed` shows that it would.
"""

import io
import json
import os
import pickle
import resource
import shutil
import struct
import tarfile
import zipfile
import zlib
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from training_runs import TEACHER, arguments, load_script, write_images
from transformers import HfArgumentParser

from pixelrepa_diffusers import JiTTransformer2DModel, PixelREPAPipeline, files
from pixelrepa_diffusers.commands import evaluate, generate, prepare_reference
from pixelrepa_diffusers.conversion import _WeightSet, load_original_checkpoint, read_original_checkpoint
from pixelrepa_diffusers.evaluation import (
    FeatureSpace,
    FeatureStatistics,
    VisionEncoderNetwork,
    file_images,
    read_image,
)
from pixelrepa_diffusers.evaluation.loop import Tally
from pixelrepa_diffusers.hub import card_for_folder, pipeline_files
from pixelrepa_diffusers.teacher import SemanticTeacher
from pixelrepa_diffusers.training.arguments import parse_arguments
from pixelrepa_diffusers.training.data import BadImageError, DataArguments, ImageLoader, open_source


train_pixelrepa = load_script("training/train_pixelrepa.py")


PUBLISHED = Path(__file__).parent / "fixtures" / "reference_a" / "checkpoint-last.pth"
WEIGHTS = "diffusion_pytorch_model.safetensors"


class Payload:
    """Unpickled, it makes a folder."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.fixture
def marker(tmp_path):
    """A place that stays empty unless a payload runs."""
    path = tmp_path / "payload-ran"
    yield path
    assert not path.exists()


def armed(file: Path, marker: Path) -> None:
    """The file's payload is real: read carelessly, it runs."""
    if file.suffix == ".npz":
        with np.load(file, allow_pickle=True) as content:
            [content[name] for name in content.files]
    else:
        torch.load(file, weights_only=False)
    assert marker.exists()
    marker.rmdir()


@pytest.fixture
def folder(make_pipeline, tmp_path):
    make_pipeline(id2label={0: "zero"}).save_pretrained(tmp_path / "given" / "pipeline")
    return tmp_path / "given" / "pipeline"


def tree(root: Path) -> list[Path]:
    return sorted(root.rglob("*"))


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


# -------------------------------------------------------------------------------------------- checkpoints of a run


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A checkpoint of a tiny run, and the words that resume it."""
    root = tmp_path_factory.mktemp("run")
    data = write_images(root / "data", per_class=2)
    options = {
        "max_train_steps": 2,
        "checkpointing_steps": 1,
        "checkpoints_total_limit": 2,
        "num_validation_images": 1,
    }
    train_pixelrepa.main(parse_arguments(arguments(data, root / "out", **options)))
    return data, root / "out" / "checkpoint-1", options


@pytest.fixture
def resume(trained, tmp_path):
    """Resumes a copy after a change to it, with a manifest that fits: whoever writes the files writes that, too."""
    data, checkpoint, options = trained
    copy = tmp_path / "given" / "checkpoint-1"
    shutil.copytree(checkpoint, copy)

    def run(change, keep_manifest: bool = False):
        change(copy)
        if not keep_manifest:
            names = [
                p.relative_to(copy).as_posix() for p in copy.rglob("*") if p.is_file() and p.name != files.MANIFEST
            ]
            content = {name: files._fingerprint(copy / name) for name in names}
            (copy / files.MANIFEST).write_text(json.dumps(content))
        words = arguments(data, tmp_path / "out", resume_from_checkpoint=copy, **options)
        return train_pixelrepa.main(parse_arguments(words))

    return run


def test_an_optimizer_state_with_code_is_refused_and_not_run(resume, marker):
    def plant(checkpoint):
        torch.save({"state": Payload(marker)}, checkpoint / "optimizer.bin")
        armed(checkpoint / "optimizer.bin", marker)

    with pytest.raises(ValueError, match=r"checkpoint-1 is refused: its optimizer.bin .*mkdir.*Nothing of it was run"):
        resume(plant)


def test_further_pickles_in_a_checkpoint_are_not_run(resume, marker):
    def plant(checkpoint):
        # Generator states are passed over by accelerate when they are not what they should be; no draw depends on them.
        torch.save({"random_state": Payload(marker)}, checkpoint / "random_states_0.pkl")
        armed(checkpoint / "random_states_0.pkl", marker)
        for name in ("pytorch_model.bin", "scaler.pt", "scheduler.bin"):
            torch.save(Payload(marker), checkpoint / name)

    assert resume(plant).is_dir()


def test_pickles_of_registered_objects_which_no_run_has_are_refused(resume, marker):
    def plant(checkpoint):
        (checkpoint / "custom_checkpoint_0.pkl").write_bytes(pickle.dumps(Payload(marker)))

    with pytest.raises(ValueError, match=r"checkpoint-1 does not fit this run: .*custom checkpoints"):
        resume(plant)


def plant_manifest(text: str):
    return lambda checkpoint: (checkpoint / files.MANIFEST).write_text(text)


@pytest.mark.parametrize(
    "text, named",
    [
        ("[" * 200_000, "is not a complete checkpoint: manifest.json: .*recursion"),
        ("1" * 5000, "is not a complete checkpoint: manifest.json: Exceeds the limit"),
        ("[]", "manifest.json does not list files with their size and crc32"),
        ('{"a": 1}', "manifest.json does not list files with their size and crc32"),
        ('{"../secret": {"size": 1, "crc32": 1}}', "manifest.json names '../secret', which lies outside it"),
        ('{"/etc/passwd": {"size": 1, "crc32": 1}}', "manifest.json names '/etc/passwd', which lies outside it"),
        ('{"optimizer.bin": {"size": NaN, "crc32": 1e999}}', "optimizer.bin is not as it was written"),
    ],
    ids=lambda text: text[:12],
)
def test_a_manifest_that_is_none_is_a_damaged_checkpoint(resume, text, named):
    with pytest.raises(files.DamagedFolderError, match=named):
        resume(plant_manifest(text), keep_manifest=True)


@pytest.mark.parametrize(
    "change, named",
    [
        ("[" * 200_000, "progress.json cannot be read: .*recursion"),
        ("null", "progress.json must hold step, loader, ema_calls, arguments"),
        ({"step": -5}, "progress.json: the step must be at least 0, got -5"),
        ({"step": 10**30}, "is at step 1000000000000000000000000000000, beyond the 2 steps"),
        ({"step": "1"}, "progress.json must hold step"),
        ({"loader": {}}, r"A data position must hold epoch, batch, .* got \{\}"),
        (
            {"loader": {"epoch": -1, "batch": 0, "seed": 0, "global_batch_size": 4, "num_images": 6}},
            "A data position must hold",
        ),
        ({"arguments": []}, "progress.json must hold step"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_progress_that_is_none_is_refused_by_its_path(resume, change, named):
    def plant(checkpoint):
        path = checkpoint / "progress.json"
        path.write_text(change if isinstance(change, str) else json.dumps({**json.loads(path.read_text()), **change}))

    with pytest.raises(ValueError, match=named):
        resume(plant)


# ------------------------------------------------------------------------------------------------------- safetensors


def header(entries: dict, data: bytes = b"", length: int | None = None) -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


LIES = {
    "a header longer than the file": header({}, length=10**6),
    "a header of 2⁶³ bytes": header({}, length=2**63),
    "no JSON": struct.pack("<Q", 8) + b"notjson!",
    "deep JSON": struct.pack("<Q", 100_000) + b"[" * 100_000,
    "offsets beyond the file": header({"x": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}, b"1234"),
    "offsets backwards": header({"x": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}, b"1234"),
    "negative offsets": header({"x": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}, b"1234"),
    "a shape too large for its bytes": header({"x": {"dtype": "F32", "shape": [10**12], "data_offsets": [0, 4]}}, b"1234"),
    "a shape that overflows": header({"x": {"dtype": "F32", "shape": [2**62, 8], "data_offsets": [0, 4]}}, b"1234"),
    "overlapping tensors": header(
        {name: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for name in "xy"}, b"1234"
    ),
    "a hole between tensors": header({"x": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, b"12345678"),
    "an unknown type": header({"x": {"dtype": "PICKLE", "shape": [1], "data_offsets": [0, 4]}}, b"1234"),
    "nothing": b"",
}  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
def test_weights_that_lie_about_themselves_are_neither_loaded_nor_published(folder, lie):
    (folder / "transformer" / WEIGHTS).write_bytes(LIES[lie])
    with pytest.raises((OSError, ValueError, SafetensorError)):
        PixelREPAPipeline.from_pretrained(folder)
    with pytest.raises(ValueError, match=rf"{WEIGHTS} is damaged: .* Save the pipeline again"):
        pipeline_files(folder)


@pytest.mark.parametrize("lie", ["a header of 2⁶³ bytes", "overlapping tensors", "nothing"])
def test_weights_that_lie_are_not_resumed(resume, lie):
    with pytest.raises(ValueError, match=rf"does not fit this run: .*{WEIGHTS} is no safetensors file"):
        resume(lambda checkpoint: (checkpoint / "transformer" / WEIGHTS).write_bytes(LIES[lie]))


@pytest.mark.parametrize(
    "index, named",
    [
        ({"weight_map": {"x": "../../secret.safetensors"}}, 'must hold "weight_map"'),
        ({"weight_map": {"x": "/etc/passwd"}}, 'must hold "weight_map"'),
        ({"weight_map": ["x"]}, 'must hold "weight_map"'),
        ({"weight_map": {"x": 1}}, 'must hold "weight_map"'),
        ({}, 'must hold "weight_map"'),
        ({"weight_map": {"x": "gone.safetensors"}}, "lacks weights: gone.safetensors"),
    ],
    ids=str,
)
def test_an_index_of_shards_leads_nowhere_else(folder, index, named):
    (folder / "transformer" / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    with pytest.raises((ValueError, FileNotFoundError), match=named):
        pipeline_files(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_not_published_and_make_no_image(folder, value, tmp_path):
    path = folder / "transformer" / WEIGHTS
    tensors = load_file(path)
    tensors["final_layer.linear.bias"][3] = value
    save_file(tensors, path)
    with pytest.raises(ValueError, match=rf"{WEIGHTS}: the tensor 'final_layer.linear.bias' holds NaN or infinity"):
        pipeline_files(folder)
    words = ["--pipeline", str(folder), "--class_labels", "0", "--output_dir", str(tmp_path / "out")]
    with pytest.raises(ValueError, match="The images contain NaN or infinite values: the weights do"):
        generate.main(
            HfArgumentParser(generate.GenerateArguments).parse_args_into_dataclasses(
                [*words, "--num_inference_steps", "1"]
            )[0]
        )
    assert not list((tmp_path / "out").glob("*.png"))


# ----------------------------------------------------------------------------------------- published checkpoints (.pth)


def test_a_published_checkpoint_may_not_inflate_a_tensor(tmp_path):
    torch.save({"x": torch.zeros(1).expand(2**40)}, tmp_path / "small.pth")
    assert (tmp_path / "small.pth").stat().st_size < 5000
    weights = _WeightSet("model_ema1", "", read_original_checkpoint(tmp_path / "small.pth"))
    with pytest.raises(ValueError, match=r"'x' in 'model_ema1' must be a dense tensor .* 4096 GiB out of a few bytes"):
        weights.check_values()


@pytest.mark.parametrize(
    "name, shape", [("pos_embed", (1, 2**40, 32)), ("y_embedder.embedding_table.weight", (2**40, 32))]
)
def test_a_published_checkpoint_of_absurd_size_is_refused_without_its_memory(tmp_path, name, shape):
    checkpoint = read_original_checkpoint(PUBLISHED)
    checkpoint["model_ema1"][name] = torch.zeros(1).expand(shape)
    vars(checkpoint["args"]).pop("class_num", None), vars(checkpoint["args"]).pop("img_size", None)
    torch.save(checkpoint, tmp_path / "huge.pth")
    with pytest.raises(ValueError, match=r"must be a positive integer of at most 1048576|instead of"):
        load_original_checkpoint(tmp_path / "huge.pth", in_context_start=2)


# --------------------------------------------------------------------------------------------------- saved pipelines


@pytest.mark.parametrize("place", ["model_index.json", "transformer/config.json", "scheduler/scheduler_config.json"])
@pytest.mark.parametrize(
    "text", ["[" * 200_000, '{"a":' * 200_000, "1" * 5000, "null", "\xff"], ids=lambda text: text[:4]
)
def test_a_json_bomb_in_a_saved_pipeline_ends_in_an_error(folder, place, text):
    (folder / place).write_text(text, encoding="latin-1")
    said = "is nested too deeply|must hold a JSON object|is not a valid JSON file|limit .* for integer string"
    with pytest.raises((ValueError, OSError), match=said):
        PixelREPAPipeline.from_pretrained(folder)
    if not place.startswith("scheduler"):
        with pytest.raises(ValueError, match=rf"{Path(place).name} (is not valid JSON|must hold a JSON object)"):
            card_for_folder(folder, "me/tiny")


@pytest.mark.parametrize(
    "change, named",
    [
        ({"num_layers": 10**9}, "`num_layers` must be a positive integer of at most 1024, got 1000000000"),
        ({"sample_size": 10**30, "patch_size": 1}, "`sample_size` must be a positive integer of at most 1048576"),
        ({"num_classes": 2**62}, "`num_classes` must be a positive integer of at most 1048576"),
        ({"attention_head_dim": 2**40}, "`attention_head_dim` must be a positive integer of at most 1048576"),
        ({"in_context_len": 2**40}, "`in_context_len` must be an integer of at least 0, at most 1048576"),
    ],
    ids=str,
)
def test_a_configuration_of_absurd_size_is_refused_at_once(folder, change, named):
    edit(folder / "transformer" / "config.json", **change)
    with pytest.raises(ValueError, match=named):
        PixelREPAPipeline.from_pretrained(folder)


def test_a_pickle_in_the_place_of_weights_does_not_run(folder, marker):
    (folder / "transformer" / WEIGHTS).unlink()
    path = folder / "transformer" / "diffusion_pytorch_model.bin"
    torch.save({"x": Payload(marker)}, path)
    armed(path, marker)
    with pytest.raises((OSError, ValueError, pickle.UnpicklingError)):
        PixelREPAPipeline.from_pretrained(folder)
    with pytest.raises((OSError, ValueError, pickle.UnpicklingError)):
        JiTTransformer2DModel.from_pretrained(folder, subfolder="transformer")
    with pytest.raises(FileNotFoundError, match="lacks weights"):
        pipeline_files(folder)


def code(marker: Path) -> str:
    return f"import os\nos.mkdir({str(marker)!r})\nclass X: pass\n"


@pytest.mark.parametrize("loader", [PixelREPAPipeline, DiffusionPipeline])
@pytest.mark.parametrize(
    "component, library",
    [
        ("transformer", "evil"),
        ("transformer", "../evil"),
        ("transformer", "../../evil"),
        ("../outside", "evil"),
        ("x", "evil"),
    ],
)
def test_code_that_a_description_names_runs_with_trust_alone(folder, marker, component, library, loader):
    for place in (folder, folder.parent, folder / "transformer", folder.parent / "outside", folder / "x"):
        place.mkdir(exist_ok=True)
        (place / "evil.py").write_text(code(marker))
    edit(folder / "model_index.json", **{component: [library, "X"]})
    if loader is PixelREPAPipeline and component != "transformer":
        loader.from_pretrained(str(folder))  # a component the pipeline does not have is ignored, with a warning
        return
    with pytest.raises((ValueError, TypeError, OSError, AttributeError)):  # diffusers'
        loader.from_pretrained(str(folder))


def test_code_that_a_description_names_does_run_with_trust(folder, marker):
    (folder / "transformer" / "evil.py").write_text(code(marker))
    edit(folder / "model_index.json", transformer=["evil", "X"])
    with pytest.raises(Exception):  # noqa: B017, the class is no model
        DiffusionPipeline.from_pretrained(str(folder), trust_remote_code=True)
    assert marker.exists()
    marker.rmdir()


@pytest.mark.parametrize(
    "module, name", [("os", "system"), ("subprocess", "run"), ("builtins", "eval"), ("pickle", "loads")]
)
def test_a_description_may_not_name_functions_of_python(folder, module, name):
    edit(folder / "model_index.json", scheduler=[module, name])
    with pytest.raises((ValueError, TypeError, OSError, AttributeError)):
        PixelREPAPipeline.from_pretrained(folder)


def test_the_files_own_code_beside_the_weights_is_not_what_the_installed_class_runs(folder, marker):
    for file in folder.rglob("*.py"):
        file.write_text(code(marker))
    PixelREPAPipeline.from_pretrained(folder)


# -------------------------------------------------------------------------------------------------------- publishing


def test_publishing_never_leaves_the_folder_by_a_name(folder):
    secret = folder.parent / "keys"
    secret.mkdir()
    (secret / "id_rsa").write_text("secret")
    for name, library in (
        ("../keys", "diffusers"),
        ("", "diffusers"),
        ("a/b", "diffusers"),
        ("x", "../../keys/id_rsa"),
    ):
        description = json.loads((folder / "model_index.json").read_text())
        (folder / "model_index.json").write_text(json.dumps({**description, name: [library, "X"]}))
        with pytest.raises(ValueError, match="so that none leads out of the folder"):
            pipeline_files(folder)
        (folder / "model_index.json").write_text(json.dumps(description))
    edit(folder / "model_index.json", _class_name=["../keys/id_rsa", "X"])
    with pytest.raises(ValueError, match=r"names '../keys/id_rsa'"):
        pipeline_files(folder)


def test_publishing_never_leaves_the_folder_by_a_link(folder):
    (folder.parent / "id_rsa").write_text("secret")
    (folder / "scheduler" / "notes.txt").symlink_to(folder.parent / "id_rsa")
    with pytest.raises(ValueError, match=r"notes.txt is a link to .*id_rsa, outside the folder"):
        pipeline_files(folder)


def test_a_snapshot_of_the_cache_whose_files_are_links_can_be_published(folder, tmp_path):
    snapshot, blobs = tmp_path / "cache" / "snapshots" / "abc", tmp_path / "cache" / "blobs"
    shutil.copytree(folder, snapshot)
    blobs.mkdir()
    for number, file in enumerate(path for path in tree(snapshot) if path.is_file()):
        file.rename(blobs / str(number))
        file.symlink_to(blobs / str(number))
    assert pipeline_files(snapshot) == pipeline_files(folder)


# ----------------------------------------------------------------------------------------------------------- teachers


@pytest.fixture
def encoder(tmp_path):
    shutil.copytree(TEACHER, tmp_path / "teacher")
    return tmp_path / "teacher"


LOADERS = [
    lambda path: SemanticTeacher.from_pretrained(path, 4, 32),
    lambda path: VisionEncoderNetwork.from_pretrained(path),
]


@pytest.mark.parametrize("load", LOADERS, ids=["teacher", "network"])
def test_an_encoders_own_code_is_refused_without_a_question(encoder, marker, load, monkeypatch):
    (encoder / "modeling.py").write_text(code(marker))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    edit(encoder / "config.json", model_type="evil", auto_map={"AutoConfig": "modeling.X", "AutoModel": "modeling.X"})
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        load(str(encoder))


@pytest.mark.parametrize("load", LOADERS, ids=["teacher", "network"])
def test_an_encoders_pickle_does_not_run(encoder, marker, load):
    (encoder / "model.safetensors").unlink()
    torch.save({"x": Payload(marker)}, encoder / "pytorch_model.bin")
    armed(encoder / "pytorch_model.bin", marker)
    with pytest.raises((OSError, ValueError, pickle.UnpicklingError)):
        load(str(encoder))


# ------------------------------------------------------------------------------------------------- statistics, states


def test_arrays_of_objects_are_not_unpickled(tmp_path, marker):
    path = tmp_path / "real.npz"
    np.savez(path, mu=np.array([Payload(marker)], dtype=object), sigma=np.eye(1))
    armed(path, marker)
    with pytest.raises(ValueError, match=r"real.npz cannot be used as reference statistics"):
        FeatureStatistics.load(path)
    np.savez(path, settings=np.array([Payload(marker)], dtype=object), done=1)
    with pytest.raises(ValueError, match=r"real.npz cannot be read .*: remove it to start this evaluation again"):
        Tally([], 4).load(path, {})


def test_an_array_that_claims_more_than_there_is_is_refused(tmp_path):
    path, stream = tmp_path / "real.npz", io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": "<f8", "fortran_order": False, "shape": (10**13,)})
    np.savez(path, sigma=np.eye(2))
    with zipfile.ZipFile(path, "a") as file:
        file.writestr("mu.npy", stream.getvalue())
    with pytest.raises(ValueError, match=r"real.npz cannot be used as reference statistics"):
        FeatureStatistics.load(path)


@pytest.mark.parametrize(
    "arrays, named",
    [
        ({"settings": "{", "done": 1}, "cannot be read"),
        ({"settings": "[" * 200_000, "done": 1}, "cannot be read"),
        ({"settings": "[]", "done": 1}, "holds no settings but a list"),
        ({"done": 1}, "cannot be read"),
        ({"settings": "{}", "done": "many"}, "cannot be read"),
        ({"settings": "{}", "done": 1, "moments/teacher/update": 1}, "holds the unknown 'moments/teacher/update'"),
        ({"settings": "{}", "done": 1, "moments/teacher/__class__": 1}, "holds the unknown"),
        ({"settings": "{}", "done": 1, "banks/other": np.eye(2)}, "holds the unknown 'banks/other'"),
        ({"settings": "{}", "done": 1, "shown/x": 1}, "holds the unknown 'shown/x'"),
        ({"settings": "{}", "done": 1, "x": 1}, "holds the unknown 'x'"),
    ],
    ids=str,
)
def test_a_state_of_an_evaluation_that_is_none_is_refused(tmp_path, arrays, named):
    np.savez(tmp_path / "state.npz", **arrays)
    space = FeatureSpace("teacher", torch.nn.Identity(), ("fd_teacher",))
    with pytest.raises(ValueError, match=rf"state.npz {named}"):
        Tally([space], 4).load(tmp_path / "state.npz", {})


# ------------------------------------------------------------------------------------------------------------- images


def png(width: int, height: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG of a few bytes that claims a size."""
    content = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), *chunks]
    content += [(b"IDAT", zlib.compress(b"\0" * 100)), (b"IEND", b"")]
    body = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in content
    )
    return b"\x89PNG\r\n\x1a\n" + body


BOMBS = {
    "3.6 billion pixels": (png(60_000, 60_000), "pixels"),
    "144 million pixels": (png(12_000, 12_000), "pixels"),  # where Pillow itself only warns
    "2³¹ pixels wide": (png(2**31 - 1, 1), "."),
    "text of 256 MB": (png(4, 4, (b"zTXt", b"k\0\0" + zlib.compress(b"\0" * 2**28))), "."),
    "cut short": (png(64, 64)[:60], "."),
    "no image": (b"\x89PNG\r\n\x1a\n", "."),
}  # fmt: skip


@pytest.fixture
def light():
    """The peak of memory grows by less than a picture of 144 million pixels takes."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 350_000  # kB


@pytest.mark.parametrize("bomb", BOMBS)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_an_image_bomb_is_a_bad_image_by_name_wherever_images_are_read(tmp_path, light, bomb):
    content, named = BOMBS[bomb]
    data = write_images(tmp_path / "data", classes=1, per_class=4, size=8)
    path = data / "class0" / "0.png"
    path.write_bytes(content)

    loader = ImageLoader(open_source(DataArguments(train_data_dir=str(data))), resolution=8, batch_size=4, seed=0)
    with pytest.raises(BadImageError, match=rf"Bad image .*0\.png: .*{named}"):
        next(iter(loader))
    with pytest.raises(ValueError, match=rf"Bad image .*0\.png: .*{named}"):
        read_image(path, 8)
    with pytest.raises(ValueError, match=r"Bad image .*0\.png: "):
        file_images([path])([0])

    words = ["--images", str(data / "class0"), "--metrics", "fd_teacher", "--teacher", str(TEACHER)]
    words += ["--teacher_image_size", "28", "--teacher_reference", str(tmp_path / "real.npz")]
    FeatureStatistics(np.zeros(24), np.eye(24), count=100).save(tmp_path / "real.npz")
    given = [*words, "--output_dir", str(tmp_path / "measured")]
    with pytest.raises(ValueError, match=r"Bad image .*0\.png: |Images of several sizes: .*0\.png"):
        evaluate.main(HfArgumentParser(evaluate.EvaluateArguments).parse_args_into_dataclasses(given)[0])
    assert not (tmp_path / "measured" / "metrics.json").exists()

    options = prepare_reference.ReferenceArguments(
        train_data_dir=str(data), output_file=tmp_path / "out" / "real.npz", cache_dir=str(tmp_path / "cache"),
        network=str(TEACHER), image_size=28, resolution=8, dataloader_num_workers=0,
    )  # fmt: skip
    with pytest.raises(ValueError, match="Image 0 of the data set cannot be read: "):
        prepare_reference.main(options)
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------- archives, links, names


def shard(path: Path, members: dict[str, bytes | str]) -> None:
    """A tar of regular files (bytes) and links (text)."""
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            if isinstance(content, str):
                entry.type, entry.linkname = tarfile.SYMTYPE, content
                archive.addfile(entry)
            else:
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))


@pytest.mark.parametrize("streaming", [True, False])
def test_members_of_a_shard_that_point_outside_write_nothing_there(tmp_path, streaming):
    stream = io.BytesIO()
    Image.new("RGB", (8, 8)).save(stream, "PNG")
    given = tmp_path / "given"
    given.mkdir()
    (tmp_path / "secret.png").write_bytes(stream.getvalue())
    members = {}
    for number, stem in enumerate(("../../up", "/tmp/absolute-member", "plain", "a/../../b")):
        members |= {f"{stem}{number}.png": stream.getvalue(), f"{stem}{number}.cls": b"0"}
    shard(given / "a.tar", {**members, "link.png": str(tmp_path / "secret.png"), "link2.cls": "/etc/passwd"})
    before = [path for path in tree(tmp_path) if "cache" not in path.parts]
    source = open_source(
        DataArguments(
            dataset_name="webdataset", data_files=[str(given / "a.tar")], streaming=streaming, image_column="png",
            label_column="cls", num_classes=1, cache_dir=str(tmp_path / "cache"),
        )
    )  # fmt: skip
    assert len(list(source)) == 4  # links are no images
    assert [path for path in tree(tmp_path) if "cache" not in path.parts] == before
    assert not list(Path("/tmp").glob("absolute-member*"))


def test_a_prepared_folder_reads_no_file_of_another(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "other.arrow").write_bytes(b"1234")
    manifest = {"resolution": 8, "num_classes": 1, "class_names": None, "num_images": 1, "skipped": []}
    for name in ("../other.arrow", str(tmp_path / "other.arrow")):
        (tmp_path / "data" / "prepared.json").write_text(json.dumps({**manifest, "files": {name: 4}}))
        with pytest.raises(ValueError, match="which lies outside its folder"):
            open_source(DataArguments(train_data_dir=str(tmp_path / "data")))


def test_a_prepared_file_that_is_no_table_is_named(tmp_path):
    (tmp_path / "data-00000.arrow").write_bytes(b"1234")
    manifest = {"resolution": 8, "num_classes": 1, "class_names": None, "files": {"data-00000.arrow": 4}}
    (tmp_path / "prepared.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=f"The files of {tmp_path} are damaged"):
        open_source(DataArguments(train_data_dir=str(tmp_path)))


def test_a_saved_data_set_that_is_damaged_is_named(tmp_path):
    datasets.Dataset.from_dict({"image": [b"x"], "label": [0]}).save_to_disk(tmp_path / "set")
    state = json.loads((tmp_path / "set" / "state.json").read_text())
    for content in ("{", "[" * 200_000, json.dumps({**state, "_data_files": [{"filename": "../../etc/passwd"}]})):
        (tmp_path / "set" / "state.json").write_text(content)
        with pytest.raises(ValueError, match="set cannot be read as a data set"):
            open_source(DataArguments(dataset_name=str(tmp_path / "set")))


@pytest.mark.parametrize("name", ["../../up", "/tmp/absolute", "..", "a/b", "CON", "a\u202eb", "x" * 300])
def test_class_names_never_become_paths(make_pipeline, tmp_path, name):
    make_pipeline(id2label={3: name}).save_pretrained(tmp_path / "given")
    before = tree(tmp_path)
    words = ["--pipeline", str(tmp_path / "given"), "--class_labels", "3", "--output_dir", str(tmp_path / "out")]
    words += ["--num_inference_steps", "1"]
    generate.main(HfArgumentParser(generate.GenerateArguments).parse_args_into_dataclasses(words)[0])
    written = {str(path.relative_to(tmp_path)) for path in set(tree(tmp_path)) - set(before)}
    assert written - {"out/.lock"} == {"out", "out/0003_000000.png", "out/grid.png", "out/arguments.json"}


@pytest.mark.parametrize("name", ["two\nlines", "bell\a", "nul\0", "half\ud800", "\x1b[31mred"], ids=repr)
def test_class_names_are_one_line_of_text(make_pipeline, name):
    with pytest.raises(ValueError, match=r"`id2label\[3\]` must be a name of one line, without control characters"):
        make_pipeline(id2label={3: name})


def test_yaml_makes_no_objects(tmp_path, marker, capsys):
    text = f"!!python/object/apply:os.mkdir [{str(marker)!r}]"
    (tmp_path / "run.yaml").write_text(f"seed: {text}")
    with pytest.raises(SystemExit):
        parse_arguments(["--config", str(tmp_path / "run.yaml")])
    assert "could not determine a constructor" in capsys.readouterr().err


def test_yaml_that_multiplies_itself_is_refused_at_once(tmp_path, capsys):
    lines = ["a: &a [x, x, x, x, x, x, x, x, x]"]
    lines += [
        f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]"
        for before, name in zip("abcdefgh", "bcdefghi", strict=True)
    ]
    (tmp_path / "run.yaml").write_text("\n".join(lines) + "\nema_decays: *i\n")
    with pytest.raises(SystemExit):
        parse_arguments(["--config", str(tmp_path / "run.yaml")])
    assert "unknown arguments: a, b" in capsys.readouterr().err
    (tmp_path / "run.yaml").write_text("ema_decays: " + "[" * 5_000)
    with pytest.raises(SystemExit):
        parse_arguments(["--config", str(tmp_path / "run.yaml")])
