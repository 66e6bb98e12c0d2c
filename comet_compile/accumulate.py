"""`accumulate_gradients`: backward passes that add to the gradients that are there."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import nn

from comet_compile.kernels.lent_gradients import LOANS


@contextlib.contextmanager
def accumulate_gradients(parameters: nn.Module | Iterable[nn.Parameter]) -> Iterator[None]:
    """Have backward passes inside add the experts' gradients to those that are there.

        for batch in micro_batches:
            loss = model(batch)
            with comet_compile.accumulate_gradients(model):
                loss.backward()

    Gradients come out as without it, but each sum is rounded once, and the experts' matrices are
    not read and written again to add two of them. Only three-dimensional parameters that have a
    gradient are concerned; inside the block it is None until their backward has run. Where no layer
    of comet's takes it (eager layers, shards of FSDP, parameters with hooks, replays of a CUDA
    graph), it is added to as always when the block ends.

    For `backward()` alone: `torch.autograd.grad` inside would return sums, and a function of the
    model's own that scales a matrix's gradient on its way would scale what was there as well.

    `parameters`: a module, or parameters, whose backward passes run inside the block.
    """
    found = parameters.parameters() if isinstance(parameters, nn.Module) else parameters
    loans = LOANS.lend(found)
    try:
        yield
    finally:
        with torch.no_grad():
            LOANS.give_back(loans)
