"""What the rewrite leaves behind: the ops, their metadata, and all that is not the region's."""

from __future__ import annotations

import functools
import operator
import textwrap
from collections.abc import Callable
from types import SimpleNamespace

import joint_graphs
import lockstep
import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from expecttest import assert_expected_inline
from torch import Tensor, fx, nn
from torch._inductor import config as inductor_config
from zoo import ep, near_misses, textbook
from zoo.titan import TitanMoE

from comet_compile import records
from comet_compile.kernels import paths
from comet_compile.kernels.paths import Choice
from comet_compile.passes import moe_pass

aten = torch.ops.aten
c10d = torch.ops._c10d_functional

T = 6


@functools.cache
def _captured(make: Callable[[], nn.Module], train: bool) -> fx.Graph:
    return joint_graphs.capture(make(), ep.tokens(T), train=train)


def captured(make: Callable[[], nn.Module], train: bool) -> fx.Graph:
    return joint_graphs.clone(_captured(make, train))


LAYERS = {
    "local": (near_misses.LocalMoE, 1),
    "batched": (near_misses.BatchedMoE, 1),
    "titan": (TitanMoE, 2),
    "funcol": (textbook.FuncolMoE, 2),
    "in_place_function": (textbook.InPlaceFunctionMoE, 2),
}

each_layer = pytest.mark.parametrize("name", LAYERS)
each_direction = pytest.mark.parametrize("train", [False, True], ids=["inference", "training"])


def rewritten(name: str, train: bool) -> tuple[fx.Graph, fx.Graph]:
    """The graph before and after."""
    before = captured(LAYERS[name][0], train)
    after = joint_graphs.clone(before)
    counts = joint_graphs.run_pass(after)
    assert joint_graphs.is_rewritten(counts), counts
    return before, after


def new_nodes(before: fx.Graph, after: fx.Graph) -> list[fx.Node]:
    known = {node.name for node in before.nodes}
    return [node for node in after.nodes if node.name not in known]


# -- before and after, as text -----------------------------------------------------------------


def emitted(graph: fx.Graph) -> str:
    """A listing from the router to the last output of the ops."""
    listed = list(graph.nodes)
    router = max(i for i, node in enumerate(listed) if node.name in ("getitem", "getitem_1"))
    ops = {joint_graphs.MOE, joint_graphs.MOE_BACKWARD}
    last = max(
        i
        for i, node in enumerate(listed)
        if node.target is operator.getitem and node.args[0].target in ops
    )
    return joint_graphs.normalized(listed[router + 1 : last + 1])


def replaced(before: fx.Graph, after: fx.Graph) -> str:
    """The operations that are gone, in order."""
    kept = {node.name for node in after.nodes}
    names = [str(node.target) for node in before.nodes if node.name not in kept]
    return textwrap.fill(" ".join(name.removesuffix(".default") for name in names), 90)


def test_local_inference() -> None:
    before, after = rewritten("batched", train=False)
    assert_expected_inline(
        replaced(before, after),
        """\
aten.unsqueeze aten.expand aten.clone aten.view aten.unsqueeze aten.index.Tensor aten.bmm
aten.squeeze.dim aten.split.Tensor <built-in function getitem> <built-in function getitem>
prims.convert_element_type aten.neg aten.exp aten.add.Tensor aten.div.Tensor
prims.convert_element_type aten.mul.Tensor aten.unsqueeze aten.index.Tensor aten.bmm
aten.squeeze.dim aten.view aten.mul.Tensor aten.sum.dim_IntList""",
    )
    assert_expected_inline(
        emitted(after),
        """\
%15 = aten.view(%14, [-1])
%16 = aten.unsqueeze(%13, -1)
%17 = prims.convert_element_type(%16, torch.bfloat16)
%18 = aten.view(%15, [-1, 2])
%19 = aten.view(%17, [-1, 2])
%20 = comet.moe_layer(%1, %18, %19, %2, None, %3, None, None, None, None,
    activation=silu_glu, weight_place=after, product_dtype=torch.bfloat16, form=local,
    group_name=, out_dtype=torch.bfloat16, save=nothing)
%21 = <getitem>(%20, 0)""",
    )


