"""PSNR and SSIM against their definitions; the numbers are scikit-image 0.26's."""

import numpy as np
import pytest
import torch

from tokenizer.tokenizer_image.similarity import WINDOW, figures, ssim


@pytest.fixture
def pair():
    rng = np.random.default_rng(0)
    a = rng.integers(256, size=(2, 10, 12, 3))
    b = (a * 0.8 + rng.integers(50, size=a.shape)).clip(0, 255)
    return [torch.from_numpy(part.astype(np.uint8)) for part in (a, b)]


@pytest.mark.parametrize("data_range", [1.0, 2.0])
def test_ssim_is_the_mean_over_windows(pair, data_range):
    a, b = (part.numpy().astype(float) / 255 for part in pair)
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    for i in range(2):
        values = []
        for top in range(10 - WINDOW + 1):
            for left in range(12 - WINDOW + 1):
                for channel in range(3):
                    x, y = (part[i, top : top + WINDOW, left : left + WINDOW, channel].ravel() for part in (a, b))
                    cov = np.cov(x, y)
                    values.append(
                        (2 * x.mean() * y.mean() + c1) * (2 * cov[0, 1] + c2)
                        / ((x.mean() ** 2 + y.mean() ** 2 + c1) * (cov[0, 0] + cov[1, 1] + c2))
                    )  # fmt: skip
        assert ssim(*pair, data_range)[i].item() == pytest.approx(np.mean(values), abs=1e-9)


def test_figures(pair):
    found = figures(*pair)
    a, b = (part.numpy().astype(float) / 255 for part in pair)
    mse = ((a - b) ** 2).mean((1, 2, 3))
    np.testing.assert_allclose(found["mse"], mse)
    np.testing.assert_allclose(found["psnr"], -10 * np.log10(mse))
    assert (found["ssim_published"] > found["ssim"]).all()
    same = figures(pair[0], pair[0])
    np.testing.assert_allclose(same["ssim"], 1, atol=1e-9)
    assert same["psnr"].tolist() == [100, 100] and same["mse"].tolist() == [0, 0]


def test_images_smaller_than_the_window():
    small = torch.zeros(1, 6, 9, 3, dtype=torch.uint8)
    with pytest.raises(ValueError, match="at least 7 px"):
        ssim(small, small)
