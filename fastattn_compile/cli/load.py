"""Loading what a user names as a model, and giving it something to read; nothing comes from a network."""

from __future__ import annotations

import contextlib
import copy
import importlib
import io
import json
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastattn_compile.errors import ModelLoadError

if TYPE_CHECKING:
    import torch

_TYPES = ("float32", "bfloat16", "float16", "float64")
_CAUSAL = ("ForCausalLM", "LMHeadModel")


@dataclass(frozen=True)
class Loaded:
    """A model and its inputs.

    Args:
        model: In evaluation mode.
        inputs: Keyword or positional arguments of one call.
        notices: What the user should know: cut lengths, random tokens.
        source: What was read, for the provenance.
        more: Inputs of further calls, from text that ``inputs`` does not hold.
    """

    model: torch.nn.Module
    inputs: Mapping[str, Any] | tuple[Any, ...]
    notices: tuple[str, ...]
    source: str
    more: tuple[Mapping[str, Any] | tuple[Any, ...], ...] = ()


def load(
    name: str,
    *,
    length: int,
    attention: str = "sdpa",
    dtype: str = "float32",
    text: Path | None = None,
    seed: int = 0,
    more: int = 0,
) -> Loaded:
    """Loads a model and makes an input of ``length`` tokens for it.

    Args:
        name: A folder, a ``.gguf`` file, or ``module:function``.
        length: Tokens of the input, cut to what the model has positions for.
        attention: ``eager`` or ``sdpa``: how transformers writes attention.
        dtype: Type of the weights.
        text: A text file; the sources of Python's standard library when ``None``.
        seed: Seed of random tokens and of random weights that a function makes.
        more: Number of further inputs to make, for choosing and fitting: the text after the first ``length`` tokens of a
            text file, other modules of the standard library without one. A function that gives inputs gives no more.

    Raises:
        ModelLoadError: It is no model, or there is no way to feed it; the text says what to do.
    """
    import torch

    if dtype not in _TYPES:
        raise ModelLoadError(f"--dtype must be one of {', '.join(_TYPES)}, got {dtype!r}")
    torch.manual_seed(seed)
    path = Path(name)
    if path.is_dir() or path.suffix.lower() == ".gguf":
        model, tokenizer = _pretrained(path, attention)
        model = model.to(getattr(torch, dtype)).eval()
        inputs, notices, source = _token_inputs(model, tokenizer, length, text, seed)
        return Loaded(model, inputs, notices, source, _more(model, tokenizer, inputs, text, seed, more))
    if ":" in name and not path.exists():
        model, inputs = _from_function(name)
        model = model.eval()
        if inputs is not None:
            return Loaded(model, inputs, (), "inputs of the function")
        made, notices, source = _token_inputs(model, None, length, text, seed)
        return Loaded(model, made, notices, source, _more(model, None, made, text, seed, more))
    if path.exists():
        raise ModelLoadError(
            f"{name} is no model: expected a folder with config.json, a .gguf file, or module:function"
        )
    raise ModelLoadError(f"{name}: no such file or folder, and not module:function")


def load_retrofit(name: str, base: Loaded, *, attention: str, dtype: str) -> torch.nn.Module:
    """Loads what was made from a base model.

    Args:
        name: A folder from ``fa.save_pretrained``, or any other model that ``load`` reads.
        base: The base model; it is not changed.
        attention: As for ``load``.
        dtype: As for ``load``.

    Raises:
        CheckpointError: The folder is damaged or belongs to another base.
        ModelLoadError: It is no model.
    """
    from fastattn_compile.retrofitting.checkpoint import from_pretrained
    from fastattn_compile.retrofitting.manifest import CONFIG, SEPARATE, Manifest

    if not (Path(name) / CONFIG).is_file():
        return load(name, length=1, attention=attention, dtype=dtype).model
    separate = Manifest.load(Path(name)).weights == SEPARATE
    return from_pretrained(copy.deepcopy(base.model) if separate else None, name).eval()


def _from_function(name: str) -> tuple[torch.nn.Module, Any]:
    """Calls ``module:function``, looked up in the current folder too."""
    import torch

    module_name, _, function_name = name.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ModelLoadError(f"cannot import {module_name!r}: {error}") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise ModelLoadError(f"module {module_name!r} has no function {function_name!r}")
    made = function()
    model, inputs = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(model, torch.nn.Module):
        raise ModelLoadError(
            f"{name}() must return a torch.nn.Module or (model, inputs), got {type(made).__name__}"
        )
    if inputs is not None and not isinstance(inputs, (Mapping, tuple)):
        raise ModelLoadError(
            f"{name}(): the inputs must be a dict of keywords or a tuple, got {type(inputs).__name__}"
        )
    return model, inputs


def _pretrained(path: Path, attention: str) -> tuple[Any, Any]:
    """A model and, when there is one, its tokenizer, through transformers, from files alone."""
    if attention not in ("eager", "sdpa"):
        raise ModelLoadError(f"--attn must be eager or sdpa, got {attention!r}")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if (path / "fastattn_config.json").is_file():
        from fastattn_compile.retrofitting.checkpoint import from_pretrained

        return from_pretrained(None, path), _tokenizer(path, {})
    if path.is_dir():
        folder, architectures = path, _check_folder(path)
        extra: dict[str, Any] = {"use_safetensors": True}
    else:
        folder, architectures = path.parent, ["ForCausalLM"]
        extra = {"gguf_file": path.name}
        _check_gguf(path)
    transformers = _transformers("gguf" if "gguf_file" in extra else "")
    causal = any(name.endswith(_CAUSAL) for name in architectures)
    auto = transformers.AutoModelForCausalLM if causal else transformers.AutoModel
    safe = {"local_files_only": True, "trust_remote_code": False}
    model = _loaded(
        path, lambda: auto.from_pretrained(str(folder), attn_implementation=attention, **extra, **safe)
    )
    extra.pop("use_safetensors", None)
    return model, _tokenizer(folder, extra)


