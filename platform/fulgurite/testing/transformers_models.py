"""Tiny models of Hugging Face transformers, and a judge of what a strategy does to their attention.

A cell of the judge's table is an architecture in a mode, such as Mistral with packed documents. The
model runs twice through the Trainer, with its own attention and under the strategy, with the same
weights and in double precision; what both compute (logits, loss, the gradients of all parameters,
the tokens it generates) must agree.

Axes: B batch, N tokens, V vocabulary.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
import math
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import Strategy
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fulgurite.errors import FulguriteError

__all__ = [
    "ARCHITECTURES",
    "EXTRA_MODES",
    "MODES",
    "TOLERANCE",
    "Architecture",
    "Cell",
    "build_model",
    "compare_values",
    "compute_values",
    "judge_architecture",
    "measure_influence",
    "name_implementations",
    "select_architectures",
    "take_modes",
]

Kind = Literal["causal", "masked", "text", "seq2seq", "vision", "speech", "speech2seq"]
Verdict = Literal["exact", "refused", "unsupported", "wrong", "crashed"]
Values = dict[str, Tensor]

#: What counts in the totals.
MODES = (
    "plain", "right_padding", "left_padding", "packed", "generate", "generate_left_padding",
)  # fmt: skip
#: What is asked beside, and counts apart.
EXTRA_MODES = (
    "causality", "static_cache", "chunked_prefill", "prefix", "mask_4d_bool", "mask_4d_min",
    "bias_4d",
)  # fmt: skip
#: Largest difference that is rounding, relative to the largest number.
TOLERANCE = 1e-9

_BATCH, _TOKENS, _REAL, _VOCABULARY = 2, 48, 31, 99  # the second sequence has _REAL tokens
_PROMPT, _NEW = 24, 28  # together beyond all windows and chunks
_WINDOW = 16


@dataclass(frozen=True)
class Architecture:
    """A tiny model with random weights.

    Attributes:
        name: Of the row.
        kind: What goes in and what comes out.
        options: Of the configuration, over those of the kind.
        model_type: Of the configuration; the name by default.
        model_class: Name of a class of transformers; the automatic class of the kind by default.
        attention: The attention implementation that is the reference; by default what the model
            itself chooses.
        is_causal: Whether tokens of a decoder see no later ones.
        extra_modes: Modes that are asked of it beside the common ones.
        omitted: Options of the kind that this configuration does not take.
        has_token_types: Whether token types say which tokens see each other both ways.
    """

    name: str
    kind: Kind
    options: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    model_type: str = ""
    model_class: str = ""
    attention: str | None = None
    is_causal: bool = True
    extra_modes: tuple[str, ...] = ()
    omitted: tuple[str, ...] = ()
    has_token_types: bool = False


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
_MASKS_4D = ("mask_4d_bool", "mask_4d_min", "bias_4d")
_CACHES = ("static_cache", "chunked_prefill")


def _causal(name: str, *extra_modes: str, **options: Any) -> Architecture:
    special = {
        key: options.pop(key)
        for key in (
            "model_type",
            "model_class",
            "attention",
            "is_causal",
            "omitted",
            "has_token_types",
        )
        if key in options
    }
    return Architecture(name, "causal", options, extra_modes=("causality", *extra_modes), **special)


def _of(kind: Kind, name: str, **options: Any) -> Architecture:
    special = {
        key: options.pop(key)
        for key in ("model_type", "model_class", "attention", "omitted", "extra_modes")
        if key in options
    }
    return Architecture(name, kind, options, **special)


_T5GEMMA = _DECODER | {
    "attn_logit_softcapping": 1.0, "sliding_window": _WINDOW, "query_pre_attn_scalar": 16,
}  # fmt: skip

#: The zoo, decoders first.
ARCHITECTURES: tuple[Architecture, ...] = (
    _causal("llama", *_CACHES, *_MASKS_4D),
    _causal("mistral", *_CACHES, *_MASKS_4D, sliding_window=_WINDOW),
    _causal("ministral", *_CACHES, sliding_window=_WINDOW),
    _causal("qwen2", *_CACHES),
    _causal(
        "qwen2_window",
        model_type="qwen2",
        use_sliding_window=True,
        sliding_window=_WINDOW,
        max_window_layers=1,
    ),
    _causal("qwen3", *_CACHES, *_MASKS_4D),
    _causal("gemma", *_CACHES),
    _causal(
        "gemma2",
        *_CACHES,
        *_MASKS_4D,
        attention="eager",
        attn_logit_softcapping=1.0,
        sliding_window=_WINDOW,
        query_pre_attn_scalar=16,
    ),
    _causal(
        "gemma2_without_softcap",
        *_CACHES,
        model_type="gemma2",
        attn_logit_softcapping=None,
        sliding_window=_WINDOW,
        query_pre_attn_scalar=16,
    ),
    _causal(
        "gemma3_text",
        *_CACHES,
        sliding_window=_WINDOW,
        sliding_window_pattern=2,
        query_pre_attn_scalar=16,
    ),
    _causal(
        "gemma3_bidirectional",
        model_type="gemma3_text",
        sliding_window=_WINDOW,
        sliding_window_pattern=2,
        use_bidirectional_attention=True,
        query_pre_attn_scalar=16,
        is_causal=False,
    ),
    _causal(
        "vaultgemma",
        attention="eager",
        attn_logit_softcapping=1.0,
        sliding_window=_WINDOW,
        query_pre_attn_scalar=16,
    ),
    _causal("gpt2", *_CACHES, *_MASKS_4D, n_positions=128),
    _causal("gpt_neox", *_CACHES),
    _causal("gpt_bigcode", n_positions=128),
    _causal("gpt_oss", *_CACHES, *_MASKS_4D, attention="eager", sliding_window=_WINDOW, **_EXPERTS),
    _causal("granite", *_CACHES, attention_multiplier=0.3),
    _causal("granite_swa", *_CACHES, attention="eager", sliding_window=_WINDOW),
    _causal(
        "granitemoe_swa",
        attention="eager",
        sliding_window=_WINDOW,
        **_EXPERTS,
    ),
    _causal("granitemoe", **_EXPERTS),
    _causal("phi", *_CACHES),
    _causal("phi3", *_CACHES, sliding_window=_WINDOW),
    _causal("olmo", *_CACHES),
    _causal("olmo2", *_CACHES),
    _causal("olmo3", sliding_window=_WINDOW),
    _causal("cohere", *_CACHES),
    _causal("cohere2", *_CACHES, sliding_window=_WINDOW, sliding_window_pattern=2),
    _causal("starcoder2", *_CACHES, sliding_window=_WINDOW),
    _causal("stablelm", *_CACHES),
    _causal(
        "llama4_text",
        *_CACHES,
        attention_chunk_size=_WINDOW,
        intermediate_size_mlp=64,
        num_hidden_layers=4,
        no_rope_layers=[1, 1, 1, 0],
        **_EXPERTS,
    ),
    _causal(
        "deepseek_v2",
        *_CACHES,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=16,
        v_head_dim=16,
        first_k_dense_replace=1,
        num_key_value_heads=4,
        head_dim=8,
        n_group=1,
        topk_group=1,
        **_EXPERTS,
    ),
    _causal(
        "deepseek_v3",
        *_CACHES,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=16,
        v_head_dim=16,
        first_k_dense_replace=1,
        num_key_value_heads=4,
        head_dim=8,
        n_group=1,
        topk_group=1,
        **_EXPERTS,
    ),
    _causal(
        "minicpm3",
        *_CACHES,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=16,
        num_key_value_heads=4,
    ),
    _causal("smollm3", *_CACHES),
    _causal("glm", *_CACHES),
    _causal("glm4", *_CACHES),
    _causal("nemotron", *_CACHES),
    _causal("opt", *_CACHES, *_MASKS_4D, ffn_dim=64, word_embed_proj_dim=64),
    _causal(
        "xglm",
        *_CACHES,
        d_model=64,
        ffn_dim=64,
        attention_heads=4,
        num_layers=2,
    ),
    _causal("biogpt", *_CACHES),
    _causal("bloom", *_CACHES),
    _causal("falcon", *_CACHES, omitted=("head_dim",)),
    _causal("falcon_alibi", model_type="falcon", alibi=True, omitted=("head_dim",)),
    _causal("mpt", *_CACHES, d_model=64, n_heads=4, n_layers=2, max_seq_len=128),
    _causal("gptj", *_CACHES, rotary_dim=8),
    _causal("gpt_neo", *_CACHES, attention_types=[[["global", "local"], 1]], window_size=_WINDOW),
    _causal("codegen", *_CACHES, rotary_dim=8),
    _causal("mixtral", *_CACHES, sliding_window=_WINDOW, **_EXPERTS),
    _causal("qwen2_moe", *_CACHES, **_EXPERTS),
    _causal("qwen3_moe", *_CACHES, **_EXPERTS),
    _causal("persimmon", *_CACHES),
    _causal("helium", *_CACHES),
    _causal("exaone4", *_CACHES, sliding_window=_WINDOW, sliding_window_pattern=2),
    _causal("arcee"),
    _causal("seed_oss"),
    _causal("hunyuan_v1_dense"),
    _causal("apertus"),
    _causal("ernie4_5"),
    _causal("doge"),
    _causal("diffllama"),
    _causal("bitnet"),
    _causal("cwm", sliding_window=_WINDOW),
    _causal("nanochat"),
    _causal("olmoe", **_EXPERTS),
    _causal("phimoe", **_EXPERTS),
    _causal("jetmoe", kv_channels=16, **_EXPERTS),
    _causal("minimax", **_EXPERTS),
    _causal("dots1", n_shared_experts=1, n_group=1, topk_group=1, **_EXPERTS),
    _causal("flint", attention="eager", sliding_window=_WINDOW, **_EXPERTS),
    _causal("mimo_v2_flash", attention="eager", sliding_window=_WINDOW, **_EXPERTS),
    _causal("glm4_moe", n_group=1, topk_group=1, **_EXPERTS),
    _causal("lfm2"),
    _causal("jamba", attn_layer_period=2, attn_layer_offset=1, use_mamba_kernels=False, **_EXPERTS),
    _causal("falcon_h1"),
    _causal("modernbert-decoder", local_attention=_WINDOW, global_attn_every_n_layers=2),
    _causal("openai-gpt", n_positions=128),
    _causal("gpt_neox_japanese"),
    _causal("ctrl", dff=64, n_positions=128),
    _causal(
        "paligemma",
        "prefix",
        has_token_types=True,
        model_class="PaliGemmaForConditionalGeneration",
        text_config={"model_type": "gemma", **_DECODER},
        vision_config={"model_type": "siglip_vision_model", **_VISION, "projection_dim": 64},
        projection_dim=64,
        image_token_index=98,
    ),
    _of("masked", "bert"),
    _of("masked", "roberta"),
    _of("masked", "xlm-roberta"),
    _of("masked", "camembert"),
    _of("masked", "distilbert", dim=64, hidden_dim=64, n_heads=4, n_layers=2),
    _of("masked", "electra", embedding_size=64),
    _of("masked", "albert", embedding_size=64),
    _of("masked", "esm", position_embedding_type="rotary", mask_token_id=2),
    _of("masked", "deberta-v2", relative_attention=True, pos_att_type=["c2p", "p2c"]),
    _of("masked", "mpnet"),
    _of("masked", "modernbert", local_attention=_WINDOW, global_attn_every_n_layers=2),
    _of("text", "ultrabert"),
    _of("masked", "eurobert"),
    _of("masked", "ernie"),
    _of("masked", "data2vec-text"),
    _of("masked", "nystromformer", num_landmarks=8, segment_means_seq_len=_TOKENS),
    _of("masked", "big_bird", block_size=4, num_random_blocks=1, attention_type="block_sparse"),
    _of("masked", "longformer", attention_window=_WINDOW),
    _of("masked", "megatron-bert"),
    _of("masked", "roberta-prelayernorm"),
    _of("masked", "xlm-roberta-xl"),
    _of("masked", "rembert", input_embedding_size=64, output_embedding_size=64),
    _of("masked", "roformer", embedding_size=64),
    _of("masked", "nomic_bert"),
    _of(
        "text",
        "xlnet",
        omitted=("max_position_embeddings",),
        d_model=64,
        n_head=4,
        d_inner=64,
        n_layer=2,
    ),
    _of("text", "clip_text_model", model_class="CLIPTextModel", projection_dim=64),
    _of("text", "siglip_text_model", model_class="SiglipTextModel", projection_size=64),
    _of("seq2seq", "t5", **_T5),
    _of("seq2seq", "mt5", **_T5),
    _of("seq2seq", "umt5", **_T5),
    _of("seq2seq", "longt5", local_radius=8, **_T5),
    _of(
        "seq2seq",
        "longt5_global",
        model_type="longt5",
        local_radius=8,
        encoder_attention_type="transient-global",
        global_block_size=4,
        **_T5,
    ),
    _of("seq2seq", "switch_transformers", num_experts=2, **_T5),
    _of(
        "seq2seq",
        "t5gemma",
        attention="eager",
        is_encoder_decoder=True,
        encoder=_T5GEMMA,
        decoder=_T5GEMMA,
        vocab_size=_VOCABULARY,
    ),
    _of("seq2seq", "bart"),
    _of("seq2seq", "mbart"),
    _of("seq2seq", "pegasus"),
    _of("seq2seq", "pegasus_x", block_size=8, num_global_tokens=4),
    _of("seq2seq", "bigbird_pegasus", block_size=4, num_random_blocks=1),
    _of("seq2seq", "marian"),
    _of("seq2seq", "m2m_100"),
    _of(
        "seq2seq",
        "nllb-moe",
        num_experts=4,
        expert_capacity=64,
        encoder_sparse_step=2,
        decoder_sparse_step=2,
    ),
    _of("seq2seq", "blenderbot"),
    _of("seq2seq", "blenderbot-small"),
    _of("seq2seq", "plbart"),
    _of("seq2seq", "mvp"),
    _of(
        "seq2seq",
        "led",
        attention_window=_WINDOW,
        max_encoder_position_embeddings=128,
        max_decoder_position_embeddings=128,
    ),
    _of("speech2seq", "whisper", num_mel_bins=8, max_source_positions=48, max_target_positions=128),
    _of(
        "speech2seq",
        "speech_to_text",
        input_feat_per_channel=8,
        conv_channels=64,
        max_source_positions=48,
        max_target_positions=128,
    ),
    _of("vision", "vit"),
    _of("vision", "deit"),
    _of("vision", "dinov2"),
    _of("vision", "beit"),
    _of("vision", "dinov3_vit"),
    _of("vision", "ijepa"),
    _of("vision", "clip_vision_model", model_class="CLIPVisionModel", projection_dim=64),
    _of("vision", "siglip_vision_model", model_class="SiglipVisionModel"),
    _of("speech", "wav2vec2"),
    _of("speech", "hubert"),
    _of("speech", "wavlm"),
    _of("speech", "data2vec-audio"),
)


def select_architectures(names: Iterable[str] | None = None) -> list[Architecture]:
    """Return the architectures of these names, or all.

    Args:
        names: Of architectures, or None.

    Raises:
        KeyError: There is none of this name.

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
        seed: Of the weights.

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