def test_local_training() -> None:
    _, after = rewritten("local", train=True)
    assert_expected_inline(
        emitted(after),
        """\
%16 = aten.view(%15, [-1])
%17 = aten.unsqueeze(%14, -1)
%18 = prims.convert_element_type(%17, torch.bfloat16)
%19 = aten.view(%16, [-1, 2])
%20 = aten.view(%18, [-1, 2])
%21 = comet.moe_layer(%1, %19, %20, %2, None, %3, None, None, None, None,
    activation=silu_glu, weight_place=after, product_dtype=torch.bfloat16, form=local,
    group_name=, out_dtype=torch.bfloat16, save=pre_activation)
%22 = <getitem>(%21, 0)
%23 = <getitem>(%21, 1)
%24 = comet.moe_layer_backward(%4, %1, %19, %20, %2, None, %3, None, None, None, %23, None,
    activation=silu_glu, weight_place=after, product_dtype=torch.bfloat16, form=local,
    group_name=, needs=[True, True, True, False, True, False, False, False],
    free_saved=True)
%25 = <getitem>(%24, 0)
%26 = <getitem>(%24, 1)
%27 = <getitem>(%24, 2)
%28 = <getitem>(%24, 4)""",
    )


@pytest.mark.usefixtures("fake_group")
def test_all_to_all_inference() -> None:
    _, after = rewritten("titan", train=False)
    assert_expected_inline(
        emitted(after),
        """\
%16 = aten.view(%14, [-1])
%17 = aten.permute(%2, [0, 2, 1])
%18 = aten.permute(%3, [0, 2, 1])
%19 = aten.permute(%4, [0, 2, 1])
%20 = aten.view(%16, [-1, 2])
%21 = comet.moe_layer(%1, %15, %20, %17, %18, %19, None, None, None, None,
    activation=silu_glu, weight_place=after, product_dtype=torch.float32, form=all_to_all,
    group_name=0, out_dtype=torch.bfloat16, save=nothing)
%22 = <getitem>(%21, 0)""",
    )


# -- for every layer ---------------------------------------------------------------------------


@pytest.mark.usefixtures("fake_group")
@each_direction
@each_layer
def test_computes_the_same(name: str, train: bool) -> None:
    before, after = rewritten(name, train)
    world_size = LAYERS[name][1]
    for seed in range(3):
        inputs = lockstep.random_inputs(before, world_size, seed, T)
        expected = lockstep.execute(before, inputs, world_size)
        assert not lockstep.differences(lockstep.execute(after, inputs, world_size), expected)


@pytest.mark.usefixtures("fake_group")
@each_direction
@each_layer
def test_second_run_changes_nothing(name: str, train: bool) -> None:
    _, after = rewritten(name, train)
    listing = joint_graphs.listing(after)
    assert joint_graphs.run_pass(after) == {}
    assert joint_graphs.listing(after) == listing


@pytest.mark.usefixtures("fake_group")
@each_direction
@each_layer
def test_is_deterministic(name: str, train: bool) -> None:
    _, first = rewritten(name, train)
    _, second = rewritten(name, train)
    assert joint_graphs.listing(first) == joint_graphs.listing(second)


@pytest.mark.usefixtures("fake_group")
@each_direction
@each_layer
def test_new_nodes_are_complete(name: str, train: bool) -> None:
    before, after = rewritten(name, train)
    after.lint()
    for node in new_nodes(before, after):
        assert "val" in node.meta, node
        assert node.meta.get("stack_trace"), node
    outputs = [graph.output_node().args[0] for graph in (before, after)]
    for old, new in zip(*outputs, strict=True):
        if old is not None:
            assert old.meta["val"].dtype == new.meta["val"].dtype
            assert old.meta["val"].ndim == new.meta["val"].ndim


