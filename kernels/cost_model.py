"""How long a fused forward takes, from sizes and a few numbers of the machine.

    time = top-k + tables + layer0 + layer1 + sums        (one GPU)
         + publishing + what of the transfers is not hidden   (between ranks)

A GEMM takes the longer of its products and its bytes, and HIDE of the shorter, which overlap does
not hide whole::

    products = waves * K / 64 * flops of a step / rate of a multiprocessor
    bytes    = (matrices of the experts that have tokens + rows written) / memory bandwidth

Tiles are those of `choose_plan`; an expert's rows end within a tile, so half a tile of each is
padding. Between ranks, `num_fetchers` CTAs pull the peers' tokens, rank by rank, while the others
multiply what is there: that costs their share of the multiprocessors for as long as it takes. Sums
are reduced and pushed once the products are done. With skew, the busiest rank is what is predicted.

Top-k and transfers of `H100` were measured apart, its other numbers are fitted to measured
layers; `benchmarks/cost_model.py` says how far off the model is on them, and on layers that were
left out of the fit. `backward_cost` predicts the other direction.

Legend: T tokens of a rank, A experts per token, S = T*A slots, P ranks, E experts of all ranks, H
model dim, I expert intermediate dim.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence

from comet_compile.kernels.plan import Device, GemmTiles, Plan, choose_plan

_STEP_K = 64
USUAL_FETCHERS = 24


@dataclasses.dataclass(frozen=True)
class Machine:
    """A GPU and its links; the rates are what kernels reach, not what a data sheet says."""

    name: str
    device: Device
    gemm_tf: float
    """Teraflops of one multiprocessor in full tiles whose rows come by index (layer0)."""
    row_gemm_tf: float
    """The same where rows lie in order (layer1)."""
    hidden_gemm_tf: float
    """The same of the hidden rows' gradients, whose bytes come on top (`backward_cost`)."""
    weight_gemm_tf: float
    """The same of the matrices' gradients."""
    memory_tb: float
    """TB/s of streaming."""
    hide: float
    """The part of a GEMM's shorter side that still shows."""
    topk_us: float
    topk_element_ns: float
    """Softmax and top-k: fixed, and per router score."""
    fixed_us: float
    """Launches and the tables' fixed part."""
    sync_us: float
    """What a call between ranks takes beside: flags that are waited for, kernels that start and
    end."""
    torch_gemm_tf: float
    """Teraflops of one multiprocessor in torch's grouped GEMM (`unfused_cost`)."""
    unfused_us: float
    """The fixed part of an unfused layer: the launches of sorting and of what surrounds it."""
    nccl_gb: float
    """GB/s of an all-to-all by NCCL, in each direction."""
    host_us: float
    """Until the host has read the splits of an all-to-all, and what it launches then has begun."""
    pull_gb: tuple[tuple[int, float], ...]
    """GB/s of fetching rows from peers, by the number of CTAs."""
    push_gb: tuple[tuple[int, float], ...]
    """GB/s of sending rows to peers, by the number of CTAs."""

    def with_link(self, scale: float) -> Machine:
        """Return the machine with links `scale` times as fast, as far as CTAs can use them."""
        return dataclasses.replace(
            self,
            name=f"{self.name}, links x {scale:g}",
            pull_gb=_scaled(self.pull_gb, scale),
            push_gb=_scaled(self.push_gb, scale),
            nccl_gb=scale * self.nccl_gb,
        )


def _scaled(table: tuple[tuple[int, float], ...], scale: float) -> tuple[tuple[int, float], ...]:
    # a link carries `scale` times what it did at most, and so few CTAs never asked for more
    most = scale * max(rate for _, rate in table)
    return tuple((ctas, min(rate * max(1.0, scale), most)) for ctas, rate in table)


H100 = Machine(
    "H100",
    Device(132, 232448, (9, 0), "NVIDIA H100 80GB HBM3"),
    gemm_tf=5.57,
    row_gemm_tf=6.08,
    hidden_gemm_tf=5.6,
    weight_gemm_tf=5.5,
    memory_tb=2.73,
    hide=0.426,
    topk_us=19.0,
    topk_element_ns=0.044,
    fixed_us=27.3,
    sync_us=87.1,
    torch_gemm_tf=5.67,
    unfused_us=37.2,
    nccl_gb=330.0,
    host_us=976.0,
    pull_gb=((8, 85.0), (16, 161.0), (24, 227.0), (32, 280.0), (64, 301.0)),
    push_gb=((4, 123.0), (8, 185.0), (12, 316.0), (64, 343.0), (132, 349.0)),
)


