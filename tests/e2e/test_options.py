"""Inductor's modes, options and custom passes keep their meaning; bad options are named."""

from __future__ import annotations

from typing import Any

import pytest
from distributed.gloo import RankPool
from e2e import harness
from torch import fx
from torch._dynamo.exc import BackendCompilerFailed
from torch._inductor import config as inductor_config
from torch._inductor.custom_graph_pass import CustomGraphPass
from zoo import ep, near_misses, textbook

from comet_compile import passes
from comet_compile.errors import OptionError

BAD_OPTION_ERRORS = (OptionError, BackendCompilerFailed)


class Watch(CustomGraphPass):
    """A user's pass: counts its calls and notes Inductor's settings while it runs."""

    def __init__(self) -> None:
        self.calls = 0
        self.targets: set[str] = set()
        self.settings: dict[str, Any] = {}

    def __call__(self, graph: fx.Graph) -> None:
        self.calls += 1
        self.targets |= {str(node.target) for node in graph.nodes}
        self.settings = {
            "epilogue_fusion": inductor_config.epilogue_fusion,
            "cudagraphs": inductor_config.triton.cudagraphs,
        }

    def uuid(self) -> Any:
        return None


def compare(train: bool = False, **compile_options: Any) -> harness.Outcome:
    outcome = harness.compile_and_compare(
        near_misses.LocalMoE(), [ep.tokens(12)], train=train, **compile_options
    )
    harness.assert_rewritten(outcome, 1, train=train)
    return outcome


@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "max-autotune-no-cudagraphs"])
def test_modes(mode: str) -> None:
    compare(train=True, mode=mode)


def test_mode_reaches_inductor() -> None:
    watch = Watch()
    with inductor_config.patch(post_grad_custom_post_pass=watch):
        compare(mode="reduce-overhead")
    assert watch.settings["cudagraphs"] is True


def test_inductor_options_reach_inductor() -> None:
    watch = Watch()
    compare(options={"epilogue_fusion": False, "post_grad_custom_post_pass": watch})
    assert watch.calls == 1
    assert watch.settings["epilogue_fusion"] is False


def test_options_hold_in_the_backward_too() -> None:
    watch = Watch()
    compare(train=True, options={"epilogue_fusion": False, "post_grad_custom_post_pass": watch})
    assert watch.calls == 2, "forward and backward"
    assert watch.settings["epilogue_fusion"] is False
    assert "comet.moe_layer_backward.default" in watch.targets


@pytest.mark.parametrize("how", ["option", "global"])
@pytest.mark.parametrize("name", ["joint_custom_pre_pass", "joint_custom_post_pass"])
def test_users_joint_pass_still_runs(name: str, how: str) -> None:
    watch = Watch()
    if how == "option":
        compare(train=True, options={name: watch})
    else:
        with inductor_config.patch({name: watch}):
            compare(train=True)
    assert watch.calls == 1
    assert "aten._grouped_mm.default" in watch.targets, "it runs before the rewrite"


def test_users_plain_function_as_joint_pass() -> None:
    calls = []
    compare(options={"joint_custom_post_pass": calls.append})
    assert len(calls) == 1


def test_users_settings_are_left_as_they_were() -> None:
    before = inductor_config.get_config_copy()
    compare(train=True, options={"epilogue_fusion": False})
    after = inductor_config.get_config_copy()
    assert {k for k in before if before[k] is not after[k] and before[k] != after[k]} == set()


def test_unknown_comet_option_names_the_nearest() -> None:
    with pytest.raises(BAD_OPTION_ERRORS, match=r"comet\.stric.*did you mean 'comet\.strict'"):
        compare(options={"comet.stric": True})


def test_unknown_inductor_option() -> None:
    with pytest.raises(BAD_OPTION_ERRORS, match="epilog_fusion"):
        compare(options={"epilog_fusion": True})


def test_bad_value_of_an_option() -> None:
    with pytest.raises(BAD_OPTION_ERRORS, match=r"comet\.save.*pre_activation"):
        compare(options={"comet.save": "everything"})


def test_enabled_off_is_inductor() -> None:
    outcome = harness.compile_and_compare(
        near_misses.LocalMoE(), [ep.tokens(12)], train=True, options={"comet.enabled": False}
    )
    assert not any(outcome.comet.values()), outcome.comet


def test_strict_raises_for_a_refused_region() -> None:
    with pytest.raises(Exception, match="not_equivalent"):
        harness.compile_and_compare(
            near_misses.NotUnpermuted(),
            [ep.tokens(12)],
            train=False,
            options={"comet.strict": True},
        )


def test_backward_off_leaves_training_graphs_alone() -> None:
    options = {"comet.backward": False}
    outcome = harness.compile_and_compare(
        near_misses.LocalMoE(), [ep.tokens(12)], train=True, options=options
    )
    harness.assert_untouched(outcome)
    assert outcome.comet["rejected.backward_disabled"] == 1
    compare(train=False, options=options)


@pytest.mark.parametrize("save", ["auto", "nothing", "pre_activation"])
def test_save(save: str) -> None:
    compare(train=True, options={"comet.save": save})


def test_pass_under_plain_inductor() -> None:
    with inductor_config.patch(joint_custom_post_pass=passes.MoePass()):
        compare(train=True, backend="inductor")


def test_without_captured_scalars_the_graph_breaks_as_before(alone: RankPool) -> None:
    alone.run(_without_captured_scalars)


def _without_captured_scalars(rank: int, world_size: int) -> None:
    for capture, graphs in ((True, 1), (False, None)):
        outcome = harness.compare_with_oracle(
            textbook.FuncolMoE(),
            [[ep.tokens(12)]],
            rank=rank,
            train=False,
            fullgraph=False,
            options={"comet.capture_scalars": capture},
        )
        if graphs is None:
            assert outcome.graphs > 1
            harness.assert_untouched(outcome)
        else:
            assert outcome.graphs == graphs
            harness.assert_rewritten(outcome, 1, train=False)
