"""Streamed attention as an attention implementation of Hugging Face transformers.

Axes: B batch, H query heads, G key/value heads, M queries, N keys, D head size.
"""

from __future__ import annotations

import inspect
import itertools
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from fulgurite.attention import Streamed
from fulgurite.attention.biases import DenseBias, SelectedKeys, TileBias
from fulgurite.attention.calls import AttentionCall
from fulgurite.attention.keywords import make_record
from fulgurite.errors import ConfigError, MissingExtraError
from fulgurite.extras import suggest_extra
from fulgurite.strategies.stream_mask import StreamMask
from fulgurite.strategies.transformers_checks import (
    check_direction,
    check_implementation,
    refuse_options,
)
from fulgurite.strategies.transformers_masks import MaskRequest, make_mask

__all__ = ["ModelOptions", "TransformersAttention", "attention_owners", "unreachable_models"]

_NUMBERS = itertools.count(1)


class TransformersAttention:
    """Answers the attention of transformers' models by a backend, or refuses it by name.

    Args:
        backend: Computes attention.
        name: Under which transformers knows it, with a number of its own, so that runs within
            runs keep apart.
    """

    def __init__(self, backend: Streamed, name: str) -> None:
        self.backend, self.name = backend, f"{name}_{next(_NUMBERS)}"
        self._previous: dict[int, str | None] = {}  # implementations, by identity of configurations

    def install(self, model: nn.Module) -> list[Callable[[], None]]:
        """Make it the attention of all transformers' models in a model.

        Args:
            model: Model of the run.

        Returns:
            What puts each model's own implementation back; empty if there is none in it that can
            be reached.

        Raises:
            ConfigError: An implementation is not of transformers, so what it computes is unknown.
            MissingExtraError: The installed version of transformers describes masks otherwise.
        """
        owners = [part for part in attention_owners(model) if _is_settable(part)]
        if not owners:
            return []
        import transformers
        from transformers import AttentionInterface, AttentionMaskInterface, masking_utils

        if "q_length" not in inspect.signature(masking_utils.sdpa_mask).parameters:
            raise MissingExtraError(
                f"transformers {transformers.__version__} describes masks in another way than the "
                "versions that streamed attention knows.",
                suggest_extra("transformers"),
            )
        configs = _configs_of(owners)
        functions = AttentionInterface()  # type: ignore[no-untyped-call]
        for config in configs:
            function = functions.get(config._attn_implementation)
            if not isinstance(getattr(function, "__self__", None), TransformersAttention):
                check_implementation(config, function)
        AttentionInterface.register(self.name, self.attend)
        AttentionMaskInterface.register(self.name, self.mask)
        before = [(config, config._attn_implementation_internal) for config in configs]
        self._previous = {id(config): implementation for config, implementation in before}
        for config in configs:
            config._attn_implementation_internal = self.name

        def undo() -> None:
            for config, implementation in before:
                config._attn_implementation_internal = implementation

        return [undo]

    def mask(self, **options: Any) -> StreamMask:
        """Return a mask; see :func:`.transformers_masks.make_mask`.

        Args:
            options: As transformers gives them. The implementation that the configuration had
                before decides what the model's own code expects.
        """
        is_additive = self._previous.get(id(options.get("config"))) == "eager"
        return make_mask(MaskRequest.of(options, is_additive=is_additive))

    def attend(  # noqa: PLR0917 (transformers' order)
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        **options: Any,
    ) -> tuple[Tensor, None]:
        """Attention as transformers asks for it.

        Args:
            module: Whose attention it is.
            query: Shape: (B, H, M, D).
            key: Shape: (B, G, N, D).
            value: Shape: (B, G, N, E).
            attention_mask: A :class:`StreamMask`, or a mask that the model's own code or the user
                made: boolean, or added to the scores.
            options: Further options of the call, as :class:`ModelOptions` reads them.

        Returns:
            Shape: (B, M, H, E); and None in the place of the weights.

        Raises:
            ConfigError: The model uses a feature that streamed attention does not support.
        """
        model_options = ModelOptions.of(module, options)
        if isinstance(attention_mask, StreamMask):
            check_direction(module, attention_mask)
            call = _masked_call((query, key, value), attention_mask, module, model_options)
            out = self.backend.attend(call)
        else:
            model_options.refuse_indices(module)
            mask = model_options.combine_masks(attention_mask, query.dtype)
            out = self.backend(
                query, key, value, mask, scale=model_options.scaling, softcap=model_options.softcap,
                sinks=model_options.all_sinks,
                **(model_options.masks(module, query, key) if attention_mask is None else {}),
            )  # fmt: skip
        return out.transpose(1, 2).contiguous(), None


