"""The random draws of a training step as functions of (seed, step, image), by a counter-based generator."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


_WORD = 0xFFFFFFFF  # bits of a 32-bit word

_CPU_CHUNK = 2**17  # noise elements that a CPU draws at once, so that their words stay in its cache


def philox(
    counter: tuple[torch.Tensor, ...], key: tuple[int, int]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011) as tensor operations.

    Args:
        counter (four `torch.Tensor`): 32-bit words in `int64` that broadcast.
        key (`tuple[int, int]`): 32-bit words.

    Returns:
        Four `int64` tensors of independent random 32-bit words, in [0, 2³²).
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # 64-bit products; int64 wraps around to the same bits. The high words of c1 and c3 are cut off a round later.
        product0, product2 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1 = ((product2 >> 32) ^ c1 ^ k0) & _WORD, product2
        c2, c3 = ((product0 >> 32) ^ c3 ^ k1) & _WORD, product0
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return c0, c1 & _WORD, c2, c3 & _WORD


def to_uniform(words: torch.Tensor) -> torch.Tensor:
    """Map 32-bit words to float32 in [0, 1), multiples of 2⁻²⁴: exact, hence equal on every device."""
    return (words >> 8).float() * 2**-24


def to_normal(first: torch.Tensor, second: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Map pairs of 32-bit words to pairs of standard normal float32 (Box–Muller), at most 6.8 in magnitude."""
    radius = torch.sqrt(-2 * torch.log((first.float() + 0.5) * 2**-32))
    angle = second.float() * (2 * math.pi * 2**-32)
    return radius * torch.cos(angle), radius * torch.sin(angle)


@dataclass
class BatchDraws:
    """
    Draws timesteps, dropped labels, keep masks and noise of a batch on its device.

    A draw depends on (seed, step, image) alone: not on the other images of the batch, the number of processes, workers and
    accumulation steps, or a restart. Labels and masks are equal on every kind of device; timesteps and noise differ by the
    rounding of the device's logarithm, sine and cosine.

    Args:
        seed (`int`): Seed in [0, 2⁶⁴).
        num_classes (`int`): Label of the null class, which replaces dropped labels.
        num_tokens (`int`): Patch tokens of an image.
        P_mean, P_std (`float`): Mean and standard deviation of the logits of the timesteps.
        label_drop_prob (`float`): Probability that a label is dropped.
        mask_ratio (`float`, *optional*): Probability that a token is masked; None draws no masks.
    """

    seed: int
    num_classes: int
    num_tokens: int
    P_mean: float
    P_std: float
    label_drop_prob: float
    mask_ratio: float | None

    @classmethod
    def from_arguments(cls, args, config) -> BatchDraws:
        """Build from the training arguments and the config of the transformer."""
        num_tokens = (config.sample_size // config.patch_size) ** 2
        mask_ratio = args.mask_ratio if args.objective == "pixelrepa" else None
        return cls(
            args.seed, config.num_classes, num_tokens, args.P_mean, args.P_std, args.label_drop_prob, mask_ratio
        )

    def __call__(
        self, step: int, index: torch.Tensor, class_labels: torch.Tensor, shape: torch.Size
    ) -> dict[str, torch.Tensor | None]:
        """
        Draw the random inputs of [`PixelREPAObjective`] for one batch.

        Args:
            step (`int`): Number of completed optimizer steps.
            index, class_labels (`torch.Tensor` of shape `(B,)`): Numbers of the images, in [0, 2³²), and their labels.
            shape (`torch.Size`): (C, H, W) of an image.
        """
        # A tensor, because a number would be compiled into the kernel.
        step = torch.full((1,), step, device=index.device)
        chunk = max(1, _CPU_CHUNK // shape.numel()) if index.device.type == "cpu" else len(index)
        parts = [
            self.draw(step, *rows, shape) for rows in zip(index.split(chunk), class_labels.split(chunk), strict=True)
        ]
        timestep, labels, noise, keep_mask = (
            None if rows[0] is None else torch.cat(rows) for rows in zip(*parts, strict=True)
        )
        return {"timestep": timestep, "class_labels": labels, "noise": noise, "keep_mask": keep_mask}

    def compile(self) -> None:
        """Fuse the draws into a few kernels; the shapes of a run are constant."""
        self.draw = torch.compile(self.draw, fullgraph=True, dynamic=False)

    def draw(
        self, step: torch.Tensor, index: torch.Tensor, class_labels: torch.Tensor, shape: torch.Size
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Return (timesteps, labels, noise, keep mask) of some images."""
        # One call of the generator: the counters of an image's timestep and label, of its pixels, and of its tokens.
        sizes = [1, math.ceil(shape.numel() / 4), 0 if self.mask_ratio is None else math.ceil(self.num_tokens / 4)]
        ranges = [torch.arange(size, device=index.device) + (use << 30) for use, size in enumerate(sizes)]
        counter = (torch.cat(ranges), index[:, None], step, torch.zeros_like(step))
        words = philox(counter, (self.seed & _WORD, self.seed >> 32))  # (B, blocks) each
        image, pixels, tokens = zip(*(word.split(sizes, dim=1) for word in words), strict=True)

        normal, _ = to_normal(*image[:2])  # (B, 1)
        timestep = torch.sigmoid(self.P_mean + self.P_std * normal[:, 0])
        labels = class_labels.masked_fill(to_uniform(image[2])[:, 0] < self.label_drop_prob, self.num_classes)
        noise = torch.stack([*to_normal(*pixels[:2]), *to_normal(*pixels[2:])], dim=-1)
        noise = noise.flatten(1)[:, : shape.numel()].reshape(-1, *shape)
        if self.mask_ratio is None:
            return timestep, labels, noise, None
        uniform = to_uniform(torch.stack(tokens, dim=-1)).flatten(1)[:, : self.num_tokens]
        return timestep, labels, noise, uniform >= self.mask_ratio
