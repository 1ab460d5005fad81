"""The model card of a saved retrofit: what it is, what it costs, how to load it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from fastattn_compile.reporting.document import Report
from fastattn_compile.reporting.terminal import joined_names, number
from fastattn_compile.reporting.verdict import ratio_text, verdict
from fastattn_compile.retrofitting.manifest import MERGED, REPORT, WEIGHTS_NOTE, Manifest


def model_card(manifest: Manifest, report: Report | None) -> str:
    """The card as Markdown.

    Args:
        manifest: What the folder holds.
        report: What it costs; the card says so when nothing was measured.
    """
    base = manifest.base
    parts = [
        "---\nlibrary_name: fastattn_compile\ntags:\n- fastattn\n- sub-quadratic-attention\n---",
        f"# {base.model} with sub-quadratic attention",
        f"Softmax attention of a {base.model} replaced by fastattn_compile "
        f"{manifest.producer.get('fastattn_compile', '')}. {WEIGHTS_NOTE[manifest.weights]}",
        _sites(manifest),
        "## What it costs",
        *_measured(report),
        "## Use",
        _usage(manifest),
        f"Base weights: sha256 `{base.hash}`, {len(base.tensors)} tensors.",
    ]
    return "\n\n".join(parts) + "\n"


def _sites(manifest: Manifest) -> str:
    groups: dict[tuple[str, str], list[str]] = {}
    for name, site in manifest.plan.sites.items():
        options = ", ".join(f"{key}={value}" for key, value in site.options.items())
        groups.setdefault((site.operator, options), []).append(name)
    rows = [
        (
            f"`{operator}`",
            options or "-",
            str(len(names)),
            f"`{joined_names(names)}`" if _alike(names) else "various",
        )
        for (operator, options), names in groups.items()
    ]
    return _table(("operator", "options", "sites", "where"), rows)


def _alike(names: list[str]) -> bool:
    parts = {tuple(word for word in name.split(".") if not word.isdigit()) for name in names}
    return len(parts) == 1


def _measured(report: Report | None) -> list[str]:
    if report is None:
        return ["Nothing was measured when this was saved. Run `fastattn eval` before you rely on it."]
    model, cost = report.model, report.cost
    rows = [
        ("KL to the base model, nats a token", "0", number(model.kl)),
        (
            "same prediction as the base model",
            "100 %",
            f"{model.top1:.1%}" if model.top1 is not None else "-",
        ),
        ("perplexity", number(model.ppl_exact), number(model.ppl)),
        ("error of the last hidden state", "0", number(model.hidden_error)),
        ("attention, all sites, ms", number(cost.attention_ms_exact), number(cost.attention_ms)),
        ("whole model, ms", number(cost.total_ms_exact), number(cost.total_ms)),
    ]
    shown = [row for row in rows if row[2] != "-"]
    device = report.provenance.get("device", "this machine")
    where = f"Measured at n = {cost.n} on {device}." if cost.n else f"Measured on {device}."
    speed = ratio_text(cost.attention_ms_exact, cost.attention_ms)
    faster = f" Attention speed: {speed}." if speed != "-" else ""
    kept = Counter(site.operator for site in report.sites)["exact"]
    exact = f"{kept} of {len(report.sites)} softmax attentions were kept exact."
    return [
        _table(("", "base", "this model"), shown),
        f"{where}{faster} {exact} Details: `{REPORT}`.",
        " ".join(verdict(report)),
        *_stages(report),
    ]


def _stages(report: Report) -> list[str]:
    """What each stage of the training gained, where the report tells (``context={"stages": ...}``)."""
    stages = report.provenance.get("stages") or []
    rows = [
        (
            str(stage["name"]), str(stage["objective"]), str(stage["train"]), str(stage["steps"]),
            number(stage["before"]), number(stage["after"]), "yes" if stage["kept"] else "no",
        )
        for stage in stages
    ]  # fmt: skip
    return (
        [_table(("stage", "objective", "trained", "steps", "before", "after", "kept"), rows)] if rows else []
    )


def _usage(manifest: Manifest) -> str:
    base = "None" if manifest.weights == MERGED else "base"
    return (
        "```\nimport torch\nimport fastattn_compile as fa\n\n"
        f'model = fa.from_pretrained({base}, "path/to/this/folder")\n'
        'fast = torch.compile(model, backend="fastattn", options={"plan": model.fastattn_plan})\n```'
    )


def _table(head: Iterable[str], rows: Iterable[tuple[str, ...]]) -> str:
    head = list(head)
    lines = [head, ["---"] * len(head), *(list(row) for row in rows)]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
