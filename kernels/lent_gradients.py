"""Gradients that parameters have already, lent to the backward of their layer, which adds to them.

Autograd adds a parameter's new gradient to its old one, which reads and writes the whole matrix
again, three times its bytes. A lent gradient is taken off its parameter; the backward finds it by
where the parameter lies in memory, adds to it while it stores its sums, and returns it as its own.
Autograd, finding the parameter without a gradient, puts it back. What no backward took is added to
or put back at the end.

    loans = LOANS.lend(parameters)      p.grad = None
    ...  LOANS.take([w_in, w_out])      in `comet::moe_layer_backward`
    LOANS.give_back(loans)
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

Place = tuple[torch.device, int]


@dataclasses.dataclass(frozen=True, eq=False)
class Loan:
    """A parameter's gradient of before, and where the parameter lay when it was lent."""

    parameter: nn.Parameter
    gradient: Tensor
    place: Place

    def view_like(self, weight: Tensor) -> Tensor | None:
        """Return the gradient in the strides of `weight`, None if that is a part or a copy."""
        own = self.parameter
        if weight.dtype != own.dtype or _dims(weight) != _dims(own):
            return None
        return self.gradient.as_strided(
            weight.shape, weight.stride(), self.gradient.storage_offset()
        )


def _dims(tensor: Tensor) -> list[tuple[int, int]]:
    """Return (stride, size) of the dims in the order of memory: the same for permuted views."""
    dims = zip(tensor.stride(), tensor.shape, strict=True)
    return sorted(dim for dim in dims if dim[1] != 1)


class Loans:
    """What is lent at the moment, by place; backwards run in threads of their own."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._by_place: dict[Place, Loan] = {}

    @property
    def are_none(self) -> bool:
        """Whether nothing is lent."""
        return not self._by_place

    def lend(self, parameters: Iterable[nn.Parameter]) -> list[Loan]:
        """Take the gradients of matrices of experts off their parameters, and lend them.

        Left alone are parameters that share their memory with one that was lent, and those with
        hooks, which would see the sum instead of what was added to it.
        """
        loans = []
        with self._lock:
            for parameter in parameters:
                gradient = parameter.grad
                if gradient is None or not _is_lendable(parameter, gradient):
                    continue
                loan = Loan(parameter, gradient, (parameter.device, parameter.data_ptr()))
                if loan.place in self._by_place:
                    continue
                self._by_place[loan.place] = loan
                parameter.grad = None
                loans.append(loan)
        return loans

    def take(self, weights: Sequence[Tensor]) -> list[Tensor] | None:
        """Return the lent gradients in the strides of these weights, None unless all are there.

        Each is lent once: another backward of the same layer gets none. While a CUDA graph is
        captured nobody gets any, since the graph would add to that memory at every replay.
        """
        if not weights:
            return None
        if weights[0].is_cuda and torch.cuda.is_current_stream_capturing():
            return None
        places = [(weight.device, weight.data_ptr()) for weight in weights]
        with self._lock:
            loans = [self._by_place.get(place) for place in places]
            views = [
                None if loan is None else loan.view_like(weight)
                for loan, weight in zip(loans, weights, strict=True)
            ]
            found = [view for view in views if view is not None]
            if len(found) < len(weights) or len(set(places)) < len(places):
                return None
            for place in places:
                del self._by_place[place]
        return found

    def give_back(self, loans: Iterable[Loan]) -> None:
        """Put the gradients back where no backward has."""
        with self._lock:
            for loan in loans:
                parameter = loan.parameter
                is_untouched = self._by_place.get(loan.place) is loan
                if is_untouched:
                    del self._by_place[loan.place]
                if parameter.grad is None:
                    parameter.grad = loan.gradient
                elif is_untouched:
                    # no lent gradient has been added to: this is all that is new
                    loan.gradient.add_(parameter.grad)
                    parameter.grad = loan.gradient


def _is_lendable(parameter: nn.Parameter, gradient: Tensor) -> bool:
    return (
        parameter.dim() == 3
        and type(gradient) is Tensor
        and gradient.layout == torch.strided
        and not gradient.requires_grad
        and gradient.dtype == parameter.dtype
        and gradient.stride() == parameter.stride()
        and parameter.data_ptr() % 16 == gradient.data_ptr() % 16 == 0
        and not parameter._backward_hooks
        and not getattr(parameter, "_post_accumulate_grad_hooks", None)
    )


LOANS = Loans()
