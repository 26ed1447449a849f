"""Networks that read sequences of tokens; their heads are applied apart, a few tokens at a time.

Axes: B batch, N tokens, E width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn
from torch.nn import functional as F

from fulgurite.errors import ConfigError
from fulgurite.extras import optional_import
from fulgurite.layers.transformer import Transformer, TransformerConfig, initialize
from fulgurite.options import make_options

__all__ = ["Decoder", "Encoder", "HuggingFaceCausalLM", "LanguageNetwork"]

_KEY = "--model.init_args.network.init_args"
_SIZES = TransformerConfig(256, layers=4, heads=4, kv_heads=2)


class LanguageNetwork(Protocol):
    """The interface of networks to language models: hidden states, and logits from some of them."""

    def __call__(
        self, tokens: Tensor, documents: Sequence[int] | None = None, prefix: int = 0
    ) -> Tensor:
        """Hidden states. Shape: (B, N) to (B, N, E)."""
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits. Shape: (..., E) to (..., V)."""
        ...


class _TokenNetwork(nn.Module):
    """Embedding, transformer and head.

    Args:
        vocab_size: V.
        transformer: Sizes of what is between embedding and head.
        is_causal: Whether tokens see earlier ones only.
        extra: Number of tokens that are read, but never predicted.
        tie: Use the embedding as head.
    """

    def __init__(
        self,
        vocab_size: int,
        transformer: TransformerConfig,
        *,
        is_causal: bool,
        extra: int,
        tie: bool,
    ) -> None:
        super().__init__()
        if vocab_size < 2:
            raise ConfigError(
                f"vocab_size={vocab_size} is too small.", f"Give {_KEY}.vocab_size of 2 or more."
            )
        self.vocab_size = vocab_size
        config = make_options(TransformerConfig, transformer)
        body = Transformer(config, is_causal=is_causal)  # first: it draws weights, in this order
        self.embedding = nn.Embedding(vocab_size + extra, config.width)
        self.transformer = body
        self.head = None if tie else nn.Linear(config.width, vocab_size, bias=False)
        initialize(self)

    def forward(
        self, tokens: Tensor, documents: Sequence[int] | None = None, prefix: int = 0
    ) -> Tensor:
        """Hidden states after the last norm.

        Args:
            tokens: Shape: (B, N).
            documents: First tokens of the documents; tokens see only their own.
            prefix: Number of first tokens that all tokens see (in a causal network).

        Returns:
            Shape: (B, N, E).
        """
        return self.transformer(self.embedding(tokens), documents, prefix)  # type: ignore[no-any-return]

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits. Shape: (..., E) to (..., V)."""
        if self.head is not None:
            return self.head(hidden)  # type: ignore[no-any-return]
        return F.linear(hidden, self.embedding.weight[: self.vocab_size])


class Decoder(_TokenNetwork):
    """A causal language model.

    Args:
        vocab_size: V.
        transformer: Sizes of the blocks, what their tokens see, and what bounds their memory. A
            ``window`` needs a strategy that streams.
        tie: Use the embedding as head.

    Shape: (B, N) to (B, N, E).

    Raises:
        ConfigError: The sizes do not fit together.

    Example:
        >>> import torch
        >>> network = Decoder(256, TransformerConfig(32, layers=1))
        >>> hidden = network(torch.zeros(2, 7, dtype=torch.int64))
        >>> hidden.shape, network.logits(hidden).shape
        (torch.Size([2, 7, 32]), torch.Size([2, 7, 256]))

    Source: Llama, arXiv 2302.13971; sizes: inferred.
    """

    def __init__(
        self, vocab_size: int, transformer: TransformerConfig = _SIZES, *, tie: bool = True
    ) -> None:
        super().__init__(vocab_size, transformer, is_causal=True, extra=0, tie=tie)


class Encoder(_TokenNetwork):
    """A network in which all tokens see all; for masked language modelling.

    Args:
        vocab_size: V; the token V itself stands for a hidden one.
        transformer: Sizes of the blocks, and what bounds their memory; without a ``window``.
        tie: Use the embedding as head.

    Attributes:
        mask_token: Token V, which stands for a hidden one.

    Shape: (B, N) to (B, N, E).

    Raises:
        ConfigError: The sizes do not fit together.

    Example:
        >>> import torch
        >>> network = Encoder(256, TransformerConfig(32, layers=1))
        >>> network.logits(network(torch.full((2, 7), network.mask_token))).shape
        torch.Size([2, 7, 256])

    Source: BERT, arXiv 1810.04805, with the blocks of :class:`Decoder`; sizes: inferred.
    """

    def __init__(
        self, vocab_size: int, transformer: TransformerConfig = _SIZES, *, tie: bool = True
    ) -> None:
        super().__init__(vocab_size, transformer, is_causal=False, extra=1, tie=tie)
        self.mask_token = vocab_size


class HuggingFaceCausalLM(nn.Module):
    """A causal language model of Hugging Face transformers.

    Args:
        name: Folder with a model, or name of one.
        config: Instead of ``name``: options of a configuration with its ``model_type``, for a model
            with random weights.
        download: Fetch the model if it is not on this machine.
        attention: Name of the attention implementation, such as ``eager`` or ``sdpa``.
        checkpoint: Compute layers again in backward instead of keeping their activations.

    Shape: (B, N) to (B, N, E).

    Raises:
        ConfigError: Not exactly one of name and config is given, the model cannot be made, or its
            logits are more than a linear head.
        MissingExtraError: transformers is not installed.
    """

    def __init__(
        self,
        name: str | None = None,
        config: dict[str, Any] | None = None,
        *,
        download: bool = False,
        attention: str | None = None,
        checkpoint: bool = False,
    ) -> None:
        super().__init__()
        if (name is None) == (config is None):
            raise ConfigError(
                "HuggingFaceCausalLM takes a name or a config.",
                f"Give one of {_KEY}.name, .config.",
            )
        transformers = optional_import("transformers", "transformers", "HuggingFaceCausalLM")
        auto_class = transformers.AutoModelForCausalLM
        try:
            if config is not None:
                model = auto_class.from_config(transformers.AutoConfig.for_model(**config))
            else:
                assert name is not None
                path = Path(name).expanduser()
                model = auto_class.from_pretrained(
                    path if path.exists() else name, local_files_only=not download
                )
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise ConfigError(
                f"transformers cannot make {name or config}: {_first_line(error)}",
                f"Give {_KEY}.name a folder with a model (or set {_KEY}.download=true), or "
                f"{_KEY}.config a model_type with its options.",
            ) from error
        # the Trainer's precision decides, not the file; loaded models come in eval mode
        self.model: nn.Module = model.float().train()
        scaled = [
            key
            for key in ("final_logit_softcapping", "logit_scale", "logits_scaling")
            if getattr(model.config, key, None) not in (None, 1, 1.0)
        ]
        if scaled:
            raise ConfigError(
                f"{model.config.model_type} changes its logits after the head ({scaled[0]}).",
                f"Choose a model without it in {_KEY}.name.",
            )
        self.vocab_size = int(model.config.vocab_size)
        if self.body is model:
            raise ConfigError(
                f"{type(model).__name__} does not say which part of it gives hidden states.",
                f"Choose another model in {_KEY}.name.",
            )
        if checkpoint:
            # the second is its name in older versions
            enable = getattr(model, "activation_checkpointing_enable", None)
            enable = enable or model.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        if attention is not None:
            self.use_attention(attention)

    @property
    def body(self) -> Any:
        """The part of the model that gives hidden states."""
        model: Any = self.model
        if model.base_model is not model:
            return model.base_model
        # some classes name no base model, and are their own
        parts = [part for part in model.children() if hasattr(part, "get_input_embeddings")]
        return parts[0] if len(parts) == 1 else model

    def use_attention(self, name: str) -> None:
        """Choose the attention implementation by its name in transformers.

        Raises:
            ConfigError: transformers has no attention of this name.
        """
        model: Any = self.model
        if not hasattr(model, "set_attn_implementation"):  # older versions
            model.config._attn_implementation = name
            return
        try:
            model.set_attn_implementation(name)
        except (ValueError, ImportError) as error:
            raise ConfigError(
                f"transformers cannot use the attention {name!r}: {_first_line(error)}",
                f"Set {_KEY}.attention to eager or sdpa.",
            ) from error

    def forward(
        self, tokens: Tensor, documents: Sequence[int] | None = None, prefix: int = 0
    ) -> Tensor:
        """Hidden states. Shape: (B, N) to (B, N, E).

        Raises:
            ConfigError: Documents or a prefix are given; these models take neither.
        """
        if documents is not None or prefix:
            raise ConfigError(
                "Models of transformers take no documents and no prefix here.",
                "Use fulgurite.models.stream_cqsa.Decoder, or data with one document a sequence.",
            )
        return self.body(input_ids=tokens, use_cache=False).last_hidden_state  # type: ignore[no-any-return]

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits. Shape: (..., E) to (..., V)."""
        model: Any = self.model
        return model.get_output_embeddings()(hidden)  # type: ignore[no-any-return]


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
