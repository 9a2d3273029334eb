"""Tiny real components, training runs, and the numbers recorded from the published implementation.

torch and the package are imported in the fixtures: the process that hands the tests to pytest-xdist's workers needs neither.
"""

import atexit
import os
import shutil
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from training_runs import TRAINER, arguments, load_script, write_images


# Set before the imports that read them: no test reads or writes the user's caches.
CACHE = tempfile.mkdtemp(prefix="pixelrepa-tests-")
for variable in ("HF_HOME", "XDG_CACHE_HOME", "TORCH_HOME", "TORCHINDUCTOR_CACHE_DIR"):
    os.environ[variable] = os.path.join(CACHE, variable.lower())
os.environ["HF_MODULES_CACHE"] = os.path.join(os.environ["HF_HOME"], "modules")
atexit.register(shutil.rmtree, CACHE, ignore_errors=True)


@pytest.fixture(scope="session", autouse=True)
def torch_settings():
    import torch

    # A forked child would wait forever for its parent's threads.
    torch.set_num_threads(1)
    # Workers of a DataLoader that ends in an error do not hear that they should stop, and are waited for: 5 s by default.
    torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL = 0.5


def reset_accelerate_state() -> None:
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(True)
    GradientState._reset_state()


@pytest.fixture(autouse=True)
def fresh_accelerate_state():
    """accelerate keeps the settings of a process's first Accelerator: no test inherits another's."""
    yield
    reset_accelerate_state()


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory) -> Path:
    """24 small images of 3 classes; read-only."""
    return write_images(tmp_path_factory.mktemp("images") / "train")


@pytest.fixture(scope="session")
def train(image_folder):
    """train(output_dir, [data], **arguments) runs the trainer's main in this process and returns its result."""
    from pixelrepa_diffusers.training.arguments import parse_arguments

    def run(output_dir, train_data_dir=image_folder, **overrides):
        reset_accelerate_state()
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("HF_HUB_OFFLINE", "1")
            return load_script(TRAINER).main(parse_arguments(arguments(train_data_dir, output_dir, **overrides)))

    return run


@pytest.fixture(scope="session")
def finished_run(train, tmp_path_factory) -> Path:
    """Output folder of a run of 6 steps with checkpoints and samples at 3 and 6; read-only."""
    output_dir = tmp_path_factory.mktemp("finished") / "run"
    train(output_dir, validation_steps=3, report_to="tensorboard", hub_token="hf_secret", lr_warmup_steps=0)
    return output_dir


@pytest.fixture(scope="session")
def make_transformer():
    """A transformer of 16 tokens, in eval mode; its zero-initialized layers are not zero, which would hide mistakes."""
    import torch

    from pixelrepa_diffusers import JiTTransformer2DModel

    def make(seed: int = 0, **changes) -> JiTTransformer2DModel:
        config = {
            "sample_size": 16,
            "patch_size": 4,
            "num_layers": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "bottleneck_dim": 6,
            "in_context_len": 2,
            "in_context_start": 2,
            "num_classes": 10,
        }
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            transformer = JiTTransformer2DModel(**{**config, **changes})
            with torch.no_grad():
                for parameter in transformer.parameters():
                    parameter.add_(0.1 * torch.randn_like(parameter))
        return transformer.eval()

    return make


@pytest.fixture(scope="session")
def make_pipeline(make_transformer):
    """A quiet pipeline: `transformer` settings, or a transformer, and the pipeline's own arguments."""
    from pixelrepa_diffusers import JiTFlowMatchScheduler, PixelREPAPipeline

    def make(transformer=None, scheduler=None, **arguments) -> PixelREPAPipeline:
        if transformer is None or isinstance(transformer, dict):
            transformer = make_transformer(**(transformer or {}))
        pipeline = PixelREPAPipeline(transformer, scheduler or JiTFlowMatchScheduler(), **arguments)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    return make


@pytest.fixture(scope="session")
def reference():
    """`config`, `tensors` and the `transformer` of the recorded run; read-only."""
    from safetensors.torch import load_file
    from tiny import REFERENCE, recorded_architecture, recorded_config

    from pixelrepa_diffusers.conversion import transformer_state_from_original

    config, transformer = recorded_config(), recorded_architecture()
    state = load_file(REFERENCE / "jit.safetensors")
    transformer.load_state_dict(transformer_state_from_original(state, config["ctx_start"]))
    tensors = load_file(REFERENCE / "tensors.safetensors")
    return SimpleNamespace(config=config, tensors=tensors, transformer=transformer.eval())
