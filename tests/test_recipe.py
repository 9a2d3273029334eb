"""The trainer follows its arguments: learning rate, optimizer, EMAs, switches and fine-tuning."""

import functools

import pytest
import torch
from safetensors.torch import load_file
from training_runs import TRAINER, assert_equal, load_script, read_metrics, weights, write_images

from pixelrepa_diffusers import PixelREPAPipeline, get_preset
from pixelrepa_diffusers.teacher import SemanticTeacher
from pixelrepa_diffusers.training.arguments import TrainingArguments
from pixelrepa_diffusers.training.builders import build_objective, build_optimizer
from pixelrepa_diffusers.training.export import build_pipeline
from pixelrepa_diffusers.transformer_jit import JiTBlock


train_pixelrepa = load_script(TRAINER)


def read(folder) -> dict[str, torch.Tensor]:
    return load_file(folder / "diffusion_pytorch_model.safetensors")


# ------------------------------------------------------------------------------------ learning rate, optimizer, EMAs


def test_learning_rate_and_emas_follow_the_recipe_at_every_step(train, tmp_path):
    run = tmp_path / "run"
    train(run, checkpointing_steps=1, lr_warmup_steps=3, scale_lr=True, learning_rate=0.64)
    for row in read_metrics(run):  # 0.64 · 4 / 256 after the warmup, which starts at 0
        assert row["learning_rate"] == pytest.approx(0.01 * min(1, (row["step"] - 1) / 3)), row["step"]

    parameters = [read(run / f"checkpoint-{step}/transformer") for step in range(1, 7)]
    for decay in (0.9, 0.5):
        averages = [read(run / f"checkpoint-{step}/transformer_ema_{decay}") for step in range(1, 7)]
        # The first step has learning rate 0: the parameters are those the EMAs start from.
        torch.testing.assert_close(averages[0], parameters[0], rtol=0, atol=0)
        for step in range(1, 6):
            for name, average in averages[step].items():
                expected = decay * averages[step - 1][name] + (1 - decay) * parameters[step][name]
                torch.testing.assert_close(average, expected, rtol=1e-5, atol=1e-6)
    assert not torch.equal(parameters[1]["final_layer.linear.weight"], parameters[0]["final_layer.linear.weight"])


def test_optimizer_follows_its_arguments_and_decays_only_matrices(make_transformer):
    transformer = make_transformer()
    args = TrainingArguments(adam_beta1=0.8, adam_beta2=0.7, adam_epsilon=1e-5, adam_weight_decay=0.3)
    objective = build_objective(args, transformer, None)
    optimizer = build_optimizer(args, objective, learning_rate=0.25)
    decayed, others = optimizer.param_groups
    for group in (decayed, others):
        assert (group["lr"], group["betas"], group["eps"]) == (0.25, (0.8, 0.7), 1e-5)
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.3, 0.0)
    names = {id(parameter): name for name, parameter in transformer.named_parameters()}
    undecayed = {names[id(parameter)] for parameter in others["params"]}
    assert undecayed == {name for name in names.values() if name.endswith("bias") or "norm" in name}
    assert len(decayed["params"]) + len(undecayed) == len(names)


def test_only_student_and_adapter_are_trained_and_the_teacher_stays_frozen(train, tmp_path, monkeypatch):
    teachers, build_teacher = [], train_pixelrepa.build_teacher

    def remember(*args):
        teacher = build_teacher(*args)
        teachers.append((teacher, [tensor.clone() for tensor in (*teacher.parameters(), *teacher.buffers())]))
        return teacher

    monkeypatch.setattr(train_pixelrepa, "build_teacher", remember)
    train(tmp_path / "run", max_train_steps=3, lr_warmup_steps=0)
    ((teacher, before),) = teachers
    assert all(map(torch.equal, (*teacher.parameters(), *teacher.buffers()), before))
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    saved = weights(tmp_path / "run/checkpoint-3")
    trained = [tensor.numel() for name, tensor in saved.items() if name.startswith(("transformer.", "adapter."))]
    assert sum(tensor.numel() for name, tensor in saved.items() if name.endswith("exp_avg")) == sum(trained)


