"""The `comet` command: what it prints, what it refuses, and its exit codes."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import hand_made
import pytest
import torch
from click.testing import CliRunner, Result

from comet_compile import __version__, doctor, explainer, targets
from comet_compile.cli import main
from comet_compile.targets import TargetError, load_target

MODEL_FILE = """
import torch

class WithInputs(torch.nn.Linear):
    example_inputs = torch.ones(3, 4)

def pair(tokens=3): return torch.nn.Linear(4, 4), (torch.ones(tokens, 4),)
def triple(): return torch.nn.Linear(4, 4), (), {"input": torch.ones(3, 4)}
def named(): return torch.nn.Linear(4, 4), {"input": torch.ones(3, 4)}
def single(): return torch.nn.Linear(4, 4), torch.ones(3, 4)
def attribute(): return WithInputs(4, 4)
def nothing(): return torch.nn.Linear(4, 4)
number = 3
"""


@pytest.fixture
def model_file(tmp_path: Path) -> str:
    path = tmp_path / "my_model.py"
    path.write_text(MODEL_FILE)
    return str(path)


def comet(*arguments: str) -> Result:
    return CliRunner().invoke(main, list(arguments), catch_exceptions=False)


def load(name: str, **changes: Any) -> targets.Target:
    options: dict[str, Any] = {
        "tokens": None, "train": False, "small": False, "layers": None, "device": "cpu",
    }  # fmt: skip
    return load_target(name, **{**options, **changes})


@pytest.fixture
def explained(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Replace the compilation by a hand-made report; return its (model, args, kwargs, grad)."""
    calls: list[tuple[Any, ...]] = []

    def explain(model: Any, /, *args: Any, **kwargs: Any) -> Any:
        calls.append((model, args, kwargs, torch.is_grad_enabled()))
        return hand_made.report()

    monkeypatch.setattr(explainer, "explain", explain)
    return calls


def test_version_and_help() -> None:
    assert comet("--version").output == f"comet, version {__version__}\n"
    help_text = comet("--help").output
    assert "doctor" in help_text
    assert "explain" in help_text


def test_doctor_shows_facts_and_succeeds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMET_DUMP", "[bold]dumps")
    monkeypatch.setenv("COLUMNS", "200")
    result = comet("doctor")
    assert result.exit_code == 0
    for text in (__version__, torch.__version__, "gloo", "symmetric memory", "[bold]dumps"):
        assert text in result.output


def test_doctor_makes_no_folder_and_no_cuda_context(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(cache))
    facts = {fact.name: fact for fact in doctor.diagnose()}
    assert facts["Inductor cache"].value == str(cache)
    assert not cache.exists()
    if not torch.cuda.is_available():
        assert facts["GPU"].tone == "note"
        assert not torch.cuda.is_initialized()


@pytest.mark.parametrize(("version", "noted"), [("2.11.0+cu130", True), ("2.13.0", False)])
def test_doctor_names_the_zero_gradient_bug_of_torch_2_11(
    version: str, noted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "__version__", version)
    facts = doctor.diagnose({})
    assert any("180642" in fact.value for fact in facts) == noted


def test_doctor_reports_a_wrong_variable() -> None:
    facts = doctor.diagnose({"COMET_STRICT": "maybe"})
    assert facts[-1].tone == "missing"
    assert "COMET_STRICT" in facts[-1].value


@pytest.mark.parametrize("factory", ["pair", "triple", "named", "single", "attribute"])
def test_factory_forms(factory: str, model_file: str) -> None:
    target = load(f"{model_file}:{factory}")
    assert target.model(*target.args, **target.kwargs).shape == (3, 4)
    assert isinstance(target.model, torch.nn.Module)
    assert not target.model.training
    assert load(f"{model_file}:{factory}", train=True).model.training  # type: ignore[attr-defined]


def test_factory_of_a_module_in_the_current_directory(
    model_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(model_file).parent)
    monkeypatch.setattr("sys.path", [])
    target = load("my_model:pair", tokens=7)
    assert target.args[0].shape == (7, 4)


@pytest.mark.parametrize(
    ("target", "changes", "message"),
    [
        ("{file}:absent", {}, "no callable 'absent'"),
        ("{file}:number", {}, "no callable 'number'"),
        ("{file}:nothing", {}, "has to return"),
        ("{file}:single", {"tokens": 4}, "no parameter named tokens"),
        ("{file}:pair", {"small": True}, "--small and --layers"),
        ("no_such_module_at_all:make", {}, "cannot import 'no_such_module_at_all'"),
        ("no_such_file.py:make", {}, "there is no file"),
    ],
)
def test_bad_factories_say_what_to_do(
    target: str, changes: dict[str, Any], message: str, model_file: str
) -> None:
    with pytest.raises(TargetError, match=message):
        load(target.format(file=model_file), **changes)


def test_explain_prints_the_table_and_writes_the_page(
    model_file: str, tmp_path: Path, explained: list[tuple[Any, ...]]
) -> None:
    page = tmp_path / "report.html"
    result = comet("explain", f"{model_file}:pair", "--tokens", "5", "--html", str(page))
    assert result.exit_code == 0
    assert str(hand_made.report()) in result.stdout
    assert "<svg" in page.read_text()
    (_, args, _, grad), = explained  # fmt: skip
    assert args[0].shape == (5, 4)
    assert grad is False


def test_explain_train_enables_gradients_and_json_prints_json_alone(
    model_file: str, explained: list[tuple[Any, ...]]
) -> None:
    result = comet("explain", f"{model_file}:pair", "--train", "--json")
    assert len(json.loads(result.stdout)["regions"]) == 4
    model, _, _, grad = explained[0]
    assert grad is True
    assert model.training


def test_explain_error_has_exit_code_1_and_no_traceback() -> None:
    result = comet("explain", "no_such_model")
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: 'no_such_model' is neither module:factory")


class TestHuggingFace:
    """Targets that are Hugging Face configs."""

    @pytest.fixture(autouse=True)
    def _needs_transformers(self) -> None:
        pytest.importorskip("transformers")

    @pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss"])
    def test_small_model_types_run(self, model_type: str) -> None:
        target = load(model_type, tokens=12, small=True)
        with torch.no_grad():
            logits = target.model(*target.args, **target.kwargs).logits
        assert logits.shape == (1, 12, 512)

    def test_config_file_keeps_its_sizes(self, tmp_path: Path) -> None:
        config = {
            "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "dtype": "float32",
            "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2, "head_dim": 8,
            "num_key_value_heads": 2, "moe_intermediate_size": 16, "vocab_size": 40,
            "num_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 16,
        }  # fmt: skip
        (tmp_path / "config.json").write_text(json.dumps(config))
        target = load(str(tmp_path), layers=1, train=True)
        assert target.model.config.hidden_size == 48  # type: ignore[attr-defined]
        assert len(target.model.model.layers) == 1  # type: ignore[attr-defined]
        assert target.kwargs["input_ids"].shape == (1, 128)
        assert target.model.training  # type: ignore[attr-defined]

    def test_broken_config_file(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text("{}")
        with pytest.raises(TargetError, match="is no Hugging Face config"):
            load(str(tmp_path / "config.json"))

    def test_model_larger_than_memory_is_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("os.sysconf", lambda name: 1024)
        with pytest.raises(TargetError, match=r"GiB of parameters .* add --layers 2"):
            load("qwen3_moe")

    def test_without_transformers(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "transformers", None)
        with pytest.raises(TargetError, match=r"pip install comet-compile\[transformers\]"):
            load("qwen3_moe")