def name_implementations(model: nn.Module) -> dict[str, str]:
    """Return the attention implementation of each sub-model, by its path.

    Args:
        model: Any module.

    Example:
        >>> name_implementations(nn.Linear(1, 1))
        {}
    """
    return {
        path: part.config._attn_implementation
        for path, part in model.named_modules()
        if hasattr(getattr(part, "config", None), "_attn_implementation")
    }


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
        real: Which rows of the output are no padding. Shape: (B, N), or None for all.
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
    if kind in ("seq2seq", "speech2seq"):
        modes.append("causality")
    if architecture.has_token_types:
        modes.append("prefix")
    return [*modes, *architecture.extra_modes]


def _draw_tokens(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, _VOCABULARY, shape, generator=generator)  # 0 to 2 are special


def _mask_padding(side: str, tokens: int, real: int) -> Tensor:
    mask = torch.ones(_BATCH, tokens, dtype=torch.int64)
    mask[1, real:] = 0
    return mask.flip(1) if side == "left" else mask


def _first_real(mask: Tensor) -> Tensor:
    # the label of the first real token is predicted from what is left of it, which is padding
    return (mask.cumsum(1) == 1) & mask.bool()


def _make_text_batch(architecture: Architecture, mode: str) -> _Batch:
    tokens = _draw_tokens(_BATCH, _TOKENS)
    inputs: dict[str, Any] = {"input_ids": tokens}
    real = None
    if mode in ("right_padding", "left_padding"):
        mask = _mask_padding(mode.removesuffix("_padding"), _TOKENS, _REAL)
        real = mask.bool()
        inputs = {"input_ids": tokens.where(real, 0), "attention_mask": mask}
    kind = architecture.kind
    if kind == "causal":
        labels = tokens if real is None else tokens.where(real & ~_first_real(mask), -100)
        inputs["labels"] = labels
    elif kind == "masked":
        labels = _draw_tokens(_BATCH, _TOKENS, seed=1)
        inputs["labels"] = labels if real is None else labels.where(real, -100)
    elif kind == "seq2seq":
        decoder, labels = (_draw_tokens(_BATCH, _TOKENS, seed=seed) for seed in (1, 2))
        if real is not None:
            decoder, labels = decoder.where(real, 0), labels.where(real, -100)
            inputs["decoder_attention_mask"] = mask
        inputs |= {"decoder_input_ids": decoder, "labels": labels}
    if mode == "packed":
        # each sequence has documents of its own
        starts = ([0, 20, 33], [0, 11, 40])
        positions = torch.stack([_restart_positions(row, _TOKENS) for row in starts])
        inputs |= {"position_ids": positions, "use_cache": False}
    if mode == "prefix":
        # the first tokens see each other both ways; whether 0 or 1 says so is the model's matter
        types = torch.ones(_BATCH, _TOKENS, dtype=torch.int64)
        types[0, :20] = types[1, :33] = 0
        inputs |= {"token_type_ids": types, "use_cache": False}
    if mode in _MASKS_4D:
        inputs["attention_mask"] = _draw_mask_4d(mode)
    return _Batch(inputs, real)