@pytest.mark.usefixtures("fake_group")
@each_direction
@each_layer
def test_nothing_of_the_region_is_left(name: str, train: bool) -> None:
    _, after = rewritten(name, train)
    for target in (
        aten._grouped_mm.default,
        aten.bmm.default,
        aten._local_scalar_dense.default,
        aten._assert_scalar.default,
        c10d.all_to_all_single.default,
        c10d.wait_tensor.default,
    ):
        assert joint_graphs.nodes_of(after, target) == [], target


@pytest.mark.usefixtures("fake_group")
@each_layer
def test_no_size_is_left_that_is_known_at_run_time_only(name: str) -> None:
    _, after = rewritten(name, train=False)
    for node in after.nodes:
        value = node.meta.get("val")
        if isinstance(value, Tensor):
            assert all(isinstance(size, int) for size in value.shape), node


# -- several regions and foreign nodes ---------------------------------------------------------


@pytest.mark.usefixtures("fake_group")
@each_direction
def test_tokens_chain_the_ops_of_a_group(train: bool) -> None:
    model = ep.Stack([TitanMoE(seed=0), textbook.FuncolMoE(seed=1), TitanMoE(seed=2)])
    graph = joint_graphs.capture(model, ep.tokens(T), train=train)
    joint_graphs.run_pass(graph)
    assert len(joint_graphs.nodes_of(graph, joint_graphs.MOE)) == 3
    for target in (joint_graphs.MOE, joint_graphs.MOE_BACKWARD):
        names = [argument.name for argument in target._schema.arguments]
        previous = None
        for node in joint_graphs.nodes_of(graph, target):
            token = node.args[names.index("token")]
            if previous is None:
                assert token is None
            else:
                assert token.target is operator.getitem
                assert token.args == (previous, len(previous.meta["val"]) - 1)
            previous = node


def test_local_ops_need_no_tokens() -> None:
    model = nn.Sequential(near_misses.LocalMoE(), near_misses.BatchedMoE())
    graph = joint_graphs.capture(model, ep.tokens(T), train=False)
    joint_graphs.run_pass(graph)
    nodes = joint_graphs.nodes_of(graph, joint_graphs.MOE)
    assert [node.args[9] for node in nodes] == [None, None]


