"""The fixtures of test_roundtrip.py, one of each for all files here; a thread for each worker."""
import os

import torch

from test_roundtrip import critic, ear, pocket, runs  # noqa: F401

torch.set_num_threads(1)  # two workers on two cores, see pytest.ini
os.environ["OMP_NUM_THREADS"] = "1"  # and the programs that they start
