"""Vision, audio and time series models of transformers."""

from __future__ import annotations

from typing import Any

from zoo.entry import DECODER, FREE, PADDING, Zoo, image, tensor
from zoo.hugging_face import EAGER, HEADS, INNER, LAYERS, PIXELS, TEXT, WIDTH, entry

RESNET = {
    "model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 8, 8, 8], "depths": [1, 1, 1, 1], "out_features": ["stage4"],
}  # fmt: skip
DETR: dict[str, Any] = {
    "d_model": WIDTH, "encoder_layers": LAYERS, "decoder_layers": LAYERS, "encoder_attention_heads": HEADS,
    "decoder_attention_heads": HEADS, "encoder_ffn_dim": INNER, "decoder_ffn_dim": INNER, "num_queries": 10,
    "use_timm_backbone": False, "use_pretrained_backbone": False, "backbone": None, "backbone_config": RESNET,
}  # fmt: skip


def vision(zoo: Zoo) -> None:
    """Models of pixels."""

    def see(name: str, stem: str, sizes: dict[str, Any], **more: Any) -> None:
        entry(zoo, name, stem, sizes, **({"kind": FREE, "family": "vision", "inputs": image()} | more))

    for name, stem in (
        ("vit", "ViT"), ("deit", "DeiT"), ("clip_vision", "CLIPVision"), ("vit_mae", "ViTMAE"), ("vit_msn", "ViTMSN"),
        ("dinov2", "Dinov2"), ("dinov2_with_registers", "Dinov2WithRegisters"), ("ijepa", "IJepa"),
    ):  # fmt: skip
        see(name, stem, PIXELS)
    # Its head pools with one query.
    see("siglip_vision", "SiglipVision", PIXELS, sites=LAYERS + 1)
    for name, stem in (
        ("owlvit_vision", "OwlViTVision"),
        ("blip_vision", "BlipVision"),
        ("altclip_vision", "AltCLIPVision"),
    ):
        see(name, stem, PIXELS, implementations=EAGER)
    see("yolos", "Yolos", PIXELS | {"image_size": [32, 32], "num_detection_tokens": 5})
    # They put their biases together in place.
    see(
        "beit",
        "Beit",
        PIXELS | {"use_relative_position_bias": True, "out_indices": [0, 1]},
        plain={"opaque": LAYERS},
    )
    see(
        "data2vec_vision",
        "Data2VecVision",
        PIXELS | {"use_relative_position_bias": True, "out_indices": [0, 1]},
        plain={"opaque": LAYERS},
    )
    windows = {
        "image_size": 32,
        "patch_size": 2,
        "embed_dim": 16,
        "depths": [1, 2],
        "num_heads": [2, 2],
        "window_size": 4,
    }
    see("swin", "Swin", windows, sites=3, implementations=EAGER)
    see("swinv2", "Swinv2", windows, sites=3, implementations=EAGER)
    see("donut_swin", "DonutSwin", windows, sites=3, implementations=EAGER)
    see("segformer", "Segformer", {
        "num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [4, 1], "hidden_sizes": [32, 64], "num_attention_heads": [2, 4],
        "patch_sizes": [7, 3], "strides": [4, 2], "mlp_ratios": [2, 2], "decoder_hidden_size": 32,
    }, implementations=EAGER, inputs=image(64))  # fmt: skip
    see("pvt", "Pvt", {
        "image_size": 64, "num_encoder_blocks": 2, "depths": [1, 1], "sequence_reduction_ratios": [4, 1], "hidden_sizes": [16, 32],
        "patch_sizes": [4, 2], "strides": [4, 2], "num_attention_heads": [1, 2], "mlp_ratios": [2, 2],
    }, implementations=EAGER, inputs=image(64))  # fmt: skip
    see("glpn", "GLPN", {
        "num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [4, 1], "hidden_sizes": [32, 64], "num_attention_heads": [2, 4],
        "patch_sizes": [7, 3], "strides": [4, 2], "mlp_ratios": [2, 2], "decoder_hidden_size": 32,
    }, implementations=EAGER, inputs=image(64))  # fmt: skip
    see("levit", "Levit", {
        "image_size": 224, "hidden_sizes": [16, 24, 32], "num_attention_heads": [2, 2, 2], "depths": [1, 1, 1],
        "key_dim": [8, 8, 8], "mlp_ratio": [2, 2, 2], "attention_ratio": [2, 2, 2],
    }, sites=5, implementations=EAGER, inputs=image(224))  # fmt: skip
    see("mobilevit", "MobileViT", {
        "image_size": 128, "hidden_sizes": [32, 48, 64], "neck_hidden_sizes": [8, 8, 16, 24, 32, 32, 64], "num_attention_heads": 4,
    }, sites=9, implementations=EAGER, inputs=image(128))  # fmt: skip
    see(
        "detr",
        "Detr",
        DETR,
        sites=3 * LAYERS,
        implementations=EAGER,
        inputs=image(96),
        plain={PADDING: 4, "none": 2},
    )
    see(
        "deformable_detr",
        "DeformableDetr",
        DETR | {"num_feature_levels": 2},
        implementations=EAGER,
        inputs=image(96),
    )
    see(
        "timesformer",
        "Timesformer",
        PIXELS | {"num_frames": 2},
        sites=2 * LAYERS,
        implementations=EAGER,
        inputs=image(frames=2),
    )
    see("vivit", "Vivit", PIXELS | {"num_frames": 2, "tubelet_size": [2, 8, 8]}, inputs=image(frames=2))
    see("videomae", "VideoMAE", PIXELS | {"num_frames": 2, "tubelet_size": 2},
        inputs=lambda _: image(frames=2)(False) | {"bool_masked_pos": None})  # fmt: skip
    see("poolformer", "PoolFormer", {
        "hidden_sizes": [8, 16], "depths": [1, 1], "num_encoder_blocks": 2, "patch_sizes": [7, 3], "strides": [4, 2], "padding": [2, 1],
        "mlp_ratio": 2.0,
    }, sites=0, family="negative", implementations=EAGER)  # fmt: skip
    see(
        "convnext",
        "ConvNext",
        {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2},
        sites=0,
        family="negative",
        implementations=EAGER,
    )
    see(
        "resnet",
        "ResNet",
        {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]},
        sites=0,
        family="negative",
        implementations=EAGER,
    )


