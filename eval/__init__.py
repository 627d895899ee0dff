"""Reload artifacts and score them."""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # as train_gpt.py has it: before torch is loaded
