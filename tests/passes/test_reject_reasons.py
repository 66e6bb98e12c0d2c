"""Every refusal is provoked, counted under its name, and leaves the graph as it was."""

from __future__ import annotations

from collections.abc import Callable

import joint_graphs
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from zoo import ep, loops, near_misses
from zoo.textbook import FuncolMoE
from zoo.titan import TitanMoE

from comet_compile.passes import moe_pass
from comet_compile.passes.reasons import RejectReason

R = RejectReason
H = 32


def tokens(num_tokens: int = 6) -> Tensor:
    return ep.tokens(num_tokens, hidden=H)


# -- small models, each refused for one reason -------------------------------------------------


class RoutedElsewhere(near_misses.LocalMoE):
    """The permutation and the offsets come from another graph."""

    def forward(self, x: Tensor, order_S: Tensor, offs_E: Tensor) -> Tensor:  # type: ignore[override]
        rows_SH = self.ffn(self.gather(x, order_S), offs_E)
        return rows_SH[torch.argsort(order_S)].view(-1, self.top_k, H).sum(1)


@torch.library.custom_op("comet_tests::columns_of", mutates_args=())
def columns_of(x: Tensor, top_k: int) -> Tensor:
    """[T, H] -> [T * top_k, H, 1], where no compiler can look."""
    return x.repeat_interleave(top_k, dim=0).unsqueeze(2)


@columns_of.register_fake
def _(x: Tensor, top_k: int) -> Tensor:
    return x.new_empty(x.shape[0] * top_k, x.shape[1], 1)


@torch.library.custom_op("comet_tests::sum_slots", mutates_args=())
def sum_slots(columns: Tensor, top_k: int) -> Tensor:
    """[T * top_k, H, 1] -> [T, H], where no compiler can look."""
    return columns.view(-1, top_k, columns.shape[1]).sum(1)


