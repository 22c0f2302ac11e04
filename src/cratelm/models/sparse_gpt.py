"""Weight-sparse GPT, complete in this file: configuration, model, language model.

Source: Gao et al., "Weight-sparse transformers have interpretable circuits" (2025, arXiv 2511.13653). Most weights
are 0, which training arranges (`cratelm.train.weight_sparsity`), and activations are sparse at the listed places:
AbsTopK keeps the entries of largest magnitude and sets the others to 0.

    Z_0       = token embedding + position embedding
    Z_{l+1/2} = Z_l + AbsTopK(attention(AbsTopK(RMSNorm(Z_l))))        q, k, v through AbsTopK as well
    Z_{l+1}   = Z_{l+1/2} + AbsTopK(W_2 AbsTopK(GELU(W_1 AbsTopK(RMSNorm(Z_{l+1/2}))))))
    logits    = RMSNorm(Z_L) W^T + bigram[token] + b                   head not tied, b constant

The attention has a sink: one more key and value of zeros per head, with a learned logit. It imports only torch and
transformers, so that it can be saved with a model. Names of weights are those of the released checkpoints, except
`sink_logit` and `bigram_table.weight`.

Shape legend: B batch, T position, S cached and new positions, D width, K heads, P width of a head, H neurons of a
layer, V vocabulary, L layers.
"""

from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.configuration_utils import PreTrainedConfig
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

PLACES = ("attn_in", "attn_q", "attn_k", "attn_v", "attn_out", "mlp_in", "mlp_neuron", "mlp_out")
"""where AbsTopK can be: inputs and outputs of attention and MLP; q, k, v over all heads together; the neurons"""


class SparseGptConfig(PreTrainedConfig):
    """Shape and sparsity of a weight-sparse GPT.

    Raises `ValueError` for a fraction outside of 0 to 1, an unknown place, or a width that the heads do not divide.
    """

    model_type = "sparse_gpt"
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
    head_dim: int | None = None
    """P; None: D / K"""
    expansion: int = 4
    """H / D, if `intermediate_size` is None"""
    intermediate_size: int | None = None
    """H; None: expansion * D"""
    hidden_act: Literal["gelu", "relu"] = "gelu"
    activation_fraction: float = 0.25
    """fraction of the entries that AbsTopK keeps, of each token: int(fraction * n), at least 1"""
    activation_places: list[str] | tuple[str, ...] = PLACES
    """places of AbsTopK, of `PLACES`"""
    weight_fraction: float = 1 / 8
    """fraction of the entries of each matrix, embedding and bias that are not 0 after training"""
    use_bias: bool = True
    """biases in the four matrices of a block"""
    attention_sink: bool = True
    """one more key and value of zeros per head, with a learned logit"""
    bigram_table: bool = True
    """a table [V, V], whose row of the last token is added to the logits"""
    dropout: float = 0.0
    """probability; applied to the embedding and to the outputs of attention and MLP"""
    initializer_range: float = 0.02
    """standard deviation of the initial linear and embedding weights; the bigram table starts at 0"""
    use_cache: bool = True
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads"
                f" {self.num_attention_heads}: change one of them, or give head_dim"
            )
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads
        self.intermediate_size = self.intermediate_size or self.expansion * self.hidden_size
        self.activation_places = list(self.activation_places)
        for place in self.activation_places:
            if place not in PLACES:
                raise ValueError(f"activation_places has {place!r}, not one of {', '.join(PLACES)}")
        for name in ("activation_fraction", "weight_fraction"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} {getattr(self, name)} must be above 0 and at most 1")
        if self.hidden_act not in ("gelu", "relu"):
            raise ValueError(f"hidden_act is {self.hidden_act!r}, but it must be gelu or relu")