# ------------------------------------------------------------------------------------------------------------ switches

# Draws and optimizer settings are tested above.
CHANGES = [
    {"seed": 1},
    {"alignment_weight": 1.0},
    {"t_eps": 0.9},
    {"noise_scale": 2.0},
    {"alignment_depth": 2},
    {"teacher_mode": "resize"},
    {"max_grad_norm": 0.01},
    {"lr_scheduler": "cosine"},
    {"random_flip": False},
    {"center_crop": False},
    {"objective": "irepa", "spatial_norm": 0.0},
]


@pytest.fixture(scope="module")
def trained(train, tmp_path_factory):
    """trained(**arguments) returns transformer and adapter after two steps; equal arguments are trained once."""

    @functools.cache
    def run(**overrides) -> dict[str, torch.Tensor]:
        output_dir = tmp_path_factory.mktemp("trained") / "run"
        train(output_dir, max_train_steps=2, lr_warmup_steps=0, **overrides)
        parts = weights(output_dir / "checkpoint-2").items()
        return {name: value for name, value in parts if name.startswith(("transformer.", "adapter."))}

    return run


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_argument_changes_the_weights(trained, change):
    objective = change.get("objective", "pixelrepa")
    baseline, changed = trained(objective=objective), trained(**{"objective": objective, **change})
    assert changed.keys() == baseline.keys()
    assert all(value.isfinite().all() for value in changed.values())
    assert any(not torch.equal(value, baseline[key]) for key, value in changed.items())


def test_without_ema_the_online_weights_are_published(train, tmp_path):
    folder = train(tmp_path / "run", use_ema=False, max_train_steps=3)
    assert not list((tmp_path / "run").glob("checkpoint-*/transformer_ema*"))
    published, trained = read(folder / "transformer"), read(tmp_path / "run/checkpoint-3/transformer")
    torch.testing.assert_close(published, trained, rtol=0, atol=0)


def test_bf16_keeps_weights_and_emas_in_float32(train, tmp_path, monkeypatch):
    seen, forward = set(), torch.nn.Linear.forward

    def watch(self, states):
        output = forward(self, states)
        seen.add(output.dtype)
        return output

    monkeypatch.setattr(torch.nn.Linear, "forward", watch)
    train(tmp_path / "run", max_train_steps=2, mixed_precision="bf16")
    assert torch.bfloat16 in seen
    saved = weights(tmp_path / "run/checkpoint-2")
    assert {value.dtype for name, value in saved.items() if not name.endswith("step")} == {torch.float32}
    assert all(value.isfinite().all() for value in saved.values())


def test_compiled_blocks_train_to_the_same_weights(train, tmp_path, monkeypatch):
    # Traced in full, without graph breaks; generating machine code would take minutes on a CPU.
    compiled, inputs, compile_block = [], [], JiTBlock.compile

    def record(graph, example_inputs):
        inputs.extend(example_inputs)
        return graph.forward

    def trace(self, **settings):
        compiled.append(self)
        compile_block(self, **settings, backend=record)

    monkeypatch.setattr(JiTBlock, "compile", trace)
    monkeypatch.setattr(SemanticTeacher, "compile", lambda self: compiled.append(self))
    train(tmp_path / "plain", max_train_steps=2, lr_warmup_steps=0)
    assert not compiled
    train(tmp_path / "compiled", max_train_steps=2, lr_warmup_steps=0, compile=True)
    assert [type(module).__name__ for module in compiled] == ["JiTBlock"] * 4 + ["SemanticTeacher"]
    assert inputs and not any(isinstance(value, torch.SymInt) for value in inputs)  # every length is static
    plain, other = (weights(tmp_path / name / "checkpoint-2") for name in ("plain", "compiled"))
    torch.testing.assert_close(other, plain)


