"""diffusers' everyday idioms, and every Python block of docs/diffusers.md."""

import json
import re
import shutil
import sys
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from diffusers import AutoModel, DiffusionPipeline, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from diffusers.callbacks import PipelineCallback, SDCFGCutoffCallback
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image
from standin_hub import StandInHub, log_in
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from training_runs import ROOT

from pixelrepa_diffusers import (
    JiTFlowMatchScheduler,
    JiTTransformer2DModel,
    PixelREPAPipeline,
    save_original_checkpoint,
)
from pixelrepa_diffusers.hub import publish_folder


REPO = "user/pixelrepa-b-16"
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "docs/diffusers.md").read_text(encoding="utf-8"), flags=re.S)
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
SHALLOW = {"num_layers": 2, "in_context_start": 1}


def sample(pipeline, labels=(1, 2), **settings) -> torch.Tensor:
    settings = {"num_inference_steps": 4, "output_type": "latent", **settings}
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(list(labels), generator=[torch.Generator().manual_seed(k) for k in labels], **settings).images


def save_lora(transformer, folder, seed=0) -> None:
    """Save random LoRA weights, as a training run leaves them."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    PixelREPAPipeline.save_lora_weights(folder, get_peft_model_state_dict(transformer))


@pytest.fixture(scope="module")
def saved(make_pipeline, tmp_path_factory):
    """The folder of a pipeline with a class of ImageNet and a fast solver; read-only."""
    folder = tmp_path_factory.mktemp("saved") / "pipeline"
    scheduler = JiTFlowMatchScheduler(solver="euler")
    pipeline = make_pipeline({**SHALLOW, "num_classes": 208}, scheduler, id2label={207: "golden retriever"})
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def page(saved, make_transformer, tmp_path_factory):
    """The names that the blocks of the page leave behind."""
    folder, names = tmp_path_factory.mktemp("page"), {}
    save_lora(make_transformer(**SHALLOW, num_classes=208), folder / "lora")
    Image.fromarray(np.arange(24 * 24 * 3, dtype=np.uint8).reshape(24, 24, 3)).save(folder / "photo.png")
    save_original_checkpoint(folder / "checkpoint-last.pth", make_transformer(**SHALLOW))
    shutil.copy(saved / "transformer/diffusion_pytorch_model.safetensors", folder)
    with StandInHub() as hub, pytest.MonkeyPatch.context() as patch:
        log_in(hub, patch)
        publish_folder(saved, REPO)
        patch.chdir(folder)
        for block in BLOCKS:
            if "torchao" not in block or find_spec("torchao"):
                exec(block, names)
    return {**names, "folder": folder}


def test_the_page_replaces_components_by_those_of_the_caller(page):
    assert len(page["images"]) == 8 and page["image"].size == (16, 16)
    assert type(page["scheduler"]) is UniPCMultistepScheduler


def test_the_inpainting_of_the_page_keeps_the_known_pixels_and_paints_the_others(page):
    known, painted = page["known"] / 2 + 0.5, page["inpainted"]
    torch.testing.assert_close(painted[..., :8, :], known[..., :8, :])
    assert (painted - known)[..., 8:, :].abs().mean() > 0.05


def test_the_page_merges_lora_weights(page, saved):
    merged, plain = (PixelREPAPipeline.from_pretrained(folder) for folder in (page["folder"] / "merged", saved))
    assert not torch.allclose(sample(merged), sample(plain), atol=1e-3)
    plain.load_lora_weights(page["folder"] / "lora", adapter_name="photos")
    plain.set_adapters("photos", 0.8)
    torch.testing.assert_close(sample(merged), sample(plain), rtol=0, atol=1e-4)


def test_single_file_weights_are_those_of_the_repository(page, saved):
    state = PixelREPAPipeline.from_pretrained(saved).transformer.state_dict()
    torch.testing.assert_close(page["transformer"].state_dict(), state, rtol=0, atol=0)


# Components from outside, loaded as remote code


def test_passed_components_are_used_and_checked(saved):
    def load(**components):
        return DiffusionPipeline.from_pretrained(str(saved), trust_remote_code=True, **components)

    transformer = AutoModel.from_pretrained(str(saved), subfolder="transformer", trust_remote_code=True)
    scheduler = FlowMatchEulerDiscreteScheduler()
    assert load(transformer=transformer).transformer is transformer
    assert load(scheduler=scheduler).scheduler is scheduler
    package = JiTTransformer2DModel.from_pretrained(saved, subfolder="transformer")
    assert torch.equal(sample(load(transformer=package)), sample(load()))
    with pytest.raises(ValueError, match=r"should be .*ModelMixin"):
        load(transformer=scheduler)


def test_remote_code_takes_a_device_but_no_balanced_map(saved):
    pipeline = DiffusionPipeline.from_pretrained(str(saved), trust_remote_code=True, device_map="cpu")
    assert torch.equal(sample(pipeline), sample(PixelREPAPipeline.from_pretrained(saved, device_map="balanced")))
    model = AutoModel.from_pretrained(str(saved), subfolder="transformer", trust_remote_code=True, device_map="auto")
    assert set(model.hf_device_map.values()) == {"cpu"}
    with pytest.raises(ValueError, match="Pass `trust_remote_code=True`"):
        DiffusionPipeline.from_pretrained(str(saved), trust_remote_code=True, device_map="balanced")


# Saving


def test_whole_weights_replace_shards(make_transformer, tmp_path):
    make_transformer(seed=1).save_pretrained(tmp_path, max_shard_size="20KB")
    transformer = make_transformer()
    transformer.save_pretrained(tmp_path)
    loaded = JiTTransformer2DModel.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded.state_dict(), transformer.state_dict(), rtol=0, atol=0)


def test_fused_projections_are_saved_as_the_plain_ones(make_transformer, tmp_path):
    transformer = make_transformer()
    names = transformer.state_dict().keys()
    transformer.fuse_qkv_projections()
    transformer.save_pretrained(tmp_path)
    assert transformer.transformer_blocks[0].attn.fused_projections
    loaded, info = JiTTransformer2DModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()) and loaded.state_dict().keys() == names


# LoRA


def test_two_adapters_are_loaded_mixed_and_removed(make_pipeline, make_transformer, tmp_path):
    pipeline = make_pipeline(SHALLOW)
    plain = sample(pipeline)
    for seed, name in enumerate(("one", "two")):
        save_lora(make_transformer(**SHALLOW), tmp_path / name, seed)
        pipeline.load_lora_weights(tmp_path / name, adapter_name=name)
    assert pipeline.get_list_adapters() == {"transformer": ["one", "two"]}
    images = {}
    for names, weights in ((["one"], [1.0]), (["two"], [1.0]), (["one", "two"], [0.5, 0.5])):
        pipeline.set_adapters(names, weights)
        images[tuple(names)] = sample(pipeline)
    pipeline.unload_lora_weights()
    assert torch.equal(sample(pipeline), plain)
    assert len({image.sum().item() for image in (*images.values(), plain)}) == 4


# Images in


def test_full_strength_ignores_the_image_and_a_small_one_returns_it(make_pipeline):
    pipeline = make_pipeline(SHALLOW)
    image = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(sample(pipeline, image=image, strength=1.0), sample(pipeline))
    # one step of 50 from t = 0.98, where the velocity is bounded by the clamp at t_eps = 0.05
    distances = [
        (sample(pipeline, image=image, strength=strength, num_inference_steps=50) - (2 * image - 1)).abs().mean()
        for strength in (0.02, 0.3, 0.9)
    ]
    assert distances[0] < 0.3
    assert distances[0] < distances[1] < distances[2]


@pytest.mark.parametrize(
    "scheduler",
    [JiTFlowMatchScheduler(), FlowMatchEulerDiscreteScheduler(), UniPCMultistepScheduler(**FLOW)],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_strength_is_the_share_of_the_steps(make_pipeline, scheduler):
    pipeline, times = make_pipeline(SHALLOW, scheduler=scheduler), []
    pipeline.transformer.register_forward_pre_hook(lambda module, arguments: times.append(float(arguments[1])))
    sample(pipeline, image=Image.new("RGBA", (20, 16)), strength=0.4, num_inference_steps=10)
    assert times[0] == pytest.approx(0.6, abs=1e-3)
    assert len(times) == pipeline.num_timesteps == (7 if scheduler.order == 2 else 4)


def test_one_image_per_label_or_one_for_all(make_pipeline):
    pipeline = make_pipeline(SHALLOW)
    black, white = Image.new("RGB", (16, 16)), Image.new("RGB", (16, 16), "white")
    both = sample(pipeline, image=[black, white], strength=0.5)
    shared = sample(pipeline, image=black, strength=0.5)
    assert torch.equal(both[0], shared[0]) and not torch.equal(both[1], shared[1])
    with pytest.raises(ValueError, match="Got 3 images for 2 labels"):
        sample(pipeline, image=[black] * 3)
    with pytest.raises(ValueError, match="`strength` must lie in"):
        sample(pipeline, image=black, strength=0.0)


# Callbacks, devices, descriptions


def test_callback_objects_name_their_tensors(make_pipeline):
    class Blacken(PipelineCallback):
        tensor_inputs = ["latents"]

        def callback_fn(self, pipeline, step_index, timesteps, callback_kwargs):
            return {"latents": torch.zeros_like(callback_kwargs["latents"])}

    assert sample(make_pipeline(SHALLOW), callback_on_step_end=Blacken()).abs().max() == 0
    with pytest.raises(ValueError, match=r"may only name \['latents'\]"):
        sample(make_pipeline(SHALLOW), callback_on_step_end=SDCFGCutoffCallback())


@pytest.mark.parametrize(
    "scheduler", [JiTFlowMatchScheduler(), UniPCMultistepScheduler(**FLOW)], ids=lambda s: s.order
)
def test_no_float64_tensor_is_made_on_the_device(make_pipeline, scheduler):
    """MPS has no float64; the meta device stands for any device that is not the CPU."""

    class NoFloat64(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            output = function(*args, **kwargs or {})
            for value in tree_leaves(output):
                assert not (isinstance(value, torch.Tensor) and value.is_meta and value.dtype == torch.float64), (
                    function
                )
            return output

    pipeline = make_pipeline(SHALLOW, scheduler=scheduler).to("meta")
    with NoFloat64():
        pipeline([1, 2], guidance_scale=2.0, num_inference_steps=3, output_type="latent")


def test_a_pipeline_describes_itself_in_a_few_lines(make_pipeline):
    text = repr(make_pipeline(id2label=dict.fromkeys(range(10), "name"), guidance_scale=2.0))
    assert len(text.splitlines()) < 10
    for fact in (
        "JiTTransformer2DModel",
        "M parameters, torch.float32 on cpu",
        "3×16×16, 10 classes",
        "guidance: 2 for t",
    ):
        assert fact in text


def test_model_index_names_the_class_for_auto_model(saved):
    index = json.loads((saved / "model_index.json").read_text())
    assert index["auto_map"] == {"AutoModel": "transformer_jit.JiTTransformer2DModel"}
    assert sys.modules["transformer_jit"].JiTTransformer2DModel


# Quantization


def test_the_quantized_pipeline_of_the_page_is_close_and_loads_again(page, saved):
    pytest.importorskip("torchao")
    quantized = PixelREPAPipeline.from_pretrained(page["folder"] / "quantized", dtype=torch.bfloat16)
    weight = quantized.transformer.transformer_blocks[0].attn.to_q.weight
    assert type(weight).__name__ == "Int8Tensor"
    images, expected = sample(quantized), sample(PixelREPAPipeline.from_pretrained(saved, dtype=torch.bfloat16))
    assert 0 < (images - expected).abs().mean() < 0.02