class AbsTopK(nn.Module):
    """Keep the entries of largest magnitude in the last dimension, and set the others to 0.

    The gradient goes through the kept entries.
    """

    def __init__(self, fraction: float):
        super().__init__()
        self.fraction = fraction

    def extra_repr(self) -> str:
        """Return the fraction that is kept."""
        return f"fraction={self.fraction}"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return [..., n] with int(fraction * n) entries of x [..., n], at least 1."""
        kept = max(1, int(self.fraction * x.shape[-1]))
        places = x.detach().abs().topk(kept, dim=-1, sorted=False).indices
        return torch.zeros_like(x).scatter(-1, places, x.gather(-1, places))


def _sparse(config: SparseGptConfig, place: str) -> nn.Module:
    """Return AbsTopK if the configuration lists this place, else a module that changes nothing."""
    listed = place in config.activation_places
    return AbsTopK(config.activation_fraction) if listed else nn.Identity()


class OutputMap(nn.Linear):
    """Map to the residual stream, with smaller initial weights."""


class SparseGptAttention(nn.Module):
    """Causal attention with a sink: [B, T, D] -> [B, T, D]."""

    def __init__(self, config: SparseGptConfig, layer_idx: int):
        super().__init__()
        assert config.head_dim is not None
        self.config, self.layer_idx, self.head_dim = config, layer_idx, config.head_dim
        inner = config.num_attention_heads * config.head_dim
        self.c_attn = nn.Linear(config.hidden_size, 3 * inner, bias=config.use_bias)
        self.c_proj = OutputMap(inner, config.hidden_size, bias=config.use_bias)
        """site (its input): outputs of the heads [B, T, K P]"""
        self.top_q = _sparse(config, "attn_q")
        self.top_k = _sparse(config, "attn_k")
        self.top_v = _sparse(config, "attn_v")
        heads = config.num_attention_heads
        self.sink_logit = nn.Parameter(torch.zeros(heads)) if config.attention_sink else None
        """[K]"""

    def forward(
        self,
        x: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the output [B, T, D] and, in eager mode, the weights [B, K, T, S], which the sink makes sum to less than 1."""
        q, k, v = self.c_attn(x).chunk(3, -1)
        q, k, v = (
            top(z).view(*x.shape[:-1], -1, self.head_dim).transpose(1, 2)
            for top, z in ((self.top_q, q), (self.top_k, k), (self.top_v, v))
        )  # [B, K, T, P]
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)  # [B, K, S, P]
        mask = _additive(attention_mask, q, k.shape[2])  # [B or 1, 1, T, S]
        if self.config._attn_implementation == "sdpa":
            heads, weights = self._sdpa(q, k, v, mask), None
        else:
            scores = q @ k.transpose(-1, -2) * self.head_dim**-0.5 + mask
            weights = F.softmax(self._with_sink(scores), dim=-1, dtype=torch.float32).to(v.dtype)
            weights = weights[..., : k.shape[2]]
            heads = weights @ v
        return self.c_proj(heads.transpose(1, 2).flatten(2)), weights

    def _sdpa(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        """Return outputs [B, K, T, P]; the sink is one more key and value of zeros, its logit in the mask."""
        if self.sink_logit is not None:
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
            mask = self._with_sink(mask.expand(-1, len(self.sink_logit), -1, -1))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    def _with_sink(self, scores: torch.Tensor) -> torch.Tensor:
        """Return [B, K, T, S + 1]: the scores [B, K, T, S], and the logit of the sink in one more column."""
        if self.sink_logit is None:
            return scores
        logit = self.sink_logit.to(scores.dtype).view(1, -1, 1, 1)
        return torch.cat([scores, logit.expand(*scores.shape[:-1], 1)], -1)


def _additive(mask: torch.Tensor | None, q: torch.Tensor, keys: int) -> torch.Tensor:
    """Return what is added to scores [B, K, T, S], 0 or the lowest number, whatever kind of mask is given.

    transformers gives a mask of numbers or of booleans, or none where it is plainly causal.
    """
    if mask is None:
        steps = torch.arange(keys, device=q.device)
        mask = (steps <= steps[-q.shape[2] :, None])[None, None]
    if mask.dtype != torch.bool:
        return mask.clamp_min(torch.finfo(q.dtype).min).to(q.dtype)
    return torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, torch.finfo(q.dtype).min)


class SparseGptMlp(nn.Module):
    """Two matrices with GELU and AbsTopK between them: [B, T, D] -> [B, T, D]."""

    def __init__(self, config: SparseGptConfig):
        super().__init__()
        assert config.intermediate_size is not None
        self.c_fc = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.use_bias)
        self.act = nn.GELU() if config.hidden_act == "gelu" else nn.ReLU()
        self.top = _sparse(config, "mlp_neuron")
        self.c_proj = OutputMap(config.intermediate_size, config.hidden_size, bias=config.use_bias)
        """site (its input): the neurons [B, T, H], after AbsTopK"""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return [B, T, D] for x [B, T, D]."""
        return self.c_proj(self.top(self.act(self.c_fc(x))))


class SparseGptBlock(GradientCheckpointingLayer):
    """Attention and MLP, each added to the residual stream: [B, T, D] -> [B, T, D]."""

    def __init__(self, config: SparseGptConfig, layer_idx: int):
        super().__init__()
        self.dropout = config.dropout
        self.ln_1 = nn.RMSNorm(config.hidden_size)  # eps: torch's own, that of the number format
        self.attn = SparseGptAttention(config, layer_idx)
        self.ln_2 = nn.RMSNorm(config.hidden_size)
        self.mlp = SparseGptMlp(config)
        self.attn_in, self.attn_out = _sparse(config, "attn_in"), _sparse(config, "attn_out")
        self.mlp_in, self.mlp_out = _sparse(config, "mlp_in"), _sparse(config, "mlp_out")

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Return the residual stream [B, T, D] after this block."""
        attended, _ = self.attn(
            self.attn_in(self.ln_1(hidden_states)),
            attention_mask=attention_mask,
            past_key_values=past_key_values,
        )
        hidden_states = hidden_states + self._dropped(self.attn_out(attended))
        written = self.mlp_out(self.mlp(self.mlp_in(self.ln_2(hidden_states))))
        return hidden_states + self._dropped(written)

    def _dropped(self, x: torch.Tensor) -> torch.Tensor:
        return F.dropout(x, self.dropout, self.training)


