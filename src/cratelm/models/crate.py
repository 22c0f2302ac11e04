"""CRATE for causal language modelling, complete in this file: configuration, model, language model.

Source: Bai & Ma, "Improving Neuron-level Interpretability with White-box Language Models"
(arXiv 2410.16443), after Yu et al., "White-Box Transformers via Sparse Rate Reduction"
(arXiv 2306.01129). It imports only torch, transformers and `tssa.py`, so that it can be saved with a model.

    Z_0       = token embedding + position embedding
    Z_{l+1/2} = Z_l + MSSA(LN(Z_l))             compression towards K subspaces, residual
    Z_{l+1}   = ISTA(LN(Z_{l+1/2}))             sparse coding in a dictionary, no residual
    logits    = LN(Z_L) E^T                     head tied to the token embedding

Two fields of the configuration replace one of the two steps, for comparison: `attention` (a query, or query and
value, of its own projection; token statistics) and `feedforward` (an MLP, or nothing).

Shape legend: B batch, T position, S cached and new positions, D width, K heads (subspaces),
P = D/K width of a head, H = expansion * D neurons of a layer, V vocabulary, L layers.
"""

from collections.abc import Callable
from typing import Any, Literal, cast

import torch
from torch import nn
from torch.nn import functional as F
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.utils.generic import can_return_tuple

try:
    from transformers import initialization as init
    from transformers.configuration_utils import PreTrainedConfig
    from transformers.utils.generic import merge_with_config_defaults
    from transformers.utils.output_capturing import OutputRecorder, capture_outputs

    causal_mask, STATES = cast("Any", create_causal_mask), 2
except ImportError:  # transformers 4.56, with which other tools load saved models
    from torch.nn import init
    from transformers.configuration_utils import PretrainedConfig as PreTrainedConfig
    from transformers.utils.generic import OutputRecorder  # pyright: ignore
    from transformers.utils.generic import check_model_inputs as capture_outputs

    STATES = 1
    """number of the arguments that `DynamicLayer.lazy_initialization` takes: keys, and values in version 5"""

    def merge_with_config_defaults(func: Callable) -> Any:
        """Return the function as it is: `check_model_inputs` does the same."""
        return func

    def causal_mask(  # pyright: ignore
        inputs_embeds: torch.Tensor, past_key_values: Any, **kwargs: Any
    ) -> Any:
        """Return the mask of version 5's function from that of version 4."""
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        return create_causal_mask(
            input_embeds=inputs_embeds,  # pyright: ignore
            cache_position=past + torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device),  # pyright: ignore
            past_key_values=past_key_values,
            **kwargs,
        )


from cratelm.models.tssa import RunningSums, Tssa


class CrateConfig(PreTrainedConfig):
    """Shape and sparse-coding constants of a CRATE language model.

    Raises `ValueError` for a width that the heads do not divide, or a constant out of its range.
    """

    model_type = "crate"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012 (transformers reads a list)

    vocab_size: int = 50304
    max_position_embeddings: int = 1024
    """longest sequence, in tokens"""
    hidden_size: int = 768
    """D"""
    num_hidden_layers: int = 12
    """L"""
    num_attention_heads: int = 12
    """K"""
    expansion: int = 4
    """H / D: how overcomplete the dictionary is"""
    attention: Literal["mssa", "query", "standard", "tssa"] = "mssa"
    """mssa: one projection is query, key and value; query: a second projection is the query; standard: query, key
    and value are three projections; tssa: token statistics self-attention, in linear time (`tssa.py`)"""
    feedforward: Literal["ista", "mlp", "none"] = "ista"
    """ista: sparse coding; mlp: two matrices with ReLU between them and no biases, added to its input; none: the
    compression step alone, a model without a sparse code"""
    ista_steps: int = 2
    """number of unrolled sparse-coding steps; the paper uses 2"""
    step_size: float = 0.1
    """eta of the proximal gradient step"""
    threshold: float = 0.1
    """lambda, weight of the l1 norm; each step subtracts eta * lambda"""
    ista_residual: bool = False
    """add the block's input to its output (as CRATE-alpha does; the paper does not)"""
    decoupled_dictionary: bool = False
    """reconstruct with a second dictionary (as CRATE-alpha does; the paper does not)"""
    dropout: float = 0.0
    """probability; applied to the embedding, the attention weights and the attention output"""
    layer_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    """standard deviation of the initial linear and embedding weights"""
    use_cache: bool = True
    tie_word_embeddings: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of"
                f" num_attention_heads {self.num_attention_heads}: change one of them"
            )
        for name in ("vocab_size", "num_hidden_layers", "expansion", "ista_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name, values in (
            ("attention", ("mssa", "query", "standard", "tssa")),
            ("feedforward", ("ista", "mlp", "none")),
        ):
            if getattr(self, name) not in values:
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}, but it must be one of {', '.join(values)}"
                )
        if self.step_size <= 0 or self.threshold < 0:
            raise ValueError(
                f"step_size {self.step_size} must be above 0 and threshold {self.threshold} at least 0"
            )

    @property
    def num_neurons(self) -> int:
        """Return H, the number of neurons per layer; without a second step, the D subspace codes."""
        return self.hidden_size * (1 if self.feedforward == "none" else self.expansion)