def _restart_positions(starts: Sequence[int], tokens: int) -> Tensor:
    stops = [*starts[1:], tokens]
    return torch.cat([torch.arange(b - a) for a, b in zip(starts, stops, strict=True)])


def _draw_mask_4d(mode: str) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    shape = (_BATCH, 1, _TOKENS, _TOKENS)
    seen = (torch.rand(shape, generator=generator) < 0.6).tril() | torch.eye(_TOKENS).bool()
    if mode == "mask_4d_bool":
        return seen
    least = torch.finfo(torch.float64).min
    bias = torch.zeros(shape, dtype=torch.float64)
    if mode == "bias_4d":
        bias = torch.randn(shape, generator=generator, dtype=torch.float64)
    return bias.masked_fill(~seen, least)


def _make_batch(architecture: Architecture, model: Any, mode: str) -> _Batch:
    generator = torch.Generator().manual_seed(0)
    kind, config = architecture.kind, model.config
    if kind == "vision":
        size = (config.num_channels, config.image_size, config.image_size)
        pixels = torch.randn(_BATCH, *size, generator=generator, dtype=torch.float64)
        return _Batch({"pixel_values": pixels})
    if kind == "speech":
        samples = 768
        wave = torch.randn(_BATCH, samples, generator=generator, dtype=torch.float64)
        if mode != "right_padding":
            return _Batch({"input_values": wave})
        mask = _mask_padding("right", samples, 512)
        frames = model._get_feat_extract_output_lengths(mask.sum(1))
        most = int(model._get_feat_extract_output_lengths(torch.tensor(samples)))
        real = torch.arange(most) < frames[:, None]
        return _Batch({"input_values": wave * mask, "attention_mask": mask}, real)
    if kind == "speech2seq":
        frames = 2 * config.max_source_positions
        size = (getattr(config, "num_mel_bins", 0), frames)
        if architecture.name == "speech_to_text":  # time first
            size = (frames, config.input_feat_per_channel)
        features = torch.randn(_BATCH, *size, generator=generator, dtype=torch.float64)
        decoder, labels = (_draw_tokens(_BATCH, _TOKENS, seed=seed) for seed in (1, 2))
        return _Batch({"input_features": features, "decoder_input_ids": decoder, "labels": labels})
    return _make_text_batch(architecture, mode)