def test_gradient_checkpointing_recomputes_blocks_and_changes_no_bit(train, tmp_path, monkeypatch):
    calls, forward = [], JiTBlock.forward
    monkeypatch.setattr(JiTBlock, "forward", lambda self, *args: (calls.append(id(self)), forward(self, *args))[1])
    train(tmp_path / "plain", max_train_steps=3)
    assert len(calls) == 3 * 4  # three blocks of the transformer, one of the adapter
    calls.clear()
    train(tmp_path / "checkpointed", max_train_steps=3, gradient_checkpointing=True)
    assert len(calls) == 3 * 4 * 2
    assert_equal(*(weights(tmp_path / name / "checkpoint-3") for name in ("plain", "checkpointed")))


# --------------------------------------------------------------------------------------------------------- fine-tuning

EMBEDDING = "conditioning.class_embedding.weight"


def test_fine_tuning_starts_from_the_weights_of_the_pipeline(train, finished_run, tmp_path, caplog):
    pipeline = finished_run / "pipeline"
    train(tmp_path / "run", max_train_steps=1, pretrained_model_name_or_path=pipeline)  # at learning rate 0
    assert_equal(read(tmp_path / "run/checkpoint-1/transformer"), read(pipeline / "transformer"))
    assert "has no adapter" in caplog.text and "other names" not in caplog.text
    caplog.clear()
    caplog.set_level("INFO")
    resumed = {"resume_from_checkpoint": "latest", "max_train_steps": 2}
    train(tmp_path / "run", pretrained_model_name_or_path=pipeline, **resumed)
    assert "Resumed" in caplog.text and "has no adapter" not in caplog.text


def test_fine_tuning_starts_from_the_adapter_of_a_checkpoint_if_it_fits(train, finished_run, tmp_path, caplog):
    checkpoint = finished_run / "checkpoint-6"
    train(tmp_path / "run", max_train_steps=1, pretrained_model_name_or_path=checkpoint)
    for part in ("adapter", "transformer"):
        assert_equal(read(tmp_path / "run/checkpoint-1" / part), read(checkpoint / part))
    for changes, difference in (
        ({"adapter_layers": 2}, "num_layers: 1, not 2"),
        ({"objective": "repa"}, "_class_name: MaskedTransformerAdapter, not MLPProjector"),
    ):
        run = tmp_path / next(iter(changes))
        train(run, max_train_steps=1, pretrained_model_name_or_path=checkpoint, mask_ratio=0, **changes)
        assert difference in caplog.text


def test_fine_tuning_on_other_classes_keeps_the_embeddings_of_equal_names(train, finished_run, tmp_path, caplog):
    data = write_images(tmp_path / "data", classes=5)
    (data / "class1").rename(data / "zebra")  # the others move up: class0, class2, class3, class4, zebra
    train(tmp_path / "run", data, max_train_steps=1, pretrained_model_name_or_path=finished_run / "checkpoint-6")
    assert "3 classes, the data have 5: 3 class embeddings" in caplog.text
    for part in ("transformer", "adapter"):
        before, after = read(finished_run / "checkpoint-6" / part), read(tmp_path / "run/checkpoint-1" / part)
        assert all(torch.equal(before[name], after[name]) for name in before if name != EMBEDDING)
        old, new = before[EMBEDDING], after[EMBEDDING]
        assert torch.equal(new[[0, 1, 5]], old[[0, 2, 3]]) and len(new) == 6  # the last is the null class


def test_renamed_classes_keep_the_embeddings_of_their_numbers(train, finished_run, tmp_path, caplog):
    data, pipeline = write_images(tmp_path / "data"), finished_run / "pipeline"
    (data / "class1").rename(data / "class1 renamed")
    train(tmp_path / "run", data, max_train_steps=1, pretrained_model_name_or_path=pipeline)
    assert "other names than those of the data (class 1: 'class1', here 'class1 renamed')" in caplog.text
    assert_equal(read(tmp_path / "run/checkpoint-1/transformer"), read(pipeline / "transformer"))


