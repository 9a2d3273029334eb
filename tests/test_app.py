"""commands/app.py: what the page shows and hands out, and the page itself in a real browser.

python tests/test_app.py PIPELINE SCREENSHOT visits the page of a pipeline and photographs it.
"""

import contextlib
import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
import zipfile
from pathlib import Path

import numpy as np
import pytest
import yaml
from packaging.requirements import Requirement
from PIL import Image
from standin_hub import StandInHub, log_in
from tiny import files

from pixelrepa_diffusers.cli import parse
from pixelrepa_diffusers.commands import app, generate
from pixelrepa_diffusers.commands.publish import main as publish
from pixelrepa_diffusers.sampling import SCHEDULERS, load_pipeline, seeded


CHROMIUM_FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1280,1010",
]


@pytest.fixture(scope="module")
def pipeline(make_pipeline, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("app") / "digits"
    names = {index: f"digit {index}, d{index}" for index in range(10)}
    make_pipeline({"num_layers": 2, "in_context_start": 1}, id2label=names, guidance_scale=2.0).save_pretrained(folder)
    return folder


def visit(pipeline: Path, folder: Path, search: str, num_images: int, screenshot: Path | None = None) -> dict:
    """Serve the page, use it in Chromium, and return what its user sees and downloads."""
    import gradio
    from selenium.webdriver import Chrome, ChromeOptions, ChromeService
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import WebDriverWait

    args = parse(app.AppArguments, "", ["--pipeline", str(pipeline)])
    _, url, _ = app.main(args, prevent_thread_lock=True, quiet=True)
    options = ChromeOptions()
    for word in (*CHROMIUM_FLAGS, f"--user-data-dir={folder / 'profile'}"):
        options.add_argument(word)
    options.add_experimental_option("prefs", {"download.default_directory": str(folder)})
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    browser = Chrome(options, ChromeService(shutil.which("chromedriver")))
    try:

        def wait(selector: str, count: int = 1) -> list:
            found = lambda browser: [e for e in browser.find_elements(By.CSS_SELECTOR, selector) if e.is_displayed()]  # noqa: E731
            return WebDriverWait(browser, 60).until(lambda browser: len(found(browser)) >= count and found(browser))

        browser.get(url)
        (button,) = wait("button#generate")
        choice = wait("#class input")[0]
        choice.click()
        choice.send_keys(Keys.CONTROL, "a")
        choice.send_keys(search)
        offered = [option.text.strip() for option in wait("#class li")]
        choice.send_keys(Keys.ENTER)
        number = wait("#num_images input[type=number]")[0]
        number.send_keys(Keys.CONTROL, "a")
        number.send_keys(str(num_images), Keys.TAB)
        button.click()
        seen = {
            "offered": offered,
            "images": len(wait("#images img", num_images)),
            "path": wait("#path img")[0].size,
        }
        wait("#download:not([disabled])")[0].click()
        WebDriverWait(browser, 60).until(lambda _: list(folder.glob("*.zip")))
        (seen["download"],) = folder.glob("*.zip")
        if screenshot:
            browser.save_screenshot(str(screenshot))
        seen["console"] = [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
        requests = (json.loads(entry["message"])["message"] for entry in browser.get_log("performance"))
        requested = {
            entry["params"]["request"]["url"]
            for entry in requests
            if entry["method"] == "Network.requestWillBeSent" and entry["params"]["documentURL"].startswith(url)
        }
        seen["elsewhere"] = [address for address in requested if not address.startswith((url, "data:", "blob:"))]
        return seen
    finally:
        browser.quit()
        gradio.close_all()


@pytest.mark.parametrize("solver", SCHEDULERS)
def test_strip_runs_from_the_noise_to_the_first_image(make_pipeline, solver):
    pipe = make_pipeline(scheduler=SCHEDULERS[solver](), guidance_scale=2.0)
    done = []
    images, strip = app.sample_with_path(
        pipe, 3, range(5, 7), {"num_inference_steps": 3}, lambda *counts: done.append(counts)
    )
    expected = pipe([3, 3], generator=seeded([5, 6]), num_inference_steps=3).images
    assert [image.tobytes() for image in images] == [image.tobytes() for image in expected]
    assert done == [(index + 1, pipe.num_timesteps) for index in range(pipe.num_timesteps)]

    frame, gap, header = 64, 8, strip.height - 64 - 16
    assert strip.width == 4 * (frame + gap) + gap  # the noise and three steps
    last = strip.crop((strip.width - gap - frame, gap + header, strip.width - gap, gap + header + frame))
    assert last.resize((16, 16), Image.Resampling.NEAREST).tobytes() == images[0].tobytes()


def test_download_has_the_settings_and_each_image_the_command_that_makes_it_again(pipeline, tmp_path):
    pipe, args = load_pipeline(pipeline, "float32"), parse(app.AppArguments, "", ["--pipeline", str(pipeline)])
    pipe.scheduler = SCHEDULERS["unipc"]()
    request = app.Request(7, range(2, 4), 3, "unipc", {"guidance_scale": 1.5, "guidance_interval": [0.2, 1]})
    paths, _, archive = app.answer(pipe, request, args, None, tmp_path, lambda *done: None)
    with zipfile.ZipFile(archive) as download:
        assert set(download.namelist()) - {"./"} == {"0007_000002.png", "0007_000003.png", "arguments.json"}
        record = json.loads(download.read("arguments.json"))
    assert (record["class_labels"], record["seeds"]) == ({"7": "digit 7, d7"}, [2, 3])
    assert (record["guidance_scale"], record["guidance_interval"]) == (1.5, [0.2, 1])
    with Image.open(paths[1]) as picture:
        _, *words = shlex.split(picture.text["command"])
    (again,) = generate.main(parse(generate.GenerateArguments, "", [*words[:-1], str(tmp_path / "again")]))
    assert np.array_equal(Image.open(again), Image.open(paths[1]))


def test_page_in_a_browser(pipeline, tmp_path):
    pytest.importorskip("gradio")
    pytest.importorskip("selenium")
    if shutil.which("chromedriver") is None:
        pytest.skip("Chromium is not installed")
    seen = visit(pipeline, tmp_path, "digit 7", 3)
    assert seen["offered"] == ["digit 7, d7"] and seen["images"] == 3 and seen["path"]["width"] > 200
    assert seen["console"] == [] and seen["elsewhere"] == []  # no error, and no other server
    with zipfile.ZipFile(seen["download"]) as download:
        pictures = {name for name in download.namelist() if name.endswith(".png")}
    assert pictures == {f"0007_{seed:06d}.png" for seed in range(3)}


@pytest.fixture
def space(pipeline, tmp_path, monkeypatch):
    """The files of a published Space in a folder, and the stand-in Hub with the pipeline."""
    with StandInHub() as hub:
        log_in(hub, monkeypatch)
        publish([str(pipeline), "me/digits", "--license", "mit", "--space", "me/page"])
        for name, content in hub.files("me/page").items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_bytes(content)
        yield tmp_path, hub


def test_space_has_a_header_requirements_and_the_package(space):
    folder, _ = space
    _, header, _ = (folder / "README.md").read_text().split("---\n")
    expected = {"sdk": "gradio", "app_file": "app.py", "models": ["me/digits"], "license": "mit"}
    assert yaml.safe_load(header) == yaml.safe_load(header) | expected
    required = {Requirement(line).name for line in (folder / "requirements.txt").read_text().splitlines()}
    assert {"torch", "diffusers", "safetensors"} <= required and "pytest" not in required
    package = Path(app.__file__).parents[1]
    content = {name: content for name, content in files(package).items() if "__pycache__" not in name}
    assert files(folder / package.name) == content


def test_space_serves_the_published_pipeline(space):
    pytest.importorskip("gradio")
    folder, hub = space
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    variables = {"GRADIO_SERVER_PORT": str(port), **hub.environment(folder / "home")}
    process = subprocess.Popen([sys.executable, folder / "app.py"], env={**os.environ, **variables})
    try:
        parts = []
        while not parts and process.poll() is None:
            time.sleep(0.2)
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/config") as answer:
                parts = json.load(answer)["components"]
    finally:
        process.kill()
        process.wait()
    choices = [part["props"]["choices"] for part in parts if part["props"].get("label") == "Class"]
    assert choices == [[[f"digit {index}, d{index}", index] for index in range(10)]]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        print(visit(Path(sys.argv[1]), Path(folder), "7", 8, Path(sys.argv[2])))
