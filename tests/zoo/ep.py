"""What the expert parallel layers of the zoo share: parameters, the router and the dense oracle.

T tokens of this rank, H model dim, I expert dim, E experts of the group, P its ranks,
L = E // P experts of this rank, A = top_k, S = T * A rows sent, R rows received.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from zoo import routing

Group = dist.ProcessGroup | DeviceMesh | None

HIDDEN = 32
INTERMEDIATE = 48
NUM_EXPERTS = 4
TOP_K = 2


def process_group(group: Group) -> dist.ProcessGroup:
    """Return the process group behind a group, a one-dimensional mesh or None (the world)."""
    if isinstance(group, DeviceMesh):
        return group.get_group()
    return dist.group.WORLD if group is None else group


def all_to_all_rows(
    x: Tensor, output_splits: list[int], input_splits: list[int], group: Group
) -> Tensor:
    """Differentiable functional all-to-all, in the spelling that this torch has for it."""
    target = dist.group.WORLD if group is None else group
    if torch.__version__ >= "2.12":
        return funcol.all_to_all_single(x, output_splits, input_splits, target)
    return funcol.all_to_all_single_autograd(x, output_splits, input_splits, target)


class DenseMoE(nn.Module):
    """The plain layer over all E experts: a loop over experts, in the dtype of its parameters."""

    def __init__(
        self,
        weights: dict[str, Tensor],
        top_k: int,
        activation: Callable = F.silu,
        weight_place: str = "after",
    ):
        super().__init__()
        self.top_k = top_k
        self.activation = activation
        self.weight_place = weight_place
        self.gate = nn.Parameter(weights["gate"].clone())
        self.w_gate = nn.Parameter(weights["w_gate"].clone())
        self.w_up = nn.Parameter(weights["w_up"].clone())
        self.w_down = nn.Parameter(weights["w_down"].clone())

    def forward(self, x: Tensor) -> Tensor:
        """[T, H] -> [T, H]."""
        scores_TA, ids_TA = route(x, self.gate, self.top_k)
        out = torch.zeros_like(x)
        for expert in range(self.w_gate.shape[0]):
            weight_T1 = (scores_TA * (ids_TA == expert)).sum(1, keepdim=True)
            scaled = x * weight_T1 if self.weight_place == "before" else x
            h = self.activation(scaled @ self.w_gate[expert].T) * (scaled @ self.w_up[expert].T)
            y = h @ self.w_down[expert].T
            out = out + (y if self.weight_place == "before" else y * weight_T1)
        return out


def route(x: Tensor, gate: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Return softmax scores [T, A] in float32 and expert ids [T, A] int64."""
    logits = F.linear(x.float(), gate.float())
    return torch.topk(torch.softmax(logits, dim=-1), top_k, dim=-1)