class AmongCollectives(nn.Module):
    """An expert-parallel layer between collectives that belong to others."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = TitanMoE()

    def forward(self, x: Tensor) -> Tensor:
        group = dist.group.WORLD
        x = funcol.all_reduce(x, "sum", group)
        y = self.layer(x)
        gathered = funcol.all_gather_tensor(y, 0, group)
        return funcol.reduce_scatter_tensor(gathered * 2, "sum", 0, group) + x


@pytest.mark.usefixtures("fake_group")
def test_foreign_collectives_keep_their_order() -> None:
    graph = joint_graphs.capture(AmongCollectives(), ep.tokens(T), train=False)
    counts = joint_graphs.run_pass(graph)
    assert joint_graphs.is_rewritten(counts), counts
    kept = [t for t in joint_graphs.targets(graph) if "c10d" in t or "comet" in t]
    assert kept == [
        "_c10d_functional.all_reduce.default",
        "_c10d_functional.wait_tensor.default",
        "comet.moe_layer.default",
        "_c10d_functional.all_gather_into_tensor.default",
        "_c10d_functional.wait_tensor.default",
        "_c10d_functional.reduce_scatter_tensor.default",
        "_c10d_functional.wait_tensor.default",
    ]


@each_direction
@each_layer
@pytest.mark.usefixtures("fake_group")
def test_nodes_outside_are_untouched(name: str, train: bool) -> None:
    before, after = rewritten(name, train)
    kept = {node.name for node in after.nodes}
    replaced = {node.name for node in before.nodes} - kept
    originals = {node.name: node for node in before.nodes}
    for node in after.nodes:
        old = originals.get(node.name)
        if old is None or node.op == "output":
            continue
        if not replaced & {source.name for source in old.all_input_nodes}:
            assert (node.target, str(node.args)) == (old.target, str(old.args)), node
    common = [name for name in originals if name in kept]
    assert [node.name for node in after.nodes if node.name in originals] == common


@pytest.mark.parametrize(
    ("option", "may_keep", "memory", "expected"),
    [
        ("auto", True, 10**6, "balanced"),
        ("auto", True, 10**3, "nothing"),
        ("auto", False, 10**6, "nothing"),
        ("nothing", True, 10**6, "nothing"),
        ("pre_activation", True, 10**3, "balanced"),
        ("pre_activation", False, 10**3, "nothing"),
    ],
)
def test_rows_between_ranks_are_kept_where_memory_allows(
    option: str, may_keep: bool, memory: int, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    choice = Choice(True, False, may_keep, {})
    monkeypatch.setattr(paths, "choose_path", lambda *args, **facts: choice)
    properties = SimpleNamespace(total_memory=memory)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    graph = captured(TitanMoE, train=True)
    with records.collect() as collected:
        joint_graphs.run_pass(graph, save=option)
    layer = joint_graphs.only(graph, joint_graphs.MOE)
    assert layer.kwargs["save"] == expected
    (region,) = collected[0].regions
    saved = layer.meta["val"][1]
    assert region.plan["save"] == expected
    assert region.estimate["bytes_saved"] == saved.numel() * saved.element_size()
    ids, w_in = (layer.args[i].meta["val"] for i in (1, 3))
    if expected == "balanced":
        num_rows = ids.numel() + ids.numel() // 8 + 256
        assert saved.shape == (num_rows, w_in.shape[2] * (1 if layer.args[4] is None else 2))


def test_memory_that_inductor_captures_is_not_freed_early() -> None:
    graph = captured(near_misses.LocalMoE, train=True)
    for changes, expected in (
        ({}, True),
        ({"triton.cudagraphs": True}, False),
        ({"memory_planning": True}, False),
    ):
        run = joint_graphs.clone(graph)
        with inductor_config.patch(changes):
            joint_graphs.run_pass(run)
        (layer,) = run.find_nodes(
            op="call_function", target=torch.ops.comet.moe_layer_backward.default
        )
        assert layer.kwargs["free_saved"] is expected


def test_a_captured_backward_finds_room_for_all_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paths, "choose_path", lambda *args, **facts: Choice(True, False, True, {}))
    graph = captured(TitanMoE, train=True)
    with inductor_config.patch({"triton.cudagraphs": True}):
        joint_graphs.run_pass(graph, save="pre_activation")
    layer = joint_graphs.only(graph, joint_graphs.MOE)
    assert layer.kwargs["save"] == "pre_activation"
    assert layer.meta["val"][1].shape[0] == 2 * layer.args[1].meta["val"].numel()


def test_no_more_layers_keep_rows_than_memory_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paths, "choose_path", lambda *args, **facts: Choice(True, False, True, {}))
    graph = captured(lambda: nn.Sequential(TitanMoE(), TitanMoE()), train=True)
    with records.collect() as collected:
        run = joint_graphs.clone(graph)
        monkeypatch.setattr(
            torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=10**9)
        )
        joint_graphs.run_pass(run, save="auto")
        each = collected[0].regions[0].estimate["bytes_saved"]
        assert each > 0
        properties = SimpleNamespace(total_memory=moe_pass._PART_TO_KEEP * (2 * each - 1))
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
        joint_graphs.run_pass(graph, save="auto")
    assert [r.plan["save"] for r in collected[1].regions] == ["balanced", "nothing"]


def test_saves_pre_activations_unless_told_otherwise() -> None:
    for option, expected in (("auto", "pre_activation"), ("nothing", "nothing")):
        graph = captured(near_misses.LocalMoE, train=True)
        joint_graphs.run_pass(graph, save=option)
        assert joint_graphs.only(graph, joint_graphs.MOE).kwargs["save"] == expected
