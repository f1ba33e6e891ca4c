"""A web page on which to draw images of a class, and the same as an API; images appear as they are drawn.

bash scripts/demo.sh --vq-ckpt vq_ds16_c2i --gpt-ckpt c2i_B_256   # then open http://127.0.0.1:7860

Settings given here are where the page begins. Requests that wait with equal settings are drawn together, up to --max-batch
images at once. Image i of a seed is that of the other samplers. The API: docs/sampling.md.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the modules of this clone, whatever else is installed

import difflib
import os
import re
import secrets
import socket
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from importlib import metadata
from typing import TYPE_CHECKING, Annotated

from annotated_types import Interval
from PIL import Image
from pydantic import model_validator
from typing_extensions import Self

from autoregressive.models.guidance import SCHEDULES
from autoregressive.models.sampler import ImageSampler
from autoregressive.sample.batching import DrawingQueue
from autoregressive.sample.flags import DrawingSettings, SamplerSettings, class_names
from utils import cli
from utils.distributed import best_device
from utils.draw import label_text
from utils.settings import AtLeastOne, PositiveInt, Seed, setting

if TYPE_CHECKING:
    from gradio import Blocks

OLDEST_GRADIO = 6
WAITING = 100  # requests, at most, besides those that are drawn now or next
KEPT = 3600  # seconds that files of images stay
RANDOM_SEEDS = 2**31  # few enough to be written down
IMAGES = COLUMNS = 4
ENLARGED = 128  # px; the pixels of smaller images are shown as squares
Port = Annotated[int, Interval(ge=1, le=65535), "a whole number from 1 to 65535"]


class DemoSettings(SamplerSettings):
    cfg_scale: AtLeastOne = setting(4.0, "classifier-free guidance; 1 is off")
    images: PositiveInt | None = setting(
        None, f"images of a request; default: {IMAGES}, or --max-batch if that is less"
    )
    compile: bool = setting(
        False, "torch.compile of both models; takes long for each new temperature, top-k or top-p", free=True
    )
    max_batch: PositiveInt = setting(8, "images drawn at once, of one request or of several", free=True)
    host: str = setting("127.0.0.1", "address to listen on; 0.0.0.0: for everybody in the network", free=True)
    port: Port = setting(7860, free=True)

    @model_validator(mode="after")
    def _a_request_fits_a_batch(self) -> Self:
        if self.images and self.images > self.max_batch:
            raise ValueError(f"--images {self.images} is more than --max-batch {self.max_batch}")
        return self


class RequestSettings(DrawingSettings):
    """What a request may set besides the class."""

    cfg_scale: AtLeastOne = setting()
    images: PositiveInt = setting()
    seed: Seed = setting()


def check_gradio() -> None:
    """Raise InputError where gradio is not installed, or too old."""
    install = f"{sys.executable} -m pip install --upgrade gradio"
    try:
        version = metadata.version("gradio")
    except metadata.PackageNotFoundError:
        raise cli.InputError(f"the demo needs gradio, which is not installed: {install}") from None
    if int(version.split(".")[0]) < OLDEST_GRADIO:
        raise cli.InputError(f"the demo needs gradio {OLDEST_GRADIO}, this is {version}: {install}")


def check_address(host: str, port: int) -> None:
    """Raise InputError where this machine cannot listen."""
    try:
        socket.create_server((host, port)).close()
    except OSError as error:
        raise cli.InputError(f"--host {host} --port {port}: {error.strerror}; give another one") from None


def distinct(names: Sequence[str]) -> list[str]:
    """Names on one line; those that several classes share get the number of the class."""
    lines = [label_text(name) for name in names]
    shared = {name for name, times in Counter(lines).items() if times > 1}
    return [f"{name} ({i})" if name in shared else name for i, name in enumerate(lines)]


class Demo:
    """What the page shows, and how requests are answered."""

    def __init__(self, sampler: ImageSampler, settings: DemoSettings) -> None:
        self.settings, self.sampler = settings, sampler
        self.names = distinct(class_names(sampler))
        self.queue = DrawingQueue(sampler)
        if sampler.device.type == "cuda":  # the decoder is made for full batches, so that rounding stays the same
            list(self.queue.draw([0] * settings.max_batch, cfg_scale=settings.cfg_scale, **settings.drawing))

    def class_of(self, given: object) -> int:
        """The number of a class that is given by name or number. Raises InputError for one that does not exist."""
        text = str(given).strip()
        if text in self.names:
            return self.names.index(text)
        if re.fullmatch("[0-9]{1,9}", text):
            self.sampler.check_labels([int(text)], "class")
            return int(text)
        similar = difflib.get_close_matches(text[:100], self.names)
        near = f" (there is {', '.join(similar)})" if similar else ""
        raise cli.InputError(f"there is no class {text[:100]!r}{near}: give the name or the number of a class")

    def draw(
        self, class_name: str, images: int, cfg_scale: float, cfg_schedule: str, cfg_interval: str, temperature: float,
        top_k: int, top_p: float, seed: int | str | None = None,
    ) -> Iterator[tuple[list[Image.Image], str]]:  # fmt: skip
        """Draw images of a class, given by name or number. Yields (images, seed): first partly drawn images, whose missing
        pixels are grey, at last the finished ones. Image i of a seed is always the same; without a seed one is chosen.
        cfg_interval: "-1" guides all codes, "FIRST STOP" only those from FIRST up to, not including, STOP.
        """
        from gradio import Error

        try:
            label = self.class_of(class_name)
            settings = RequestSettings.checked(
                images=images, seed=secrets.randbelow(RANDOM_SEEDS) if seed in (None, "") else seed, cfg_scale=cfg_scale,
                cfg_schedule=cfg_schedule, cfg_power=self.settings.cfg_power if cfg_schedule == "power-cosine" else None,
                cfg_interval=str(cfg_interval).split(), temperature=temperature, top_k=top_k, top_p=top_p,
                image_size_eval=self.settings.image_size_eval,
            )  # fmt: skip
            how = {"cfg_scale": settings.cfg_scale, **settings.drawing}
            for pictures in self.queue.draw([label] * settings.images, settings.seed, **how):
                yield [Image.fromarray(picture) for picture in pictures], str(settings.seed)
        except Exception as error:
            message = cli.explain(error)
            if message is None:  # a bug: gradio prints where
                raise
            raise Error(message, print_exception=False) from None

    def page(self) -> "Blocks":
        """The page; its button is the API's `/draw`."""
        import gradio as gr

        s, gpt, codes = self.settings, self.sampler.gpt, self.sampler.codes

        def slider(label: str, info: str, least: float, most: float, value: float, step: float) -> gr.Slider:
            return gr.Slider(min(least, value), max(most, value), value, step=step, label=label, info=info)

        with gr.Blocks(analytics_enabled=False, title="Next Patch Prediction", delete_cache=(KEPT // 4, KEPT)) as page:
            gr.Markdown(
                f"# Next Patch Prediction\n{gpt.about.get('gpt_model') or 'GPT'}, {self.sampler.image_size} px, "
                f"{len(self.names)} classes"
            )
            with gr.Row():
                with gr.Column(scale=1, min_width=320):
                    name = gr.Dropdown(self.names, value=self.names[0], label="Class", info="Type to search.")
                    images = slider(
                        "Images", f"Up to {s.max_batch}.", 1, s.max_batch, s.images or min(IMAGES, s.max_batch), 1
                    )
                    seed = gr.Textbox(label="Seed", placeholder="a new one each time", max_lines=1)
                    button = gr.Button("Draw", variant="primary")
                with gr.Column(scale=2, min_width=480):
                    gallery = gr.Gallery(
                        label="Images", show_label=False, format="png", columns=COLUMNS, object_fit="contain",
                        buttons=["download", "fullscreen"], interactive=False, elem_id="images",
                    )  # fmt: skip
                    used = gr.Textbox(label="Seed of these images", interactive=False)
            with gr.Accordion("Guidance and distribution"):
                with gr.Row():
                    scale = slider("Guidance", "1 is off.", 1, 10, s.cfg_scale, 0.1)
                    schedule = gr.Dropdown(
                        list(SCHEDULES), value=s.cfg_schedule, label="Schedule", info="How it grows from 1.", filterable=False
                    )  # fmt: skip
                    interval = gr.Textbox(
                        " ".join(map(str, s.cfg_interval)), label="Guided codes", max_lines=1,
                        info=f"-1: all {codes}. 0 {codes // 2}: the first half.",
                    )  # fmt: skip
                with gr.Row():
                    temperature = slider("Temperature", "1: as trained.", 0.05, 2, s.temperature, 0.05)
                    top_k = slider("Top-k", "0 is off.", 0, gpt.config.vocab_size, s.top_k, 1)
                    top_p = slider("Top-p", "1 is off.", 0.01, 1, s.top_p, 0.01)
            button.click(
                self.draw, [name, images, scale, schedule, interval, temperature, top_k, top_p, seed], [gallery, used],
                api_name="draw", preprocess=False, show_progress="minimal",
                concurrency_limit=2 * s.max_batch,  # while one batch is drawn, the next comes together
            )  # fmt: skip
        return page.queue(max_size=WAITING)


def serve(demo: Demo) -> "Blocks":
    """Start to answer, in threads; close() of what is returned ends it. Nothing is fetched from or sent to other machines."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = os.environ["GRADIO_RUN_HISTORY"] = "False"
    import gradio as gr

    settings, page = demo.settings, demo.page()
    direct = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or "localhost"
    os.environ["no_proxy"] = f"{direct},localhost,127.0.0.1,{settings.host}"  # gradio asks itself whether it is up
    css = "#images .grid-wrap { max-height: none; overflow: hidden }"
    css += "#images img { image-rendering: pixelated }" if demo.sampler.image_size <= ENLARGED else ""
    page.launch(
        server_name=settings.host, server_port=settings.port, share=False, quiet=True, prevent_thread_lock=True,
        ssr_mode=False, pwa=False, mcp_server=False, enable_monitoring=False, footer_links=["api"], css=css,
        max_threads=40 + 2 * settings.max_batch,
        theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
    )  # fmt: skip
    return page


def main() -> None:
    check_gradio()  # before weights are fetched
    settings = DemoSettings.from_command_line(__doc__).as_published("image_size")
    check_address(settings.host, settings.port)
    demo = Demo(settings.sampler(best_device(), settings.max_batch), settings)
    page = serve(demo)
    print(f"open {page.local_url} (Ctrl-C ends it)", flush=True)
    try:
        threading.Event().wait()
    finally:
        demo.queue.close()
        page.close(verbose=False)


if __name__ == "__main__":
    cli.run(main)