class BigramTable(nn.Embedding):
    """Table [V, V] that starts at 0: row i is added to the logits after token i."""


class SparseGptPreTrainedModel(PreTrainedModel):
    """Initial weights, and the features of transformers that the model supports."""

    config: SparseGptConfig
    base_model_prefix = "transformer"
    head_is_linear = False
    """logits are more than the last hidden state times the head's matrix"""
    supports_gradient_checkpointing = True
    _no_split_modules = ["SparseGptBlock"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_sdpa = True
    _can_compile_fullgraph = True
    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": SparseGptBlock,
        "attentions": OutputRecorder(SparseGptAttention, index=1),
    }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Draw N(0, r), r = `initializer_range`, and N(0, r / sqrt(2L)) in maps to the stream; sinks and table are 0."""
        super()._init_weights(module)
        if isinstance(module, OutputMap):
            std = self.config.initializer_range / (2 * self.config.num_hidden_layers) ** 0.5
            init.normal_(module.weight, mean=0.0, std=std)
        if isinstance(module, BigramTable):
            init.zeros_(module.weight)
        if isinstance(module, SparseGptAttention) and module.sink_logit is not None:
            init.zeros_(module.sink_logit)
        if isinstance(module, SparseGptForCausalLM):
            init.zeros_(module.final_logits_bias)  # type: ignore[arg-type]


class SparseGptModel(SparseGptPreTrainedModel):
    """Embeddings and blocks: token ids [B, T] -> normalised hidden states [B, T, D]."""

    def __init__(self, config: SparseGptConfig):
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.hidden_size)
        self.wpe = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.h = nn.ModuleList(SparseGptBlock(config, i) for i in range(config.num_hidden_layers))
        self.ln_f = nn.RMSNorm(config.hidden_size)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Return the token embedding."""
        return self.wte

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Set the token embedding."""
        self.wte = value

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
            inputs_embeds = self.wte(input_ids)  # [B, T, D]
        assert inputs_embeds is not None
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            past = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = (
                torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device)[None] + past
            )
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        hidden_states = inputs_embeds + self.wpe(position_ids)
        hidden_states = F.dropout(hidden_states, self.config.dropout, self.training)
        for block in self.h:
            hidden_states = block(
                hidden_states, attention_mask=mask, past_key_values=past_key_values, **kwargs
            )
        return BaseModelOutputWithPast(
            last_hidden_state=self.ln_f(hidden_states),
            past_key_values=past_key_values if use_cache else None,
        )


class SparseGptForCausalLM(SparseGptPreTrainedModel, GenerationMixin):
    """Weight-sparse GPT with its head, bigram table and constant bias of the logits."""

    _tied_weights_keys = {"lm_head.weight": "transformer.wte.weight"}  # noqa: RUF012

    def __init__(self, config: SparseGptConfig):
        super().__init__(config)
        self.transformer = SparseGptModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        rows = config.vocab_size
        self.bigram_table = BigramTable(rows, rows) if config.bigram_table else None
        self.register_buffer("final_logits_bias", torch.zeros(rows))
        self.post_init()

    def sparse_parameters(self) -> list[nn.Parameter]:
        """Return the tensors that training makes sparse: each matrix, embedding and bias.

        Not the gains of the norms, the logits of the sinks, and the bigram table.
        """
        modules = [m for m in self.modules() if isinstance(m, nn.Linear) or type(m) is nn.Embedding]
        unique = {id(p): p for m in modules for p in m.parameters()}
        return list(unique.values())

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

        With `labels` [B, T] also return the mean cross-entropy in nats per token; labels are shifted inside, and
        labels of -100 are ignored. Raises `ValueError` for embeddings instead of ids if there is a bigram table.
        """
        if input_ids is None and self.bigram_table is not None:
            raise ValueError("the bigram table reads input_ids: give them instead of inputs_embeds")
        outputs = self.transformer(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        last = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, last, :]) + self.final_logits_bias
        if self.bigram_table is not None:
            assert input_ids is not None
            logits = logits + self.bigram_table(input_ids[:, last])
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
