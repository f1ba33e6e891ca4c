"""The report's parts: pages of both forms, and the nearest training images."""

import numpy as np
from PIL import Image

from scripts.pipeline.nearest import nearest, pick
from scripts.pipeline.pages import Code, Heading, Picture, Table, Text, as_html, as_markdown
from scripts.pipeline.report import _without
from utils import samples


def test_a_page_needs_no_other_file_and_escapes_what_it_shows(tmp_path):
    picture = tmp_path / "report" / "a.png"
    picture.parent.mkdir()
    Image.new("RGB", (4, 4)).save(picture)
    blocks = [
        Heading("<b>"), Text("see `a_b` & <i>"), Table(["x|y"], [["<script>"]]), Picture(picture, 'a "class" <x>'),
        Code("Then:", "echo '<1>'"),
    ]  # fmt: skip
    page = as_html("t <", blocks)
    assert "<script>" not in page and "<i>" not in page and "&lt;script&gt;" in page and "<code>a_b</code>" in page
    assert 'src="data:image/png;base64,' in page and "http" not in page.replace("http-equiv", "")
    assert "prefers-color-scheme: dark" in page
    text = as_markdown("t", blocks, tmp_path)
    assert "report/a.png)" in text and "| x\\|y |" in text and "```bash\necho '<1>'\n```" in text


def test_the_nearest_image_is_found_also_in_a_mirror(tmp_path):
    rng = np.random.default_rng(0)
    images = rng.integers(256, size=(3000, 40, 40, 3), dtype=np.uint8)
    samples.write(tmp_path / "a.npz", [images[:1000], images[1000:]], images.shape, np.arange(3000))
    file = samples.Samples(tmp_path / "a.npz")
    chosen = [2500, 3, 1024, 3]
    assert np.array_equal(pick(file, chosen), images[chosen])
    queries = images[chosen].copy()
    queries[0] = queries[0, :, ::-1]
    mirrored, plain = nearest(queries, file, True), nearest(queries, file, False)
    assert mirrored.index.tolist() == chosen and np.allclose(mirrored.distance, 0, atol=0.5)
    assert plain.index.tolist()[1:] == chosen[1:] and plain.distance[0] > 10


def test_a_command_to_go_on_with_leaves_flags_out_with_their_values():
    words = "bash train.sh --a 1 --init-classes x=1 y=2 --ema --gpt-ckpt a.pt"
    assert _without(words.split(), "--init-classes", "--gpt-ckpt") == ["bash", "train.sh", "--a", "1", "--ema"]
