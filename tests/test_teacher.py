"""The teacher gives the untouched encoder's patch tokens on the student's grid, and stays frozen."""

import copy
import json

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from tiny import perturbed
from transformers import (
    AutoModel,
    BeitConfig,
    BertConfig,
    CLIPConfig,
    CLIPVisionConfig,
    DeiTConfig,
    Dinov2Config,
    Dinov2WithRegistersConfig,
    DINOv3ViTConfig,
    IJepaConfig,
    Siglip2Config,
    Siglip2VisionConfig,
    SiglipConfig,
    SiglipVisionConfig,
    SwinConfig,
    ViTConfig,
    ViTMAEConfig,
)

from pixelrepa_diffusers.teacher import SemanticTeacher


MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
PATCH, NATIVE_GRID, WIDTH = 6, 4, 24
TINY = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 3, "patch_size": PATCH}
SIZED = {**TINY, "intermediate_size": 40, "image_size": PATCH * NATIVE_GRID}
TEXT = {**TINY, "intermediate_size": 40, "vocab_size": 9}
ENCODERS = {
    "dinov2": Dinov2Config(**TINY, image_size=PATCH * NATIVE_GRID),
    "dinov2-registers": Dinov2WithRegistersConfig(**TINY, image_size=PATCH * NATIVE_GRID, num_register_tokens=3),
    "dinov3": DINOv3ViTConfig(**SIZED, num_register_tokens=4),
    "siglip": SiglipVisionConfig(**SIZED),
    "siglip2-naflex": Siglip2VisionConfig(**TINY, intermediate_size=40, num_patches=NATIVE_GRID**2),
    "clip": CLIPVisionConfig(**SIZED),
    "vit": ViTConfig(**SIZED),
    "deit": DeiTConfig(**SIZED),
    "ijepa": IJepaConfig(**SIZED),
}
NUM_PREFIX = {"dinov2": 1, "dinov2-registers": 4, "dinov3": 5, "clip": 1, "vit": 1, "deit": 2}


def make_encoder(config):
    torch.manual_seed(0)
    return perturbed(AutoModel.from_config(copy.deepcopy(config))).eval()


def make_teacher(config, **kwargs):
    arguments = {"grid_size": 4, "image_size": 32, "image_mean": MEAN, "image_std": STD, **kwargs}
    return SemanticTeacher(make_encoder(config), **arguments)


def write_preprocessor(folder, **content):
    content = {"image_processor_type": "BitImageProcessor", **content}
    (folder / "preprocessor_config.json").write_text(json.dumps(content))


@pytest.fixture
def images():
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1


def normalize(images):
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
    return ((images + 1) / 2 - mean) / std


def patch_features(name, images):
    """Patch tokens of the unmodified encoder, for images of a whole number of patches."""
    model, grid = make_encoder(ENCODERS[name]), images.shape[-1] // PATCH
    with torch.no_grad():
        if name == "siglip2-naflex":
            patches = images.unflatten(3, (grid, PATCH)).unflatten(2, (grid, PATCH)).permute(0, 2, 4, 3, 5, 1)
            return model(
                patches.reshape(len(images), grid**2, -1),
                torch.ones(len(images), grid**2),
                torch.tensor([[grid, grid]] * len(images)),
            ).last_hidden_state
        arguments = {} if name.startswith("dino") else {"interpolate_pos_encoding": True}
        states = model(images, **arguments).last_hidden_state[:, NUM_PREFIX.get(name, 0) :]
        return model.post_layernorm(states) if name == "clip" else states


@pytest.mark.parametrize("grid_size", [NATIVE_GRID, 5])
@pytest.mark.parametrize("name", ENCODERS)
def test_resize_equals_the_unmodified_encoder_on_resized_images(name, grid_size, images):
    teacher = make_teacher(ENCODERS[name], grid_size=grid_size, mode="resize")
    resized = F.interpolate(images, PATCH * grid_size, mode="bicubic")
    torch.testing.assert_close(teacher(images), patch_features(name, normalize(resized)), rtol=1e-5, atol=2e-5)
    assert teacher.feature_dim == WIDTH


