"""A saved folder loads without this package (as remote code) and with it (without `trust_remote_code`)."""

import json
import os
import subprocess
import sys

import pytest
import torch
from diffusers import AutoModel, DiffusionPipeline, UniPCMultistepScheduler
from safetensors.torch import load_file
from tiny import files

from pixelrepa_diffusers import JiTFlowMatchScheduler, JiTGuidanceHead, JiTTransformer2DModel, PixelREPAPipeline


NAMES = {0: "tench, Tinca tinca", 1: "goldfish"}

# Runs where the package cannot be imported, in one process because importing diffusers takes most of the time.
WITHOUT_THE_PACKAGE = """
import sys
sys.modules["pixelrepa_diffusers"] = None  # import now fails
from pathlib import Path
import torch
from diffusers import AutoModel, ClassifierFreeGuidance, DiffusionPipeline, ModularPipeline, UniPCMultistepScheduler
from safetensors.torch import save_file

source, out = Path(sys.argv[1]), Path(sys.argv[2])
images = {}

def load(folder, **kwargs):
    pipe = DiffusionPipeline.from_pretrained(str(folder), trust_remote_code=True, **kwargs)
    pipe.set_progress_bar_config(disable=True)
    return pipe

def sample(name, pipe):
    arguments = dict(class_labels=["goldfish", 3], num_inference_steps=4, output_type="latent")
    arguments["generator"] = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    images[name] = pipe(**arguments, output="images") if isinstance(pipe, ModularPipeline) else pipe(**arguments)[0]

pipe = load(source / "plain")
assert type(pipe).__module__.startswith("diffusers_modules."), type(pipe)
sample("plain", pipe)

pipe.save_pretrained(out / "again")
again = load(out / "again")
sample("again", again)
again.save_pretrained(out / "and_again")

copied = type(again).from_pipe(again)
assert copied.transformer is again.transformer
sample("from_pipe", copied)

pipe.scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
pipe.save_pretrained(out / "swapped")
sample("swapped", load(out / "swapped"))

sample("sharded variant", load(source / "sharded_fp16", variant="fp16"))
half = load(source / "plain", dtype=torch.bfloat16)
assert half.transformer.dtype == torch.bfloat16
assert half.transformer.conditioning.time_embedding.linear_1.weight.dtype == torch.float32
sample("bfloat16", half)

guided = load(source / "guided")
assert type(guided.guidance_head).__module__.startswith("diffusers_modules."), type(guided.guidance_head)
sample("guided", guided)
guided.save_pretrained(out / "guided")

modular = ModularPipeline.from_pretrained(str(source / "guided"), trust_remote_code=True)
modular.load_components()
assert type(modular.guidance_head).__module__.startswith("diffusers_modules."), type(modular.guidance_head)
sample("modular", modular)
modular.save_pretrained(out / "modular")
modular.update_components(guider=ClassifierFreeGuidance(2.0))
sample("guider", modular)
modular.unload_components("transformer")
modular.load_components(names="transformer", dtype=torch.bfloat16, trust_remote_code=True)
assert modular.transformer.dtype == torch.bfloat16
assert modular.transformer.conditioning.time_embedding.linear_1.weight.dtype == torch.float32

z, t, y = torch.linspace(-1, 1, 768).view(1, 3, 16, 16), torch.tensor([0.5]), torch.tensor([3])
model = AutoModel.from_pretrained(str(source / "plain" / "transformer"), trust_remote_code=True)
with torch.no_grad():
    images["model"] = model(z, t, y).sample
model.save_pretrained(out / "model")
with torch.no_grad():
    images["model again"] = AutoModel.from_pretrained(str(out / "model"), trust_remote_code=True)(z, t, y).sample

save_file({name: tensor.float() for name, tensor in images.items()}, str(out / "images.safetensors"))
"""


def sample(pipeline, **settings):
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    settings = {"num_inference_steps": 4, "output_type": "latent", **settings}
    return pipeline(["goldfish", 3], generator=generators, **settings).images


@torch.no_grad()
def predict(transformer):
    return transformer(torch.linspace(-1, 1, 768).view(1, 3, 16, 16), torch.tensor([0.5]), torch.tensor([3])).sample