@dataclass(frozen=True)
class ModelOptions:
    """What a model of transformers asks of its attention, beside tensors and a mask.

    Args:
        scaling: Scale of the scores.
        is_causal: Without a mask, whether queries see earlier keys only; as the module says by
            default.
        sliding_window: Without a mask, how many keys queries see: before them if causal, else on
            both sides. A mask has the window in it.
        softcap: Cap of the scores.
        s_aux: Sinks. Shape: (H,), (B, H), (B, H, M) or (B, H, M, 1).
        sinks: Another name of them.
        position_bias: Added to the scores. Shape: (B or 1, H, M, N).
        cu_seq_lens_q: Without a mask, where packed sequences begin and end. Shape: (S + 1,).
        cu_seq_lens_k: The same boundaries for the keys.
        indices: With a mask, the keys that each query sees of those that the mask lets it see.
            Shape: (B, M, K).
        block_indices: With a mask, the same of blocks of as many keys as the module's indexer
            says, for each of I groups of heads. Shape: (B, I, M, K).
    """

    scaling: float | None = None
    is_causal: bool | None = None
    sliding_window: int | None = None
    softcap: float | None = None
    s_aux: Tensor | None = None
    sinks: Tensor | None = None
    position_bias: Tensor | None = None
    cu_seq_lens_q: Tensor | None = None
    cu_seq_lens_k: Tensor | None = None
    indices: Tensor | None = None
    block_indices: Tensor | None = None

    @classmethod
    def of(cls, module: nn.Module, options: Mapping[str, Any]) -> ModelOptions:
        """Read the options of a call.

        Args:
            module: Whose attention it is.
            options: As transformers hands them on; ``dropout`` must be 0.

        Raises:
            ConfigError: The model uses a feature that streamed attention does not support.
        """
        names = {field.name for field in fields(cls)}
        refuse_options(module, {name: x for name, x in options.items() if name not in names})
        record = make_record(cls, options)
        if record.s_aux is not None and record.sinks is not None:
            raise ConfigError(
                f"{type(module).__name__} gives its attention both s_aux and sinks.",
                "Use --trainer.strategy=auto.",
            )
        return record

    def refuse_indices(self, module: nn.Module) -> None:
        """Refuse keys that are chosen where no mask of ours says what is seen.

        Raises:
            ConfigError: The module chooses keys.
        """
        if self.indices is not None or self.block_indices is not None:
            raise ConfigError(
                f"{type(module).__name__} chooses keys (indices) without a mask of its own.",
                "Use --trainer.strategy=auto.",
            )

    @property
    def all_sinks(self) -> Tensor | None:
        """Sinks by whatever name. Shape: (H,), (B, H) or (B, H, M)."""
        sinks = self.s_aux if self.sinks is None else self.sinks
        return sinks.squeeze(-1) if sinks is not None and sinks.ndim == 4 else sinks

    def combine_masks(self, mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """What hides keys or is added to scores, from a mask and the bias of positions.

        Args:
            mask: Boolean, or added to the scores.
            dtype: Type of the scores.
        """
        if mask is None:
            return self.position_bias
        if self.position_bias is None:
            return mask
        if mask.dtype == torch.bool:
            return torch.where(mask, self.position_bias, torch.finfo(dtype).min)
        return self.position_bias + mask

    def masks(self, module: nn.Module, query: Tensor, key: Tensor) -> dict[str, Any]:
        """Masks of a call that has none of its own, as streamed attention takes them.

        Raises:
            ConfigError: The module packs sequences in another way.
        """
        is_causal = self.is_causal
        if is_causal is None:
            is_causal = bool(getattr(module, "is_causal", True))
        masks: dict[str, Any] = {"is_causal": is_causal and query.shape[2] > 1}
        if self.sliding_window is not None:
            masks["window"] = _window(self.sliding_window, masks["is_causal"])
            masks["query_offset"] = "bottom_right"
        if self.cu_seq_lens_q is not None:
            ends = self.cu_seq_lens_q, self.cu_seq_lens_k
            masks["documents"] = _starts(module, ends, query.shape[2], key.shape[2])
        return masks


def _masked_call(
    tensors: tuple[Tensor, Tensor, Tensor], mask: StreamMask, module: nn.Module,
    options: ModelOptions,
) -> AttentionCall:  # fmt: skip
    """The call of query, key and value under a mask that says what is seen.

    Raises:
        ConfigError: The mask is of other sizes, or the module does not state how it chooses keys.
    """
    query, key, value = tensors
    source = mask.source
    if source.visible[0].keys > key.shape[2]:
        source = source.cropped(key.shape[2])
    sizes = source.visible[0]
    if (sizes.queries, sizes.keys) != (query.shape[2], key.shape[2]):
        raise ConfigError(
            f"The model gives {query.shape[2]} queries and {key.shape[2]} keys the mask of "
            f"{sizes.queries} queries and {sizes.keys} keys.",
            "Use --trainer.strategy=auto.",
        )
    batch = max(len(query), len(key), source.batch)
    query, key, value = (x.expand(batch, -1, -1, -1) for x in tensors)
    biases = (*_select_keys(module, query.shape[1], options), *source.biases)
    bias = None
    if options.position_bias is not None:
        biases = (DenseBias(options.position_bias), *biases)
        bias = options.position_bias if options.position_bias.requires_grad else None
    return AttentionCall(
        query, key, value, source.visible, biases=biases, bias=bias, scale=options.scaling,
        softcap=options.softcap, sinks=options.all_sinks,
    )  # fmt: skip


def _select_keys(module: nn.Module, heads: int, options: ModelOptions) -> tuple[TileBias, ...]:
    """Keys that sparse attention chose.

    Raises:
        ConfigError: The module does not state the length of its blocks.
    """
    biases: tuple[TileBias, ...] = ()
    if options.indices is not None:
        biases += (SelectedKeys(options.indices[:, None], heads),)
    if options.block_indices is not None:
        block = getattr(getattr(module, "indexer", None), "block_size", None)
        if not isinstance(block, int):
            raise ConfigError(
                f"{type(module).__name__} chooses blocks of keys (block_indices) of a length that "
                "its indexer does not say.",
                "Use --trainer.strategy=auto.",
            )
        biases += (SelectedKeys(options.block_indices, heads, block),)
    return biases


def _window(width: int, is_causal: bool) -> int | tuple[int, int]:
    """A window as FlashAttention's users mean it: the token itself is one of its keys."""
    return int(width) if is_causal else (int(width), int(width) - 1)


def _starts(
    module: nn.Module, ends: tuple[Tensor, Tensor | None], queries: int, keys: int
) -> list[int]:
    """First tokens of packed sequences, from the boundaries of queries and of keys.

    Raises:
        ConfigError: The sequences do not cover the queries, or keys are packed otherwise.
    """
    bounds = [int(x) for x in ends[0]]
    same = ends[1] is None or [int(x) for x in ends[1]] == bounds
    if not same or bounds[-1] != queries or queries != keys:
        raise ConfigError(
            f"{type(module).__name__} packs sequences (cu_seq_lens_q) in a way that streamed "
            "attention does not do: queries and keys are not the same tokens.",
            "Give position_ids alone, or use --trainer.strategy=auto.",
        )
    return sorted(set(bounds[:-1]))


def attention_owners(model: nn.Module) -> Iterator[Any]:
    """The models of transformers within a model, itself included.

    Args:
        model: Any.
    """
    if "transformers" not in sys.modules:  # then no part of the model is from there
        return
    from transformers import PreTrainedModel

    for part in model.modules():
        if isinstance(part, PreTrainedModel):
            yield part


def unreachable_models(model: nn.Module) -> list[str]:
    """Names of classes of transformers that compute attention in their own code.

    Args:
        model: Any.
    """
    names = {type(x).__name__ for x in attention_owners(model) if not _is_settable(x)}
    return sorted(names)


def _is_settable(part: Any) -> bool:
    """Whether a model asks transformers' interface for its attention."""
    return bool(part._can_set_attn_implementation())


def _configs_of(owners: list[Any]) -> list[Any]:
    """The configurations of models and of their parts, each once."""
    configs: dict[int, Any] = {}
    waiting = [owner.config for owner in owners]
    while waiting:
        config = waiting.pop()
        if id(config) in configs:
            continue
        configs[id(config)] = config
        parts = (getattr(config, name, None) for name in getattr(config, "sub_configs", ()))
        waiting += [part for part in parts if part is not None]
    return list(configs.values())
