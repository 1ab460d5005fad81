"""``fa.capture``: queries, keys and values of every site, or statistics of them, in one pass a batch."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fastattn_compile.errors import CheckpointError, OptionError, PlanError
from fastattn_compile.files import write_json
from fastattn_compile.operators.base import AttentionInputs
from fastattn_compile.operators.exact.reference import masked_softmax
from fastattn_compile.operators.mask import MaskStructure
from fastattn_compile.reporting.evaluate import Progress, evaluating
from fastattn_compile.reporting.metrics import sample_rows
from fastattn_compile.retrofitting.objectives import split_batch
from fastattn_compile.retrofitting.replay import Replay

SCHEMA = "fastattn.capture/1"
INDEX = "capture.json"
_TENSORS = ("query", "key", "value", "key_padding", "segments", "bias")
_ROWS = 64


@dataclass
class Statistics:
    """Of one site, over all real tokens of all batches.

    Args:
        tokens: Real keys that were seen.
        mean: Tensor (``"query"``, ``"key"``, ``"value"``) to its mean, ``(heads, channels)``.
        second: Tensor to the mean of its products of channels, ``(heads, channels, channels)``.
        rows: Query rows sampled for the two below.
        entropy: Mean entropy of their softmax, nats, ``(heads,)``.
        largest: Largest score among them, ``(heads,)``.
    """

    tokens: int = 0
    mean: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    second: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    rows: int = 0
    entropy: Tensor | None = None
    largest: Tensor | None = None

    def add(self, inputs: AttentionInputs) -> None:
        """Counts one call in."""
        real = inputs.key_padding
        if real is None:
            real = torch.ones(
                inputs.key.shape[0], inputs.key.shape[2], dtype=torch.bool, device=inputs.key.device
            )
        counted = int(real.sum())
        for name in ("query", "key", "value"):
            tensor = getattr(inputs, name)
            here = tensor.transpose(1, 2).double()
            here = here[real] if here.shape[:2] == real.shape else here.flatten(0, 1)
            share = counted / max(1, self.tokens + counted)
            for kept, value in (
                (self.mean, here.mean(0)),
                (self.second, torch.einsum("thc,thd->hcd", here, here) / max(1, here.shape[0])),
            ):
                before = kept.get(name, torch.zeros_like(value))
                kept[name] = before + share * (value - before)
        self.tokens += counted
        self._scores(inputs)

    def _scores(self, inputs: AttentionInputs) -> None:
        rows = sample_rows(inputs.query.shape[2], _ROWS).to(inputs.query.device)
        key = inputs.key.float().repeat_interleave(inputs.group, 1)
        scores = inputs.scale * (inputs.query[:, :, rows].float() @ key.mT) + inputs.added(rows).float()
        visible = inputs.visible(rows)
        weights, _ = masked_softmax(scores, visible)
        entropy = -(weights * weights.clamp(min=1e-30).log()).sum(-1).mean((0, 2)).double()
        largest = scores.masked_fill(~visible, -torch.inf).amax((0, 2, 3))
        share = len(rows) / (self.rows + len(rows))
        self.entropy = entropy if self.entropy is None else self.entropy + share * (entropy - self.entropy)
        self.largest = largest if self.largest is None else torch.maximum(self.largest, largest)
        self.rows += len(rows)


@dataclass(frozen=True)
class Captured:
    """What was captured.

    Args:
        sites: Names of the sites, in execution order.
        batches: Number of batches.
        folder: Where the tensors are; ``None`` when they are in memory.
        statistics: By site; empty when tensors were captured.
    """

    sites: tuple[str, ...]
    batches: int
    folder: Path | None = None
    statistics: Mapping[str, Statistics] = dataclasses.field(default_factory=dict)
    _held: Mapping[tuple[str, int], AttentionInputs] = dataclasses.field(default_factory=dict, repr=False)

    def read(self, site: str, batch: int = 0) -> AttentionInputs:
        """The tensors of a site in a batch.

        Args:
            site: Name of the site.
            batch: Number of the batch.

        Raises:
            PlanError: There are none of this site or batch.
            CheckpointError: The file is damaged.
        """
        if site not in self.sites or not 0 <= batch < self.batches or self.statistics:
            raise PlanError(
                f"no tensors of site {site!r}, batch {batch}: there are {self.batches} batches of {list(self.sites)}"
                + ("; statistics alone were captured" if self.statistics else "")
            )
        if self.folder is None:
            return self._held[site, batch]
        path = _file(self.folder, batch, self.sites.index(site))
        try:
            with safe_open(path, "pt") as stream:
                facts = stream.metadata()
                found = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118
            return AttentionInputs(
                scale=float(facts["scale"]), mask=MaskStructure.parse(facts["mask"]), **found
            )
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path} is truncated or damaged ({error}); capture again") from error

    def __iter__(self) -> Iterator[tuple[str, int]]:
        """Site and batch of everything that was captured."""
        return ((site, batch) for batch in range(self.batches) for site in self.sites)

    @staticmethod
    def load(folder: str | Path) -> Captured:
        """Opens what an earlier run captured into a folder.

        Raises:
            CheckpointError: It holds no whole capture.
        """
        path = Path(folder) / INDEX
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
            if document["schema"] != SCHEMA:
                raise ValueError(f"schema {document['schema']!r}")
            return Captured(tuple(document["sites"]), int(document["batches"]), Path(folder))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{folder} holds no whole capture ({error})") from error


def capture(
    model: nn.Module,
    data: Iterable[Any],
    *,
    sites: Collection[str] | None = None,
    statistics: bool = False,
    batches: int | None = None,
    folder: str | Path | None = None,
    memory: int = 2 << 30,
    progress: Progress | None = None,
) -> Captured:
    """Runs a model with exact attention over data and keeps what its sites meet. The model is left as it is.

    With ``folder`` a site's tensors go to a safetensors file as soon as they are seen, so that memory is that of one call.

    Args:
        model: The model.
        data: Batches: mappings of keywords, tuples of arguments, or tensors.
        sites: Names of the sites; all when ``None``.
        statistics: Keep means, second moments, entropy and largest scores in place of tensors: memory does not grow with
            the data.
        batches: Batches to read at most; all when ``None``.
        folder: Where tensors are written.
        memory: Bytes that tensors may take when there is no folder.
        progress: Called as ``progress(stage, done, total)``.

    Raises:
        PlanError: ``sites`` names one that the model does not have.
        OptionError: The data holds no batch or raises, or tensors need more than ``memory``.
        ModelLoadError: The model has no data, or is spread over devices.
    """
    model = getattr(model, "_orig_mod", model)
    replay = Replay(model)
    store = _Store(sites, statistics, None if folder is None else Path(folder), memory)
    if store.folder is not None:
        store.folder.mkdir(parents=True, exist_ok=True)
        # Until all is there again, there is no capture, and nothing of an older one.
        for old in (store.folder / INDEX, *store.folder.glob("batch*-site*.safetensors")):
            old.unlink(missing_ok=True)
    count = 0
    with evaluating(model), replay.closed():
        for batch in _numbered(data, batches):
            store.batch = count
            replay.run(batch, take=store.take)
            count += 1
            if progress is not None:
                progress("capture", count, batches or 0)
    if not count:
        raise OptionError("the data holds no batch")
    missing = sorted(set(sites or ()) - set(store.names))
    if missing:
        raise PlanError(
            f"sites the model does not have: {', '.join(missing)}; it has {sorted(replay.specs) or store.all}"
        )
    if store.folder is not None and not statistics:
        write_json(store.folder / INDEX, {"schema": SCHEMA, "sites": store.names, "batches": count})
    return Captured(
        tuple(store.names), count, None if statistics else store.folder, store.statistics, store.held
    )


class _Store:
    def __init__(
        self, sites: Collection[str] | None, statistics: bool, folder: Path | None, memory: int
    ) -> None:
        self.sites, self.counts, self.folder, self.memory = sites, statistics, folder, memory
        self.names: list[str] = []
        self.all: list[str] = []
        self.statistics: dict[str, Statistics] = {}
        self.held: dict[tuple[str, int], AttentionInputs] = {}
        self.bytes = 0
        self.batch = 0

    def take(self, site: str, inputs: AttentionInputs, _: Tensor) -> None:
        if site not in self.all:
            self.all.append(site)
        if self.sites is not None and site not in self.sites:
            return
        if site not in self.names:
            self.names.append(site)
        if self.counts:
            self.statistics.setdefault(site, Statistics()).add(inputs)
            return
        tensors = {name: t for name in _TENSORS if (t := getattr(inputs, name)) is not None}
        if self.folder is not None:
            path = _file(self.folder, self.batch, self.names.index(site))
            beside = path.with_suffix(".part")
            stored = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
            facts = {"site": site, "scale": repr(float(inputs.scale)), "mask": str(inputs.mask)}
            save_file(stored, beside, metadata=facts)
            os.replace(beside, path)
            return
        self.bytes += sum(t.numel() * t.element_size() for t in tensors.values())
        if self.bytes > self.memory:
            raise OptionError(
                f"the tensors of the sites need more than {self.memory >> 20} MiB of memory (batch {self.batch}, site "
                f"{site}): give a folder, fewer sites or batches, or statistics=True"
            )
        copies = {name: tensor.detach().clone() for name, tensor in tensors.items()}
        self.held[site, self.batch] = dataclasses.replace(inputs, **copies)


def _file(folder: Path, batch: int, site: int) -> Path:
    return folder / f"batch{batch:05d}-site{site:04d}.safetensors"


def _numbered(data: Iterable[Any], most: int | None) -> Iterator[Any]:
    read = 0
    try:
        for batch in data:
            if most is not None and read == most:
                return
            split_batch(batch)
            yield batch
            read += 1
    except GeneratorExit:
        raise
    except OptionError:
        raise
    except Exception as error:
        raise OptionError(f"the data raised {type(error).__name__} after {read} batches: {error}") from error
