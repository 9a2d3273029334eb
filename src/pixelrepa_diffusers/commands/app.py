"""A web page to try a pipeline on: choose a class and settings, watch noise become an image, download the images.

    pixelrepa-app --pipeline FOLDER_OR_HUB_ID

The page needs the extra `app` (Gradio). It is served to this machine; `--host 0.0.0.0` serves it to the network.
"""

import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from .. import PixelREPAPipeline
from ..cli import flag, parse, run
from ..files import write_json
from ..images import make_grid, to_uint8
from ..sampling import (
    DTYPES,
    SCHEDULERS,
    class_names,
    compile_transformer,
    device_name,
    fetch_pipeline,
    load_pipeline,
    sampling_settings,
    saved_guidance,
    seeded,
    versions,
)
from .generate import describe_run, png_info


if TYPE_CHECKING:
    import gradio


PATH_LENGTH = 8  # images in the strip from noise to image
MAX_STEPS = 100
MAX_SCALE = 10.0
# Images of a few pixels stay sharp when the browser enlarges them.
SHARP = "#images img, #path img { image-rendering: pixelated; }"


@dataclass
class AppArguments:
    pipeline: str = flag(help="Saved pipeline or training checkpoint (checkpoint-N), or a Hub id.")
    revision: str | None = flag(None, "Branch, tag or commit of a Hub id.")
    guidance_transformer: str | None = flag(None, "Folder of a second transformer, for autoguidance.")
    dtype: str = flag("float32", "Data type of the network.", choices=DTYPES)
    compile: bool = flag(False, "Compile the transformer's blocks: slow start, then faster.")
    max_images: int = flag(16, "Most images of one request; they are sampled in one batch.", ge=1)
    host: str | None = flag(None, "Address to listen on. Default: GRADIO_SERVER_NAME, or this machine only.")
    port: int | None = flag(None, "Port to listen on. Default: GRADIO_SERVER_PORT, or the first free one from 7860.")
    share: bool = flag(False, "Also make a public link, which passes through Gradio's servers.")


def sample_with_path(
    pipe: PixelREPAPipeline,
    label: int,
    seeds: Sequence[int],
    settings: dict[str, Any],
    on_model_call: Callable[[int, int], object],
) -> tuple[list[Image.Image], Image.Image]:
    """
    Sample one image per seed, and draw the states z of the first one from t = 0 to 1 as a strip.

    `on_model_call` is called with the number of finished model calls and their total.
    """
    states = [(0.0, pipe.prepare_latents(1, torch.device("cpu"), seeded(seeds[:1]), None))]

    def on_step_end(pipe, index, timestep, tensors):
        on_model_call(index + 1, pipe.num_timesteps)
        # A Heun step takes two model calls, the last step one.
        if (index + 1) % pipe.scheduler.order == 0 or index + 1 == pipe.num_timesteps:
            states.append((1 - float(pipe.scheduler.sigmas[index + 1]), tensors["latents"][:1].cpu()))
        return {}

    images = pipe([label] * len(seeds), generator=seeded(seeds), callback_on_step_end=on_step_end, **settings).images
    shown = np.linspace(0, len(states) - 1, min(PATH_LENGTH, len(states))).round().astype(int)
    frames = [to_uint8(states[index][1])[0].permute(1, 2, 0).numpy() for index in shown]
    return images, make_grid(frames, [f"t = {states[index][0]:.2f}" for index in shown], columns=len(frames))


@dataclass
class Request:
    """Settings of one request to the page."""

    class_label: int
    seeds: range
    num_inference_steps: int
    scheduler: str | None  # None: the saved one
    guidance: dict[str, Any]


def answer(
    pipe: PixelREPAPipeline,
    request: Request,
    args: AppArguments,
    revision: str | None,
    folder: Path,
    on_model_call: Callable[[int, int], object],
) -> tuple[list[Path], Image.Image, Path]:
    """
    Sample with the scheduler of `pipe`, and write the images to `folder` as `pixelrepa-generate` does.

    Returns:
        The images' paths, the strip from noise to image, and the path of a ZIP with the images and arguments.json.
    """
    label, name = request.class_label, class_names(pipe)[request.class_label]
    sampling = sampling_settings(pipe, label, request.num_inference_steps, request.guidance)
    images, strip = sample_with_path(pipe, label, request.seeds, sampling, on_model_call)
    settings = {**describe_run(pipe, args, revision, sampling), "device": device_name(pipe.device)}
    content = folder / "images"
    content.mkdir()
    record = {**settings, "class_labels": {label: name}, "seeds": list(request.seeds), "versions": versions()}
    write_json(content / "arguments.json", record)
    paths = []
    for seed, image in zip(request.seeds, images, strict=True):
        paths.append(content / f"{label:04d}_{seed:06d}.png")
        facts = {**settings, "class_id": label, "class_name": name, "seed": seed}
        image.save(paths[-1], pnginfo=png_info(facts, request.scheduler))
    return paths, strip, Path(shutil.make_archive(str(folder / f"{label:04d}"), "zip", content))


