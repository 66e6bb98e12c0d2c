"""Suite "traps": Hugging Face's MoE blocks, run in ways that cost much more than the layer needs.

- Weights in float32, alone and under autocast to bf16: transformers compiles an opaque operator
  that reads offsets on the host and multiplies expert after expert. Before transformers 5.23 its
  backward does not compile under Inductor.
- Llama 4: every expert multiplies every token, most of them scaled to zero.
- A list of experts as modules, each of which multiplies every token: how most people write a layer
  first, and what a compiler captures in one graph.
- `batched_mm`: every row of a decoded token gets a copy of its expert's weights.

Errors are those of the experts' products for the routing that eager finds.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from comet_compile import fallback_gemm
from moe_bench import hf, layers
from moe_bench.errors import layer_errors
from moe_bench.shapes import Case
from moe_bench.workload import Workload

Read = Callable[[Tensor], Tensor]


@dataclasses.dataclass
class Block:
    """A block, and what the reference in float32 has to know of it.

    `matrices(e, read)` is gate-up [2I, H] and down [H, I] of expert e, of what `read` makes of
    the parameters that have them; `router(x, ids)` the weights [T, A] of the experts `ids`.
    """

    module: nn.Module
    forward: Callable[[Tensor], Tensor]
    ids: Tensor  # [T, A]
    weights: Tensor  # [T, A]
    router: Callable[[Tensor, Tensor], Tensor]
    matrices: Callable[[int, Read], tuple[Tensor, Tensor]]
    place: str


def workloads(case: Case, device: torch.device) -> Iterator[Workload]:
    """Yield a workload per mode of the case, over the same weights and tokens."""
    wide = case.way in ("float32", "autocast")
    x_TH = layers.draw_tokens(case.shape, case.tokens, device, 0)
    x_TH = x_TH.float() if wide else x_TH
    autocast = functools.partial(torch.autocast, device.type, layers.DTYPE)
    context = autocast if case.way == "autocast" else contextlib.nullcontext
    build = {"llama4_text": _llama4, "mixtral": _modules}.get(case.shape.family, _qwen3)
    with torch.no_grad(), context():
        block = build(case, x_TH)
    for mode in case.modes:
        _undo_repair()
        yield _workload(case, mode, block, x_TH, context)


def _undo_repair() -> None:
    """Take back what comet made of transformers' operator: it would serve Inductor's rows too."""
    from transformers.integrations import moe

    torch.library.register_autograd(
        "transformers::grouped_mm_fallback",
        moe._grouped_mm_fallback_backward,
        setup_context=moe._grouped_mm_fallback_setup_context,
    )
    fallback_gemm._register.cache_clear()


def _workload(
    case: Case,
    mode: str,
    block: Block,
    x_TH: Tensor,
    context: Callable[[], contextlib.AbstractContextManager[object]],
) -> Workload:
    train = mode == "train"
    x = x_TH.view(case.batch, case.seq, -1).detach().requires_grad_(train)
    num_shared = block.ids.shape[1] - case.shape.top_k
    grad_y = layers.draw_tokens(case.shape, case.tokens, x.device, 1).to(x.dtype)

    def errors(out: Tensor) -> dict[str, float]:
        got = {"y": out.reshape(x_TH.shape)}
        if train:
            got["d_x"] = x.grad.view_as(x_TH)
        return layer_errors(
            x_TH,
            block.ids,
            block.weights,
            range(case.shape.num_experts + num_shared),
            lambda expert: block.matrices(expert, Tensor.detach),
            got,
            grad_y if train else None,
            (lambda expert: block.matrices(expert, lambda p: p.grad)) if train else None,
            place=block.place,
            router=lambda tokens: block.router(tokens, block.ids),
        )

    return Workload(
        case=case,
        mode=mode,
        layer=block.forward,
        inputs=(x,),
        leaves=[x, *block.module.parameters()],
        errors=errors,
        grad_out=grad_y.view_as(x),
        flops=case.shape.forward_flops(case.tokens) * (1 + num_shared / case.shape.top_k),
        host_splits=x.dtype == torch.float32,
        context=context,
        # Dynamo would leave a frame that Inductor fails on to eager, under comet as well
        fullgraph=True,
    )


def _qwen3(case: Case, x_TH: Tensor) -> Block:
    implementation = case.way if case.way == "batched_mm" else "grouped_mm"
    model = hf.causal_lm(case, x_TH.device, x_TH.dtype, implementation)
    module = hf.moe_blocks(model)[0]
    weights, ids = hf.routing_of(module, x_TH)
    experts = module.experts

    def router(x: Tensor, ids: Tensor) -> Tensor:
        chosen = F.linear(x, module.gate.weight.float()).softmax(-1).gather(1, ids)
        return chosen / chosen.sum(-1, keepdim=True)

    def matrices(expert: int, read: Read) -> tuple[Tensor, Tensor]:
        return read(experts.gate_up_proj)[expert], read(experts.down_proj)[expert]

    return Block(module, lambda x: module(x), ids, weights, router, matrices, "after")


class _Expert(nn.Module):
    def __init__(self, hidden: int, inter: int) -> None:
        super().__init__()
        self.gate, self.up = (nn.Linear(hidden, inter, bias=False) for _ in range(2))
        self.down = nn.Linear(inter, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class _Modules(nn.Module):
    """[.., H] both ways, by a loop over all experts."""

    def __init__(self, hidden: int, inter: int, num_experts: int, top_k: int) -> None:
        super().__init__()
        self.router = nn.Linear(hidden, num_experts, bias=False)
        self.experts = nn.ModuleList(_Expert(hidden, inter) for _ in range(num_experts))
        self.top_k = top_k

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        values, ids = self.router(x).float().topk(self.top_k, dim=-1)
        return values.softmax(-1), ids

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.route(x)
        y = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            weight = (weights * (ids == number)).sum(-1, keepdim=True).to(x.dtype)
            y = y + expert(x) * weight
        return y


def _modules(case: Case, x_TH: Tensor) -> Block:
    shape, device = case.shape, x_TH.device
    with device:
        module = _Modules(shape.hidden, shape.inter, shape.num_experts, shape.top_k).to(x_TH.dtype)
    generator = layers.seeded(device, 60)
    for parameter in module.parameters():
        parameter.normal_(std=parameter.shape[1] ** -0.5, generator=generator)
    weights, ids = module.route(x_TH)

    def router(x: Tensor, ids: Tensor) -> Tensor:
        return F.linear(x, module.router.weight.float()).gather(1, ids).softmax(-1)

    def matrices(expert: int, read: Read) -> tuple[Tensor, Tensor]:
        own = module.experts[expert]
        return torch.cat([read(own.gate.weight), read(own.up.weight)]), read(own.down.weight)

    return Block(module, lambda x: module(x), ids, weights, router, matrices, "after")


def _llama4(case: Case, x_TH: Tensor) -> Block:
    from transformers import Llama4TextConfig
    from transformers.models.llama4.modeling_llama4 import Llama4TextMoe

    shape, device = case.shape, x_TH.device
    config = Llama4TextConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.inter,
        num_local_experts=shape.num_experts,
        num_experts_per_tok=shape.top_k,
    )
    with device:
        module = Llama4TextMoe(config).to(x_TH.dtype)
    experts, shared = module.experts, module.shared_expert
    generator = layers.seeded(device, 60)
    for parameter in module.parameters():
        # [E, in, out] of experts, [out, in] of nn.Linear
        parameter.normal_(std=parameter.shape[1] ** -0.5, generator=generator)
    scores_TE, _ = module.router(x_TH)
    weights, ids = scores_TE.topk(shape.top_k)
    # the shared expert as one behind the others, which every token chooses with weight one
    weights = F.pad(weights, (0, 1), value=1.0)
    ids = F.pad(ids, (0, 1), value=shape.num_experts)

    def router(x: Tensor, ids: Tensor) -> Tensor:
        chosen = F.linear(x, module.router.weight.float()).gather(1, ids[:, :-1])
        return F.pad(chosen.sigmoid(), (0, 1), value=1.0)

    def matrices(expert: int, read: Read) -> tuple[Tensor, Tensor]:
        if expert < shape.num_experts:
            return read(experts.gate_up_proj)[expert].T, read(experts.down_proj)[expert].T
        gate_up = torch.cat([read(shared.gate_proj.weight), read(shared.up_proj.weight)])
        return gate_up, read(shared.down_proj.weight)

    def forward(x: Tensor) -> Tensor:
        out, _logits = module(x)
        return out.view_as(x)

    return Block(module, forward, ids, weights, router, matrices, "before")
