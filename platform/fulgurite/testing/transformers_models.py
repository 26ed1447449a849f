"""Tiny models of Hugging Face transformers, and what each computes in a mode.

A mode is how a model is used: trained on whole sequences, on padded ones or on packed documents,
asked to generate, and so on. Everything runs through the Trainer and in double precision, so that
the same model under two strategies can be compared; see :mod:`fulgurite.testing.attention_judge`.

Axes: B batch, N tokens.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
import math
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import Strategy
from torch import Tensor
from torch.overrides import TorchFunctionMode

__all__ = [
    "ARCHITECTURES",
    "EXTRA_MODES",
    "MODES",
    "Architecture",
    "Values",
    "build_model",
    "compute_values",
    "measure_influence",
    "select_architectures",
    "take_modes",
]

Kind = Literal["causal", "masked", "text", "seq2seq", "vision", "speech", "speech2seq"]
Values = dict[str, Tensor]

#: What counts in the totals.
MODES = (
    "plain", "right_padding", "left_padding", "packed", "generate", "generate_left_padding",
)  # fmt: skip
#: What is asked beside, and counts apart.
EXTRA_MODES = (
    "causality", "generate_right_padding", "static_cache", "chunked_prefill", "checkpointing",
    "prefix", "mask_4d_bool", "mask_4d_min", "bias_4d",
)  # fmt: skip
_BATCH, _TOKENS, _VOCABULARY = 2, 48, 99
_DECODED = 40  # tokens of the decoder of an encoder-decoder; others, so that no mask fits by chance
_PROMPT, _NEW = 24, 28  # together beyond all windows and chunks
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
    "vocab_size": _VOCABULARY, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 128, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_DECODER = _TEXT | {"num_key_value_heads": 2, "head_dim": 16}
_EXPERTS = {
    "num_local_experts": 4, "num_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32,
}  # fmt: skip
_SEQ2SEQ = {
    "vocab_size": _VOCABULARY, "d_model": 64, "encoder_layers": 2, "decoder_layers": 2,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "decoder_start_token_id": 1, "forced_eos_token_id": None,
}  # fmt: skip
_T5 = {
    "vocab_size": _VOCABULARY, "d_model": 64, "d_kv": 16, "d_ff": 64, "num_layers": 2,
    "num_decoder_layers": 2, "num_heads": 4, "pad_token_id": 0, "decoder_start_token_id": 0,
    "relative_attention_num_buckets": 8, "relative_attention_max_distance": 32,
}  # fmt: skip
_BIDIRECTIONAL = _TEXT | {"cls_token_id": 1, "sep_token_id": 2}
_VISION = {
    "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "image_size": 56, "patch_size": 8, "num_channels": 3,
}  # fmt: skip
_SPEECH = {
    "vocab_size": _VOCABULARY, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "conv_dim": (16, 16), "conv_stride": (4, 4), "conv_kernel": (8, 8),
    "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
}  # fmt: skip
_OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "causal": _DECODER, "masked": _BIDIRECTIONAL, "text": _BIDIRECTIONAL, "seq2seq": _SEQ2SEQ,
    "vision": _VISION, "speech": _SPEECH, "speech2seq": _SEQ2SEQ,
}  # fmt: skip
_CLASSES = {
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
_FIELDS = {"model_type", "model_class", "attention", "omitted", "ambiguous", "needs_token_types"}


def _row(kind: Kind, name: str, *extra_modes: str, **options: Any) -> Architecture:
    fields = {key: options.pop(key) for key in _FIELDS & options.keys()}
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
            hidden_size_per_layer_input=16, vocab_size_per_layer_input=_VOCABULARY),
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
    _masked("nystromformer", num_landmarks=8, segment_means_seq_len=_TOKENS),
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
             vocab_size=_VOCABULARY),
    _seq2seq("t5gemma2", omitted=("max_position_embeddings",), vocab_size=_VOCABULARY,
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
    _speech2seq("whisper", num_mel_bins=8, max_source_positions=_TOKENS, max_target_positions=128),
    _speech2seq("speech_to_text", input_feat_per_channel=8, conv_channels=64,
                max_source_positions=_TOKENS, max_target_positions=128),
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


# --- models -------------------------------------------------------------------------------------


def build_model(architecture: Architecture, seed: int = 0) -> Any:
    """Make a model in float64 whose attention matters.

    The usual small random weights make nearly uniform attention weights, under which a lost mask
    or bias hardly shows. So small matrices are multiplied by 6, and sinks, relative positions,
    zero biases and zero norms are drawn anew.

    Args:
        architecture: Which.
        seed: Seed of the weights.

    Returns:
        The model, in eval mode, without an end-of-sequence token that would stop generation.
    """
    import transformers

    options = {**_OPTIONS[architecture.kind], **architecture.options}
    config = transformers.AutoConfig.for_model(
        architecture.model_type or architecture.name,
        **{key: value for key, value in options.items() if key not in architecture.omitted},
    )
    model_class = getattr(transformers, architecture.model_class or _CLASSES[architecture.kind])
    make = getattr(model_class, "from_config", None) or model_class._from_config
    # the default for experts, grouped_mm, has no float64
    options = {"experts_implementation": "eager"}
    if architecture.attention:
        options["attn_implementation"] = architecture.attention
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = make(config, **options).double().eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                _strengthen(name, parameter)
    if getattr(model, "generation_config", None) is not None:
        for key in ("eos_token_id", "forced_eos_token_id", "forced_bos_token_id"):
            setattr(model.generation_config, key, None)
    return model


def _strengthen(name: str, parameter: Tensor) -> None:
    if any(word in name for word in ("sink", "relative", "position_bias", "rel_pos")):
        parameter.normal_()
    elif parameter.ndim > 1:
        if parameter.numel() > 1 and 0 < parameter.std() < 0.06:
            parameter.mul_(6)
    elif not parameter.any():
        parameter.normal_(0, 0.1)


class _InFloat64(TorchFunctionMode):
    """Lets transformers compute in float64 what it computes in float32 whatever the model's type.

    Its eager attention takes the softmax in float32, and most norms are in float32, so that
    nothing could be compared closer than to 1e-7. Only calls from transformers itself are
    changed, not those of the attention that is judged.
    """

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        single = func is torch.Tensor.float or any(
            argument is torch.float32 for argument in (*args, *kwargs.values())
        )
        if single and _comes_from_transformers(sys._getframe(1)):
            if func is torch.Tensor.float:
                return args[0].double()
            args = [torch.float64 if x is torch.float32 else x for x in args]
            kwargs = {key: torch.float64 if x is torch.float32 else x for key, x in kwargs.items()}
        return func(*args, **kwargs)


@contextlib.contextmanager
def _use_float64() -> Iterator[None]:
    """As in a step of a Trainer with ``precision="64-true"``."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _InFloat64():
            yield
    finally:
        torch.set_default_dtype(before)