def guidance_sliders(pipe: PixelREPAPipeline) -> dict[str, list["gradio.Slider"]]:
    """Add a slider for each scale and two for each interval of the guidance that the pipeline has."""
    from gradio import Row, Slider

    sliders = {}
    for name, value in saved_guidance(pipe).items():
        kind, _, quantity = name.replace("_", " ").capitalize().rpartition(" ")
        if quantity == "scale":
            sliders[name] = [Slider(0, max(MAX_SCALE, value), value, step=0.05, label=f"{kind} scale")]
        else:
            ends = zip(("from", "to"), value, strict=True)
            with Row():
                sliders[name] = [Slider(0, 1, bound, step=0.01, label=f"{kind} {end} t") for end, bound in ends]
    return sliders


def build_page(args: AppArguments) -> "gradio.Blocks":
    """Load a pipeline and build its page. Requests are sampled one after another."""
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read when Gradio is imported
    try:
        import gradio
    except ImportError as error:
        raise ImportError(f'The page needs Gradio ({error}). Run: pip install "pixelrepa-diffusers[app]"') from error

    folder, revision = fetch_pipeline(args.pipeline, args.revision)
    pipe = load_pipeline(folder, args.dtype, guidance_transformer=args.guidance_transformer)
    if args.compile:
        compile_transformer(pipe.transformer)
    saved_scheduler, names = pipe.scheduler, class_names(pipe)
    size = pipe.transformer.config.sample_size

    def generate(values, progress=gradio.Progress()):  # noqa: B008 (Gradio finds it among the defaults)
        given = {name: [values[slider] for slider in sliders] for name, sliders in guidance.items()}
        request = Request(
            values[label],
            range(values[seed], values[seed] + values[num_images]),
            values[steps],
            values[scheduler] or None,
            {name: numbers if len(numbers) > 1 else numbers[0] for name, numbers in given.items()},
        )
        pipe.scheduler = SCHEDULERS[request.scheduler]() if request.scheduler else saved_scheduler
        with tempfile.TemporaryDirectory() as folder:
            try:
                paths, strip, archive = answer(
                    pipe, request, args, revision, Path(folder), lambda *done: progress(done, unit="model calls")
                )
            except ValueError as error:  # such as a guidance interval that is empty
                raise gradio.Error(str(error), print_exception=False) from error
            yield paths, strip, gradio.DownloadButton(value=archive, interactive=True)  # Gradio copies the files

    title = "/".join(Path(args.pipeline).parts[-2:])
    with gradio.Blocks(title=title, analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        gradio.Markdown(f"# {title}\n{size}×{size} pixels, {len(names)} classes, {device_name(pipe.device)}")
        with gradio.Row():
            with gradio.Column(scale=1, min_width=320):
                choices = [(name, index) for index, name in enumerate(names)]
                label = gradio.Dropdown(
                    choices, value=0, label="Class", info="Type to search", visible=len(names) > 1, elem_id="class"
                )
                num_images = gradio.Slider(
                    1, args.max_images, min(4, args.max_images), step=1, label="Images", elem_id="num_images"
                )
                seed = gradio.Number(
                    0, precision=0, minimum=0, label="Seed", info="Of the first image; the others count up from it."
                )
                steps = gradio.Slider(1, MAX_STEPS, 50, step=1, label="Steps")
                scheduler = gradio.Dropdown([("as saved", ""), *SCHEDULERS], value="", label="Solver")
                guidance = guidance_sliders(pipe)
                button = gradio.Button("Generate", variant="primary", elem_id="generate")
            with gradio.Column(scale=2):
                look = {"show_label": False, "format": "png", "buttons": ["download", "fullscreen"]}
                gallery = gradio.Gallery(columns=4, object_fit="contain", elem_id="images", **look)
                gradio.Markdown("The first image, from noise (t = 0) to the end (t = 1):")
                path = gradio.Image(elem_id="path", **look)
                download = gradio.DownloadButton("Download images and settings", interactive=False, elem_id="download")
        inputs = {
            label,
            num_images,
            seed,
            steps,
            scheduler,
            *(slider for part in guidance.values() for slider in part),
        }
        button.click(generate, inputs, [gallery, path, download], api_name="generate")
    return page


def main(args: AppArguments, **options) -> Any:
    """Serve the page; `options` go to `gradio.Blocks.launch`, whose result is returned."""
    page = build_page(args)
    settings = {"server_name": args.host, "server_port": args.port, "share": args.share, "css": SHARP}
    return page.launch(**settings, **options)


def cli() -> None:
    run(lambda: main(parse(AppArguments, __doc__.partition("\n")[0])))