def text_towers(zoo: Zoo) -> None:
    """The text sides of models of pictures and text."""
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    entry(zoo, "clip_text", "CLIPText", TEXT | special, kind=DECODER, family="text tower")
    entry(zoo, "siglip_text", "SiglipText", TEXT | {"pad_token_id": 0}, family="text tower")
    entry(
        zoo,
        "owlvit_text",
        "OwlViTText",
        TEXT | special,
        kind=DECODER,
        family="text tower",
        implementations=EAGER,
    )


def audio_and_series(zoo: Zoo) -> None:
    """Models of sound and of time series."""
    wave = {
        "vocab_size": 32, "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "intermediate_size": INNER,
        "conv_dim": (16, 16), "conv_stride": (4, 4), "conv_kernel": (8, 8), "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 8,
        "num_conv_pos_embedding_groups": 2, "apply_spec_augment": False, "mask_time_prob": 0.0, "layerdrop": 0.0,
    }  # fmt: skip

    def hear(name: str, stem: str, sizes: dict[str, Any], **more: Any) -> None:
        entry(
            zoo,
            name,
            stem,
            sizes,
            **({"kind": FREE, "family": "audio", "inputs": tensor("input_values", 800)} | more),
        )

    for name, stem in (
        ("wav2vec2", "Wav2Vec2"),
        ("hubert", "Hubert"),
        ("unispeech", "UniSpeech"),
        ("unispeech_sat", "UniSpeechSat"),
    ):
        hear(name, stem, wave)
    hear("wavlm", "WavLM", wave, implementations=EAGER)
    hear("wav2vec2_conformer", "Wav2Vec2Conformer", wave | {"position_embeddings_type": "relative", "conv_depthwise_kernel_size": 3},
         implementations=EAGER)  # fmt: skip
    hear("ast", "AST", {
        "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "intermediate_size": INNER, "patch_size": 4,
        "frequency_stride": 4, "time_stride": 4, "max_length": 32, "num_mel_bins": 16,
    }, inputs=tensor("input_values", 32, 16))  # fmt: skip
    hear("patchtst", "PatchTST", {
        "num_input_channels": 2, "context_length": 64, "patch_length": 8, "patch_stride": 8, "d_model": WIDTH, "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS, "ffn_dim": INNER,
    }, family="time series", inputs=tensor("past_values", 64, 2))  # fmt: skip