def _comes_from_transformers(frame: Any) -> bool:
    # past torch's own frames, such as functional.softmax, to whoever called them
    while frame is not None and frame.f_globals.get("__name__", "").startswith("torch."):
        frame = frame.f_back
    return frame is not None and frame.f_globals.get("__name__", "").startswith("transformers.")


# --- what is computed in a mode -----------------------------------------------------------------


@dataclass(frozen=True)
class _Batch:
    """Inputs of a forward call.

    Attributes:
        inputs: Keywords of the model.
        real: Which tokens of the output are no padding; None for all. Shape: (B, N).
    """

    inputs: dict[str, Any]
    real: Tensor | None = None


def take_modes(architecture: Architecture, model: Any) -> list[str]:
    """Return the modes that can be asked of an architecture.

    Args:
        architecture: Which.
        model: Its model.
    """
    parameters = inspect.signature(model.forward).parameters
    kind = architecture.kind
    modes = ["plain"]
    if kind in ("causal", "masked", "text", "seq2seq", "speech") and "attention_mask" in parameters:
        modes.append("right_padding")
    if kind in ("causal", "masked", "text", "seq2seq") and "attention_mask" in parameters:
        modes.append("left_padding")
    if kind == "causal" and "position_ids" in parameters:
        modes.append("packed")
    if kind in ("causal", "seq2seq", "speech2seq") and hasattr(model, "generate"):
        modes.append("generate")
        if kind != "speech2seq":
            modes.append("generate_left_padding")
        if kind == "seq2seq":
            modes.append("generate_right_padding")
    if kind in ("causal", "seq2seq", "speech2seq"):
        modes.append("causality")
    return [x for x in (*modes, *architecture.extra_modes) if x not in architecture.ambiguous]


