"""The report's parts: pages of both forms, and the nearest training images."""

import numpy as np
from PIL import Image

from scripts.pipeline.nearest import nearest, pick
from scripts.pipeline.pages import Page
from utils import samples


def test_a_page_needs_no_other_file_and_escapes_what_it_shows(tmp_path):
    picture = tmp_path / "report" / "a.png"
    picture.parent.mkdir()
    Image.new("RGB", (4, 4)).save(picture)
    page = Page("t <", tmp_path)
    page.heading("<b>")
    page.text("see `a_b` & <i>")
    page.table(["x|y"], [["<script>"]])
    page.picture(picture, 'a "class" <x>')
    page.code("Then:", "echo '<1>'")
    html, text = page.as_html(), page.as_markdown()
    assert "<script>" not in html and "<i>" not in html and "&lt;script&gt;" in html and "<code>a_b</code>" in html
    assert 'src="data:image/png;base64,' in html and "http" not in html.replace("http-equiv", "")
    assert "prefers-color-scheme: dark" in html
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
    index, distance = nearest(queries, file, mirrored=True)
    assert index.tolist() == chosen and np.allclose(distance, 0, atol=0.5)
    index, distance = nearest(queries, file, mirrored=False)
    assert index.tolist()[1:] == chosen[1:] and distance[0] > 10