@dataclasses.dataclass(frozen=True)
class Load:
    """A layer and what it is given; `experts` are those of all ranks, SwiGLU, bf16.

    `tokens` has a number per rank. `hot`: the busiest expert's tokens, in multiples of its share.
    """

    hidden: int
    inter: int
    experts: int
    top_k: int
    tokens: tuple[int, ...]
    hot: float = 1.0

    @property
    def ranks(self) -> int:
        """How many there are."""
        return len(self.tokens)

    @property
    def busiest_rows(self) -> float:
        """Rows that the busiest rank computes."""
        slots = sum(self.tokens) * self.top_k
        even = slots / self.ranks
        # a hot expert takes its tokens from all others alike
        share = min(self.hot * slots / self.experts, float(sum(self.tokens)))
        others = (slots - share) * (self.experts / self.ranks - 1) / max(1, self.experts - 1)
        return max(even, share + others) if self.hot > 1 else even

    @property
    def busy_experts(self) -> float:
        """Experts of the busiest rank that have tokens: of few slots, some get none."""
        own = self.experts / self.ranks
        return own * (1 - (1 - 1 / own) ** self.busiest_rows) if own > 1 else 1.0

    @property
    def moved_bytes(self) -> float:
        """Of the tokens that a rank has from others, or sends back: a token crosses to a rank once,
        however many of its experts live there."""
        reached = 1 - (1 - 1 / self.ranks) ** self.top_k
        return (sum(self.tokens) - min(self.tokens)) * reached * 2 * self.hidden

    @property
    def flops(self) -> float:
        """Of all ranks, forward: ``6*T*A*H*I`` of all tokens."""
        return 6.0 * sum(self.tokens) * self.top_k * self.hidden * self.inter


@dataclasses.dataclass(frozen=True)
class Phase:
    """A kernel or group of kernels on the busiest rank; they follow each other."""

    name: str
    us: float
    bound: str
    """What would have to be faster: "products", "memory", "link" or "latency"."""
    transfer_us: float = 0.0
    """How long the links are busy meanwhile."""
    exposed_us: float = 0.0
    """The part of `us` that the transfer adds."""


def predict(load: Load, machine: Machine, num_fetchers: int = USUAL_FETCHERS) -> list[Phase]:
    """Return the phases of a forward on the busiest rank, in order."""
    most, ranks, bandwidth = max(load.tokens), load.ranks, machine.memory_tb * 1e6
    rows = load.busiest_rows
    busy, plan = load.busy_experts, plan_of(load, machine)
    layer0 = gemm_us(plan.layer0, rows, busy, load.hidden, load.inter, 2, machine.gemm_tf, machine)
    layer1 = gemm_us(
        plan.layer1, rows, busy, load.inter, load.hidden, 1, machine.row_gemm_tf, machine
    )
    topk = machine.topk_us + most * load.experts * machine.topk_element_ns * 1e-3
    row_bytes = 2 * load.hidden
    phases = [Phase("top-k", topk, "latency")]
    if ranks == 1:
        tables = machine.fixed_us + 2 + most * load.top_k * 0.15e-3
        sums = most * (load.top_k + 1) * row_bytes / bandwidth
        return [
            *phases,
            Phase("tables", tables, "latency"),
            Phase("layer0", *layer0),
            Phase("layer1", *layer1),
            Phase("sums", sums, "memory"),
        ]
    publish = 5 + 2 * most * row_bytes / bandwidth
    moved = load.moved_bytes
    pull = moved / (rate_at(machine.pull_gb, num_fetchers) * 1e3)
    # tiles go in the order in which tokens come, so all but the last rank's hide the fetching
    last_part = most / max(1, sum(load.tokens))
    waited = max(0.0, pull - (1 - last_part) * layer0[0])
    lost = pull * num_fetchers / machine.device.num_sms + waited
    push = moved / (rate_at(machine.push_gb, machine.device.num_sms) * 1e3)
    reduced = rows * (ranks - 1) / ranks * row_bytes / bandwidth
    sending = max(reduced, push)
    own_sums = most * (load.top_k / ranks + ranks) * row_bytes / bandwidth
    bound0 = "link" if waited else layer0[1]
    bound1 = "link" if sending > layer1[0] else layer1[1]
    return [
        *phases,
        Phase("publish", publish, "memory"),
        Phase("tables", exchange_tables_us(load, machine, plan), "latency"),
        Phase("layer0 + fetch", layer0[0] + lost, bound0, pull, lost),
        Phase("layer1 + send", layer1[0] + sending, bound1, push, sending),
        Phase("sums", own_sums, "memory"),
    ]