def expert_weights(
    num_experts: int = NUM_EXPERTS,
    hidden: int = HIDDEN,
    intermediate: int = INTERMEDIATE,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Return the float32 weights of all experts: gate [E, H]; w_gate, w_up [E, I, H]; w_down.

    The values are exact in bfloat16, so the oracle and the layers hold the same numbers.
    """
    generator = torch.Generator().manual_seed(100 + seed)

    def draw(*shape: int) -> Tensor:
        value = torch.randn(shape, generator=generator) / shape[-1] ** 0.5
        return value.bfloat16().float()

    return {
        "gate": 0.5 * routing.router_rows(num_experts, hidden).bfloat16().float(),
        "w_gate": draw(num_experts, intermediate, hidden),
        "w_up": draw(num_experts, intermediate, hidden),
        "w_down": draw(num_experts, hidden, intermediate),
    }


class ExpertParallelLayer(nn.Module):
    """A router and this rank's share of the experts; subclasses write `routed`.

    `expert_gradients` brings gradients into the oracle's layout, so that they can be compared
    whatever a framework stores.
    """

    weight_place = "after"

    def __init__(
        self,
        group: Group = None,
        *,
        num_experts: int = NUM_EXPERTS,
        top_k: int = TOP_K,
        hidden: int = HIDDEN,
        intermediate: int = INTERMEDIATE,
        dtype: torch.dtype = torch.bfloat16,
        activation: Callable = F.silu,
        seed: int = 0,
    ):
        super().__init__()
        pg = process_group(group)
        self.group = group
        self.ep_size = dist.get_world_size(pg)
        self.ep_rank = dist.get_rank(pg)
        assert num_experts % self.ep_size == 0
        self.num_experts = num_experts
        self.num_local_experts = num_experts // self.ep_size
        self.top_k = top_k
        self.activation = activation
        self.all_weights = expert_weights(num_experts, hidden, intermediate, seed)
        first = self.ep_rank * self.num_local_experts
        self.own = slice(first, first + self.num_local_experts)
        self.gate = nn.Parameter(self.all_weights["gate"].clone())
        local = {k: v[self.own].to(dtype) for k, v in self.all_weights.items() if k != "gate"}
        self.set_experts(local["w_gate"], local["w_up"], local["w_down"])

    def set_experts(self, w_gate: Tensor, w_up: Tensor, w_down: Tensor) -> None:
        """Store [L, I, H], [L, I, H], [L, H, I] in the layer's own layout."""
        raise NotImplementedError

    def expert_gradients(self) -> dict[str, Tensor]:
        """Return the gradients of this rank's experts in the oracle's layout and names."""
        raise NotImplementedError

    def routed(self, x: Tensor, scores_TA: Tensor, ids_TA: Tensor) -> Tensor:
        """[T, H] -> [T, H]: dispatch, experts, combine."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """[T, H] -> [T, H]."""
        scores_TA, ids_TA = route(x, self.gate, self.top_k)
        return self.routed(x, scores_TA, ids_TA)

    def oracle(self, dtype: torch.dtype = torch.float32) -> DenseMoE:
        """Return the same layer over all experts, in one process."""
        place = self.weight_place
        return DenseMoE(self.all_weights, self.top_k, self.activation, place).to(dtype)


class Stack(nn.Module):
    """Several layers with residual connections: x + layer(x), over and over."""

    def __init__(self, layers: Sequence[nn.Module]):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        """[T, H] -> [T, H]."""
        for layer in self.layers:
            x = x + layer(x)
        return x


def expert_parallel_layers(model: nn.Module) -> list[ExpertParallelLayer]:
    """Return the layers of `model` that are split over a group, in order."""
    return [m for m in model.modules() if isinstance(m, ExpertParallelLayer)]


def oracle_of(model: nn.Module, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Return the single-process twin of a layer or a `Stack` of layers."""
    if isinstance(model, Stack):
        return Stack([layer.oracle(dtype) for layer in model.layers])
    return model.oracle(dtype)


def gradients_of(model: nn.Module) -> dict[str, Tensor | None]:
    """Return gradients by layer number and the oracle's parameter names."""
    found: dict[str, Tensor | None] = {}
    for i, layer in enumerate(expert_parallel_layers(model)):
        found[f"{i}.gate"] = layer.gate.grad
        if _trains_experts(layer):
            found |= {f"{i}.{name}": grad for name, grad in layer.expert_gradients().items()}
    return found


def oracle_gradients(oracle: nn.Module, model: nn.Module) -> dict[str, Tensor | None]:
    """Return the oracle's gradients under the names of `gradients_of`, this rank's experts only."""
    found: dict[str, Tensor | None] = {}
    dense = [m for m in oracle.modules() if isinstance(m, DenseMoE)]
    for i, (twin, layer) in enumerate(zip(dense, expert_parallel_layers(model), strict=True)):
        found[f"{i}.gate"] = twin.gate.grad
        if _trains_experts(layer):
            for name in ("w_gate", "w_up", "w_down"):
                found[f"{i}.{name}"] = getattr(twin, name).grad[layer.own]
    return found


def _trains_experts(layer: ExpertParallelLayer) -> bool:
    return any(p.requires_grad for name, p in layer.named_parameters() if name != "gate")


def tokens(
    num_tokens: int,
    *,
    seed: int = 0,
    num_experts: int = NUM_EXPERTS,
    top_k: int = TOP_K,
    hidden: int = HIDDEN,
    ids_TA: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """Return tokens [T, H] whose routing is planted: random, or exactly `ids_TA` [T, A]."""
    if ids_TA is None:
        ids_TA = routing.spread_ids(num_tokens, num_experts, top_k, seed)
    return routing.planted_tokens(ids_TA, num_experts, hidden, seed).to(dtype)