@pytest.mark.parametrize("name", ["dinov2", "siglip2-naflex", "clip"])
def test_resample_at_the_native_patch_and_grid_changes_nothing(name, images):
    images = images[..., : PATCH * NATIVE_GRID, : PATCH * NATIVE_GRID]
    teacher = make_teacher(ENCODERS[name], grid_size=NATIVE_GRID, image_size=PATCH * NATIVE_GRID)
    torch.testing.assert_close(teacher(images), patch_features(name, normalize(images)), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("name", ENCODERS)
def test_resample_gives_the_students_grid_in_row_major_order(name, images):
    teacher = make_teacher(ENCODERS[name], grid_size=8)
    features = teacher(images)
    assert features.shape == (2, 64, WIDTH) and features.dtype == torch.float32
    # A change of one patch shows most at its own token.
    changed = images.clone()
    changed[:, :, 4:8, 8:12] += 0.5
    difference = (teacher(changed) - features).abs().mean(dim=(0, 2))
    assert difference.argmax() == 1 * 8 + 2


@pytest.mark.parametrize("patch_size", [3, 5, 8, 16])
def test_resampled_kernel_is_the_pseudo_inverse_of_the_2d_resize(patch_size):
    encoder = make_encoder(ENCODERS["dinov2"])
    kernel = encoder.embeddings.patch_embeddings.projection.weight.detach()
    teacher = SemanticTeacher(encoder, 4, 4 * patch_size, MEAN, STD)
    basis = torch.eye(PATCH**2, dtype=torch.float64).view(-1, 1, PATCH, PATCH)
    resize = F.interpolate(basis, (patch_size, patch_size), mode="bicubic", antialias=True).flatten(1).T
    expected = torch.einsum("nk,fck->fcn", torch.linalg.pinv(resize.T), kernel.flatten(2).double())
    actual = teacher.model.embeddings.patch_embeddings.projection.weight
    torch.testing.assert_close(actual.flatten(2), expected.float(), rtol=0, atol=1e-6)


def test_images_of_another_size_are_resized_bilinearly():
    teacher = make_teacher(ENCODERS["dinov2"])
    large = torch.rand(1, 3, 48, 48) * 2 - 1
    expected = teacher(F.interpolate(large, 32, mode="bilinear"))
    torch.testing.assert_close(teacher(large), expected)


def test_parents_cannot_train_unfreeze_or_save_the_teacher(images):
    class Parent(nn.Module):
        def __init__(self):
            super().__init__()
            self.student = nn.Linear(2, 2)
            self.teacher = make_teacher(ENCODERS["dinov2"])

    parent = Parent()
    before = parent.teacher(images)
    parent.train().requires_grad_(True)
    teacher = parent.teacher
    assert not teacher.training and not any(module.training for module in teacher.model.modules())
    assert not any(parameter.requires_grad for parameter in teacher.model.parameters())
    assert teacher.state_dict() == {} and list(parent.state_dict()) == ["student.weight", "student.bias"]
    assert len(list(parent.parameters())) == 2
    parent.load_state_dict(nn.ModuleDict({"student": nn.Linear(2, 2)}).state_dict(), strict=True)
    features = teacher(images.requires_grad_(True))
    assert not features.requires_grad
    torch.testing.assert_close(features, before, rtol=0, atol=0)


def test_teacher_is_a_copy_of_the_encoder(images):
    encoder = make_encoder(ENCODERS["dinov2"])
    teacher = SemanticTeacher(encoder, 4, 32, MEAN, STD)
    before = teacher(images)
    assert all(parameter.requires_grad for parameter in encoder.parameters())
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(1.0)
    torch.testing.assert_close(teacher(images), before, rtol=0, atol=0)


def test_bfloat16_by_argument_and_by_to_agree(images):
    exact = make_teacher(ENCODERS["dinov2"])
    reduced = make_teacher(ENCODERS["dinov2"], dtype=torch.bfloat16)
    moved = nn.ModuleList([make_teacher(ENCODERS["dinov2"])]).to(torch.bfloat16)[0]
    assert reduced.model.dtype == moved.model.dtype == torch.bfloat16
    features = reduced(images)
    assert features.dtype == torch.bfloat16
    torch.testing.assert_close(moved(images), features, rtol=0, atol=0)
    assert F.cosine_similarity(features.float(), exact(images), dim=-1).min() > 0.999
    torch.testing.assert_close(moved.pixel_scale, exact.pixel_scale, rtol=0, atol=0)


def test_autocast_does_not_change_the_features(images):
    teacher = make_teacher(ENCODERS["dinov2"])
    expected = teacher(images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(teacher(images), expected, rtol=0, atol=0)


def test_teacher_compiles_to_one_graph(images):
    teacher = make_teacher(ENCODERS["dinov2"], image_size=48)
    compiled = torch.compile(teacher, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(images), teacher(images))


@pytest.mark.parametrize(
    "dual",
    [
        SiglipConfig(vision_config=ENCODERS["siglip"].to_dict(), text_config=TEXT),
        Siglip2Config(vision_config=ENCODERS["siglip2-naflex"].to_dict(), text_config=TEXT),
        CLIPConfig(vision_config=ENCODERS["clip"].to_dict(), text_config=TEXT),
    ],
    ids=["siglip", "siglip2-naflex", "clip"],
)
def test_dual_models_load_their_vision_tower(dual, images, tmp_path):
    model = make_encoder(dual)
    model.save_pretrained(tmp_path)
    write_preprocessor(tmp_path, image_mean=MEAN, image_std=STD)
    teacher = SemanticTeacher.from_pretrained(str(tmp_path), 4, 32)
    expected = SemanticTeacher(model.vision_model, 4, 32, MEAN, STD)
    torch.testing.assert_close(teacher(images), expected(images), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("preprocessor", "mean", "std"),
    [
        ({"image_mean": MEAN, "image_std": STD}, MEAN, STD),
        # This one cannot be built without torchvision; the stored numbers are read anyway.
        ({"image_processor_type": "DINOv3ViTImageProcessorFast", "image_mean": MEAN, "image_std": STD}, MEAN, STD),
        ({"image_processor_type": "SiglipImageProcessor"}, (0.5,) * 3, (0.5,) * 3),
        ({"do_normalize": False}, (0.0,) * 3, (1.0,) * 3),
    ],
)
def test_normalization_is_the_encoders_own(preprocessor, mean, std, images, tmp_path):
    encoder = make_encoder(ENCODERS["dinov2"])
    encoder.save_pretrained(tmp_path)
    write_preprocessor(tmp_path, **preprocessor)
    teacher = SemanticTeacher.from_pretrained(str(tmp_path), 4, 32)
    torch.testing.assert_close(teacher(images), SemanticTeacher(encoder, 4, 32, mean, std)(images), rtol=0, atol=0)


def test_missing_image_processor_or_weights_are_refused(tmp_path):
    encoder = make_encoder(ENCODERS["dinov2"])
    state_dict = encoder.state_dict()
    del state_dict["layernorm.weight"]
    encoder.save_pretrained(tmp_path, state_dict=state_dict)
    with pytest.raises(OSError, match="preprocessor_config"):
        SemanticTeacher.from_pretrained(str(tmp_path), 4, 32)
    write_preprocessor(tmp_path, image_mean=MEAN, image_std=STD)
    with pytest.raises(ValueError, match=r"lacks weights.*layernorm\.weight"):
        SemanticTeacher.from_pretrained(str(tmp_path), 4, 32)


@pytest.mark.parametrize(
    "config",
    [
        BertConfig(**TEXT),
        SwinConfig(image_size=32, patch_size=4, embed_dim=12, depths=[1, 1], num_heads=[3, 3], window_size=2),
        ViTMAEConfig(**SIZED),
        BeitConfig(**SIZED, use_relative_position_bias=True),
        ViTConfig(**SIZED, num_channels=1),
    ],
    ids=lambda config: config.model_type,
)
def test_unsupported_encoders_are_refused(config):
    with pytest.raises(ValueError, match=f"'{config.model_type}' cannot be the teacher. Supported are"):
        make_teacher(config, grid_size=8)
