"""The learned parameters of CAST: names, shapes, initial values, and what the kernels make of them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastattn_compile.kernels.aten.cast_affinity import Weights
from fastattn_compile.kernels.aten.cast_kmeans import balanced_centroids
from fastattn_compile.operators.base import AttentionInputs, SiteSpec
from fastattn_compile.operators.cast.config import CastConfig

# Calibration tokens that take part in clustering, per cluster: more do not move a mean.
_TOKENS_PER_CLUSTER = 128


def shapes(config: CastConfig, spec: SiteSpec) -> dict[str, tuple[int, ...]]:
    """Names and shapes in order (specification 1.1).

    Args:
        config: The configuration.
        spec: The site; its lengths are not read.
    """
    per_key_head = (config.clusters, int(spec.kv_heads), int(spec.head_dim))
    if config.surrogate_space == "projected":
        found: dict[str, tuple[int, ...]] = {"surrogates": per_key_head}
    else:
        found = {
            "query_surrogates": (config.clusters, int(spec.heads), int(spec.head_dim)),
            "key_surrogates": per_key_head,
        }
    if config.gated:
        gates = 1 if config.phi_heads == "shared" else int(spec.kv_heads)
        found["gate_weight"] = (gates, int(spec.heads), int(spec.head_dim))
        found["gate_bias"] = (gates,)
    if config.tau == "learned":
        found["temperature"] = (2,)
    return found


def initial(config: CastConfig, spec: SiteSpec, sample: AttentionInputs | None) -> dict[str, Tensor]:
    """Initial values, float32 on the CPU (specification 5.1).

    Surrogates are centroids of a balanced k-means of the sample's keys, heads concatenated, so that clusters
    hold about equally many tokens; without a sample they are normal with variance ``1 / head_dim``, and so
    are those for which the sample has no token. The gate starts at 0. A learned temperature starts where it
    undoes ``xi(0)`` in the mixture and makes summaries plain means.

    Args:
        config: The configuration.
        spec: The site.
        sample: Calibration tensors of the site.

    Raises:
        ValueError: The sample is of other sizes than the site.
    """
    values = {name: torch.zeros(shape) for name, shape in shapes(config, spec).items()}
    group = int(spec.heads) // int(spec.kv_heads)
    for name in values:
        if name.endswith("surrogates"):
            values[name].normal_(std=int(spec.head_dim) ** -0.5)
    if sample is not None:
        centroids = _centroids(config, spec, sample)
        for name in values:
            if name.endswith("surrogates"):
                repeats = group if name.startswith("query") else 1
                values[name][: len(centroids)] = centroids.repeat_interleave(repeats, 1)
    if config.tau == "learned":
        values["temperature"][0] = 1 / (sharpness(config) + math.log(2))
    return values


def _centroids(config: CastConfig, spec: SiteSpec, sample: AttentionInputs) -> Tensor:
    kv_heads, head_dim = sample.key.shape[1], sample.key.shape[3]
    if (kv_heads, head_dim) != (int(spec.kv_heads), int(spec.head_dim)):
        raise ValueError(
            f"the sample's keys have {kv_heads} heads of {head_dim} channels, those of the site "
            f"{spec.kv_heads} of {spec.head_dim}"
        )
    keys = sample.key.detach().transpose(1, 2).float().cpu()
    tokens = keys[sample.key_padding.cpu()] if sample.key_padding is not None else keys.flatten(0, 1)
    most = _TOKENS_PER_CLUSTER * config.clusters
    stride = max(1, -(-tokens.shape[0] // most))
    tokens = tokens[::stride]
    centroids = balanced_centroids(tokens.flatten(1), min(config.clusters, len(tokens)))
    return centroids.unflatten(1, (kv_heads, head_dim))


def sharpness(config: CastConfig) -> float:
    """What ``xi`` adds to the softplus of the gate."""
    return 1.0 if config.xi == "one_plus_softplus" else 0.0


def unpacked(config: CastConfig, parameters: tuple[Tensor, ...], heads: int) -> Weights:
    """Parameters in their order as the tensors that the formulas use; differentiable.

    Args:
        config: The configuration.
        parameters: As ``shapes`` lists them.
        heads: Query heads.
    """
    rest = list(parameters)
    if config.surrogate_space == "projected":
        key_surrogates = rest.pop(0)
        query_surrogates = key_surrogates.repeat_interleave(heads // key_surrogates.shape[1], 1)
    else:
        query_surrogates, key_surrogates = rest.pop(0), rest.pop(0)
    gate, bias = (rest.pop(0), rest.pop(0)) if config.gated else (None, None)
    return Weights(
        query_surrogates, key_surrogates, gate, bias, rest.pop(0) if config.tau == "learned" else None
    )


def packed_gradients(
    config: CastConfig, gradients: Weights | None, parameters: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    """Gradients of ``unpacked`` tensors as those of the parameters, each of its parameter's shape and type.

    Args:
        config: The configuration.
        gradients: ``None`` when they are zero.
        parameters: The parameters.
    """
    if gradients is None:
        return tuple(torch.zeros_like(p) for p in parameters)
    found: list[Tensor | None] = []
    if config.surrogate_space == "projected":
        kv_heads = gradients.key_surrogates.shape[1]
        shared = gradients.query_surrogates.unflatten(1, (kv_heads, -1)).sum(2)
        found.append(shared + gradients.key_surrogates)
    else:
        found += [gradients.query_surrogates, gradients.key_surrogates]
    found += [x for x in (gradients.gate, gradients.gate_bias, gradients.temperature) if x is not None]
    return tuple(
        torch.zeros_like(p) if x is None else x.to(p.dtype).contiguous()
        for x, p in zip(found, parameters, strict=True)
    )


def check(config: CastConfig, parameters: tuple[Tensor, ...], inputs: AttentionInputs) -> None:
    """Raises when parameters are not those of a site.

    Raises:
        ValueError: Their number or a shape is wrong.
    """
    expected = shapes(config, inputs.spec())
    if [tuple(p.shape) for p in parameters] != list(expected.values()):
        raise ValueError(
            f"cast expects the parameters {expected} at this site, got shapes "
            f"{[tuple(p.shape) for p in parameters]}; "
            "make them with initial_parameters"
        )