class SharedProjectionLayer(DynamicLayer):
    """Cache of one layer with a single tensor [B, K, S, P]: in MSSA the keys are the values."""

    @property
    def values(self) -> torch.Tensor | None:  # type: ignore[override]
        """Return the keys."""
        return self.keys

    @values.setter
    def values(self, _: torch.Tensor | None) -> None:
        """Set nothing: whatever the base class does to the values, it has already done to the keys."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append key_states [B, K, T, P]; return all keys [B, K, S, P] twice, as keys and as values."""
        if self.keys is None:
            self.lazy_initialization(*(key_states, value_states)[:STATES])
        assert self.keys is not None
        self.keys = torch.cat([self.keys, key_states], dim=-2)
        return self.keys, self.keys


class CrateCache(Cache):
    """Cache for `generate`: half the bytes of GPT-2's at the same shape.

    With `attention="standard"` it is as large as GPT-2's, with "tssa" it has three sums per layer, whatever the
    length of the text. `config`: that of the model; None stands for one with `attention="mssa"`.
    """

    def __init__(self, config: CrateConfig | None = None) -> None:
        kinds: dict[str, Any] = {"standard": DynamicLayer, "tssa": RunningSums}
        attention = "mssa" if config is None else config.attention
        super().__init__(layer_class_to_replicate=kinds.get(attention, SharedProjectionLayer))


def attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return outputs [B, T, K, P] and weights [B, K, T, S], for `attn_implementation="eager"`."""
    scores = query @ key.transpose(-1, -2) * scaling  # [B, K, T, S]
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(value.dtype)
    weights = F.dropout(weights, dropout, module.training)
    return (weights @ value).transpose(1, 2), weights


class OutputMap(nn.Linear):
    """Map from the heads' outputs to the residual stream, with smaller initial weights.

    It is a separate class because, for models that are not part of the library, transformers calls
    `_init_weights` only for modules that have parameters themselves.
    """


class Mssa(nn.Module):
    """Multi-head subspace self-attention: one projection is query, key and value (paper, section 2).

    With `attention="query"` a second projection gives the query, and with "standard" a third one the key, so that
    this is the attention of other transformers: one projection cannot look back for a token unlike itself.
    """

    def __init__(self, config: CrateConfig, layer_idx: int):
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.head_dim = config.hidden_size // config.num_attention_heads  # P
        self.scaling = self.head_dim**-0.5
        self.is_causal = True
        width, kind = config.hidden_size, config.attention
        self.projection = nn.Linear(width, width, bias=False)
        self.query = nn.Linear(width, width, bias=False) if kind != "mssa" else None
        self.key = nn.Linear(width, width, bias=False) if kind == "standard" else None
        # An Identity computes nothing: its output is where hooks read and edit activations. Its path in the
        # model is named in models/sites.py, interop/ and saved models, so a rename reaches all of these.
        self.subspace = nn.Identity()
        """site: subspace codes U^T x [B, T, D], head after head"""
        self.heads = nn.Identity()
        """site: outputs of the heads [B, T, D], before the output map"""
        self.output = OutputMap(config.hidden_size, config.hidden_size)

    def forward(
        self,
        x: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the output [B, T, D] and, if the implementation has them, the attention weights."""
        codes = self.subspace(self.projection(x))  # [B, T, D]
        value = self._by_head(codes)
        query = value if self.query is None else self._by_head(self.query(x))
        key = value if self.key is None else self._by_head(self.key(x))
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)  # [B, K, S, P]
        functions = ALL_ATTENTION_FUNCTIONS
        find = getattr(functions, "get_interface", functions.get)  # transformers 5, and 4
        interface: Callable = find(self.config._attn_implementation or "eager", attend)
        dropout = self.config.dropout
        heads, weights = interface(
            self,
            query,
            key,
            value,
            attention_mask,
            scaling=self.scaling,
            dropout=dropout if self.training else 0.0,
            **kwargs,
        )  # [B, T, K, P]
        heads = self.heads(heads.reshape(x.shape))  # [B, T, D]
        return F.dropout(self.output(heads), dropout, self.training), weights

    def _by_head(self, x: torch.Tensor) -> torch.Tensor:
        """Return [B, K, T, P] of [B, T, D]."""
        return x.view(*x.shape[:-1], -1, self.head_dim).transpose(1, 2)


