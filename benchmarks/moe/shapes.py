"""The names of the suites and baselines, the sizes of the layers, and the cases of each suite."""

from __future__ import annotations

import dataclasses

SUITES = ("local", "block", "traps", "model", "ep", "ep-hf")
DISTRIBUTED = ("ep", "ep-hf")

BASELINES = {
    "eager": "the layer as written",
    "inductor": 'torch.compile(layer, backend="inductor")',
    "inductor-max-autotune": 'the same with mode="max-autotune-no-cudagraphs"',
    "gemms": "torch's compute alone: two grouped GEMMs and the compiled activation",
    "comet": 'torch.compile(layer, backend="comet")',
    "comet-op": "comet::moe_layer called directly",
    "comet-portable": "the same compiled code as comet, run with COMET_PORTABLE=1",
}
OPTIONAL = ("inductor-max-autotune",)


@dataclasses.dataclass(frozen=True)
class Shape:
    """The sizes of one routed layer; `family` is the Hugging Face model type it belongs to."""

    name: str
    hidden: int
    inter: int
    num_experts: int
    top_k: int
    family: str = ""

    def forward_flops(self, tokens: int) -> float:
        """``6*T*A*H*I``: two FLOPs per multiply-add of the gate, up and down projections."""
        return 6.0 * tokens * self.top_k * self.hidden * self.inter

    def tiny(self) -> Shape:
        """Return a layer of the same form for a machine without a GPU."""
        experts, top_k = min(self.num_experts, 8), min(self.top_k, 4)
        return dataclasses.replace(self, hidden=64, inter=32, num_experts=experts, top_k=top_k)


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("qwen3-30b-a3b", 2048, 768, 128, 8, "qwen3_moe"),
        Shape("olmoe", 2048, 1024, 64, 8, "olmoe"),
        Shape("mixtral-8x7b", 4096, 14336, 8, 2, "mixtral"),
        Shape("deepseek-v3", 7168, 2048, 256, 8),
        Shape("phi-3.5-moe", 4096, 6400, 16, 2),
        Shape("qwen2-moe-a2.7b", 2048, 1408, 60, 4, "qwen2_moe"),
        Shape("llama4-scout", 5120, 8192, 16, 1, "llama4_text"),
    )
}

TINY_TOKENS = 48


@dataclasses.dataclass(frozen=True)
class Case:
    """One layer (or model) at one size; `modes` are timed on the same weights and inputs.

    `batch` x `seq` tokens per rank. `skew`: "" even random routing, "hot" one expert with 4 times
    its share, "empty" the last rank has no token. `way`: how a block of "traps" is run.
    """

    suite: str
    shape: Shape
    batch: int
    seq: int
    modes: tuple[str, ...] = ("forward",)
    skew: str = ""
    num_layers: int = 1
    way: str = ""

    @property
    def tokens(self) -> int:
        """Tokens per rank."""
        return self.batch * self.seq

    @property
    def name(self) -> str:
        """``local/qwen3-30b-a3b/4096``, with the batch where it is not one, skew and way."""
        tokens = str(self.seq) if self.batch == 1 else f"{self.batch}x{self.seq}"
        parts = (self.suite, self.shape.name, tokens, self.skew, self.way)
        return "/".join(part for part in parts if part)

    def tiny(self) -> Case:
        """Return the same case with sizes for a machine without a GPU."""
        seq = min(self.seq, max(1, TINY_TOKENS // min(self.batch, 4)))
        layers = min(self.num_layers, 2)
        shape = self.shape.tiny()
        return dataclasses.replace(
            self, shape=shape, batch=min(self.batch, 4), seq=seq, num_layers=layers
        )


_BOTH = ("forward", "train")


def _case(suite: str, shape: str, batch: int, seq: int, *modes: str, **more: object) -> Case:
    return Case(suite, SHAPES[shape], batch, seq, modes or ("forward",), **more)  # type: ignore[arg-type]


# In order of importance: a time limit cuts the end.
CASES: tuple[Case, ...] = (
    _case("local", "qwen3-30b-a3b", 1, 16384, *_BOTH),
    _case("local", "qwen3-30b-a3b", 1, 4096),
    _case("local", "olmoe", 1, 16384, *_BOTH),
    _case("local", "mixtral-8x7b", 1, 16384, *_BOTH),
    _case("local", "qwen3-30b-a3b", 1, 64),
    _case("local", "qwen3-30b-a3b", 1, 1),
    _case("local", "qwen3-30b-a3b", 1, 256),
    _case("local", "deepseek-v3", 1, 16384, *_BOTH),
    _case("local", "phi-3.5-moe", 1, 16384),
    _case("local", "qwen2-moe-a2.7b", 1, 16384),
    _case("block", "qwen3-30b-a3b", 1, 4096),
    _case("block", "olmoe", 1, 4096),
    _case("block", "qwen3-30b-a3b", 64, 1),
    _case("block", "olmoe", 64, 1),
    _case("traps", "qwen3-30b-a3b", 1, 4096, *_BOTH, way="float32"),
    _case("traps", "qwen3-30b-a3b", 1, 4096, *_BOTH, way="autocast"),
    _case("traps", "llama4-scout", 1, 4096, *_BOTH),
    _case("traps", "mixtral-8x7b", 1, 4096, *_BOTH, way="modules"),
    _case("traps", "qwen3-30b-a3b", 1, 1, way="batched_mm"),
    _case("traps", "qwen3-30b-a3b", 1, 4, way="batched_mm"),
    _case("traps", "qwen3-30b-a3b", 1, 16, way="batched_mm"),
    _case("model", "qwen3-30b-a3b", 1, 4096, *_BOTH, num_layers=6),
    _case("model", "olmoe", 1, 4096, *_BOTH, num_layers=6),
    _case("ep", "qwen3-30b-a3b", 1, 8192, *_BOTH),
    _case("ep", "mixtral-8x7b", 1, 8192, *_BOTH),
    _case("ep", "olmoe", 1, 8192, *_BOTH),
    _case("ep", "deepseek-v3", 1, 8192, *_BOTH),
    _case("ep", "qwen3-30b-a3b", 1, 1024),
    _case("ep", "phi-3.5-moe", 1, 8192),
    _case("ep", "qwen2-moe-a2.7b", 1, 8192),
    _case("ep", "qwen3-30b-a3b", 1, 8192, skew="hot"),
    _case("ep", "qwen3-30b-a3b", 1, 8192, skew="empty"),
    _case("ep", "mixtral-8x7b", 1, 8192, skew="hot"),
    _case("ep", "mixtral-8x7b", 1, 8192, skew="empty"),
    _case("ep", "olmoe", 1, 1024),
    _case("ep", "mixtral-8x7b", 1, 1024),
    _case("ep", "deepseek-v3", 1, 1024),
    _case("ep-hf", "qwen3-30b-a3b", 1, 4096, *_BOTH, num_layers=4),
)


def select(suites: list[str], only: list[str], *, tiny: bool) -> list[Case]:
    """Return the cases of `suites` whose name contains one of `only` (all, if that is empty)."""
    cases = [case for case in CASES if case.suite in suites]
    cases = [case for case in cases if not only or any(part in case.name for part in only)]
    if not tiny:
        return cases
    by_name: dict[str, Case] = {}
    for case in cases:  # the larger sizes of a shape are one tiny size
        by_name.setdefault(case.tiny().name, case.tiny())
    return list(by_name.values())