def test_fine_tuning_takes_size_and_guidance_from_the_pretrained_folder(train, tmp_path):
    guidance = {"guidance_scale": 1.7, "guidance_interval": [0.2, 0.9]}
    first = train(tmp_path / "first", max_train_steps=1, resolution=8, **guidance)
    # a preset of 256 pixels and no argument about the architecture
    shape = ("num_layers", "num_attention_heads", "attention_head_dim", "bottleneck_dim", "in_context_len")
    plain = {**dict.fromkeys((*shape, "in_context_start")), "preset": "JiT-B/16", "max_train_steps": 1}
    for name, source in {"pipeline": first, "checkpoint": tmp_path / "first/checkpoint-1"}.items():
        folder = train(tmp_path / name, pretrained_model_name_or_path=source, dropout=0.1, **plain)
        pipeline = PixelREPAPipeline.from_pretrained(folder)
        assert pipeline.transformer.config.sample_size == 8 and pipeline.transformer.config.dropout == 0.1
        assert pipeline.config.guidance_scale == 1.7 and tuple(pipeline.config.guidance_interval) == (0.2, 0.9)
    for name, value, own in (("num_layers", 5, 3), ("resolution", 16, 8), ("patch_size", 2, 4)):
        with pytest.raises(ValueError, match=f"--{name} is {value}, but .* was trained with {own}: leave it out"):
            train(tmp_path / "third", pretrained_model_name_or_path=first, **{**plain, name: value})


def test_guidance_scale_of_an_unconditional_pipeline_is_not_taken_over(train, tmp_path):
    settings = {"max_train_steps": 1, "validation_steps": 1, "guidance_interval": [0.2, 0.9]}
    first = train(tmp_path / "first", unconditional=True, **settings)
    pipeline = PixelREPAPipeline.from_pretrained(first)
    assert pipeline.transformer.config.num_classes == 1 and pipeline.config.guidance_scale == 1.0
    second = train(tmp_path / "second", pretrained_model_name_or_path=first, max_train_steps=1)
    config = PixelREPAPipeline.load_config(second)
    assert config["guidance_scale"] == get_preset("JiT-Digits/4").guidance_scale > 1
    assert tuple(config["guidance_interval"]) == (0.2, 0.9)


# ------------------------------------------------------------------------------------------------------------ presets

# arXiv 2511.13720, arXiv 2603.14366 and their code: layers, heads, their width, bottleneck, block before which class tokens
# are inserted, dropout; guidance of PixelREPA and of plain JiT. test_arguments.py compares the numbers of parameters.
PUBLISHED = {
    "B": (12, 12, 64, 128, 4, 0.0, 3.1, 3.0),
    "L": (24, 16, 64, 128, 8, 0.0, 2.8, 2.4),
    "H": (32, 16, 80, 256, 10, 0.2, 2.4, 2.2),
}


@pytest.mark.parametrize(("patch_size", "sample_size", "noise_scale"), [(16, 256, 1.0), (32, 512, 2.0)])
@pytest.mark.parametrize("size", PUBLISHED)
def test_preset_is_the_published_variant(make_transformer, size, patch_size, sample_size, noise_scale):
    name = f"JiT-{size}/{patch_size}"
    *architecture, scale, scale_jit = PUBLISHED[size]
    names = [
        "num_layers",
        "num_attention_heads",
        "attention_head_dim",
        "bottleneck_dim",
        "in_context_start",
        "dropout",
    ]
    expected = dict(zip(names, architecture, strict=True))
    expected |= {"patch_size": patch_size, "sample_size": sample_size, "noise_scale": noise_scale}
    expected |= {"in_context_len": 32, "num_classes": 1000, "in_channels": 3}
    preset = get_preset(name)
    assert {field: getattr(preset, field) for field in expected} == expected
    for objective, published in (("pixelrepa", scale), ("none", scale_jit)):
        pipeline = build_pipeline(TrainingArguments(preset=name, objective=objective), make_transformer(), None)
        assert pipeline.config.guidance_scale == published
        assert tuple(pipeline.config.guidance_interval) == (0.1, 1.0)
