"""One optimizer step: what it skips, measures and waits for; and the FLOPs that its speed is compared with."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from training_runs import TEACHER

from pixelrepa_diffusers.adapter import ConvProjector, MaskedTransformerAdapter, MLPProjector
from pixelrepa_diffusers.ema import ConstantDecayEMA
from pixelrepa_diffusers.objective import PixelREPAObjective
from pixelrepa_diffusers.sampling import cast_transformer
from pixelrepa_diffusers.teacher import SemanticTeacher
from pixelrepa_diffusers.training.arguments import TrainingArguments
from pixelrepa_diffusers.training.builders import LORA_TARGETS, build_optimizer
from pixelrepa_diffusers.training.draws import BatchDraws
from pixelrepa_diffusers.training.flops import flops_per_image
from pixelrepa_diffusers.training.step import PreparedBatches, take_step
from pixelrepa_diffusers.transformer_jit import JiTTransformer2DModel


class Images:
    """The same four images over and over, with the interface of `ImageLoader`."""

    def __iter__(self):
        batch = {name: torch.arange(4) for name in ("index", "class_labels")}
        pixels = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        return itertools.repeat({**batch, "pixel_values": pixels, "skipped": torch.zeros(4, dtype=torch.int64)})

    def state_dict(self) -> dict:
        return {}


@pytest.fixture
def make_run(make_transformer):
    """make_run(**arguments) is a tiny run whose `step(measure=False)` takes one optimizer step."""

    def make(scaler=None, teach=None, projector=None, device="cpu", **arguments):
        args = TrainingArguments(objective="pixelrepa" if projector else "none", learning_rate=1e-2, **arguments)
        accelerator = Accelerator(cpu=device == "cpu", gradient_accumulation_steps=args.gradient_accumulation_steps)
        accelerator.scaler = scaler
        transformer = make_transformer(dropout=args.dropout or 0.0)
        objective = PixelREPAObjective(transformer, projector)
        optimizer = build_optimizer(args, objective, args.learning_rate)
        objective, optimizer = accelerator.prepare(objective.train(), optimizer)
        ema = ConstantDecayEMA(transformer, (0.5,), offload=args.ema_offload)
        draw = BatchDraws.from_arguments(args, transformer.config)
        batches = PreparedBatches(args, Images(), draw, teach, 0, accelerator.device)
        steps = itertools.count()

        def step(measure: bool = False):
            return take_step(args, accelerator, objective, optimizer, ema, batches, next(steps), measure)

        return SimpleNamespace(step=step, transformer=transformer, optimizer=optimizer, ema=ema, batches=batches)

    return make


def state(run) -> list[torch.Tensor]:
    """Copies of weights, EMA weights and optimizer state."""
    moments = [value for entries in run.optimizer.state.values() for value in entries.values()]
    return [tensor.detach().clone() for tensor in (*run.transformer.parameters(), *run.ema.averages[0.5], *moments)]


# --------------------------------------------------------------------------------------------------------- bad gradients


def poison(transformer: JiTTransformer2DModel):
    """Make one entry of one gradient infinite."""
    (bias,) = [p for name, p in transformer.named_parameters() if name == "final_layer.linear.bias"]
    return bias.register_hook(lambda grad: torch.cat([grad[:-1], torch.full_like(grad[-1:], torch.inf)]))


@pytest.mark.parametrize("case", ["gradient scaler", "skip", "skip with clipping"])
def test_non_finite_gradient_changes_neither_weights_nor_emas_nor_optimizer(make_run, case):
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0) if case == "gradient scaler" else None
    skip = {} if scaler else {"on_nonfinite": "skip"}
    run = make_run(scaler, **skip, max_grad_norm=1.0 if "clipping" in case else None)
    assert not run.step().skipped  # moves the weights away from their EMA
    before, hook = state(run), poison(run.transformer)
    assert run.step().skipped
    assert all(torch.equal(one, other) for one, other in zip(before, state(run), strict=True))
    hook.remove()
    assert not run.step().skipped
    assert not any(torch.equal(one, other) for one, other in zip(before, state(run), strict=True))
    assert scaler is None or scaler.get_scale() == 4.0


def test_measuring_the_gradient_norm_changes_no_update(make_run):
    after = []
    for measure in (False, True):
        run = make_run()
        poison(run.transformer)
        result = run.step(measure)
        assert (result.grad_norm is not None) == measure
        after.append(dict(run.transformer.named_parameters()))
    assert result.grad_norm.isinf()
    for name, parameter in after[0].items():
        torch.testing.assert_close(after[1][name], parameter, rtol=0, atol=0, equal_nan=True)


# -------------------------------------------------------------------------------------------------------------- waiting


class NoSync(TorchDispatchMode):
    """Refuses operations that would make the host wait for a GPU."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function.overloadpacket.__name__ not in ("_local_scalar_dense", "nonzero", "equal", "masked_select")
        return function(*args, **(kwargs or {}))


