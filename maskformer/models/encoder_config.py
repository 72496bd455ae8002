"""The shape of an encoder, as one validated, hashable value."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from maskformer import masks
from maskformer.attention.dispatch import BACKENDS
from maskformer.checks import choose, integer, number, one_line, require, shown, typed_fields

NORMS = ("layernorm", "rmsnorm")
NORM_POSITIONS = ("post", "pre")
ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "swiglu", "geglu")
GATED_ACTIVATIONS = ("swiglu", "geglu")
POSITIONS = ("learned", "rotary", "alibi", "none")
ROUTER_SOFTMAXES = ("chosen", "all")
REMAT_POLICIES = ("none", "elementwise", "full", "dots", "dots_no_batch")
# What a mask in a config may name; bound to the batch when the model is traced.
MASK_ARRAYS = ("segment_ids", "valid")
DTYPES = ("float32", "bfloat16", "float16", "float64")
# Of each size; far beyond what is trained, and their products still fit the counters of shapes.
MOST = {"layers": 10_000, "width": 2**20, "heads": 2**16, "vocab_multiple": 2**20, "token_types": 2**20}
MOST_EXPERTS = 2**16
# What says how experts are routed and trained; without experts, none of it may be set.
EXPERT_FIELDS = (
    "experts_per_token", "moe_period", "expert_width", "expert_capacity", "shared_expert_width", "shared_expert_gate",
    "router_softmax", "balance_loss", "router_z_loss",
)


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
        experts: feed-forward layers side by side, of which a router picks some for every token (a mixture of
            experts, `models.experts`); 0 for the dense layer alone.
        experts_per_token: how many it picks.
        moe_period: every which layer has experts, counted so that the last of each group does; the others are dense.
        expert_width: hidden size of one expert; None means `mlp_width`.
        expert_capacity: None computes every token, whatever the balance. A number gives each expert `ceil(capacity *
            experts_per_token * length / experts)` places in every row; who comes later in the row is dropped.
        shared_expert_width: hidden size of a feed-forward layer for all tokens beside the experts (Dai et al. 2024); 0
            for none.
        shared_expert_gate: multiply its output by a sigmoid of the token, as in Qwen1.5-MoE.
        router_softmax: over which experts the weights sum to 1: the "chosen" ones (Mixtral, Qwen3-MoE) or "all" of them
            (Switch, OLMoE, Qwen1.5-MoE).
        balance_loss: factor of the load-balancing loss of every layer with experts (Fedus et al. 2022, equation 4).
        router_z_loss: factor of the router's z-loss of every such layer (Zoph et al. 2022, equation 5).
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
    experts: int = 0
    experts_per_token: int = 2
    moe_period: int = 1
    expert_width: int | None = None
    expert_capacity: float | None = None
    shared_expert_width: int = 0
    shared_expert_gate: bool = False
    router_softmax: str = "chosen"
    balance_loss: float = 0.01
    router_z_loss: float = 0.001
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
        typed_fields(self, "model", skip=("mask",))
        for field in ("vocab_size", "max_length", "layers", "width", "heads", "vocab_multiple"):
            integer(f"model.{field}", getattr(self, field), 1, MOST.get(field, 2**31 - 1))
        integer("model.token_types", self.token_types, 0, MOST["token_types"])
        for field, like in (("embedding_width", "width"), ("kv_heads", "heads"), ("head_dim", "width")):
            if getattr(self, field) is not None:
                integer(f"model.{field}", getattr(self, field), 1, MOST[like])
        if self.mlp_width is not None:
            integer("model.mlp_width", self.mlp_width, 1, 4 * MOST["width"])
        choose("model.norm", self.norm, NORMS)
        choose("model.norm_position", self.norm_position, NORM_POSITIONS)
        choose("model.activation", self.activation, ACTIVATIONS)
        choose("model.positions", self.positions, POSITIONS)
        choose("model.remat", self.remat, REMAT_POLICIES)
        choose("model.attention_implementation", self.attention_implementation, (None, *BACKENDS))
        for kind in ("param", "compute", "output"):
            self.dtype(kind)
        for field in ("hidden_dropout", "attention_dropout"):
            number(f"model.{field}", getattr(self, field), "a rate in [0, 1)", 0.0, 1.0)
        # In float32 a smaller one is 0, and the norm of a constant row NaN.
        number("model.norm_epsilon", self.norm_epsilon, "a number above 0, from 1e-30 to 1", 1e-30, 1.0, closed=True)
        number("model.initializer_range", self.initializer_range, "a number above 0 and at most 100", 0.0, 100.0,
               open_low=True, closed=True)
        number("model.rotary_base", self.rotary_base, "a wavelength above 0 and below 1e30", 0.0, 1e30, open_low=True)
        if self.logits_soft_cap is not None:
            number("model.logits_soft_cap", self.logits_soft_cap, "a cap above 0 and below 1e30, or None", 0.0, 1e30,
                   open_low=True)
        self._check_heads()
        self._check_experts()
        self._check_mask()
        if self.resolved_embedding_width != self.width and self.tied_embeddings and not self.head_transform:
            raise ValueError(
                f"model.embedding_width={self.embedding_width}: tied embeddings need the head's transform to come from "
                f"model.width={self.width} to it; set head_transform=True or tied_embeddings=False"
            )

    def _check_heads(self) -> None:
        if self.head_dim is None and self.width % self.heads:
            divisors = [n for n in range(1, min(self.width, MOST["heads"]) + 1) if self.width % n == 0]
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

    def _check_experts(self) -> None:
        integer("model.experts", self.experts, 0, MOST_EXPERTS)
        if not self.experts:
            defaults = {field.name: field.default for field in dataclasses.fields(self)}
            for name in EXPERT_FIELDS:
                require(
                    getattr(self, name) == defaults[name], f"model.{name}", getattr(self, name),
                    f"{defaults[name]!r} with model.experts=0; set model.experts to how many there are",
                )
            return
        integer("model.experts_per_token", self.experts_per_token, 1, self.experts)
        integer("model.moe_period", self.moe_period, 1, self.layers)
        if self.expert_width is not None:
            integer("model.expert_width", self.expert_width, 1, 4 * MOST["width"])
        if self.expert_capacity is not None:
            number("model.expert_capacity", self.expert_capacity, "a factor above 0 and at most 1000, or None to drop "
                   "no token", 0.0, 1e3, open_low=True, closed=True)
        integer("model.shared_expert_width", self.shared_expert_width, 0, 4 * MOST["width"])
        choose("model.router_softmax", self.router_softmax, ROUTER_SOFTMAXES)
        for name in ("balance_loss", "router_z_loss"):
            number(f"model.{name}", getattr(self, name), "a factor from 0 to below 1000", 0.0, 1e3)
        if self.shared_expert_gate and not self.shared_expert_width:
            raise ValueError(
                "model.shared_expert_gate=True: there is no shared expert; set model.shared_expert_width, or leave it "
                "False"
            )
        if self.router_softmax == "chosen" and self.experts_per_token == 1:
            raise ValueError(
                "model.router_softmax='chosen': over one chosen expert it is always 1, and the router would not learn; "
                "use 'all' with model.experts_per_token=1"
            )

    def _check_mask(self) -> None:
        if isinstance(self.mask, list):
            object.__setattr__(self, "mask", tuple(self.mask))
        entries = self.mask_pattern if isinstance(self.mask, (str, tuple)) else ()
        if not entries or not all(isinstance(entry, str) and entry.strip() for entry in entries):
            raise ValueError(
                f"model.mask={shown(self.mask)}: expected a mask such as 'causal & window(512)' or a tuple of them; "
                "'everything' masks nothing"
            )
        if len(entries) > self.layers:
            raise ValueError(f"model.mask: a pattern of {len(entries)} masks is longer than model.layers={self.layers}")
        for entry in entries:
            try:
                unbound = masks.parse(entry).unbound
            except ValueError as error:
                raise ValueError(f"model.mask: {one_line(str(error))}") from error
            unknown = [name for name in unbound if name not in MASK_ARRAYS]
            if unknown:
                raise ValueError(
                    f"model.mask={shown(entry)}: no array named {unknown[0]!r}; a model offers its masks "
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
            "mlp": math.gcd(*self._hidden_widths),
            # Without experts there is nothing along their axis, which any number divides.
            "experts": self.experts,
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
    def resolved_expert_width(self) -> int:
        return self.expert_width if self.expert_width is not None else self.resolved_mlp_width

    @property
    def expert_layers(self) -> int:
        """How many layers have experts in the place of the dense feed-forward layer."""
        return self.layers // self.moe_period if self.experts else 0

    def period(self, masks: int) -> int:
        """Layers after which masks that repeat after so many, and experts, begin again together."""
        return math.lcm(masks, self.moe_period if self.experts else 1)

    def stack_of(self, layer: int) -> tuple[str, int]:
        """Which stack of parameters has this layer, and where: "layers", or "expert_layers" for one with experts.

        >>> config = EncoderConfig(vocab_size=100, layers=4, experts=8, moe_period=2)
        >>> [config.stack_of(layer) for layer in range(4)]
        [('layers', 0), ('expert_layers', 0), ('layers', 1), ('expert_layers', 1)]
        """
        if not self.experts:
            return "layers", layer
        before, routed = layer // self.moe_period, (layer + 1) % self.moe_period == 0
        return ("expert_layers", before) if routed else ("layers", layer - before)

    @property
    def _hidden_widths(self) -> tuple[int, ...]:
        """The hidden size of every kind of feed-forward layer that the model has."""
        dense = (self.resolved_mlp_width,) if self.expert_layers < self.layers else ()
        experts = (self.resolved_expert_width, self.shared_expert_width) if self.experts else ()
        return (*dense, *experts)

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the token table: `vocab_size` rounded up to a multiple of `vocab_multiple`."""
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple

    @property
    def gated(self) -> bool:
        return self.activation in GATED_ACTIVATIONS

    def dtype(self, kind: str) -> Any:
        """The numpy dtype of "param", "compute" or "output".

        Raises:
          ValueError: not a dtype of `DTYPES`, or float64 where JAX would quietly make it float32.
        """
        field, name = f"model.{kind}_dtype", getattr(self, f"{kind}_dtype")
        choose(field, name, DTYPES)
        if name == "float64" and not jax.config.jax_enable_x64:
            raise ValueError(
                f"{field}='float64': JAX makes it float32 unless jax_enable_x64 is set; set the environment variable "
                "JAX_ENABLE_X64=1, or use 'float32'"
            )
        return jnp.dtype(name)