@pytest.fixture(scope="module")
def saved(make_pipeline, make_transformer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    pipeline = make_pipeline(id2label=NAMES, guidance_scale=2.0)
    pipeline.save_pretrained(folder / "plain")
    pipeline.save_pretrained(folder / "sharded_fp16", variant="fp16", max_shard_size="20KB")
    head = JiTGuidanceHead.from_transformer(make_transformer(seed=1))
    guidance = {"guidance_head": head, "guidance_transformer": make_transformer(seed=2), "self_guidance_scale": 0.5}
    make_pipeline(id2label=NAMES, **guidance, autoguidance_scale=1.5).save_pretrained(folder / "guided")
    return folder


@pytest.fixture
def pipeline(saved):
    """Loaded like the remote one: memory alignment changes the last bits of a matrix product."""
    return PixelREPAPipeline.from_pretrained(saved / "plain")


@pytest.fixture(scope="module")
def remote(saved, tmp_path_factory):
    """Images, output folder and stderr of a process without the package."""
    folder = tmp_path_factory.mktemp("remote")
    run = subprocess.run(
        [sys.executable, "-c", WITHOUT_THE_PACKAGE, str(saved), str(folder)],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HOME": str(folder / "hf_home"), "HF_HUB_OFFLINE": "1"},
        cwd=folder,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return load_file(folder / "images.safetensors"), folder, run.stderr


@pytest.mark.parametrize("name", ["plain", "again", "from_pipe", "sharded variant"])
def test_remote_code_samples_the_same_bits(pipeline, remote, name):
    images, _, _ = remote
    assert torch.equal(images[name], sample(pipeline))


def test_remote_code_saves_and_loads_another_scheduler(make_pipeline, pipeline, remote):
    images, folder, _ = remote
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    expected = sample(make_pipeline(pipeline.transformer, scheduler, id2label=NAMES, guidance_scale=2.0))
    assert torch.equal(images["swapped"], expected)
    assert json.loads((folder / "swapped" / "model_index.json").read_text())["scheduler"] == [
        "diffusers",
        "UniPCMultistepScheduler",
    ]


def test_remote_code_loads_in_bfloat16(pipeline, remote):
    images, _, _ = remote
    assert 0 < (images["bfloat16"] - sample(pipeline)).abs().max() < 0.2


def test_remote_code_guides_by_a_head_and_a_second_transformer(saved, remote):
    images, folder, _ = remote
    for place in (saved, folder):
        assert torch.equal(images["guided"], sample(PixelREPAPipeline.from_pretrained(place / "guided")))


def test_remote_modular_code_guides_saves_and_swaps_the_guider(saved, remote):
    images, folder, _ = remote
    pipeline = PixelREPAPipeline.from_pretrained(saved / "guided")
    # The standard pipeline computes both halves of a guided batch in one model call.
    torch.testing.assert_close(images["modular"], sample(pipeline), atol=1e-5, rtol=1e-5)
    guided = sample(pipeline, guidance_scale=2.0, guidance_interval=(0, 1))
    torch.testing.assert_close(images["guider"], guided, atol=1e-5, rtol=1e-5)
    assert files(folder / "modular") == files(saved / "guided")


@pytest.mark.parametrize("name", ["model", "model again"])
def test_remote_auto_model_predicts_the_same_bits(pipeline, remote, name):
    images, _, _ = remote
    assert torch.equal(images[name], predict(pipeline.transformer))


def test_remote_code_loads_without_warnings(remote):
    _, _, stderr = remote
    for word in ("unexpected", "auto_map", "not expected", "were passed to", "Expected types"):
        assert word not in stderr


@pytest.mark.parametrize("name", ["again", "and_again"])
def test_a_folder_saved_by_remote_code_is_identical_and_loads_with_the_package(pipeline, saved, remote, name):
    _, folder, _ = remote
    written, expected = (
        # The standard loader does not fetch the blocks of the modular pipeline, so only a cache may have them.
        {path: content for path, content in files(place).items() if not path.startswith("modular_")}
        for place in (folder / name, saved / "plain")
    )
    assert written == expected  # in particular, no path of this machine
    loaded = PixelREPAPipeline.from_pretrained(folder / name)
    types = PixelREPAPipeline, JiTTransformer2DModel, JiTFlowMatchScheduler
    assert (type(loaded), type(loaded.transformer), type(loaded.scheduler)) == types
    assert torch.equal(sample(loaded), sample(pipeline))


def test_the_package_loads_without_trust(pipeline, saved):
    transformer = JiTTransformer2DModel.from_pretrained(saved / "plain", subfolder="transformer")
    assert torch.equal(predict(transformer), predict(pipeline.transformer))
    scheduler = JiTFlowMatchScheduler.from_pretrained(saved / "plain", subfolder="scheduler")
    assert scheduler.config.solver == "heun"


def test_diffusers_loaders_ask_for_trust(saved):
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        DiffusionPipeline.from_pretrained(str(saved / "plain"))
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        AutoModel.from_pretrained(str(saved / "plain" / "transformer"))


def test_remote_code_and_the_package_work_in_one_process(pipeline, saved, tmp_path):
    trusted = DiffusionPipeline.from_pretrained(str(saved / "plain"), trust_remote_code=True)
    assert type(trusted) is not PixelREPAPipeline
    assert torch.equal(sample(trusted), sample(pipeline))
    trusted.save_pretrained(tmp_path)
    assert torch.equal(sample(PixelREPAPipeline.from_pretrained(tmp_path)), sample(pipeline))
    # Remote components fit into the package's pipeline and the reverse.
    assert torch.equal(sample(PixelREPAPipeline.from_pipe(trusted)), sample(pipeline))
    assert torch.equal(sample(type(trusted).from_pipe(pipeline)), sample(pipeline))
