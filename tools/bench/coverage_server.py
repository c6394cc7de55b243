"""What the server that the processes of tools/bench/coverage.py are forked from imports: everything, used once."""

import torch

from bench import coverage_one

torch.set_num_threads(1)
coverage_one.warm()