def plan_of(load: Load, machine: Machine) -> Plan:
    """Return the rule's plan of a rank."""
    return choose_plan(
        max(1, round(max(load.tokens) * load.top_k)),
        max(1, round(load.experts / load.ranks)),
        load.hidden,
        load.inter,
        gated=True,
        interleaved=False,
        device=machine.device,
    )


def exchange_tables_us(load: Load, machine: Machine, plan: Plan) -> float:
    """Return microseconds of the routing's way between ranks and the tables made from it."""
    slots = load.ranks * max(load.tokens) * load.top_k
    return machine.fixed_us + machine.sync_us + 5 + slots * 0.135e-3 + slots / plan.block_m * 0.02


_FETCHERS = (8, 12, 16, 24, 32, 48, 64)
# what the model cannot tell apart is not changed
_WORTH = 0.01


def choose_fetchers(load: Load, machine: Machine, usual: int) -> int:
    """Return how many CTAs should fetch: `usual`, unless others are predicted WORTH faster.

    Few take from the products for longer than many, but leave most of the links idle: with two
    ranks own tokens last until the peer's are here, with eight the links decide.
    """
    times = {
        num: total_us(predict(load, machine, num))
        for num in (usual, *_FETCHERS)
        if num <= machine.device.num_sms // 2
    }
    best = min(times, key=lambda num: times[num])
    return best if times[best] < (1 - _WORTH) * times[usual] else usual


def total_us(phases: Sequence[Phase]) -> float:
    """Return the microseconds of all phases."""
    return sum(phase.us for phase in phases)


def overlap(phases: Sequence[Phase]) -> float:
    """Return which part of the transfers' time is hidden, 1 if there are none."""
    moving = sum(phase.transfer_us for phase in phases)
    shown = sum(min(phase.exposed_us, phase.transfer_us) for phase in phases)
    return 1 - shown / moving if moving else 1.0


def gemm_us(
    tiles: GemmTiles,
    rows: float,
    busy: float,
    k: int,
    columns: int,
    matrices: int,
    tf_of_sm: float,
    machine: Machine,
) -> tuple[float, str]:
    """Return microseconds and what bounds them."""
    per_expert = rows / max(busy, 1e-9)
    row_tiles = rows / tiles.block_m + 0.5 * busy if per_expert > tiles.block_m else busy
    num_tiles = row_tiles * math.ceil(columns / tiles.block_n)
    waves = num_tiles / machine.device.num_sms
    waves = math.ceil(waves) if waves < 4 else waves + 0.5
    tile_flops = 2.0 * tiles.block_m * tiles.block_n * matrices * _STEP_K
    steps = math.ceil(k / _STEP_K)
    products = waves * steps * tile_flops / (tf_of_sm * 1e6)
    moved = 2.0 * (busy * k * columns * matrices + rows * columns)
    memory = moved / (machine.memory_tb * 1e6)
    longer, shorter = max(products, memory), min(products, memory)
    return longer + machine.hide * shorter, "products" if products > memory else "memory"


def rate_at(table: tuple[tuple[int, float], ...], ctas: int) -> float:
    """Interpolate GB/s at a number of CTAs; below the first entry in proportion to them."""
    first, rate = table[0]
    if ctas <= first:
        return rate * ctas / first
    for (low, below), (high, above) in itertools.pairwise(table):
        if ctas <= high:
            return below + (above - below) * (ctas - low) / (high - low)
    return table[-1][1]
