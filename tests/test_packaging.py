"""What a fresh install gives: a lean import, the entry points, each file once."""

from __future__ import annotations

import subprocess
import sys
import venv
import zipfile
from importlib.metadata import entry_points
from pathlib import Path

import pytest

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


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out))
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
