"""The shape of an encoder, as one validated, hashable value."""

from __future__ import annotations

import dataclasses
import difflib
from typing import Any

import jax.numpy as jnp

from maskformer import masks

NORMS = ("layernorm", "rmsnorm")
NORM_POSITIONS = ("post", "pre")
ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "swiglu", "geglu")
GATED_ACTIVATIONS = ("swiglu", "geglu")
POSITIONS = ("learned", "rotary", "alibi", "none")
REMAT_POLICIES = ("none", "elementwise", "full", "dots", "dots_no_batch")
# What a mask in a config may name; bound to the batch when the model is traced.
MASK_ARRAYS = ("segment_ids", "valid")
DTYPES = ("float32", "bfloat16", "float16", "float64")


def _choose(field: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value in allowed:
        return
    close = difflib.get_close_matches(str(value), allowed, n=1, cutoff=0.4)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise ValueError(f"model.{field}={value!r}: expected one of {', '.join(allowed)}{hint}")


def _integer(field: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"model.{field}={value!r}: expected an integer of at least {least}")


def _rate(field: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 <= value < 1.0:
        raise ValueError(f"model.{field}={value!r}: expected a rate in [0, 1)")


def _positive(field: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0.0:
        raise ValueError(f"model.{field}={value!r}: expected a number above 0")


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """Shape and options of an encoder; the defaults are BERT-base (Devlin et al. 2019).

    Every field is checked when the value is made; a mistake raises a one-line `ValueError` that names the
    field, its value and what was expected.

    Attributes:
        vocab_size: number of token ids.
        max_length: longest row; the number of learned positions (only "learned" positions limit the length).
        layers, width, heads: depth, hidden size and attention heads.
        embedding_width: size of the embedding vectors, projected to `width` before the first layer and, in the
            head, back from it (ALBERT: Lan et al. 2020; 128 for 256 in Clark et al. 2020); None means `width`.
        kv_heads: key/value heads (grouped-query attention); None means `heads`.
        head_dim: size of a head; None means `width // heads`, which must then divide evenly.
        mlp_width: hidden size of the feed-forward layer; None means `4 * width`.
        norm: "layernorm" or "rmsnorm".
        norm_position: "post" (BERT: `norm(x + f(x))`) or "pre" (`x + f(norm(x))`, and one norm after the
            last layer).
        norm_epsilon: added to the variance. BERT uses 1e-12.
        activation: "gelu" (exact, by erf), "gelu_tanh", "relu", or gated: "swiglu", "geglu" (Shazeer 2020).
        positions: "learned" (a table), "rotary" (Su et al. 2021), "alibi" (Press et al. 2022, with |q - k|
            since an encoder looks both ways), or "none".
        rotary_base: the wavelength base of rotary positions.
        token_types: size of the token-type (sentence A/B) table; 0 for none. BERT uses 2.
        use_bias: biases in the attention, feed-forward and head projections.
        norm_bias: the additive parameter of a layernorm (an rmsnorm has none).
        embedding_norm: normalise the sum of the embeddings.
        tied_embeddings: the vocabulary projection is the token table transposed.
        head_transform: dense, activation and norm before the vocabulary projection, as in BERT.
        head_bias: a bias per vocabulary entry on the logits.
        hidden_dropout: rate after the embeddings and after each sublayer, before the residual addition.
        attention_dropout: rate on the attention probabilities.
        initializer_range: standard deviation of the truncated-normal initialiser (cut at two deviations).
        vocab_multiple: the token table is padded to a multiple of this, so that a mesh axis divides it.
            Logits always have exactly `vocab_size` entries.
        mask: attention mask per layer in the mask language, "and"-ed with the mask of the objective: one
            string, or a pattern that repeats over the layers, such as
            `("causal & window(512)",) * 5 + ("causal",)`.
        logits_soft_cap: cap on attention logits, `cap * tanh(logits / cap)`; None for none.
        attention_implementation: backend of `dot_product_attention`; None chooses.
        scan_layers: run the layers as one scanned body (compiles once however deep) or unrolled (larger
            program, which XLA can optimise across layers). Same parameters, same result.
        remat: what the backward pass recomputes: "none" (keep everything), "elementwise" (norms, activations,
            dropout and dense softmax; halves the memory at no cost in time), "dots" (everything but matrix
            products), "dots_no_batch" (everything but products with weights), "full" (each whole layer).
        param_dtype, compute_dtype, output_dtype: of the stored parameters, of matrix products and
            activations, and of the logits. Norm statistics and softmax are always float32 or wider.

    >>> EncoderConfig(vocab_size=100, width=64, heads=5)
    Traceback (most recent call last):
        ...
    ValueError: model.heads=5: does not divide model.width=64; use a divisor such as 4 or 8, or set head_dim
    >>> EncoderConfig(vocab_size=100, positions="rotery")
    Traceback (most recent call last):
        ...
    ValueError: model.positions='rotery': expected one of learned, rotary, alibi, none; did you mean 'rotary'?
    """

    vocab_size: int
    max_length: int = 512
    layers: int = 12
    width: int = 768
    heads: int = 12
    embedding_width: int | None = None
    kv_heads: int | None = None
    head_dim: int | None = None
    mlp_width: int | None = None
    norm: str = "layernorm"
    norm_position: str = "post"
    norm_epsilon: float = 1e-12
    activation: str = "gelu"
    positions: str = "learned"
    rotary_base: float = 10_000.0
    token_types: int = 0
    use_bias: bool = True
    norm_bias: bool = True
    embedding_norm: bool = True
    tied_embeddings: bool = True
    head_transform: bool = True
    head_bias: bool = True
    hidden_dropout: float = 0.1
    attention_dropout: float = 0.1
    initializer_range: float = 0.02
    vocab_multiple: int = 1
    mask: str | tuple[str, ...] = "everything"
    logits_soft_cap: float | None = None
    attention_implementation: str | None = None
    scan_layers: bool = True
    remat: str = "elementwise"
    param_dtype: str = "float32"
    compute_dtype: str = "float32"
    output_dtype: str = "float32"

    def __post_init__(self) -> None:
        for field in ("vocab_size", "max_length", "layers", "width", "heads", "vocab_multiple"):
            _integer(field, getattr(self, field), 1)
        _integer("token_types", self.token_types, 0)
        for field in ("embedding_width", "kv_heads", "head_dim", "mlp_width"):
            if getattr(self, field) is not None:
                _integer(field, getattr(self, field), 1)
        _choose("norm", self.norm, NORMS)
        _choose("norm_position", self.norm_position, NORM_POSITIONS)
        _choose("activation", self.activation, ACTIVATIONS)
        _choose("positions", self.positions, POSITIONS)
        _choose("remat", self.remat, REMAT_POLICIES)
        for field in ("param_dtype", "compute_dtype", "output_dtype"):
            _choose(field, getattr(self, field), DTYPES)
        for field in ("hidden_dropout", "attention_dropout"):
            _rate(field, getattr(self, field))
        for field in ("norm_epsilon", "rotary_base", "initializer_range"):
            _positive(field, getattr(self, field))
        if self.logits_soft_cap is not None:
            _positive("logits_soft_cap", self.logits_soft_cap)
        for flag in (field.name for field in dataclasses.fields(self) if field.type == "bool"):
            if not isinstance(getattr(self, flag), bool):
                raise ValueError(f"model.{flag}={getattr(self, flag)!r}: expected True or False")
        self._check_heads()
        self._check_mask()
        if self.resolved_embedding_width != self.width and self.tied_embeddings and not self.head_transform:
            raise ValueError(
                f"model.embedding_width={self.embedding_width}: tied embeddings need the head's transform to come from "
                f"model.width={self.width} to it; set head_transform=True or tied_embeddings=False"
            )

    def _check_heads(self) -> None:
        if self.head_dim is None and self.width % self.heads:
            divisors = [n for n in range(1, self.width + 1) if self.width % n == 0]
            below = [n for n in divisors if n < self.heads][-1:]
            near = below + [n for n in divisors if n > self.heads][:1]
            raise ValueError(
                f"model.heads={self.heads}: does not divide model.width={self.width}; "
                f"use a divisor such as {' or '.join(map(str, near))}, or set head_dim"
            )
        if self.heads % self.resolved_kv_heads:
            raise ValueError(
                f"model.kv_heads={self.kv_heads}: does not divide model.heads={self.heads}; "
                "each key/value head serves the same number of query heads"
            )
        if self.positions == "rotary" and self.resolved_head_dim % 2:
            raise ValueError(
                f"model.head_dim={self.resolved_head_dim}: rotary positions turn pairs of channels, so it must "
                "be even; change width, heads or head_dim"
            )

    def _check_mask(self) -> None:
        if isinstance(self.mask, list):
            object.__setattr__(self, "mask", tuple(self.mask))
        entries = self.mask_pattern if isinstance(self.mask, (str, tuple)) else ()
        if not entries or not all(isinstance(entry, str) and entry.strip() for entry in entries):
            raise ValueError(
                f"model.mask={self.mask!r}: expected a mask such as 'causal & window(512)' or a tuple of them; "
                "'everything' masks nothing"
            )
        if len(entries) > self.layers:
            raise ValueError(f"model.mask: a pattern of {len(entries)} masks is longer than model.layers={self.layers}")
        for entry in entries:
            try:
                unbound = masks.parse(entry).unbound
            except ValueError as error:
                raise ValueError(f"model.mask: {error}") from error
            unknown = [name for name in unbound if name not in MASK_ARRAYS]
            if unknown:
                raise ValueError(
                    f"model.mask={entry!r}: no array named {unknown[0]!r}; a model offers its masks "
                    f"{' and '.join(MASK_ARRAYS)}"
                )

    @property
    def mask_pattern(self) -> tuple[str, ...]:
        """The masks that repeat over the layers; layer `i` has entry `i % len(pattern)`."""
        return (self.mask,) if isinstance(self.mask, str) else tuple(self.mask)

    @property
    def axis_sizes(self) -> dict[str, int]:
        """Size of each logical axis that a mesh axis may have to divide."""
        return {
            "vocab": self.padded_vocab_size,
            "heads": self.heads,
            "kv_heads": self.resolved_kv_heads,
            "mlp": self.resolved_mlp_width,
            "embed": self.width,
            "length": self.max_length,
        }

    @property
    def resolved_embedding_width(self) -> int:
        return self.embedding_width if self.embedding_width is not None else self.width

    @property
    def resolved_head_dim(self) -> int:
        return self.head_dim if self.head_dim is not None else self.width // self.heads

    @property
    def resolved_kv_heads(self) -> int:
        return self.kv_heads if self.kv_heads is not None else self.heads

    @property
    def resolved_mlp_width(self) -> int:
        return self.mlp_width if self.mlp_width is not None else 4 * self.width

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the token table: `vocab_size` rounded up to a multiple of `vocab_multiple`."""
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple

    @property
    def gated(self) -> bool:
        return self.activation in GATED_ACTIVATIONS

    def dtype(self, kind: str) -> Any:
        """The numpy dtype of "param", "compute" or "output"."""
        return jnp.dtype(getattr(self, f"{kind}_dtype"))