def _draw_tokens(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, _VOCABULARY, shape, generator=generator)  # 0 to 2 are special


def _draw_numbers(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _mask_padding(side: str, tokens: int, row: int = 1) -> Tensor:
    mask = torch.ones(_BATCH, tokens, dtype=torch.int64)
    mask[row, tokens * 2 // 3 :] = 0
    return mask.flip(1) if side == "left" else mask


def _mark_first_real(mask: Tensor) -> Tensor:
    # the label of the first real token is predicted from what is left of it, which is padding
    return (mask.cumsum(1) == 1) & mask.bool()


def _make_text_batch(architecture: Architecture, mode: str) -> _Batch:
    tokens = _draw_tokens(_BATCH, _TOKENS)
    inputs: dict[str, Any] = {"input_ids": tokens}
    real, side = torch.ones_like(tokens, dtype=torch.bool), "right"
    if mode != "right_padding":
        side = "left"
    if mode in ("right_padding", "left_padding", "checkpointing"):
        mask = _mask_padding(side, _TOKENS)
        real = mask.bool()
        inputs |= {"input_ids": tokens.where(real, 0), "attention_mask": mask}
    if architecture.kind == "causal":
        labeled = real & ~_mark_first_real(mask) if "attention_mask" in inputs else real
        inputs["labels"] = tokens.where(labeled, -100)
    elif architecture.kind == "masked":
        inputs["labels"] = _draw_tokens(_BATCH, _TOKENS, seed=1).where(real, -100)
    elif architecture.kind == "seq2seq":
        decoder, labels = (_draw_tokens(_BATCH, _DECODED, seed=seed) for seed in (1, 2))
        real = torch.ones_like(decoder, dtype=torch.bool)
        if "attention_mask" in inputs:
            mask = _mask_padding(side, _DECODED, row=0)
            real = mask.bool()
            inputs["decoder_attention_mask"] = mask
        inputs |= {"decoder_input_ids": decoder.where(real, 0), "labels": labels.where(real, -100)}
    if mode == "packed":
        # each sequence has documents of its own
        starts = ([0, 20, 33], [0, 11, 40])
        positions = torch.stack([_restart_positions(row, _TOKENS) for row in starts])
        inputs |= {"position_ids": positions, "use_cache": False}
    if mode == "prefix" or architecture.needs_token_types:
        # the first tokens see each other both ways; whether 0 or 1 says so is the model's matter
        types = torch.ones(_BATCH, _TOKENS, dtype=torch.int64)
        types[0, :20] = types[1, :33] = 0
        inputs["token_type_ids"] = types
    if mode in _MASKS_4D:
        inputs["attention_mask"] = _draw_mask_4d(mode)
    return _Batch(inputs, real)


def _restart_positions(starts: Sequence[int], tokens: int) -> Tensor:
    stops = [*starts[1:], tokens]
    return torch.cat([torch.arange(b - a) for a, b in zip(starts, stops, strict=True)])


def _draw_mask_4d(mode: str) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    shape = (_BATCH, 1, _TOKENS, _TOKENS)
    visible = (torch.rand(shape, generator=generator) < 0.6).tril() | torch.eye(_TOKENS).bool()
    if mode == "mask_4d_bool":
        return visible
    lowest = torch.finfo(torch.float64).min
    bias = _draw_numbers(*shape) if mode == "bias_4d" else torch.zeros(shape).double()
    return bias.masked_fill(~visible, lowest)


def _make_batch(architecture: Architecture, model: Any, mode: str) -> _Batch:
    kind, config = architecture.kind, model.config
    if kind == "vision":
        size = (config.num_channels, config.image_size, config.image_size)
        return _Batch({"pixel_values": _draw_numbers(_BATCH, *size)})
    if kind == "speech":
        samples = 768
        wave = _draw_numbers(_BATCH, samples)
        if mode != "right_padding":
            return _Batch({"input_values": wave})
        mask = _mask_padding("right", samples)
        frames = model._get_feat_extract_output_lengths(mask.sum(1))
        real = torch.arange(int(frames.max())) < frames[:, None]
        return _Batch({"input_values": wave * mask, "attention_mask": mask}, real)
    if kind == "speech2seq":
        features = _draw_numbers(_BATCH, 8, 2 * config.max_source_positions)
        if architecture.name == "speech_to_text":
            features = features.mT.contiguous()  # time first
        decoder, labels = (_draw_tokens(_BATCH, _DECODED, seed=seed) for seed in (1, 2))
        return _Batch({"input_features": features, "decoder_input_ids": decoder, "labels": labels})
    return _make_text_batch(architecture, mode)


def _pick_output(outputs: Any) -> Tensor:
    logits = getattr(outputs, "logits", None)
    output: Tensor = outputs.last_hidden_state if logits is None else logits
    return output


def _run_step(architecture: Architecture, model: Any, mode: str) -> Values:
    """Loss and outputs of a training step."""
    batch = _make_batch(architecture, model, mode)
    outputs = model(**batch.inputs)
    output = _pick_output(outputs)
    rows = output.flatten(0, 1) if batch.real is None else output[batch.real]
    loss = getattr(outputs, "loss", None)
    if loss is None:
        loss = (rows * _draw_numbers(*rows.shape, seed=4)).sum() / math.sqrt(rows.numel())
    return {"loss": loss, "output": rows}


def _run_generation(architecture: Architecture, model: Any, mode: str) -> Values:
    """Tokens and the logits of each step."""
    batch = _make_batch(architecture, model, "plain")
    inputs: dict[str, Any] = {
        key: x for key, x in batch.inputs.items() if key not in ("labels", "decoder_input_ids")
    }
    if architecture.kind != "speech2seq":
        inputs = {key: x[:, :_PROMPT] for key, x in inputs.items()}
    if mode in ("generate_left_padding", "generate_right_padding"):
        mask = _mask_padding(mode.split("_")[1], _PROMPT)
        inputs |= {"input_ids": inputs["input_ids"].where(mask.bool(), 0), "attention_mask": mask}
    if mode == "static_cache":
        inputs |= {"cache_implementation": "static", "disable_compile": True}
    result = model.generate(
        **inputs, do_sample=False, num_beams=1, max_new_tokens=_NEW, pad_token_id=0,
        return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    return {
        "output": torch.stack(result.logits, 1).flatten(0, 1),
        "tokens": result.sequences[:, -_NEW:],
    }


def _run_chunks(architecture: Architecture, model: Any, mode: str) -> Values:
    """Logits of a sequence that comes in three parts, with a cache."""
    import transformers

    tokens = _draw_tokens(_BATCH, _TOKENS)
    cache = transformers.DynamicCache(config=model.config)
    logits = []
    for part in tokens.tensor_split([19, _TOKENS - 1], 1):
        outputs = model(input_ids=part, past_key_values=cache, use_cache=True)
        cache = outputs.past_key_values
        logits.append(outputs.logits)
    return {"output": torch.cat(logits, 1).flatten(0, 1)}


def _run_twice(architecture: Architecture, model: Any, mode: str) -> Values:
    """How far earlier outputs move with the last token, in units of the largest."""
    batch = _make_batch(architecture, model, "plain")
    inputs = {key: x for key, x in batch.inputs.items() if key != "labels"}
    key = "input_ids" if architecture.kind == "causal" else "decoder_input_ids"
    other = inputs[key].clone()
    other[:, -1] = (other[:, -1] - 3 + 40) % (_VOCABULARY - 3) + 3
    first, second = (
        _pick_output(model(**{**inputs, key: x}))[:, :-1] for x in (inputs[key], other)
    )
    return {"movement": ((second - first).abs().max() / first.abs().max())[None]}


_RUNS: Mapping[str, Callable[[Architecture, Any, str], Values]] = {
    "generate": _run_generation, "generate_left_padding": _run_generation,
    "generate_right_padding": _run_generation, "static_cache": _run_generation,
    "chunked_prefill": _run_chunks, "causality": _run_twice,
}  # fmt: skip


class _Probe(LightningModule):
    """Runs one step of a model, and keeps what it computes."""

    def __init__(self, model: Any, compute: Callable[[], Values]) -> None:
        super().__init__()
        self.model, self.compute = model, compute
        self.values: Values = {}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        values = self.compute()
        self.values = {key: value.detach() for key, value in values.items()}
        return values["loss"]

    def on_after_backward(self) -> None:
        for name, parameter in self.model.named_parameters():
            if parameter.grad is not None:
                self.values[f"grad {name}"] = parameter.grad.detach().clone()

    def predict_step(self, batch: Any, batch_idx: int) -> None:
        self.values = self.compute()

    def train_dataloader(self) -> list[int]:
        return [0]

    def predict_dataloader(self) -> list[int]:
        return [0]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


@contextlib.contextmanager
def _checkpoint_layers(model: Any) -> Iterator[None]:
    """Compute layers again in backward, when the forward pass is long over."""
    # autograd leaves modes behind, so that what is computed again needs one of its own
    contexts = {"context_fn": lambda: (contextlib.nullcontext(), _InFloat64())}
    model.gradient_checkpointing_enable({"use_reentrant": False, **contexts})
    model.train()
    try:
        yield
    finally:
        model.eval()
        model.gradient_checkpointing_disable()


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Keep the Trainer and transformers from logging once a cell."""
    names = ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero", "transformers")
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for logger in loggers:
                logger.setLevel(logging.CRITICAL)
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def compute_values(
    architecture: Architecture, model: Any, mode: str, strategy: Strategy | str = "auto"
) -> Values:
    """Run a model in a mode through the Trainer.

    Args:
        architecture: Which.
        model: Its model.
        mode: One of :data:`MODES` or :data:`EXTRA_MODES`.
        strategy: Strategy of the Trainer.

    Returns:
        What is compared, by name: ``output`` with one real token a row, ``loss``, ``tokens``, and
        ``grad …`` for each parameter that has a gradient.
    """
    run = _RUNS.get(mode, _run_step)
    probe = _Probe(model, functools.partial(run, architecture, model, mode))
    model.zero_grad(set_to_none=True)
    with contextlib.ExitStack() as stack:
        stack.enter_context(_silence())
        stack.enter_context(_InFloat64())
        if mode == "checkpointing":
            stack.enter_context(_checkpoint_layers(model))
        trainer = Trainer(
            accelerator="cpu", devices=1, strategy=strategy, precision="64-true", max_steps=1,
            logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False,
        )  # fmt: skip
        if run is _run_step:
            trainer.fit(probe)
        else:
            trainer.predict(probe)
    model.zero_grad(set_to_none=True)
    return probe.values


def measure_influence(architecture: Architecture, model: Any) -> float:
    """Measure how far outputs move with the input at another position.

    If this is not far above the tolerance of the judge, attention hardly matters and the judge is
    blind.

    Args:
        architecture: Which.
        model: Its model.

    Returns:
        The largest movement, relative to the largest output; of an encoder-decoder the smaller of
        those with its encoder's and with its decoder's input.
    """
    batch = _make_batch(architecture, model, "plain")
    inputs = {key: x for key, x in batch.inputs.items() if key != "labels"}
    movements = []
    for key, x in inputs.items():
        if key == "token_type_ids":
            continue
        other, start = x.clone(), 4
        if key == "pixel_values":
            other[..., : x.shape[-1] // 7, : x.shape[-1] // 7] *= -1  # the first patch
            start = 8
        elif x.is_floating_point():
            time = 1 if x.shape[1] > x.shape[-1] else -1
            other.narrow(time, 0, x.shape[time] // 12).mul_(-1)
            start = 16
        else:
            other[:, 3] = (other[:, 3] - 3 + 40) % (_VOCABULARY - 3) + 3
        if key != "decoder_input_ids" and "decoder_input_ids" in inputs:
            start = 0
        with torch.no_grad(), _use_float64():
            first, second = (_pick_output(model(**{**inputs, key: value})) for value in (x, other))
        moved = (second - first)[:, start:].abs().max() / first.abs().max()
        movements.append(float(moved))
    return min(movements)
