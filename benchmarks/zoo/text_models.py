"""Encoders, decoders and both together: language models of transformers."""

from __future__ import annotations

from zoo.entry import BOTH, FREE, PADDING, VOCABULARY, Zoo, sliding, tensor, text, text_to_text
from zoo.hugging_face import EAGER, EXPERTS, GPT, GROUPED, HEADS, INNER, LAYERS, TEXT, WIDTH, decoder, entry

SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
HIDES_ROWS = {"plain": {"none": 2}, "masked": {"opaque": 2}}
BANDED = "not a product of queries and keys"


def encoders(zoo: Zoo) -> None:
    """Models that see the whole text."""
    for name, stem in (
        ("bert", "Bert"), ("roberta", "Roberta"), ("xlm_roberta", "XLMRoberta"), ("ernie", "Ernie"),
        ("camembert", "Camembert"), ("data2vec_text", "Data2VecText"), ("roberta_prelayernorm", "RobertaPreLayerNorm"),
        ("xlm_roberta_xl", "XLMRobertaXL"), ("layoutlm", "LayoutLM"), ("markuplm", "MarkupLM"),
    ):  # fmt: skip
        entry(
            zoo,
            name,
            stem,
            TEXT,
            **({"implementations": EAGER} if name in ("layoutlm", "markuplm") else {}),
        )
    entry(zoo, "distilbert", "DistilBert", {
        "vocab_size": VOCABULARY, "dim": WIDTH, "n_layers": LAYERS, "n_heads": HEADS, "hidden_dim": INNER,
        "max_position_embeddings": 128,
    })  # fmt: skip
    for name, stem in (("albert", "Albert"), ("electra", "Electra")):
        entry(zoo, name, stem, TEXT | {"embedding_size": 32})
    disentangled = TEXT | {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]}
    entry(zoo, "deberta", "Deberta", disentangled, implementations=EAGER, plain={}, masked={},
          untraceable="scripted functions split a product from its softmax")  # fmt: skip
    entry(
        zoo,
        "deberta_v2",
        "DebertaV2",
        disentangled | {"position_buckets": 16},
        implementations=EAGER,
        **HIDES_ROWS,
    )
    entry(zoo, "modernbert", "ModernBert", TEXT | SPECIAL | {"local_attention": 16, "cls_token_id": 1, "sep_token_id": 2},
          plain={"none": 1, "right(8) & left(8)": 1},
          masked={PADDING: 1, f"right(8) & left(8) & {PADDING}": 1})  # fmt: skip
    entry(zoo, "eurobert", "EuroBert", TEXT | {"pad_token_id": 0})
    entry(zoo, "roformer", "RoFormer", TEXT | {"embedding_size": WIDTH}, implementations=EAGER)
    entry(zoo, "mobilebert", "MobileBert", TEXT | {"embedding_size": 32, "intra_bottleneck_size": 32})
    entry(zoo, "convbert", "ConvBert", TEXT | {"embedding_size": WIDTH}, implementations=EAGER)
    entry(zoo, "longformer", "Longformer", TEXT | {"attention_window": 16}, implementations=EAGER, plain={}, masked={},
          family="banded", kept=LAYERS, because=BANDED)  # fmt: skip
    entry(zoo, "big_bird", "BigBird", TEXT | {"attention_type": "original_full"}, implementations=EAGER)
    # They make a mask of the lengths of the texts, of full length without one.
    for name, stem in (("xlm", "XLM"), ("flaubert", "Flaubert")):
        entry(zoo, name, stem, {
            "vocab_size": VOCABULARY, "emb_dim": WIDTH, "n_layers": LAYERS, "n_heads": HEADS,
            "max_position_embeddings": 128,
        }, implementations=EAGER, plain={PADDING: LAYERS}, masked={PADDING: LAYERS})  # fmt: skip
    for name, stem, sizes in (
        ("ibert", "IBert", {"quant_mode": False}), ("rembert", "RemBert", {"input_embedding_size": 32}),
        ("tapas", "Tapas", {"type_vocab_sizes": [3, 256, 256, 2, 256, 256, 10]}), ("esm", "Esm", SPECIAL | {"mask_token_id": 4}),
        ("megatron_bert", "MegatronBert", {}), ("luke", "Luke", {"entity_vocab_size": 10, "entity_emb_size": 16}),
        ("mpnet", "MPNet", {}), ("splinter", "Splinter", {}), ("squeezebert", "SqueezeBert", {"embedding_size": WIDTH}),
        ("roc_bert", "RoCBert", {"enable_pronunciation": False, "enable_shape": False}), ("nomic_bert", "NomicBert", {}),
    ):  # fmt: skip
        entry(zoo, name, stem, TEXT | sizes, implementations=EAGER)
    # A layer before and one behind the molecules, and the chunks in which the first one works.
    entry(zoo, "canine", "Canine", TEXT | {
        "num_hash_buckets": 64, "local_transformer_stride": 8, "downsampling_rate": 4, "num_hash_functions": 4,
    }, sites=LAYERS + 6, implementations=EAGER, plain={"none": 6, PADDING: 2}, masked={PADDING: 8})  # fmt: skip
    entry(zoo, "xlnet", "XLNet", {"vocab_size": VOCABULARY, "d_model": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "d_inner": INNER},
          implementations=EAGER, plain={"none": 2}, masked={"opaque": 2})  # fmt: skip
    for name, stem, sizes in (
        ("fnet", "FNet", {}), ("mra", "Mra", {}),
    ):  # fmt: skip
        entry(zoo, name, stem, TEXT | sizes, sites=0, family="negative", implementations=EAGER,
              inputs=(lambda _: text(False)) if name == "fnet" else text)  # fmt: skip


