"""What a fresh install gives: a lean import, the entry points, each file once."""

from __future__ import annotations

import subprocess
import sys
import venv
import zipfile
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from filelock import FileLock

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "onnx", "triton", "transformers", "matplotlib", "networkx", "typer", "rich", "numpy")


def run(*command: str, cwd: Path = ROOT) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = f"import sys, fastattn_compile; print([m for m in {HEAVY!r} if m in sys.modules])"
    assert run(sys.executable, "-c", code).strip() == "[]"


def test_using_the_backend_imports_only_what_it_needs() -> None:
    code = (
        "import sys, fastattn_compile as fa; fa.fastattn; fa.scan; fa.attend; "
        "heavy = ('onnx', 'transformers', 'matplotlib', 'typer', 'torch._inductor.compile_fx'); "
        "print([m for m in heavy if m in sys.modules])"
    )
    assert run(sys.executable, "-c", code).strip() == "[]"


def test_the_backend_is_found_without_an_import() -> None:
    assert "fastattn" in {point.name for point in entry_points(group="torch_dynamo_backends")}
    code = "import torch; from torch._dynamo import list_backends; print('fastattn' in list_backends())"
    assert run(sys.executable, "-c", code).strip() == "True"


def test_every_public_name_resolves() -> None:
    import fastattn_compile as fa

    for name in fa.__all__:
        assert getattr(fa, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        fa.nothing


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """Built once for all processes of a run: three libraries are compiled for it."""
    base = tmp_path_factory.getbasetemp()
    out = (base if worker_id == "master" else base.parent) / "wheel"
    with FileLock(f"{out}.lock"):
        if not out.exists():
            made = tmp_path_factory.mktemp("wheel")
            run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(made))
            made.rename(out)
    (built,) = out.glob("*.whl")
    return built


@pytest.mark.slow
def test_the_wheel_holds_every_file_once(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert len(names) == len(set(names))
    assert {name.split("/")[0] for name in names} == {
        "fastattn_compile",
        wheel.name.rsplit("-py3", 1)[0] + ".dist-info",
    }
    assert "fastattn_compile/passes/find.py" in names and "fastattn_compile/py.typed" in names
    kept = Path(__file__).parents[1] / "fastattn_compile"
    sources = {
        str(Path("fastattn_compile", f.relative_to(kept)))
        for e in ("*.cpp", "*.h", "*.json")
        for f in kept.rglob(e)
    }
    assert sources <= set(names) and "fastattn_compile/kernels/cpu/fma.cpp" in sources


@pytest.mark.slow
def test_the_wheel_works_in_a_fresh_environment(wheel: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "env", with_pip=True, system_site_packages=False)
    python = tmp_path / "env" / "bin" / "python"
    run(str(python), "-m", "pip", "install", "--quiet", "--no-deps", str(wheel), cwd=tmp_path)
    # The dependencies come from this environment: what is tested is the wheel, not the index.
    site = next(p for p in sys.path if p.endswith("site-packages"))
    code = (
        f"import sys; sys.path.append({site!r}); import fastattn_compile, torch; "
        "assert 'env' in fastattn_compile.__file__, fastattn_compile.__file__; "
        "f = torch.compile(torch.nn.functional.scaled_dot_product_attention, backend='fastattn', "
        "options={'operator': 'fma', 'compiler': 'eager'}); print(f(*torch.randn(3, 1, 2, 300, 16)).shape)"
    )
    assert "300" in run(str(python), "-c", code, cwd=tmp_path)


@pytest.mark.slow
def test_the_wheel_runs_onnx_nodes_natively_without_a_compiler(wheel: Path, tmp_path: Path) -> None:
    """A wheel that was built with a compiler holds the library: nothing is built where it is installed."""
    from fastattn_compile.lowering.onnx.native import build

    if build.compiler_obstacle():
        assert wheel.name.endswith("-py3-none-any.whl")
        pytest.skip(build.compiler_obstacle())
    assert not wheel.name.endswith("-any.whl")
    names = [Path(name).name for name in zipfile.ZipFile(wheel).namelist()]
    assert {build.file_name(level) for level in build.levels_to_ship()} <= set(names)
    run(
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--target",
        str(tmp_path / "at"),
        str(wheel),
    )
    model = tmp_path / "model.onnx"
    model.write_bytes(_window_model())
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path / 'at')!r}); import numpy, fastattn_compile as fa; "
        "from fastattn_compile.lowering.onnx.native import build; "
        "assert fa.__file__.startswith(sys.path[0]), fa.__file__; "
        "assert build.compiler_obstacle(); assert build.state().startswith('shipped'), build.state(); "
        "x = numpy.random.rand(1, 2, 50, 8).astype('f'); made = fa.onnx.session('model.onnx'); "
        "out = made.run(None, {'query': x, 'key': x, 'value': x})[0]; assert 'torch' not in sys.modules; "
        "print(out.shape, numpy.abs(out - x).max() > 0)"
    )
    environment = {"PATH": str(tmp_path / "empty"), "HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.split() == ["(1,", "2,", "50,", "8)", "True"]
    assert not (tmp_path / ".cache" / "fastattn_compile").exists()


@pytest.mark.slow
def test_a_wheel_without_a_compiler_is_pure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path))
    (built,) = tmp_path.glob("*.whl")
    assert built.name.endswith("-py3-none-any.whl")
    assert not [name for name in zipfile.ZipFile(built).namelist() if name.endswith(".so")]


def _window_model() -> bytes:
    """One node whose function gives back the values: what else comes out, a kernel has computed."""
    from onnx import TensorProto, helper

    io = [
        helper.make_tensor_value_info(x, TensorProto.FLOAT, [1, 2, "n", 8])
        for x in ("query", "key", "value", "out")
    ]
    attributes = {"width": 9, "sinks": 2, "scale": 0.3, "mask": "causal", "body_version": 1}
    node = helper.make_node("Window", ["query", "key", "value"], ["out"], domain="fastattn", **attributes)
    body = [helper.make_node("Identity", ["value"], ["out"])]
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("fastattn", 1)]
    function = helper.make_function(
        "fastattn", "Window", ["query", "key", "value"], ["out"], body, opsets[:1], list(attributes)
    )
    graph = helper.make_graph([node], "window", io[:3], io[3:])
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10, functions=[function])
    return model.SerializeToString()
