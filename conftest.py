"""For every test: no GPU, because the golden numbers are a CPU's in float32; no deadlines, because machines are busy."""

import os

from hypothesis import settings

os.environ["CUDA_VISIBLE_DEVICES"] = ""
settings.register_profile("unhurried", deadline=None)
settings.load_profile("unhurried")