def decoders(zoo: Zoo) -> None:
    """Causal language models."""
    head_dim = GROUPED | {"head_dim": 16}
    for name, stem, sizes in (
        ("llama", "Llama", GROUPED), ("mixtral", "Mixtral", GROUPED | {"num_local_experts": 4, "num_experts_per_tok": 2}),
        ("qwen2", "Qwen2", GROUPED), ("qwen2_moe", "Qwen2Moe", GROUPED | EXPERTS | {"shared_expert_intermediate_size": 32}),
        ("qwen3", "Qwen3", head_dim), ("qwen3_moe", "Qwen3Moe", head_dim | EXPERTS), ("gemma", "Gemma", head_dim),
        ("phi", "Phi", TEXT), ("phi3", "Phi3", GROUPED | {"pad_token_id": 0}), ("stablelm", "StableLm", TEXT | {"num_key_value_heads": 4}),
        ("cohere", "Cohere", GROUPED), ("olmo", "Olmo", GROUPED), ("olmo2", "Olmo2", GROUPED), ("olmoe", "Olmoe", GROUPED | EXPERTS),
        ("granite", "Granite", GROUPED), ("nemotron", "Nemotron", head_dim), ("persimmon", "Persimmon", TEXT),
        ("biogpt", "BioGpt", TEXT), ("glm", "Glm", head_dim | {"pad_token_id": 0}), ("glm4", "Glm4", head_dim | {"pad_token_id": 0}),
        ("smollm3", "SmolLM3", GROUPED | {"pad_token_id": 0}), ("helium", "Helium", head_dim), ("seed_oss", "SeedOss", head_dim),
        ("starcoder2", "Starcoder2", GROUPED), ("ernie4_5", "Ernie4_5", head_dim), ("arcee", "Arcee", GROUPED), ("diffllama", "DiffLlama", GROUPED),
        ("opt", "OPT", {
            "vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "ffn_dim": INNER,
            "num_attention_heads": HEADS, "max_position_embeddings": 128, "word_embed_proj_dim": WIDTH,
        }),
        ("falcon_rope", "Falcon", {
            "vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
            "alibi": False, "new_decoder_architecture": False, "multi_query": True,
        }),
        ("deepseek_v3_mla", "DeepseekV3", TEXT | {
            "num_key_value_heads": 4, "moe_intermediate_size": 32, "n_routed_experts": 8, "n_shared_experts": 1,
            "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "kv_lora_rank": 16,
            "q_lora_rank": 24, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16,
        }),
    ):  # fmt: skip
        decoder(
            zoo,
            name,
            stem,
            sizes,
            **({"sites": 2 * LAYERS, "implementations": EAGER} if name == "diffllama" else {}),
        )
    for name, stem, sizes in (
        ("gptj", "GPTJ", GPT | {"rotary_dim": 8}), ("codegen", "CodeGen", GPT | {"rotary_dim": 8}), ("gpt_neox", "GPTNeoX", TEXT | {"rotary_pct": 0.5}),
        ("mpt", "Mpt", {"vocab_size": VOCABULARY, "d_model": WIDTH, "n_heads": HEADS, "n_layers": LAYERS, "max_seq_len": 128}),
        ("bloom", "Bloom", {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "n_layer": LAYERS, "n_head": HEADS}),
        ("falcon_alibi", "Falcon", {
            "vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "alibi": True,
        }),
        ("xglm", "XGLM", {
            "vocab_size": VOCABULARY, "d_model": WIDTH, "num_layers": LAYERS, "attention_heads": HEADS, "ffn_dim": INNER,
            "max_position_embeddings": 128,
        }),
    ):  # fmt: skip
        # ALiBi counts real tokens: those that padding parts become documents of their own.
        counted = name == "bloom"
        masks = {"plain": {"causal": 2}, "masked": {f"causal & {PADDING} & segments": 2}} if counted else {}
        decoder(zoo, name, stem, sizes, implementations=EAGER, **masks)
    decoder(zoo, "gpt2", "GPT2", GPT, model="GPT2LMHeadModel")
    decoder(zoo, "openai_gpt", "OpenAIGPT", GPT, model="OpenAIGPTLMHeadModel", implementations=EAGER)
    decoder(zoo, "ctrl", "CTRL", GPT | {"dff": INNER}, model="CTRLLMHeadModel", implementations=EAGER)
    decoder(zoo, "gpt_bigcode", "GPTBigCode", GPT | {"multi_query": True})
    decoder(
        zoo, "imagegpt", "ImageGPT", GPT | {"n_positions": 64}, model="ImageGPTModel", implementations=EAGER
    )
    decoder(zoo, "gpt_neo", "GPTNeo", {
        "vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_layers": LAYERS, "num_heads": HEADS,
        "attention_types": [[["global", "local"], 1]], "max_position_embeddings": 128, "window_size": 16,
    }, implementations=EAGER, kind=sliding(16, 1 / 2))  # fmt: skip
    decoder(zoo, "mistral", "Mistral", GROUPED | {"sliding_window": 16}, kind=sliding(16))
    decoder(
        zoo,
        "gemma2",
        "Gemma2",
        head_dim | {"sliding_window": 16},
        kind=sliding(16, 1 / 2),
        implementations=EAGER,
    )
    decoder(
        zoo,
        "gemma3_text",
        "Gemma3",
        config="Gemma3TextConfig",
        sizes=head_dim | {"sliding_window": 16},
        kind=sliding(16),
    )
    decoder(zoo, "cohere2", "Cohere2", GROUPED | {"sliding_window": 16}, kind=sliding(16))
    decoder(zoo, "olmo3", "Olmo3", GROUPED | {"sliding_window": 16}, kind=sliding(16))
    decoder(
        zoo,
        "exaone4",
        "Exaone4",
        GROUPED | {"sliding_window": 16, "sliding_window_pattern": 2},
        kind=sliding(16, 1 / 2),
    )
    decoder(zoo, "gpt_oss", "GptOss", head_dim | {"sliding_window": 16, "num_local_experts": 4, "num_experts_per_tok": 2},
            kind=sliding(16, 1 / 2), implementations=EAGER)  # fmt: skip
    decoder(zoo, "qwen3_next_hybrid", "Qwen3Next", head_dim | EXPERTS | {
        "num_hidden_layers": 4, "shared_expert_intermediate_size": 32, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
        "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    }, sites=1)  # fmt: skip
    decoder(zoo, "mamba", "Mamba", {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "state_size": 4},
            sites=0, family="negative", implementations=EAGER, kind=FREE,
            inputs=lambda _: {"input_ids": text(False)["input_ids"][:, :12]})  # fmt: skip
    decoder(zoo, "rwkv", "Rwkv", {
        "vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "intermediate_size": INNER, "context_length": 64,
    }, sites=0, family="negative", implementations=EAGER, kind=FREE)  # fmt: skip


def both(zoo: Zoo) -> None:
    """Encoders with decoders."""

    def seq(name: str, stem: str, sizes: dict[str, object], **more: object) -> None:
        entry(zoo, name, stem, sizes, **({
            "sites": 3 * LAYERS, "kind": BOTH, "family": "encoder-decoder", "inputs": text_to_text,
        } | more))  # type: ignore[arg-type]  # fmt: skip

    t5 = {
        "vocab_size": VOCABULARY, "d_model": WIDTH, "d_kv": 16, "d_ff": INNER, "num_layers": LAYERS,
        "num_decoder_layers": LAYERS, "num_heads": HEADS,
    }  # fmt: skip
    seq("t5", "T5", t5)
    seq("mt5", "MT5", t5)
    seq("umt5", "UMT5", t5, implementations=EAGER)
    seq("longt5_local", "LongT5", t5 | {"local_radius": 7, "encoder_attention_type": "local"}, implementations=EAGER,
        plain={"opaque": 2, "causal": 2, "none": 2}, masked={"opaque": 2, "causal": 2, PADDING: 2})  # fmt: skip
    seq("switch_transformers", "SwitchTransformers", t5 | {
        "num_experts": 2, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1,
    }, implementations=EAGER)  # fmt: skip
    bart = {
        "vocab_size": VOCABULARY, "d_model": WIDTH, "encoder_layers": LAYERS, "decoder_layers": LAYERS,
        "encoder_attention_heads": HEADS, "decoder_attention_heads": HEADS, "encoder_ffn_dim": INNER,
        "decoder_ffn_dim": INNER, "max_position_embeddings": 128,
    }  # fmt: skip
    for name, stem in (
        ("bart", "Bart"), ("mbart", "MBart"), ("pegasus", "Pegasus"), ("m2m_100", "M2M100"), ("blenderbot", "Blenderbot"),
        ("blenderbot_small", "BlenderbotSmall"), ("plbart", "PLBart"),
    ):  # fmt: skip
        seq(name, stem, bart)
    seq("marian", "Marian", bart | {"pad_token_id": 0, "decoder_start_token_id": 0})
    seq("led", "LED", bart | {"max_encoder_position_embeddings": 128, "max_decoder_position_embeddings": 128, "attention_window": 16},
        implementations=EAGER, kept=LAYERS, because=BANDED, plain={"causal": 2, "none": 2}, masked={"causal": 2, PADDING: 2})  # fmt: skip
    speech = tensor("input_features", 16, 64)
    seq("whisper", "Whisper", bart | SPECIAL | {
        "max_source_positions": 32, "max_target_positions": 64, "num_mel_bins": 16, "decoder_start_token_id": 1,
    }, inputs=lambda p: speech(p) | {"decoder_input_ids": text_to_text(False)["decoder_input_ids"]},
        plain={"none": 4, "causal": 2}, masked=None)  # fmt: skip