def _pick_output(outputs: Any) -> Tensor:
    logits: Tensor | None = getattr(outputs, "logits", None)
    return outputs.last_hidden_state if logits is None else logits  # type: ignore[no-any-return]


def _run_step(architecture: Architecture, model: Any, mode: str) -> Values:
    """Loss and outputs of a training step."""
    batch = _make_batch(architecture, model, mode)
    outputs = model(**batch.inputs)
    output = _pick_output(outputs)
    rows = output.flatten(0, 1) if batch.real is None else output[batch.real]
    loss = getattr(outputs, "loss", None)
    if loss is None:
        generator = torch.Generator().manual_seed(4)
        weights = torch.randn(rows.shape, generator=generator, dtype=rows.dtype)
        loss = (rows * weights).sum() / math.sqrt(rows.numel())
    return {"loss": loss, "output": rows}


def _run_generation(architecture: Architecture, model: Any, mode: str) -> Values:
    """Tokens and the logits of each step."""
    batch = _make_batch(architecture, model, "plain")
    inputs: dict[str, Any] = {
        key: x for key, x in batch.inputs.items() if key not in ("labels", "decoder_input_ids")
    }
    if architecture.kind != "speech2seq":
        inputs["input_ids"] = inputs["input_ids"][:, :_PROMPT]
    if mode == "generate_left_padding":
        mask = _mask_padding("left", _PROMPT, 15)
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


