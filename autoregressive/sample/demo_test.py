"""The demo: its API, its page in a browser, and what it refuses before weights are loaded."""

import shutil
import socket
import sys
from importlib import metadata
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
from PIL import Image

from autoregressive.models.sampler import ImageSampler
from autoregressive.sample import demo
from autoregressive.sample.demo import Demo, DemoSettings, distinct
from utils.testing import PATIENCE


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@pytest.fixture(scope="module")
def address(models):
    """The address of a demo of three classes."""
    pytest.importorskip("gradio", reason="gradio is not installed")
    files = {f"{name}_ckpt": str(path) for name, path in models.items()}
    settings = DemoSettings(**files, images=2, cfg_scale=2.0, port=free_port())
    served = Demo(ImageSampler.from_pretrained(models["gpt"], models["vq"], batch_size=settings.max_batch), settings)
    page = demo.serve(served)
    yield page.local_url
    page.close(verbose=False)
    served.queue.close()


@pytest.fixture(scope="module")
def client(address, tmp_path_factory):
    from gradio_client import Client

    return Client(address, verbose=False, download_files=tmp_path_factory.mktemp("images"), analytics_enabled=False)


def arrays(gallery) -> np.ndarray:
    return np.stack([np.array(Image.open(item["image"])) for item in gallery])


def test_the_api_draws_the_samplers_images(models, client):
    sampler = ImageSampler.from_pretrained(models["gpt"], models["vq"])
    *growing, (images, seed) = client.submit("bee", seed=2**62 + 1, api_name="/draw")
    assert growing and seed == str(2**62 + 1)
    assert all(Path(item["image"]).suffix == ".png" for item in images)
    assert np.array_equal(arrays(images), sampler([1, 1], cfg_scale=2.0, seed=2**62 + 1))
    how = {"cfg_scale": 3.0, "cfg_schedule": "linear", "temperature": 0.9, "top_k": 30, "top_p": 0.9}
    images, _ = client.predict("2", images=3, seed=7, cfg_interval="4 12", **how, api_name="/draw")
    assert np.array_equal(arrays(images), sampler([2, 2, 2], seed=7, cfg_interval=[4, 12], **how))


def test_without_a_seed_there_is_a_new_one(client):
    seeds = {client.predict("ant", images=1, api_name="/draw")[1] for _ in range(2)}
    assert len(seeds) == 2 and all(seed.isdecimal() for seed in seeds)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"top_p": 0}, r"argument --top-p: expected a number in \(0, 1\], got 0"),
        ({"images": 9}, "9 images: expected 1 to 8 at once"),
        ({"images": 0}, "argument --images: expected a whole number from 1 to .*, got 0"),
        ({"seed": -1}, "argument --seed: expected a whole number"),
        ({"cfg_scale": 0.5}, r"argument --cfg-scale: expected a number of at least 1 \(1 is off\), got 0.5"),
        ({"cfg_interval": "4 17"}, "cfg-interval 4 17: expected"),
        ({"cfg_interval": "a"}, "argument --cfg-interval: expected"),
        ({"cfg_schedule": "none"}, "argument --cfg-schedule: expected"),
        ({"class_name": "be"}, r"there is no class 'be' \(there is bee\)"),
        ({"class_name": "3"}, "class 3 is out of range: .* classes 0 to 2"),
    ],
)
def test_the_api_refuses_with_the_line_of_the_command(client, values, message):
    from gradio_client.exceptions import AppError

    with pytest.raises(AppError, match=message):
        client.predict(**{"class_name": "ant", **values}, api_name="/draw")


@pytest.fixture
def browser(tmp_path):
    """A headless browser that saves what is downloaded in tmp_path."""
    pytest.importorskip("selenium", reason="selenium is not installed")
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    driver = shutil.which("chromedriver")
    if not (program and driver):
        pytest.skip("chromium and its chromedriver are not installed (Debian: apt install chromium chromium-driver)")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = program
    for flag in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "disable-gpu", "window-size=1200,1000"):
        options.add_argument(f"--{flag}")
    options.add_experimental_option("prefs", {"download.default_directory": str(tmp_path)})
    with webdriver.Chrome(options=options, service=webdriver.ChromeService(driver)) as browser:
        yield browser


def test_a_class_is_chosen_and_drawn_in_a_browser(address, browser, tmp_path):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import WebDriverWait

    wait, field = WebDriverWait(browser, PATIENCE), "//label[contains(., '{}')]//*[self::input or self::textarea]"
    browser.get(address)
    name = wait.until(lambda page: page.find_element(By.CSS_SELECTOR, "input[aria-label='Class']"))
    draw = browser.find_element(By.XPATH, "//button[text()='Draw']")
    name.click()
    name.send_keys(Keys.CONTROL, "a")
    name.send_keys("ca")
    options = "ul[role=listbox] li"
    wait.until(lambda page: [item.text for item in page.find_elements(By.CSS_SELECTOR, options)] == ["cat"])
    name.send_keys(Keys.ENTER)
    draw.click()
    drawn = "return [...document.querySelectorAll('#images img')].filter(image => image.naturalWidth == 16).length"
    wait.until(lambda page: page.execute_script(drawn) == 2 and not page.find_elements(By.CSS_SELECTOR, ".generating"))
    assert name.get_attribute("value") == "cat"
    seed = browser.find_element(By.XPATH, field.format("Seed of these images"))
    wait.until(lambda page: seed.get_attribute("value").isdecimal())
    assert browser.save_screenshot(tmp_path / "screenshot.png")
    browser.find_element(By.CSS_SELECTOR, "#images img").click()
    wait.until(lambda page: page.find_element(By.CSS_SELECTOR, "#images [aria-label='Download']")).click()
    wait.until(lambda page: (tmp_path / "image.png").is_file())
    assert Image.open(tmp_path / "image.png").size == (16, 16)
    fetched = browser.execute_script("return performance.getEntriesByType('resource').map(entry => entry.name)")
    assert fetched and all(url.startswith(address) for url in fetched)  # nothing from other machines
    browser.find_element(By.XPATH, field.format("Guided codes")).send_keys("7")
    draw.click()
    wait.until(lambda page: "cfg-interval -17: expected one number" in page.find_element(By.TAG_NAME, "body").text)


def test_what_is_refused_before_weights_are_loaded(models, refused):
    with patch.object(ImageSampler, "from_pretrained", side_effect=AssertionError("weights are loaded")):
        files = ["--vq-ckpt", models["vq"], "--gpt-ckpt", models["gpt"]]
        with patch.object(metadata, "version", side_effect=metadata.PackageNotFoundError):
            text = f"the demo needs gradio, which is not installed: {sys.executable} -m pip install"
            refused(demo.main, files, text)
        with patch.object(metadata, "version", return_value="5.49.1"):
            refused(demo.main, files, "needs gradio 6, this is 5.49.1")
        with (
            patch.object(metadata, "version", return_value="6.0"),
            socket.create_server(("127.0.0.1", 0)) as taken,
        ):
            for flag, value, text in (
                ("--top-p", 0, "argument --top-p: expected a number in (0, 1], got 0"),
                ("--images", 9, "--images 9 is more than --max-batch 8"),
                ("--port", 70000, "a whole number from 1 to 65535"),
                ("--port", taken.getsockname()[1], "Address already in use"),
            ):
                refused(demo.main, [*files, flag, value], text)


def test_names_that_classes_share_get_their_numbers():
    assert distinct(["crane", "bee", "crane", "a\nb"]) == ["crane (0)", "bee", "crane (2)", "a b"]
