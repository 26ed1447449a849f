"""Tiny models of Hugging Face transformers: their options, one row for each."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

__all__ = [
    "ARCHITECTURES",
    "BATCH",
    "CLASSES",
    "DECODED",
    "EXTRA_MODES",
    "FIELDS",
    "MODES",
    "NEW",
    "OPTIONS",
    "PROMPT",
    "TOKENS",
    "VOCABULARY",
    "Architecture",
    "Kind",
    "select_architectures",
]


Kind = Literal["causal", "masked", "text", "seq2seq", "vision", "speech", "speech2seq"]
#: What counts in the totals.
MODES = (
    "plain", "right_padding", "left_padding", "packed", "generate", "generate_left_padding",
)  # fmt: skip
#: What is asked beside, and counts apart.
EXTRA_MODES = (
    "causality", "generate_right_padding", "static_cache", "chunked_prefill", "checkpointing",
    "prefix", "mask_4d_bool", "mask_4d_min", "bias_4d",
)  # fmt: skip
BATCH, TOKENS, VOCABULARY = 2, 48, 99
DECODED = 40  # tokens of the decoder of an encoder-decoder; others, so that no mask fits by chance
PROMPT, NEW = 24, 28  # together beyond all windows and chunks
_WINDOW = 16


@dataclass(frozen=True)
class Architecture:
    """A tiny model with random weights.

    Attributes:
        name: Name of the row.
        kind: What goes in and what comes out.
        options: Options of the configuration, over those of the kind.
        model_type: Model type of the configuration; the name by default.
        model_class: Name of a class of transformers; the automatic class of the kind by default.
        attention: The attention implementation that is the reference; by default what the model
            itself chooses.
        extra_modes: Modes that are asked of it beside the common ones.
        omitted: Options of the kind that this configuration does not take.
        ambiguous: Modes in which the implementations of transformers disagree with each other, so
            that there is nothing to compare with.
        needs_token_types: Whether it always gets token types, which say what sees each other both
            ways. (Without them the implementations of transformers disagree.)
    """

    name: str
    kind: Kind
    options: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    model_type: str = ""
    model_class: str = ""
    attention: str | None = None
    extra_modes: tuple[str, ...] = ()
    omitted: tuple[str, ...] = ()
    ambiguous: tuple[str, ...] = ()
    needs_token_types: bool = False


_TEXT = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 128, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_DECODER = _TEXT | {"num_key_value_heads": 2, "head_dim": 16}
_EXPERTS = {
    "num_local_experts": 4, "num_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32,
}  # fmt: skip
_SEQ2SEQ = {
    "vocab_size": VOCABULARY, "d_model": 64, "encoder_layers": 2, "decoder_layers": 2,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "decoder_start_token_id": 1, "forced_eos_token_id": None,
}  # fmt: skip
_T5 = {
    "vocab_size": VOCABULARY, "d_model": 64, "d_kv": 16, "d_ff": 64, "num_layers": 2,
    "num_decoder_layers": 2, "num_heads": 4, "pad_token_id": 0, "decoder_start_token_id": 0,
    "relative_attention_num_buckets": 8, "relative_attention_max_distance": 32,
}  # fmt: skip
_BIDIRECTIONAL = _TEXT | {"cls_token_id": 1, "sep_token_id": 2}
_VISION = {
    "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "image_size": 56, "patch_size": 8, "num_channels": 3,
}  # fmt: skip
_SPEECH = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "conv_dim": (16, 16), "conv_stride": (4, 4), "conv_kernel": (8, 8),
    "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
}  # fmt: skip
OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "causal": _DECODER, "masked": _BIDIRECTIONAL, "text": _BIDIRECTIONAL, "seq2seq": _SEQ2SEQ,
    "vision": _VISION, "speech": _SPEECH, "speech2seq": _SEQ2SEQ,
}  # fmt: skip
CLASSES = {
    "causal": "AutoModelForCausalLM", "masked": "AutoModelForMaskedLM", "text": "AutoModel",
    "seq2seq": "AutoModelForSeq2SeqLM", "vision": "AutoModel", "speech": "AutoModel",
    "speech2seq": "AutoModelForSpeechSeq2Seq",
}  # fmt: skip
# eager attention adds masks, so that it takes no boolean ones: [1:] for models that have no other
_MASKS_4D = ("mask_4d_bool", "mask_4d_min", "bias_4d")
_CACHES = ("static_cache", "chunked_prefill")
_LATENT = {  # keys and values from a latent; keys and values of different sizes
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16,
    "v_head_dim": 16, "num_key_value_heads": 4, "head_dim": 8, "n_group": 1, "topk_group": 1,
}  # fmt: skip
_INDEXED = _LATENT | {"index_topk": 12, "index_head_dim": 16, "index_n_heads": 2}
_SOFTCAP = {
    "attn_logit_softcapping": 1.0, "sliding_window": _WINDOW, "query_pre_attn_scalar": 16,
}  # fmt: skip
_LINEAR = {
    "linear_key_head_dim": 16, "linear_value_head_dim": 16, "linear_num_key_heads": 2,
    "linear_num_value_heads": 4, "linear_head_dim": 16, "linear_num_heads": 4,
}  # fmt: skip
_TWO_LAYERS = ["sliding_attention", "full_attention"]
_MIXED = {"sliding_window": _WINDOW, "layer_types": _TWO_LAYERS}
_RELATIVE = {
    "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 16,
    "sliding_window_size": _WINDOW, "d_rel": 8, "rel_extent": 32,
    "layer_types": ["hybrid_sliding", "hybrid"],
}  # fmt: skip
FIELDS = {"model_type", "model_class", "attention", "omitted", "ambiguous", "needs_token_types"}


def _row(kind: Kind, name: str, *extra_modes: str, **options: Any) -> Architecture:
    fields = {key: options.pop(key) for key in FIELDS & options.keys()}
    return Architecture(name, kind, options, extra_modes=extra_modes, **fields)


_causal = functools.partial(_row, "causal")
_masked = functools.partial(_row, "masked")
_text = functools.partial(_row, "text")
_seq2seq = functools.partial(_row, "seq2seq")
_vision = functools.partial(_row, "vision")
_speech = functools.partial(_row, "speech")
_speech2seq = functools.partial(_row, "speech2seq")
#: The zoo.
# fmt: off
ARCHITECTURES: tuple[Architecture, ...] = (
    # decoders: plain attention, or rotary, or grouped heads
    _causal("llama", *_CACHES, "checkpointing", *_MASKS_4D),
    _causal("qwen2", *_CACHES),
    _causal("qwen3", *_CACHES, *_MASKS_4D),
    _causal("gemma", *_CACHES),
    _causal("gpt2", *_CACHES, *_MASKS_4D, n_positions=128),
    _causal("gpt_neox", *_CACHES),
    _causal("gpt_bigcode", n_positions=128),
    _causal("granite", *_CACHES, attention_multiplier=0.3),
    _causal("phi", *_CACHES),
    _causal("olmo", *_CACHES),
    _causal("olmo2", *_CACHES),
    _causal("cohere", *_CACHES),
    _causal("stablelm", *_CACHES),
    _causal("smollm3", *_CACHES),
    _causal("glm", *_CACHES),
    _causal("glm4", *_CACHES),
    _causal("nemotron", *_CACHES),
    _causal("opt", *_CACHES, ffn_dim=64, word_embed_proj_dim=64),
    _causal("biogpt", *_CACHES),
    _causal("persimmon", *_CACHES),
    _causal("helium", *_CACHES),
    _causal("arcee"),
    _causal("seed_oss"),
    _causal("hunyuan_v1_dense"),
    _causal("apertus"),
    _causal("ernie4_5"),
    _causal("bitnet"),
    _causal("nanochat"),
    _causal("jais2"),
    _causal("internlm3"),
    _causal("hyperclovax"),
    _causal("ctrl", dff=64, n_positions=128),
    _causal("bert_decoder", model_type="bert", is_decoder=True),
    _causal("roberta_decoder", model_type="roberta", is_decoder=True),
    _causal("bart_decoder", model_type="bart", is_decoder=True, is_encoder_decoder=False,
            **_SEQ2SEQ),
    # decoders: windows and chunks
    _causal("mistral", *_CACHES, "checkpointing", *_MASKS_4D, sliding_window=_WINDOW),
    _causal("ministral", *_CACHES, sliding_window=_WINDOW),
    _causal("qwen2_window", *_CACHES, model_type="qwen2", use_sliding_window=True,
            sliding_window=_WINDOW, max_window_layers=1),
    _causal("gemma3_text", *_CACHES, "checkpointing", sliding_window=_WINDOW,
            sliding_window_pattern=2, query_pre_attn_scalar=16),
    _causal("gemma3_bidirectional", model_type="gemma3_text", sliding_window=_WINDOW,
            sliding_window_pattern=2, use_bidirectional_attention=True, query_pre_attn_scalar=16),
    _causal("gemma4_text", head_dim=16, global_head_dim=32, sliding_window=_WINDOW,
            num_hidden_layers=4, num_kv_shared_layers=2, layer_types=2 * _TWO_LAYERS,
            hidden_size_per_layer_input=16, vocab_size_per_layer_input=VOCABULARY),
    _causal("phi3", *_CACHES, sliding_window=_WINDOW),
    _causal("olmo3", *_CACHES, sliding_window=_WINDOW),
    _causal("cohere2", *_CACHES, sliding_window=_WINDOW, sliding_window_pattern=2),
    _causal("starcoder2", *_CACHES, sliding_window=_WINDOW),
    _causal("exaone4", *_CACHES, sliding_window=_WINDOW, sliding_window_pattern=2),
    _causal("cwm", sliding_window=_WINDOW),
    _causal("modernbert-decoder", *_CACHES, local_attention=_WINDOW, global_attn_every_n_layers=2),
    _causal("llama4_text", *_CACHES, "checkpointing", attention_chunk_size=_WINDOW,
            intermediate_size_mlp=64, num_hidden_layers=4, no_rope_layers=[1, 1, 1, 0],
            **_EXPERTS),
    # decoders: softcap, sinks, other changes of the scores
    _causal("gemma2", *_CACHES, "checkpointing", *_MASKS_4D[1:], attention="eager", **_SOFTCAP),
    _causal("gemma2_without_softcap", *_CACHES, model_type="gemma2",
            **_SOFTCAP | {"attn_logit_softcapping": None}),
    _causal("vaultgemma", *_CACHES, attention="eager", **_SOFTCAP),
    _causal("gpt_oss", *_CACHES, "checkpointing", *_MASKS_4D[1:], attention="eager",
            sliding_window=_WINDOW, **_EXPERTS),
    _causal("granite_swa", *_CACHES, attention="eager", sliding_window=_WINDOW),
    _causal("granitemoe_swa", *_CACHES, attention="eager", sliding_window=_WINDOW, **_EXPERTS),
    _causal("flint", *_CACHES, attention="eager", **_MIXED | _EXPERTS),
    _causal("mimo_v2_flash", attention="eager", sliding_window=_WINDOW, v_head_dim=8,
            swa_head_dim=16, swa_v_head_dim=8, swa_num_attention_heads=4,
            swa_num_key_value_heads=2, layer_types=_TWO_LAYERS, **_EXPERTS),
    _causal("deepseek_v4", sliding_window=_WINDOW, q_lora_rank=16, o_groups=2, o_lora_rank=16,
            index_n_heads=2, index_head_dim=16, index_topk=4, num_hidden_layers=3,
            layer_types=["sliding_attention", "compressed_sparse_attention",
                         "heavily_compressed_attention"],
            compress_rates={"compressed_sparse_attention": 4, "heavily_compressed_attention": 8},
            **_EXPERTS),
    _causal("diffllama"),
    _causal("doge"),
    # decoders: keys and values of other sizes, chosen keys
    _causal("deepseek_v2", *_CACHES, first_k_dense_replace=1, **_LATENT | _EXPERTS),
    _causal("deepseek_v3", *_CACHES, first_k_dense_replace=1, **_LATENT | _EXPERTS),
    _causal("minicpm3", *_CACHES, **_LATENT | {"v_head_dim": 32}),
    _causal("youtu", **_LATENT),
    _causal("glm4_moe_lite", **_LATENT | _EXPERTS),
    _causal("longcat_flash", num_layers=1, ffn_hidden_size=64, expert_ffn_hidden_size=32,
            zero_expert_num=2, moe_topk=2, omitted=("num_hidden_layers",), **_LATENT | _EXPERTS),
    _causal("deepseek_v32", first_k_dense_replace=1, **_INDEXED | _EXPERTS),
    _causal("glm_moe_dsa", **_INDEXED | _EXPERTS),
    _causal("axk2", **_INDEXED | _EXPERTS),
    _causal("hy_v4", **_INDEXED | _EXPERTS),
    _causal("minimax_m3_vl_text", index_block_size=8, index_topk_blocks=2, index_n_heads=2,
            index_head_dim=16, layer_types=["full_attention", "minimax_m3_sparse"],
            rotary_dim=8, dense_intermediate_size=64, shared_intermediate_size=32,
            # its indexer chooses padding and other documents, after which rows may see nothing
            ambiguous=("left_padding", "packed", "generate_left_padding"), **_EXPERTS),
    # decoders: position biases
    _causal("inkling_text", **_RELATIVE | _EXPERTS),
    _causal("inkling2_text", **_RELATIVE | _EXPERTS),
    # decoders: experts, and layers without attention
    _causal("mixtral", *_CACHES, sliding_window=_WINDOW, **_EXPERTS),
    _causal("qwen2_moe", *_CACHES, **_EXPERTS),
    _causal("qwen3_moe", *_CACHES, **_EXPERTS),
    _causal("granitemoe", **_EXPERTS),
    _causal("olmoe", **_EXPERTS),
    _causal("phimoe", **_EXPERTS),
    _causal("jetmoe", kv_channels=16, **_EXPERTS),
    _causal("minimax", **_EXPERTS),
    _causal("dots1", n_shared_experts=1, n_group=1, topk_group=1, **_EXPERTS),
    _causal("glm4_moe", n_group=1, topk_group=1, **_EXPERTS),
    _causal("afmoe", **_MIXED | _EXPERTS),
    _causal("laguna", **_MIXED | _EXPERTS),
    _causal("cohere2_moe", **_MIXED | _EXPERTS),
    _causal("exaone_moe", **_MIXED | _EXPERTS),
    _causal("ernie4_5_moe", **_EXPERTS),
    _causal("lfm2"),
    _causal("jamba", attn_layer_period=2, attn_layer_offset=1, **_EXPERTS),
    _causal("falcon_h1"),
    _causal("qwen3_next", layer_types=["linear_attention", "full_attention"],
            **_LINEAR | _EXPERTS),
    _causal("qwen3_5_text", layer_types=["linear_attention", "full_attention"], **_LINEAR),
    _causal("kimi_linear", layer_types=["linear_attention", "full_attention"],
            **_LATENT | _LINEAR | _EXPERTS),
    # decoders that compute attention themselves
    _causal("xglm", *_CACHES, d_model=64, ffn_dim=64, attention_heads=4, num_layers=2),
    _causal("bloom", *_CACHES),
    _causal("falcon", *_CACHES, omitted=("head_dim",)),
    _causal("falcon_alibi", model_type="falcon", alibi=True, omitted=("head_dim",)),
    _causal("mpt", *_CACHES, d_model=64, n_heads=4, n_layers=2, max_seq_len=128),
    _causal("gptj", *_CACHES, rotary_dim=8),
    _causal("gpt_neo", *_CACHES, attention_types=[[["global", "local"], 1]], window_size=_WINDOW),
    _causal("codegen", *_CACHES, rotary_dim=8),
    _causal("openai-gpt", n_positions=128),
    _causal("gpt_neox_japanese"),
    # decoders in which token types say what sees each other both ways
    _causal("paligemma", needs_token_types=True,
            model_class="PaliGemmaForConditionalGeneration",
            text_config={"model_type": "gemma", **_DECODER},
            vision_config={"model_type": "siglip_vision_model", **_VISION, "projection_dim": 64},
            projection_dim=64, image_token_index=98),
    _causal("gemma3", "prefix",
            model_class="Gemma3ForConditionalGeneration",
            text_config={"model_type": "gemma3_text", **_DECODER, "sliding_window": _WINDOW,
                         "sliding_window_pattern": 2, "query_pre_attn_scalar": 16},
            vision_config={"model_type": "siglip_vision_model", **_VISION},
            image_token_index=98, mm_tokens_per_image=4),
    _causal("hrm_text", "prefix"),
    # encoders of text
    _masked("bert"),
    _masked("roberta"),
    _masked("xlm-roberta"),
    _masked("camembert"),
    _masked("distilbert", dim=64, hidden_dim=64, n_heads=4, n_layers=2),
    _masked("electra", embedding_size=64),
    _masked("albert", embedding_size=64),
    _masked("esm", position_embedding_type="rotary", mask_token_id=2),
    _masked("esmc"),
    _masked("eurobert"),
    _masked("ernie"),
    _masked("data2vec-text"),
    _masked("roberta-prelayernorm"),
    _masked("xlm-roberta-xl"),
    _masked("nomic_bert"),
    _masked("gte"),
    _masked("jina_embeddings_v3"),
    _masked("xmod", languages=["en"], default_language="en"),
    _masked("layoutlm"),
    _text("splinter"),
    _masked("modernbert", local_attention=_WINDOW, global_attn_every_n_layers=2),
    _text("ultrabert", sliding_window=_WINDOW,
          layer_types=_TWO_LAYERS),
    _text("openai_privacy_filter", attention="eager", sliding_window=_WINDOW, num_key_value_heads=2,
          head_dim=16, **_EXPERTS),
    _text("clip_text_model", model_class="CLIPTextModel", projection_dim=64),
    _text("siglip_text_model", model_class="SiglipTextModel", projection_size=64),
    # encoders of text that compute attention themselves
    _masked("deberta-v2", relative_attention=True, pos_att_type=["c2p", "p2c"]),
    _masked("mpnet"),
    _masked("nystromformer", num_landmarks=8, segment_means_seq_len=TOKENS),
    _masked("big_bird", block_size=4, num_random_blocks=1, attention_type="block_sparse"),
    _masked("longformer", attention_window=_WINDOW),
    _masked("megatron-bert"),
    _masked("rembert", input_embedding_size=64, output_embedding_size=64),
    _masked("roformer", embedding_size=64),
    _text("xlnet", omitted=("max_position_embeddings",), d_model=64, n_head=4, d_inner=64,
          n_layer=2),
    # encoder-decoders
    _seq2seq("t5", **_T5),
    _seq2seq("mt5", **_T5),
    _seq2seq("umt5", **_T5),
    _seq2seq("longt5", local_radius=8, **_T5),
    _seq2seq("longt5_global", model_type="longt5", local_radius=8,
             encoder_attention_type="transient-global", global_block_size=4, **_T5),
    _seq2seq("switch_transformers", num_experts=2, **_T5),
    _seq2seq("t5gemma", attention="eager", encoder=_DECODER | _SOFTCAP, decoder=_DECODER | _SOFTCAP,
             vocab_size=VOCABULARY),
    _seq2seq("t5gemma2", omitted=("max_position_embeddings",), vocab_size=VOCABULARY,
             decoder=_DECODER | _MIXED | {"query_pre_attn_scalar": 16},
             encoder={"text_config": _DECODER | _MIXED | {"query_pre_attn_scalar": 16},
                      "vision_config": _VISION, "mm_tokens_per_image": 4, "image_token_index": 98},
             image_token_index=98),
    _seq2seq("bart"),
    _seq2seq("mbart"),
    _seq2seq("pegasus"),
    _seq2seq("pegasus_x", block_size=8, num_global_tokens=4),
    _seq2seq("bigbird_pegasus", block_size=4, num_random_blocks=1),
    _seq2seq("marian"),
    _seq2seq("m2m_100"),
    _seq2seq("nllb-moe", num_experts=4, expert_capacity=64, encoder_sparse_step=2,
             decoder_sparse_step=2),
    _seq2seq("blenderbot"),
    _seq2seq("blenderbot-small"),
    _seq2seq("plbart"),
    _seq2seq("mvp"),
    _seq2seq("led", attention_window=_WINDOW, max_encoder_position_embeddings=128,
             max_decoder_position_embeddings=128),
    _seq2seq("bert2bert", model_type="encoder-decoder",
             encoder={"model_type": "bert", **_TEXT},
             decoder={"model_type": "bert", **_TEXT, "is_decoder": True,
                      "add_cross_attention": True}),
    _speech2seq("whisper", num_mel_bins=8, max_source_positions=TOKENS, max_target_positions=128),
    _speech2seq("speech_to_text", input_feat_per_channel=8, conv_channels=64,
                max_source_positions=TOKENS, max_target_positions=128),
    # encoders of images and sound
    _vision("vit"),
    _vision("deit"),
    _vision("dinov2"),
    _vision("dinov2_with_registers"),
    _vision("vit_msn"),
    _vision("aimv2_vision_model", model_class="Aimv2VisionModel"),
    _vision("pixtral", head_dim=16),
    _vision("beit"),
    _vision("data2vec-vision"),
    _vision("dinov3_vit"),
    _vision("ijepa"),
    _vision("clip_vision_model", model_class="CLIPVisionModel", projection_dim=64),
    _vision("siglip_vision_model", model_class="SiglipVisionModel"),
    _speech("wav2vec2"),
    _speech("hubert"),
    _speech("sew", squeeze_factor=1),
    _speech("wav2vec2-conformer", position_embeddings_type="relative"),
    _speech("wavlm"),
    _speech("data2vec-audio"),
)
# fmt: on


def select_architectures(names: Iterable[str] | None = None) -> list[Architecture]:
    """Return the architectures of these names, or all.

    Args:
        names: Names of architectures, or None.

    Raises:
        KeyError: A name is not that of an architecture.

    Example:
        >>> [architecture.kind for architecture in select_architectures(["bert", "llama"])]
        ['masked', 'causal']
    """
    by_name = {architecture.name: architecture for architecture in ARCHITECTURES}
    return [by_name[name] for name in (by_name if names is None else names)]