CASES = [
    {},
    {"on_nonfinite": "skip"},
    {"max_grad_norm": 1.0},
    {"gradient_accumulation_steps": 2},
    {"dropout": 0.1},
    {"projector": True},
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_no_operation_of_a_step_waits_for_the_device(make_run, case):
    run = make_run(**with_projector(case))
    run.step()  # creates the optimizer's state
    with NoSync():
        for measure in (False, True):
            run.step(measure)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_step_does_not_wait_for_the_gpu(make_run, case):
    run = make_run(**with_projector(case), device="cuda")
    run.step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for measure in (False, True):
            run.step(measure)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def with_projector(case: dict) -> dict:
    if "projector" not in case:
        return case
    projector = MaskedTransformerAdapter(16, 2, 24, grid_size=4, in_context_len=2, num_classes=10)
    return {"projector": projector, "teach": lambda pixels, batch: pixels.new_ones(len(pixels), 16, 24)}


def test_next_batch_is_prefetched_after_the_update_of_the_step(make_run, monkeypatch):
    run, events = make_run(gradient_accumulation_steps=2), []
    run.optimizer.optimizer.register_step_post_hook(lambda *_: events.append("update"))
    monkeypatch.setattr(run.ema, "update", lambda *_: events.append("EMA"))
    monkeypatch.setattr(run.batches, "prefetch", lambda: events.append("prefetch"))
    run.step()
    assert events == ["prefetch", "update", "EMA", "prefetch"]


# ---------------------------------------------------------------------------------------------------- FLOPs and casting


@pytest.mark.parametrize(
    "projector",
    [
        MaskedTransformerAdapter(16, 2, 24, grid_size=4, in_context_len=2, num_classes=10),
        MLPProjector(16, 24, projector_dim=32),
        ConvProjector(16, 24, grid_size=4),
    ],
    ids=lambda projector: type(projector).__name__,
)
def test_flops_are_those_of_a_forward_and_backward_pass_and_the_teachers(make_transformer, projector):
    transformer = make_transformer()
    teacher = SemanticTeacher.from_pretrained(TEACHER, grid_size=4, image_size=16)
    student, alignment = flops_per_image(PixelREPAObjective(transformer, projector), teacher)

    def count(module, *inputs):
        # torch does not count the CPU's fused attention.
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            module(*inputs)
        return counter.get_total_flops()

    condition = torch.tensor([0.5]), torch.tensor([1])
    images, states = torch.zeros(1, 3, 16, 16), torch.zeros(1, 16, 16)
    assert student == 3 * count(transformer, images, *condition)
    trained = 3 * count(projector, states, *condition)
    assert alignment - trained == pytest.approx(count(teacher, images), rel=0.05)  # the class token has no patch


def test_frozen_weights_have_no_gradient_to_compute(make_transformer):
    transformer = make_transformer()
    trained = flops_per_image(PixelREPAObjective(transformer), None)[0]
    assert flops_per_image(PixelREPAObjective(transformer.requires_grad_(False)), None)[0] < trained
    transformer.add_adapter(LoraConfig(r=1, target_modules=LORA_TARGETS))
    assert flops_per_image(PixelREPAObjective(transformer), None)[0] < trained


def test_cast_keeps_the_timestep_embedding_exact_as_loading_does(make_transformer, tmp_path):
    transformer = make_transformer()
    transformer.save_pretrained(tmp_path)
    cast_transformer(transformer, torch.bfloat16)
    loaded = JiTTransformer2DModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for name, parameter in loaded.named_parameters():
        own = transformer.get_parameter(name)
        assert own.dtype == parameter.dtype and torch.equal(own, parameter), name