class Ista(nn.Module):
    """Non-negative sparse coding by unrolled proximal gradient steps (paper, section 2).

        A_0 = 0;  A_{k+1} = ReLU(A_k + eta D^T (x - D A_k) - eta lambda);  out = D A_steps

    This takes 2 * steps products with D (four at the paper's two steps): the first residual is x
    itself, and each later one is formed in the narrow space [D] before it is multiplied by D^T.
    """

    def __init__(self, config: CrateConfig):
        super().__init__()
        self.steps, self.step_size = config.ista_steps, config.step_size
        self.threshold = config.threshold
        shape = (config.num_neurons, config.hidden_size)
        self.dictionary = nn.Parameter(torch.empty(shape))
        """D^T [H, D]: row i is the atom of neuron i"""
        self.decoder = nn.Parameter(torch.empty(shape)) if config.decoupled_dictionary else None
        """second dictionary [H, D], initialised as a copy of the first"""
        self.code = nn.Identity()
        """site: the neurons, A_steps [B, T, H], at least 0"""

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """Return the sparse code [..., H] of x [..., D].

        `analysis/sparse_coding.py` repeats these steps to measure the objective along them.
        """
        atoms, eta = self.dictionary, self.step_size
        shift = (
            -eta * self.threshold * x.new_ones(len(atoms))
        )  # [H], as bias: added inside the product
        code = F.relu(F.linear(eta * x, atoms, shift))
        for _ in range(self.steps - 1):
            residual = x - code @ atoms  # [..., D]
            code = F.relu(code + F.linear(eta * residual, atoms, shift))
        return code

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return D A [..., D], the sparse code of x [..., D] decoded."""
        return self.code(self.encode(x)) @ (
            self.dictionary if self.decoder is None else self.decoder
        )


class Mlp(nn.Module):
    """Two matrices with ReLU between them, and no biases: [B, T, D] -> [B, T, D]."""

    def __init__(self, config: CrateConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.num_neurons, bias=False)
        self.fc2 = OutputMap(config.num_neurons, config.hidden_size, bias=False)
        """site (its input): the neurons [B, T, H]"""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return [..., D] for x [..., D]."""
        return self.fc2(F.relu(self.fc1(x)))


