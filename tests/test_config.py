"""CometConfig: defaults, options, environment variables, refusals and the cache fingerprint."""

from __future__ import annotations

import dataclasses

import pytest

from comet_compile.config import CometConfig
from comet_compile.errors import CometError, OptionError

FIELDS = [field.name for field in dataclasses.fields(CometConfig)]

# One value per field that is allowed and is not the default, as a value and as text.
OTHER_VALUES = {
    "enabled": (False, "0"),
    "capture_scalars": (False, "off"),
    "strict": (True, "TRUE"),
    "backward": (False, "no"),
    "save": ("pre_activation", "pre_activation"),
    "max_proof_rows": (4096, "4096"),
    "dump": ("graphs", "graphs"),
    "agreement_timeout": (2.5, "2.5"),
    "refine": (4.0, "4"),
}

NOT_ALLOWED = [
    ("enabled", 1),
    ("capture_scalars", None),
    ("strict", "yes"),
    ("backward", "False"),
    ("save", "everything"),
    ("save", ["nothing"]),
    ("max_proof_rows", 0),
    ("max_proof_rows", True),
    ("max_proof_rows", 10.0),
    ("dump", ""),
    ("dump", 3),
    ("agreement_timeout", 0),
    ("agreement_timeout", True),
    ("agreement_timeout", float("nan")),
    ("agreement_timeout", float("inf")),
    ("refine", 0.0),
]


def test_the_cases_below_cover_every_field() -> None:
    assert sorted(OTHER_VALUES) == sorted(FIELDS)
    assert {name for name, _ in NOT_ALLOWED} == set(FIELDS)


def test_no_options_give_the_defaults() -> None:
    assert CometConfig.from_options(None, {}) == (CometConfig(), {})


@pytest.mark.parametrize("name", FIELDS)
def test_option_sets_the_field(name: str) -> None:
    value, _ = OTHER_VALUES[name]
    config, others = CometConfig.from_options({f"comet.{name}": value}, {})
    assert config == dataclasses.replace(CometConfig(), **{name: value})
    assert others == {}


@pytest.mark.parametrize("name", FIELDS)
def test_environment_variable_sets_the_default(name: str) -> None:
    value, text = OTHER_VALUES[name]
    config, _ = CometConfig.from_options({}, {f"COMET_{name.upper()}": text})
    assert config == dataclasses.replace(CometConfig(), **{name: value})


def test_option_wins_over_the_variable() -> None:
    config, _ = CometConfig.from_options({"comet.save": "nothing"}, {"COMET_SAVE": "auto"})
    assert config.save == "nothing"


def test_empty_variable_is_not_set_and_others_are_not_ours() -> None:
    environ = {"COMET_STRICT": " ", "COMET_API_KEY": "of another program", "COMET_": "x"}
    assert CometConfig.from_options({}, environ)[0] == CometConfig()


def test_other_options_are_returned_for_inductor() -> None:
    options = {"max_autotune": True, "comet.strict": True, "triton.cudagraphs": False}
    config, others = CometConfig.from_options(options, {})
    assert config.strict
    assert others == {"max_autotune": True, "triton.cudagraphs": False}


def test_unknown_option_names_the_nearest_and_lists_all() -> None:
    with pytest.raises(
        OptionError, match=r"'comet\.stritc'.*did you mean 'comet\.strict'"
    ) as error:
        CometConfig.from_options({"comet.stritc": True}, {})
    for name in FIELDS:
        assert f"comet.{name}" in str(error.value)


@pytest.mark.parametrize(("name", "value"), NOT_ALLOWED)
def test_option_value_that_is_not_allowed(name: str, value: object) -> None:
    with pytest.raises(OptionError) as error:
        CometConfig.from_options({f"comet.{name}": value}, {})
    message = str(error.value)
    assert f"option 'comet.{name}' is {value!r}; allowed: " in message


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("enabled", "maybe"),
        ("save", "none"),
        ("max_proof_rows", "many"),
        ("max_proof_rows", "-1"),
        ("agreement_timeout", "soon"),
        ("agreement_timeout", "nan"),
    ],
)
def test_variable_that_is_not_allowed_is_named(name: str, text: str) -> None:
    with pytest.raises(OptionError, match=f"environment variable COMET_{name.upper()} is "):
        CometConfig.from_options({}, {f"COMET_{name.upper()}": text})


def test_direct_construction_is_checked_too() -> None:
    with pytest.raises(OptionError, match=r"CometConfig\.save is 'all'; allowed: one of 'auto'"):
        CometConfig(save="all")  # type: ignore[arg-type]


def test_option_error_is_a_value_error_of_ours() -> None:
    assert issubclass(OptionError, ValueError)
    assert issubclass(OptionError, CometError)


def test_config_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        CometConfig().strict = True  # type: ignore[misc]


@pytest.mark.parametrize("name", FIELDS)
def test_fingerprint_changes_with_what_a_cached_graph_depends_on(name: str) -> None:
    changed = dataclasses.replace(CometConfig(), **{name: OTHER_VALUES[name][0]})
    # where graphs are written, how long a rank waits or searches are facts of the run
    is_same = changed.fingerprint() == CometConfig().fingerprint()
    assert is_same == (name in ("dump", "agreement_timeout", "refine"))


def test_fingerprint_is_stable() -> None:
    assert CometConfig().fingerprint() == CometConfig().fingerprint()
    assert len(CometConfig().fingerprint()) == 64