@sum_slots.register_fake
def _(columns: Tensor, top_k: int) -> Tensor:
    return columns.new_empty(columns.shape[0] // top_k, columns.shape[1])


class Columns(near_misses.LocalMoE):
    """A batched layer that multiplies columns, matrix on the left."""

    def rows(self, x: Tensor) -> Tensor:
        return x.repeat_interleave(self.top_k, dim=0).unsqueeze(2)

    def combine(self, out_SH1: Tensor) -> Tensor:
        return out_SH1.squeeze(2).view(-1, self.top_k, H).sum(1)

    def forward(self, x: Tensor) -> Tensor:
        _, ids_TA = ep.route(x, self.gate, self.top_k)
        ids_S = ids_TA.view(-1)
        pre = torch.bmm(self.w_in_EHN.transpose(1, 2)[ids_S], self.rows(x)).squeeze(2)
        hidden = self.activate(pre).unsqueeze(2)
        return self.combine(torch.bmm(self.w_out_EIH.transpose(1, 2)[ids_S], hidden))


class OpaqueGather(Columns):
    def rows(self, x: Tensor) -> Tensor:
        return columns_of(x, self.top_k)


class OpaqueCombine(Columns):
    def combine(self, out_SH1: Tensor) -> Tensor:
        return sum_slots(out_SH1, self.top_k)


@torch.library.custom_op("comet_tests::sort_slots", mutates_args=())
def sort_slots(ids_S: Tensor) -> Tensor:
    return torch.argsort(ids_S, stable=True)


@sort_slots.register_fake
def _(ids_S: Tensor) -> Tensor:
    return torch.empty_like(ids_S)


class OpaqueSort(near_misses.LocalMoE):
    """The permutation is made by a custom op."""

    def order(self, ids_TA: Tensor) -> tuple[Tensor, Tensor]:
        _, offs_E = super().order(ids_TA)
        return sort_slots(ids_TA.view(-1)), offs_E


class CountsDistinctIds(near_misses.LocalMoE):
    """Rows per expert are counted by a mask [T, E], so an id twice in a row counts once."""

    def forward(self, x: Tensor) -> Tensor:
        logits_TE = F.linear(x.float(), self.gate)
        # two independent choices: they may agree
        first = logits_TE.argmax(1)
        second = (logits_TE * logits_TE).argmax(1)
        ids_TA = torch.stack([first, second], dim=1)
        mask_TE = torch.zeros(x.shape[0], self.num_experts, dtype=torch.bool, device=x.device)
        counts_E = mask_TE.scatter(1, ids_TA, True).sum(0)
        order_S = torch.argsort(ids_TA.view(-1), stable=True)
        out_SH = self.ffn(self.gather(x, order_S), counts_E.cumsum(0).to(torch.int32))
        return self.reduce(out_SH, torch.softmax(logits_TE, 1)[:, : self.top_k], order_S, x)


class SlopeAsInput(near_misses.LocalMoE):
    """The slope of the activation is an argument: with dynamic=True a 0-d input of the graph."""

    def forward(self, x: Tensor, slope: float) -> Tensor:  # type: ignore[override]
        self.slope = slope
        return super().forward(x)

    def activate(self, pre_SN: Tensor) -> Tensor:
        gate, up = pre_SN.chunk(2, dim=-1)
        return gate * torch.sigmoid(self.slope * gate) * (up + 1)


class SlotsKeptByMask(near_misses.LocalMoE):
    """The tokens are chosen by their values: their number is known at run time only."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x[x[:, 0] > 0])


class SplitsFromElsewhere(FuncolMoE):
    """The number of rows to receive is an input of the graph that no shape ties down."""

    def forward(self, x: Tensor, marks: Tensor) -> Tensor:  # type: ignore[override]
        self.total = marks.shape[0]
        return super().forward(x)

    def exchange(self, rows_SH: Tensor, send: list[int], receive: list[int]) -> Tensor:
        return super().exchange(rows_SH, send, [self.total, self.total])


# -- hand-edited graphs ------------------------------------------------------------------------


def scaled_gemms(graph: fx.Graph) -> fx.Graph:
    """Multiply in a scaled 8-bit format: such a kernel cannot be traced on a CPU."""
    for node in graph.nodes:
        if node.target is torch.ops.aten._grouped_mm.default:
            node.target = torch.ops.aten._scaled_grouped_mm.default
    return graph


def on_unknown_group(graph: fx.Graph) -> fx.Graph:
    """Name a group that this process never made, as a graph from elsewhere would."""
    for node in joint_graphs.nodes_of(graph, torch.ops._c10d_functional.all_to_all_single.default):
        node.args = (*node.args[:-1], "no_such_group")
    return graph


Build = Callable[[], fx.Graph]


def local(model: Callable[[], nn.Module], *inputs: Tensor, train: bool = False) -> Build:
    return lambda: joint_graphs.capture(model(), *(inputs or (tokens(),)), train=train)


def slope_as_input() -> fx.Graph:
    return joint_graphs.capture(SlopeAsInput(), tokens(), 1.702, train=False, dynamic=True)


def unbacked_rows() -> fx.Graph:
    marks = torch.zeros(6)
    torch._dynamo.decorators.mark_unbacked(marks, 0)
    return joint_graphs.capture(SplitsFromElsewhere(), tokens(), marks, train=False)


ROUTING = (torch.arange(12), torch.arange(3, 13, 3, dtype=torch.int32))


# (reason, graph, options of the pass)
def modules_with_own_rows() -> fx.Graph:
    x = torch.randn(6, loops.HIDDEN).bfloat16()
    return joint_graphs.capture(loops.ModulesOwnRows(), x, train=False)


LOCAL: list[tuple[RejectReason, str, Build, dict]] = [
    (R.UNPAIRED_GEMM, "first_gemm_only", local(near_misses.FirstGemmOnly), {}),
    (R.UNPAIRED_GEMM, "training", local(near_misses.FirstGemmOnly, train=True), {}),
    (R.NO_TOKENS, "opaque_gather", local(OpaqueGather), {}),
    (R.NO_EXPERT_IDS, "routed_elsewhere", local(RoutedElsewhere, tokens(), *ROUTING), {}),
    (R.NO_OUTPUT, "opaque_combine", local(OpaqueCombine), {}),
    (R.UNSUPPORTED_OP, "opaque_sort", local(OpaqueSort), {}),
    (R.SEPARATE_EXPERTS, "own_rows", modules_with_own_rows, {}),
    (R.UNSUPPORTED_OP, "training", local(OpaqueSort, train=True), {}),
    (
        R.UNSUPPORTED_DTYPE,
        "scaled_8_bit",
        lambda: scaled_gemms(local(near_misses.LocalMoE)()),
        {},
    ),
    (R.UNSUPPORTED_LAYOUT, "wide_first_gemm", local(near_misses.WideFirstGemm), {}),
    (R.UNKNOWN_ACTIVATION, "sine", local(near_misses.SineActivation), {}),
    (R.UNKNOWN_ACTIVATION, "training", local(near_misses.SineActivation, train=True), {}),
    (R.NOT_EQUIVALENT, "not_unpermuted", local(near_misses.NotUnpermuted), {}),
    (R.NOT_EQUIVALENT, "unpermuted_twice", local(near_misses.UnpermutedTwice), {}),
    (R.NOT_EQUIVALENT, "wrong_token", local(near_misses.GathersWrongToken), {}),
    (R.NOT_EQUIVALENT, "wrong_counts", local(near_misses.CountsOfNextExpert), {}),
    (R.NOT_EQUIVALENT, "wrong_weights", local(near_misses.WeightsOfNextRow, train=True), {}),
    (R.OUT_OF_RANGE_IDS, "negative", local(near_misses.NegativeIds), {}),
    (R.REPEATED_IDS, "two_choices", local(CountsDistinctIds), {}),
    (R.VALUE_USED_ELSEWHERE, "pre_activation", local(near_misses.ReturnsPreActivation), {}),
    (R.RUNTIME_NUMBER, "slope", slope_as_input, {}),
    (R.TOO_LARGE, "five_rows", local(near_misses.LocalMoE), {"max_proof_rows": 5}),
    (R.BACKWARD_NOT_PROVEN, "scaled", local(near_misses.ScalesGradient, train=True), {}),
    (R.BACKWARD_DISABLED, "option", local(near_misses.LocalMoE, train=True), {"backward": False}),
    (R.DYNAMIC_SPLITS, "chosen_tokens", local(SlotsKeptByMask), {}),
]

DISTRIBUTED: list[tuple[RejectReason, str, Build, dict]] = [
    (R.MIXED_GROUPS, "combine", local(near_misses.CombineOnOtherGroup), {}),
    (R.MIXED_GROUPS, "one_made_up", local(near_misses.NoSuchGroup), {}),
    (R.UNKNOWN_GROUP, "made_up", lambda: on_unknown_group(local(FuncolMoE)()), {}),
    (R.NOT_EQUIVALENT, "splits_swapped", local(near_misses.SplitsSwapped), {}),
    (R.VALUE_USED_ELSEWHERE, "rows_escape", local(near_misses.DispatchedRowsEscape), {}),
    (R.NO_EXPERT_IDS, "dispatch_only", local(near_misses.DispatchOnly), {}),
    (R.DYNAMIC_SPLITS, "unbacked_input", unbacked_rows, {}),
]


def named(cases: list[tuple[RejectReason, str, Build, dict]]) -> list:
    return [pytest.param(*c, id=f"{c[0].value}-{c[1]}") for c in cases]


def assert_refused(reason: RejectReason, build: Build, options: dict) -> None:
    graph = build()
    before = joint_graphs.listing(graph)
    counts = joint_graphs.run_pass(graph, **options)
    assert joint_graphs.rejections(counts) == [reason.value]
    assert counts["regions_found"] == counts["regions_rejected"]
    assert counts["regions_found"] == counts[f"rejected.{reason.value}"]
    assert joint_graphs.listing(graph) == before, "a refused region is left as it was"


@pytest.mark.parametrize(("reason", "name", "build", "options"), named(LOCAL))
def test_refuses(reason: RejectReason, name: str, build: Build, options: dict) -> None:
    assert_refused(reason, build, options)


@pytest.mark.usefixtures("fake_group")
@pytest.mark.parametrize(("reason", "name", "build", "options"), named(DISTRIBUTED))
def test_refuses_with_a_group(reason: RejectReason, name: str, build: Build, options: dict) -> None:
    assert_refused(reason, build, options)


@pytest.mark.usefixtures("fake_group")
def test_the_number_of_tokens_refuses_nothing_between_ranks() -> None:
    """Ranks have their own numbers of tokens, and must decide alike."""
    graph = joint_graphs.capture(TitanMoE(), tokens(), train=False)
    assert joint_graphs.is_rewritten(joint_graphs.run_pass(graph, max_proof_rows=1))


def test_refuses_both_halves_of_a_graph_break() -> None:
    graphs = joint_graphs.capture_all(near_misses.BreakBetweenGemms(), tokens())
    found = [joint_graphs.rejections(joint_graphs.run_pass(graph)) for graph in graphs]
    assert [reasons for reasons in found if reasons] == [["unpaired_gemm"], ["unpaired_gemm"]]


@pytest.mark.parametrize("step", ["prove", "blocked"])
def test_refuses_on_an_internal_error(step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError("a bug of ours")

    monkeypatch.setattr(moe_pass, step, fail)
    assert_refused(R.INTERNAL_ERROR, local(near_misses.LocalMoE), {})


def test_every_reason_is_provoked() -> None:
    provoked = {case[0] for case in LOCAL + DISTRIBUTED} | {R.INTERNAL_ERROR}
    assert provoked == set(RejectReason)


def test_every_reason_has_a_name_and_advice() -> None:
    for reason in RejectReason:
        assert reason.value == reason.name.lower()
        assert len(reason.advice.split()) >= 7
        assert reason.advice.endswith(".")


def test_an_accepted_and_a_refused_region_in_one_graph() -> None:
    model = nn.Sequential(near_misses.LocalMoE(), near_misses.UnpermutedTwice())
    graph = joint_graphs.capture(model, tokens(), train=False)
    counts = joint_graphs.run_pass(graph)
    assert counts["regions_found"] == 2
    assert counts["regions_portable"] == counts["rejected.not_equivalent"] == 1
    assert len(joint_graphs.nodes_of(graph, torch.ops.aten._grouped_mm.default)) == 2
