"""commands/app.py: what the page shows and hands out, and the page itself in a real browser.

python tests/test_app.py PIPELINE SCREENSHOT visits the page of a pipeline and photographs it.
"""

import json
import shlex
import shutil
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pixelrepa_diffusers.cli import parse
from pixelrepa_diffusers.commands import app, generate
from pixelrepa_diffusers.sampling import SCHEDULERS, seeded


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


def test_page_in_a_browser(pipeline, tmp_path):
    pytest.importorskip("gradio")
    pytest.importorskip("selenium")
    if shutil.which("chromedriver") is None:
        pytest.skip("Chromium is not installed")
    seen = visit(pipeline, tmp_path, "digit 7", 3)
    assert seen["offered"] == ["digit 7, d7"] and seen["images"] == 3 and seen["path"]["width"] > 200
    assert seen["console"] == [] and seen["elsewhere"] == []  # no error, and no other server

    with zipfile.ZipFile(seen["download"]) as archive:
        archive.extractall(tmp_path)
    record = json.loads((tmp_path / "arguments.json").read_text())
    assert (record["class_labels"], record["seeds"]) == ({"7": "digit 7, d7"}, [0, 1, 2])
    pictures = [tmp_path / f"0007_{seed:06d}.png" for seed in range(3)]
    with Image.open(pictures[1]) as picture:
        _, *words = shlex.split(picture.text["command"])
    words[words.index("again")] = str(tmp_path / "again")
    (again,) = generate.main(parse(generate.GenerateArguments, "", words))
    assert np.array_equal(Image.open(again), Image.open(pictures[1]))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        print(visit(Path(sys.argv[1]), Path(folder), "7", 8, Path(sys.argv[2])))
