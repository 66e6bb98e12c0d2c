"""What ``comet explain TARGET`` may name, made into a model and its example inputs.

Two forms, both offline:
- ``module:factory`` (or ``file.py:factory``), a callable of the user's returning a model;
- a Hugging Face config: the path of a ``config.json`` (or its folder), or a model type such as
  ``qwen3_moe``. Weights are random; nothing is downloaded.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import inspect
import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from comet_compile.errors import CometError

__all__ = ["Target", "TargetError", "load_config", "load_target"]

# Sizes of --small by the names configs use; only names that a config has are set. Two layers,
# because some models keep their first one dense.
_SMALL: Mapping[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 64,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "num_experts": 8,
    "num_local_experts": 8,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
# lists with one entry per layer; None lets the config make them anew
_PER_LAYER = ("layer_types", "mlp_layer_types")


class TargetError(CometError, ValueError):
    """A target of the command line names nothing that can be compiled."""


@dataclasses.dataclass(frozen=True)
class Target:
    """A model and the arguments of one call."""

    model: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def load_target(
    name: str, *, tokens: int | None, train: bool, small: bool, layers: int | None, device: str
) -> Target:
    """Return the model that `name` stands for, on `device`, with inputs of `tokens` tokens."""
    # a path may hold a colon of its own (C:\...), a factory name never holds a separator
    module, colon, factory = name.rpartition(":")
    if colon and factory.isidentifier() and module:
        if small or layers is not None:
            raise TargetError(
                f"--small and --layers are for Hugging Face configs; {name!r} is a factory, which "
                "decides on its own sizes."
            )
        return _from_factory(module, factory, tokens=tokens, train=train, device=device)
    return _from_config(
        name, tokens=tokens or 128, train=train, small=small, layers=layers, device=device
    )


def _from_factory(
    module: str, factory: str, *, tokens: int | None, train: bool, device: str
) -> Target:
    function = getattr(_import(module), factory, None)
    if not callable(function):
        raise TargetError(
            f"{module} has no callable {factory!r}; name a function that returns (model, args)."
        )
    if tokens is None:
        made = function()
    elif "tokens" in inspect.signature(function).parameters:
        made = function(tokens=tokens)
    else:
        raise TargetError(f"--tokens: {module}:{factory} has no parameter named tokens.")
    model, args, kwargs = _model_and_inputs(made, f"{module}:{factory}")
    if isinstance(model, torch.nn.Module):
        model.train(train).to(device)
    return Target(model, _to(args, device), _to(kwargs, device))


def _import(module: str) -> Any:
    if module.endswith(".py"):
        path = Path(module)
        if not path.is_file():
            raise TargetError(f"there is no file {module}.")
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None, module
        assert spec.loader is not None, module
        loaded = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(loaded)
        return loaded
    # only for a module that needs it: what lies in the current directory must not be found by
    # others under the name of a package that they probe for
    found = importlib.util.find_spec(module.partition(".")[0]) is not None
    if not found:
        sys.path.append(os.getcwd())
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if not found:
            sys.path.remove(os.getcwd())
        raise TargetError(
            f"cannot import {module!r} ({error}); give a module that imports from the current "
            "directory, or the path of a .py file."
        ) from error


def _model_and_inputs(made: Any, name: str) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """Return model, args and kwargs from what a factory made (see the forms in the error)."""
    kwargs: dict[str, Any] = {}
    if isinstance(made, tuple) and len(made) == 3 and isinstance(made[2], Mapping):
        model, inputs, kwargs = made[0], made[1], dict(made[2])
    elif isinstance(made, tuple) and len(made) == 2:
        model, inputs = made
    else:
        model, inputs = made, getattr(made, "example_inputs", None)
        # a method as often as an attribute
        inputs = inputs() if callable(inputs) else inputs
    if not callable(model) or inputs is None:
        raise TargetError(
            f"{name} returned {type(made).__name__}; it has to return (model, args), "
            "(model, args, kwargs), or a model that has example_inputs."
        )
    if isinstance(inputs, Mapping):
        return model, (), {**inputs, **kwargs}
    return model, tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,), kwargs


def _from_config(
    name: str, *, tokens: int, train: bool, small: bool, layers: int | None, device: str
) -> Target:
    try:
        import transformers
    except ImportError as error:
        raise TargetError(
            f"{name!r} is read as a Hugging Face config, which needs transformers: "
            "pip install comet-compile[transformers]. For a model of your own name module:factory."
        ) from error
    model_type, values = _read_config(name)
    try:
        default = transformers.AutoConfig.for_model(model_type)
        values |= _overrides({**default.to_dict(), **values}, small=small, layers=layers)
        config = transformers.AutoConfig.for_model(model_type, **values)
        # what these models are published in; a config.json that says otherwise wins
        dtype = config.dtype or torch.bfloat16
        with torch.device("meta"):
            shape_only = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    except (ValueError, KeyError, TypeError) as error:
        raise TargetError(
            f"{name!r} cannot be built as a causal language model: {error}"
        ) from error
    _check_memory(shape_only, name, device)
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
        ids = torch.randint(0, config.get_text_config().vocab_size, (1, tokens))
    return Target(model.train(train), (), {"input_ids": ids, "use_cache": False})


def load_config(name: str) -> Any:
    """Return the Hugging Face text config that `name` stands for, as `load_target` reads it."""
    try:
        import transformers
    except ImportError as error:
        raise TargetError(
            f"{name!r} is read as a Hugging Face config, which needs transformers: "
            "pip install comet-compile[transformers]."
        ) from error
    model_type, values = _read_config(name)
    try:
        return transformers.AutoConfig.for_model(model_type, **values).get_text_config()
    except (ValueError, KeyError, TypeError) as error:
        raise TargetError(f"{name!r} is no config of a language model: {error}") from error


def _read_config(name: str) -> tuple[str, dict[str, Any]]:
    """Return (model type, values) of a config.json, its folder, or a bare model type."""
    import transformers

    path = Path(name)
    if path.is_dir():
        path = path / "config.json"
    if path.is_file():
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            return values.pop("model_type"), values
        except (ValueError, KeyError, AttributeError) as error:
            raise TargetError(
                f"{path} is no Hugging Face config ({type(error).__name__}: {error})."
            ) from error
    if name in transformers.CONFIG_MAPPING:
        return name, {}
    raise TargetError(
        f"{name!r} is neither module:factory, nor the path of a config.json, nor a model type that "
        "the installed transformers knows (such as qwen3_moe). Names on a hub are not looked up: "
        "download the config.json and name its path."
    )


def _overrides(values: Mapping[str, Any], *, small: bool, layers: int | None) -> dict[str, Any]:
    """Return the entries to change for --small and --layers, of those that `values` has."""
    changes: dict[str, Any] = {}
    if small:
        changes = {key: value for key, value in _SMALL.items() if key in values}
        if "qk_rope_head_dim" in changes:
            # multi-head latent attention: here head_dim names the rotated part
            changes["head_dim"] = changes["qk_rope_head_dim"]
    if layers is not None:
        changes["num_hidden_layers"] = layers
    if changes:
        changes |= {key: None for key in _PER_LAYER if values.get(key) is not None}
    return changes


def _check_memory(model: torch.nn.Module, name: str, device: str) -> None:
    """Refuse a model that cannot fit, before the machine is swapping."""
    needed = sum(p.numel() * p.element_size() for p in model.parameters())
    if torch.device(device).type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    elif "SC_AVPHYS_PAGES" in os.sysconf_names:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    else:
        return
    if needed > free:
        raise TargetError(
            f"{name!r} has {needed / 2**30:.1f} GiB of parameters and {device} has "
            f"{free / 2**30:.1f} GiB free; add --layers 2 (real widths, fewer layers) or --small."
        )


def _to(value: Any, device: str) -> Any:
    return torch.utils._pytree.tree_map_only(torch.Tensor, lambda t: t.to(device), value)