def _tokenizer(folder: Path, extra: dict[str, Any]) -> Any:
    import transformers

    try:
        return transformers.AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False, **extra
        )
    except Exception:  # a missing or foreign tokenizer takes many forms; the model is measurable without one
        return None


def _loaded(path: Path, build: Callable[[], Any]) -> Any:
    try:
        # Progress bars of libraries would break the one line a stage on standard error.
        with contextlib.redirect_stderr(io.StringIO()):
            return build()
    except Exception as error:  # readers of damaged files raise anything; the user needs one line
        detail = " ".join(str(error).split()) or type(error).__name__
        raise ModelLoadError(f"{path.name} does not load as a model: {detail[:300]}") from error


def _check_folder(path: Path) -> list[str]:
    config = path / "config.json"
    if not config.is_file():
        raise ModelLoadError(f"{path} is no model folder: it has no config.json")
    if not any(path.glob("*.safetensors")):
        raise ModelLoadError(f"{path} has no .safetensors weights; formats that can run code are not read")
    try:
        values = json.loads(config.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ModelLoadError(f"{config.name} of {path} is not JSON: {error}") from error
    if not isinstance(values, dict) or "model_type" not in values:
        raise ModelLoadError(f"{config.name} of {path} names no model_type")
    return list(values.get("architectures") or [])


def _check_gguf(path: Path) -> None:
    if not path.is_file():
        raise ModelLoadError(f"{path}: no such file")
    with path.open("rb") as stream:
        magic = stream.read(4)
    if magic != b"GGUF":
        raise ModelLoadError(f"{path.name} is no GGUF file: it begins with {magic!r}, expected b'GGUF'")


def _transformers(also: str) -> Any:
    try:
        if also:
            importlib.import_module(also)
        transformers = importlib.import_module("transformers")
    except ImportError as error:
        raise ModelLoadError(
            f"reading this model needs {error.name}: pip install 'fastattn-compile[hf]'"
        ) from error
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers


def _token_inputs(
    model: Any, tokenizer: Any, length: int, text: Path | None, seed: int
) -> tuple[dict[str, Any], tuple[str, ...], str]:
    """One sequence of token ids: text where the tokenizer is known, random tokens otherwise."""
    import torch

    config = getattr(model, "config", None)
    vocabulary = getattr(config, "vocab_size", None)
    if getattr(model, "main_input_name", "input_ids") != "input_ids" or not vocabulary:
        raise ModelLoadError(
            f"{type(model).__name__} does not read token ids: name it as module:function that returns "
            "(model, inputs)"
        )
    notices = []
    positions = getattr(config, "max_position_embeddings", None)
    if isinstance(positions, int) and 0 < positions < length:
        notices.append(f"the model has {positions} positions: the input is cut to them from {length} tokens")
        length = positions
    if tokenizer is None:
        notices.append("no tokenizer: random token ids, so perplexity says nothing; KL and errors do")
        ids = torch.randint(0, vocabulary, (1, length), generator=torch.Generator().manual_seed(seed))
        source = "random tokens"
    else:
        found, source = _tokens(tokenizer, length, text)
        if len(found) < length:
            notices.append(f"the text holds {len(found)} tokens, fewer than {length}")
        ids = torch.tensor([found])
    inputs: dict[str, Any] = {"input_ids": ids}
    if hasattr(config, "use_cache"):
        inputs["use_cache"] = False
    return inputs, tuple(notices), source


def _more(
    model: Any, tokenizer: Any, first: Mapping[str, Any], text: Path | None, seed: int, count: int
) -> tuple[dict[str, Any], ...]:
    """Further inputs of the length of the first, from text it does not hold; fewer where the text ends."""
    import torch

    from fastattn_compile.reporting.text import CALIBRATION, stdlib_text

    length = first["input_ids"].shape[1]
    if not count:
        return ()
    if tokenizer is None:
        generator = torch.Generator().manual_seed(seed + 1)
        found = torch.randint(0, model.config.vocab_size, (count * length,), generator=generator).tolist()
    elif text is None:
        content = stdlib_text(16 * count * length, CALIBRATION)
        found = tokenizer(content, verbose=False)["input_ids"][: count * length]
    else:
        content = text.read_text(encoding="utf-8")
        found = tokenizer(content, verbose=False)["input_ids"][length : (count + 1) * length]
    pieces = [found[at : at + length] for at in range(0, len(found), length)]
    whole = [piece for piece in pieces if len(piece) == length]
    return tuple({**first, "input_ids": torch.tensor([piece])} for piece in whole)


def _tokens(tokenizer: Any, length: int, text: Path | None) -> tuple[list[int], str]:
    from fastattn_compile.reporting.text import stdlib_text

    if text is None:
        content, source = stdlib_text(8 * length), "sources of the Python standard library"
    else:
        try:
            content, source = text.read_text(encoding="utf-8"), text.name
        except (OSError, UnicodeDecodeError) as error:
            raise ModelLoadError(f"cannot read the text {text}: {error}") from error
    found = tokenizer(content[: 16 * length], verbose=False)["input_ids"][:length]
    if not found:
        raise ModelLoadError(f"the text {source} holds no token")
    return list(found), source