class CrateBlock(GradientCheckpointingLayer):
    """One compression step and one sparse-coding step: [B, T, D] -> [B, T, D].

    The modules keep the names `mssa` and `ista` of the two steps where the configuration replaces the first one;
    an MLP in the place of the second is `mlp`.
    """

    def __init__(self, config: CrateConfig, layer_idx: int):
        super().__init__()
        self.residual, self.layer_idx, self.dropout = (
            config.ista_residual,
            layer_idx,
            config.dropout,
        )
        width, eps = config.hidden_size, config.layer_norm_eps
        self.norm_mssa = nn.LayerNorm(width, eps=eps)
        self.mssa = (
            Tssa(width, config.num_attention_heads, config.max_position_embeddings)
            if config.attention == "tssa"
            else Mssa(config, layer_idx)
        )
        if config.feedforward == "ista":
            self.norm_ista = nn.LayerNorm(width, eps=eps)
            self.ista = Ista(config)
        elif config.feedforward == "mlp":
            self.norm_mlp = nn.LayerNorm(width, eps=eps)
            self.mlp = Mlp(config)
        self.feedforward = config.feedforward

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        position_ids: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Return the residual stream [B, T, D] after this block.

        `attention_mask` is that of an attention function; for TSSA it is [B, T], 1 at tokens and 0 at padding.
        """
        normed = self.norm_mssa(hidden_states)
        if isinstance(self.mssa, Tssa):
            compressed = self.mssa(
                normed, attention_mask, position_ids, past_key_values, self.layer_idx
            )
            compressed = F.dropout(compressed, self.dropout, self.training)
        else:
            compressed, _ = self.mssa(
                normed, attention_mask=attention_mask, past_key_values=past_key_values, **kwargs
            )
        hidden_states = hidden_states + compressed
        if self.feedforward == "none":
            return hidden_states
        if self.feedforward == "mlp":
            return hidden_states + self.mlp(self.norm_mlp(hidden_states))
        sparse = self.ista(self.norm_ista(hidden_states))
        return hidden_states + sparse if self.residual else sparse


class CratePreTrainedModel(PreTrainedModel):
    """Initial weights, and the features of transformers that the model supports."""

    config: CrateConfig
    base_model_prefix = "model"
    head_is_linear = True
    """logits are the last hidden state times the head's matrix, so that a loss need not keep them all"""
    supports_gradient_checkpointing = True
    _no_split_modules = ["CrateBlock"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": CrateBlock,
        "attentions": OutputRecorder(Mssa, index=1),
    }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Draw N(0, r), r = `initializer_range`; the attention output map N(0, r / sqrt(2L)); D uniform in +-sqrt(6/D)."""
        super()._init_weights(module)
        if isinstance(module, Ista):
            bound = (6 / module.dictionary.shape[1]) ** 0.5
            init.uniform_(module.dictionary, -bound, bound)
            if module.decoder is not None:
                copy = getattr(init, "copy_", torch.Tensor.copy_)  # torch's own has none
                copy(module.decoder, module.dictionary)
        if isinstance(module, Tssa):
            init.ones_(module.temperature)
            init.zeros_(module.denominator_bias)
        if isinstance(module, OutputMap | Tssa):
            output = module.output if isinstance(module, Tssa) else module
            std = self.config.initializer_range / (2 * self.config.num_hidden_layers) ** 0.5
            init.normal_(output.weight, mean=0.0, std=std)


class CrateModel(CratePreTrainedModel):
    """Embeddings and blocks: token ids [B, T] -> normalised hidden states [B, T, D]."""

    def __init__(self, config: CrateConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.layers = nn.ModuleList(CrateBlock(config, i) for i in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Return the token embedding."""
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Set the token embedding."""
        self.embed_tokens = value

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Return the normalised hidden states [B, T, D] of token ids [B, T]."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)  # [B, T, D]
        assert inputs_embeds is not None
        if use_cache and past_key_values is None:
            past_key_values = CrateCache(self.config)
        if position_ids is None:
            past = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = (
                torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device)[None] + past
            )
        if self.config.attention == "tssa":
            mask = _token_mask(attention_mask, inputs_embeds, past_key_values)
        else:
            mask = causal_mask(
                config=self.config,
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                position_ids=position_ids,
            )
        hidden_states = inputs_embeds + self.embed_positions(position_ids)
        hidden_states = F.dropout(hidden_states, self.config.dropout, self.training)
        for block in self.layers:
            hidden_states = block(
                hidden_states,
                attention_mask=mask,
                past_key_values=past_key_values,
                position_ids=position_ids,
                **kwargs,
            )
        return BaseModelOutputWithPast(
            last_hidden_state=self.norm(hidden_states),
            past_key_values=past_key_values if use_cache else None,
        )


def _token_mask(
    attention_mask: torch.Tensor | None, embeds: torch.Tensor, past_key_values: Cache | None
) -> torch.Tensor | None:
    """Return the mask [B, T] of the new positions for TSSA: 1 at tokens, 0 at padding; None without padding.

    Raises `ValueError` for a mask between pairs of positions, which TSSA does not have, and for another cache.
    """
    if past_key_values is not None and not isinstance(past_key_values, CrateCache):
        raise ValueError(
            f"TSSA keeps running sums, and not the keys of a {type(past_key_values).__name__}: pass CrateCache(config)"
        )
    if attention_mask is None:
        return None
    if attention_mask.ndim != 2:
        raise ValueError(
            f"TSSA has no attention between two positions: its mask is [batch, positions], not {attention_mask.ndim}-d"
        )
    return attention_mask[:, -embeds.shape[1] :].float()


class CrateForCausalLM(CratePreTrainedModel, GenerationMixin):
    """CRATE with the language-model head, tied to the token embedding."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: CrateConfig):
        super().__init__(config)
        self.model = CrateModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Return logits [B, T, V]; only those of the last `logits_to_keep` positions if that is above 0.

        With `labels` [B, T] also return the mean cross-entropy in nats per token; labels are shifted
        inside, and labels of -100 are ignored.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        last = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, last, :])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict, *args: Any, **kwargs: Any
    ) -> Any:
        """Use `CrateCache` where `generate` would use its plain default cache."""
        callers_cache = model_kwargs.get("past_key_values")
        result = super()._prepare_cache_for_generation(  # type: ignore[misc]
            generation_config, model_kwargs, *args, **kwargs
        )
        default_cache = model_kwargs.get("past_key_values")
        plain = generation_config.cache_implementation in (None, "dynamic")
        if callers_cache is None and plain and type(default_cache) is DynamicCache:
            model_kwargs["past_key_values"] = CrateCache(self.config)  # type: ignore[attr-defined]
        return result
