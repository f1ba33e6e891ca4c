"""For every test: no GPU, because the golden numbers are a CPU's in float32."""

import os

os.environ["CUDA_VISIBLE_DEVICES"] = ""
