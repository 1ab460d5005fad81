"""Attention of torch.nn, x-transformers, vit-pytorch, timm and diffusers."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from zoo.entry import BATCH, LENGTH, Entry, Inputs, Zoo, tensor
from zoo.hugging_face import HEADS, INNER, LAYERS, WIDTH
from zoo.torchvision_stub import install

AS_IS = ("library",)
SEQUENCE = tensor("x", LENGTH, WIDTH)
PICTURE = tensor("x", 3, 32, 32)
LARGER = tensor("x", 3, 64, 64)


class Called(nn.Module):
    """A module and how it is called, as a module of one argument ``x``."""

    def __init__(self, module: nn.Module, call: Callable[[nn.Module, Tensor], Any] | None = None) -> None:
        super().__init__()
        self.module, self.call = module, call

    def forward(self, x: Tensor) -> Any:
        return self.module(x) if self.call is None else self.call(self.module, x)


def add(
    zoo: Zoo, name: str, family: str, sites: int, build: Callable[[], nn.Module], inputs: Inputs,
    plain: Mapping[str, int] | None = None, **more: Any,
) -> None:  # fmt: skip
    """Adds a model of one implementation, without a padding mask."""

    def made(_: str) -> nn.Module:
        install()
        return build()

    masks = plain if plain is not None else ({"none": sites} if sites else {})
    zoo.add(Entry(name, family, sites, made, inputs, masks, None, AS_IS, **more))


def torch_modules(zoo: Zoo) -> None:
    """torch.nn."""

    def multihead() -> nn.Module:
        return nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)

    add(
        zoo,
        "nn.MultiheadAttention with weights",
        "torch.nn",
        1,
        lambda: Called(multihead(), lambda m, x: m(x, x, x)[0]),
        SEQUENCE,
    )
    add(zoo, "nn.MultiheadAttention", "torch.nn", 1,
        lambda: Called(multihead(), lambda m, x: m(x, x, x, need_weights=False)[0]), SEQUENCE)  # fmt: skip
    add(zoo, "nn.TransformerEncoder", "torch.nn", LAYERS, lambda: Called(
        nn.TransformerEncoder(nn.TransformerEncoderLayer(WIDTH, HEADS, INNER, batch_first=True), LAYERS)), SEQUENCE)  # fmt: skip

    def decode(module: nn.Module, x: Tensor) -> Tensor:
        hidden = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        out: Tensor = module(x, x, tgt_is_causal=True, tgt_mask=hidden)
        return out

    add(zoo, "nn.TransformerDecoder", "torch.nn", 2 * LAYERS, lambda: Called(
        nn.TransformerDecoder(nn.TransformerDecoderLayer(WIDTH, HEADS, INNER, batch_first=True), LAYERS), decode,
    ), SEQUENCE, {"causal": LAYERS, "none": LAYERS})  # fmt: skip


def x_transformers(zoo: Zoo) -> None:
    """x-transformers."""

    def layers(causal: bool = False, **options: Any) -> Callable[[], nn.Module]:
        def build() -> nn.Module:
            library = importlib.import_module("x_transformers")
            made = library.Decoder if causal else library.Encoder
            return Called(made(dim=WIDTH, depth=LAYERS, heads=HEADS, attn_dim_head=16, **options))

        return build

    for name, options in (
        ("Encoder", {}), ("Encoder ALiBi", {"alibi_pos_bias": True}), ("Encoder T5 bias", {"rel_pos_bias": True}),
        ("Encoder rotary", {"rotary_pos_emb": True}), ("Encoder one key head", {"attn_kv_heads": 1}),
        ("Encoder query and key norm", {"attn_qk_norm": True}),
    ):  # fmt: skip
        add(zoo, f"x-transformers {name}", "x-transformers", LAYERS, layers(**options), SEQUENCE)  # type: ignore[arg-type]
    for name, options in (("Decoder", {}), ("Decoder flash", {"attn_flash": True})):
        add(
            zoo,
            f"x-transformers {name}",
            "x-transformers",
            LAYERS,
            layers(True, **options),
            SEQUENCE,
            {"causal": LAYERS},
        )  # type: ignore[arg-type]
    talking = {"attn_pre_talking_heads": True, "attn_post_talking_heads": True}
    add(zoo, "x-transformers Encoder talking heads", "x-transformers", LAYERS, layers(**talking), SEQUENCE, {},
        kept=LAYERS, because="they go into")  # fmt: skip
    add(zoo, "x-transformers Encoder top-k", "x-transformers", LAYERS, layers(attn_sparse_topk=8), SEQUENCE,
        {"opaque": LAYERS})  # fmt: skip


def vit_pytorch(zoo: Zoo) -> None:
    """vit-pytorch."""

    def made(module: str, name: str = "ViT", **options: Any) -> Callable[[], nn.Module]:
        sizes = {
            "image_size": 32, "patch_size": 8, "num_classes": 10, "dim": WIDTH, "depth": LAYERS, "heads": HEADS, "mlp_dim": INNER,
        }  # fmt: skip

        def build() -> nn.Module:
            return Called(
                getattr(importlib.import_module(f"vit_pytorch.{module}"), name)(**{**sizes, **options})
            )

        return build

    def see(name: str, sites: int, build: Callable[[], nn.Module], **more: Any) -> None:
        add(zoo, f"vit-pytorch {name}", "vit-pytorch", sites, build, PICTURE, **more)

    see("vit", LAYERS, made("vit"))
    see("simple_vit", LAYERS, made("simple_vit", "SimpleViT"))
    see("simple_flash_attn_vit", LAYERS, made("simple_flash_attn_vit", "SimpleViT", use_flash=True), plain={},
        untraceable="a context manager that breaks the graph around the call")  # fmt: skip
    # Locality self-attention hides the diagonal, which no structure says.
    see("vit_for_small_dataset", LAYERS, made("vit_for_small_dataset"), plain={"opaque": LAYERS})
    see("parallel_vit", 2 * LAYERS, made("parallel_vit", num_parallel_branches=2))
    # Its other softmaxes weigh channels by channels.
    see("xcit, class attention", LAYERS, made("xcit", "XCiT", cls_depth=LAYERS))
    see("max_vit", 4, lambda: Called(importlib.import_module("vit_pytorch.max_vit").MaxViT(
        num_classes=10, dim_conv_stem=16, dim=16, dim_head=8, depth=(1, 1), window_size=4)))  # fmt: skip


def timm(zoo: Zoo) -> None:
    """timm."""

    def made(name: str, fused: bool = False, **options: Any) -> Callable[[], nn.Module]:
        def build() -> nn.Module:
            model = importlib.import_module("timm").create_model(name, num_classes=10, **options)
            for module in model.modules():
                if hasattr(module, "fused_attn"):
                    module.fused_attn = fused
            return Called(model)

        return build

    vit = {"img_size": 32, "patch_size": 8, "depth": LAYERS}
    add(zoo, "timm vit, fused", "timm", LAYERS, made("vit_tiny_patch16_224", True, **vit), PICTURE)
    add(zoo, "timm vit", "timm", LAYERS, made("vit_tiny_patch16_224", **vit), PICTURE)
    add(zoo, "timm swin", "timm", 4, made(
        "swin_tiny_patch4_window7_224", img_size=64, window_size=4, embed_dim=32, depths=(2, 2), num_heads=(2, 2)), LARGER)  # fmt: skip
    add(
        zoo,
        "timm beit",
        "timm",
        LAYERS,
        made("beit_base_patch16_224", **vit, embed_dim=64, num_heads=4),
        PICTURE,
    )
    add(zoo, "timm levit", "timm", LAYERS, made(
        "levit_128s", img_size=64, embed_dim=(32,), num_heads=(2,), depth=(LAYERS,), key_dim=8), LARGER)  # fmt: skip
    # Softmax over the keys alone: a factorised, linear attention.
    add(zoo, "timm coat_lite", "timm", 0, made("coat_lite_tiny", img_size=64), LARGER)


def diffusers(zoo: Zoo) -> None:
    """diffusers."""

    class Denoise(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor, t: Tensor, c: Tensor) -> Tensor:
            out: Tensor = self.model(x, t, c).sample
            return out

    def unet(written_out: bool) -> Callable[[], nn.Module]:
        def build() -> nn.Module:
            library = importlib.import_module("diffusers")
            model = library.UNet2DConditionModel(
                sample_size=16, block_out_channels=(32, 32), layers_per_block=1,
                down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
                cross_attention_dim=32, attention_head_dim=8, norm_num_groups=8,
            )  # fmt: skip
            if written_out:
                processors = importlib.import_module("diffusers.models.attention_processor")
                model.set_attn_processor(processors.AttnProcessor())
            return Denoise(model)

        return build

    def latents(_: bool) -> dict[str, Tensor]:
        return {"x": torch.randn(BATCH, 4, 16, 16), "t": torch.tensor([5, 7]), "c": torch.randn(BATCH, 9, 32)}

    # Self and cross attention in a block below, one in the middle and two above.
    add(zoo, "diffusers UNet", "diffusers", 8, unet(False), latents)
    add(zoo, "diffusers UNet, written out", "diffusers", 8, unet(True), latents)