def _run_chunks(architecture: Architecture, model: Any) -> Values:
    """Logits of a sequence that comes in three parts, with a cache."""
    import transformers

    tokens = _draw_tokens(_BATCH, _TOKENS)
    cache = transformers.DynamicCache(config=model.config)
    logits = []
    for part in tokens.split([19, _TOKENS - 20, 1], 1):
        outputs = model(input_ids=part, past_key_values=cache, use_cache=True)
        cache = outputs.past_key_values
        logits.append(outputs.logits)
    return {"output": torch.cat(logits, 1).flatten(0, 1)}


def _run_twice(architecture: Architecture, model: Any) -> Values:
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


class _Probe(LightningModule):
    """Runs one step of a model, and keeps what it computes."""

    def __init__(self, model: Any, compute: Callable[[], Values]) -> None:
        super().__init__()
        self.model, self.compute = model, compute
        self.values: Values = {}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        with _InFloat64():
            values = self.compute()
        self.values = {key: value.detach() for key, value in values.items()}
        return values["loss"]

    def on_after_backward(self) -> None:
        for name, parameter in self.model.named_parameters():
            if parameter.grad is not None:
                self.values[f"grad {name}"] = parameter.grad.detach().clone()

    def predict_step(self, batch: Any, batch_idx: int) -> None:
        with _InFloat64():
            self.values = self.compute()

    def train_dataloader(self) -> list[int]:
        return [0]

    def predict_dataloader(self) -> list[int]:
        return [0]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


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
        strategy: Of the Trainer.

    Returns:
        What is compared, by name: ``output`` with one real token a row, ``loss``, ``tokens``, and
        ``grad …`` for each parameter that has a gradient.
    """
    trains = mode in ("plain", "right_padding", "left_padding", "packed", "prefix", *_MASKS_4D)
    computes: dict[str, Callable[[], Values]] = {
        "generate": functools.partial(_run_generation, architecture, model, mode),
        "generate_left_padding": functools.partial(_run_generation, architecture, model, mode),
        "static_cache": functools.partial(_run_generation, architecture, model, mode),
        "chunked_prefill": functools.partial(_run_chunks, architecture, model),
        "causality": functools.partial(_run_twice, architecture, model),
    }
    compute = computes.get(mode, functools.partial(_run_step, architecture, model, mode))
    probe = _Probe(model, compute)
    model.zero_grad(set_to_none=True)
    with _silence():
        trainer = Trainer(
            accelerator="cpu", devices=1, strategy=strategy, precision="64-true", max_steps=1,
            logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False,
        )  # fmt: skip
        if trains:
            trainer.fit(probe)
        else:
            trainer.predict(probe)
    model.zero_grad(set_to_none=True)
    return probe.values


# --- the judge ----------------------------------------------------------------------------------


def compare_values(values: Values, reference: Values) -> tuple[float, str]:
    """Return the largest relative difference, and of what.

    A gradient is measured by its parameter's own, as long as that is not below a thousandth of
    the largest of all: the gradient of a key's bias is zero but for rounding.

    Args:
        values: What is judged.
        reference: What it should be.

    Returns:
        The difference relative to the largest number, infinite for other tokens, other shapes or
        numbers that are not finite; and its name.

    Example:
        >>> compare_values({"loss": torch.tensor(1.0)}, {"loss": torch.tensor(2.0)})
        (0.5, 'loss')
    """
    gradients = [x for name, x in reference.items() if name.startswith("grad ") and x.numel()]
    least = 1e-3 * max((float(x.abs().max()) for x in gradients), default=0.0)
    worst, where = 0.0, ""
    for name in {**reference, **values}:
        expected, actual = reference.get(name), values.get(name)
        if expected is None or actual is None:
            # no gradient is as good as one of zeros
            present = actual if expected is None else expected
            assert present is not None
            expected = torch.zeros_like(present) if expected is None else expected
            actual = torch.zeros_like(present) if actual is None else actual
        difference = _measure_difference(actual, expected, least if name[:5] == "grad " else 0.0)
        if not where or difference > worst:
            worst, where = difference, name
    return worst, where


def _measure_difference(actual: Tensor, expected: Tensor, least: float) -> float:
    if actual.shape != expected.shape:
        return math.inf
    if not expected.is_floating_point():
        return 0.0 if torch.equal(actual, expected) else math.inf
    if not expected.numel():
        return 0.0
    magnitude = max(float(expected.abs().max()), least, torch.finfo(expected.dtype).tiny)
    difference = float((actual - expected).abs().max()) / magnitude
    return math.inf if math.isnan(difference) else difference


@dataclass(frozen=True)
class Cell:
    """The judgement of an architecture in a mode.

    Attributes:
        architecture: Its name.
        mode: Of the run.
        verdict: ``exact``; ``refused``, by an error of fulgurite; ``unsupported``, where the
            model's own attention fails; ``wrong``; or ``crashed``, by another error.
        detail: What differs most, or the error.
        difference: Relative; None where there is none.
        seconds: Of both runs.
        calls: How often the strategy's attention was called, if it counts.
        schedule: How its last call was cut, if it tells.
    """

    architecture: str
    mode: str
    verdict: Verdict
    detail: str = ""
    difference: float | None = None
    seconds: float = 0.0
    calls: int | None = None
    schedule: str | None = None


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else ""


def judge_mode(
    architecture: Architecture, model: Any, mode: str, make_strategy: Callable[[], Strategy]
) -> Cell:
    """Compare a strategy with the model's own attention in a mode.

    Args:
        architecture: Which.
        model: Its model.
        mode: One of :data:`MODES` or :data:`EXTRA_MODES`.
        make_strategy: Makes a strategy of the Trainer.
    """
    began = time.perf_counter()
    cell = functools.partial(Cell, architecture.name, mode)
    implementations = name_implementations(model)
    try:
        reference = compute_values(architecture, model, mode)
    except Exception as error:  # whatever it is, the model itself does not do this
        return cell("unsupported", f"{type(error).__name__}: {_first_line(error)}")
    infinite = [x for x in reference.values() if x.is_floating_point() and not x.isfinite().all()]
    if infinite:
        return cell("unsupported", "its numbers are not finite")
    if mode == "causality":
        if float(reference["movement"]) > TOLERANCE:
            return cell("unsupported", "is not causal")
        reference = {"movement": torch.ones(1, dtype=torch.float64)}
    strategy = make_strategy()
    try:
        values = compute_values(architecture, model, mode, strategy)
        if mode == "causality":
            values = {"movement": 1 + values["movement"]}
        difference, where = compare_values(values, reference)
        verdict: Verdict = "exact" if difference <= TOLERANCE else "wrong"
        judged = cell(verdict, where, difference)
    except FulguriteError as error:
        judged = cell("refused", _first_line(error))
    except Exception as error:  # a crash is a verdict
        judged = cell("crashed", f"{type(error).__name__}: {_first_line(error)}")
    backend = getattr(strategy, "backend", None)
    changed = name_implementations(model) != implementations
    if changed:
        judged = cell("crashed", f"the model's attention is not put back (after: {judged.detail})")
    return Cell(
        judged.architecture, mode, judged.verdict, judged.detail, judged.difference,
        time.perf_counter() - began, getattr(backend, "calls", None),
        getattr(getattr(backend, "plan", None), "schedule", None),
    )  # fmt: skip


def judge_architecture(
    architecture: Architecture,
    make_strategy: Callable[[], Strategy],
    modes: Iterable[str] | None = None,
) -> list[Cell]:
    """Judge a strategy on an architecture, in all its modes or some.

    Args:
        architecture: Which.
        make_strategy: Makes a strategy of the Trainer.
        modes: Of these, those that it has; all by default.
    """
    model = build_model(architecture)
    asked = set(modes) if modes is not None else None
    cells = []
    for mode in take_modes(architecture, model):
        if asked is None or mode in asked:
            cells.append(judge_mode(architecture, model, mode, make_strategy))
            if cells[-1].detail.startswith("the model's attention is not put back"):
                model = build_model(architecture)
    return cells


def measure_influence(architecture: Architecture, model: Any) -> float:
    """Measure how far outputs move with the input at another position.

    If this is not far above :data:`TOLERANCE`, attention hardly matters and the judge is blind.

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
        other, start = x.clone(), 4
        if key == "pixel_values":
            other[..., : x.shape[-1] // 7, : x.shape[-1] // 7] *= -1  # the first patch
            start = 8
        elif key in ("input_values", "input_features"):
            other[..., : x.shape[-1] // 12] *= -1
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
