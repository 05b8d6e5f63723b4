"""The text-conditioned video transformer: building it, training it by flow matching.

B batch, L text tokens, S video tokens, D text width, C latent channels;
latents are (B, C, t, h, w) with S = t * h * w.
"""

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanAttention
from t2v.precision import fast_products
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

# The number of text positions WanPipeline pads every prompt to.
CONTEXT = 512
SPECIAL = ("<pad>", "</s>", "<unk>")


def build_tokenizer(words: Iterable[str], spellings: dict[str, str]) -> PreTrainedTokenizerFast:
    """A lower-casing tokenizer of the given words; `spellings` maps patterns to what they mean."""
    vocabulary = {word: i for i, word in enumerate((*SPECIAL, *words))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    respelled = [normalizers.Replace(Regex(rf"\b({a})\b"), b) for a, b in spellings.items()]
    plain = [normalizers.NFKC(), normalizers.Lowercase()]
    plain.append(normalizers.Replace(Regex(r"[^\w\s]"), " "))
    tokenizer.normalizer = normalizers.Sequence(plain + respelled)
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", vocabulary["</s>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=CONTEXT,
    )


def build_text_encoder(vocab_size: int, width: int, layers: int) -> UMT5EncoderModel:
    """An untrained UMT5 encoder of `layers` layers."""
    return UMT5EncoderModel(
        UMT5Config(
            vocab_size=vocab_size,
            d_model=width,
            d_kv=16,
            d_ff=2 * width,
            num_layers=layers,
            num_heads=width // 16,
            relative_attention_num_buckets=16,
            relative_attention_max_distance=32,
            dropout_rate=0.0,
            pad_token_id=0,
            eos_token_id=1,
        )
    )


def build_transformer(*, latent_channels: int, text_width: int, **options) -> WanTransformer3DModel:
    """An untrained Wan transformer with one token per latent position."""
    return WanTransformer3DModel(
        patch_size=(1, 1, 1),
        in_channels=latent_channels,
        out_channels=latent_channels,
        text_dim=text_width,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        **options,
    )


def merge_padding(
    embeddings: torch.Tensor, mask: torch.Tensor, context: int = CONTEXT
) -> tuple[torch.Tensor, torch.Tensor]:
    """Stand one zero embedding in for all the padding of a context.

    Takes (B, L, D) embeddings with a (B, L) mask of real tokens; gives (B, L + 1, D) and the
    (B, 1, 1, L + 1) term to add to cross-attention logits. `n` equal keys weigh as much as one
    key whose logit is larger by log(n).
    """
    real = F.pad(mask.bool(), (0, 1))
    length = real.sum(1)
    bias = torch.where(real, 0.0, -math.inf)
    rows = torch.arange(len(length))
    bias[rows, length] = (context - length).log().to(bias.dtype)
    embeddings = F.pad(embeddings, (0, 0, 0, 1)) * real[..., None]
    return embeddings, bias[:, None, None]


class TrainingAttention:
    """WanAttnProcessor with float32 rotation tables and a settable cross-attention bias."""

    def __init__(self) -> None:
        self.bias = None

    def over_video(
        self, attn: WanAttention, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        """Self-attention (B, H, S, D) of a layer."""
        return attend(query, key, value)

    def __call__(
        self,
        attn: WanAttention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Attend (B, S, D) video tokens to themselves or to (B, L, D) text tokens."""
        source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query = attn.norm_q(attn.to_q(hidden_states)).unflatten(2, (attn.heads, -1))
        key = attn.norm_k(attn.to_k(source)).unflatten(2, (attn.heads, -1))
        value = attn.to_v(source).unflatten(2, (attn.heads, -1))
        if rotary_emb is not None:
            query, key = (_rotate(x, *rotary_emb) for x in (query, key))
        query, key, value = (x.type_as(value).transpose(1, 2) for x in (query, key, value))
        if encoder_hidden_states is None:
            out = self.over_video(attn, query, key, value)
        else:
            out = attend(query, key, value, self.bias.type_as(query))
        return attn.to_out[0](out.transpose(1, 2).flatten(2))


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Dense attention; at these lengths the fused CPU kernel is fast in float32 only."""
    if query.dtype is torch.float32:
        rows = query.shape[2]
        bias = None if bias is None else bias.expand(-1, -1, rows, -1)
        return F.scaled_dot_product_attention(query, key, value, bias)
    # Autocast would write out the logits in float32.
    with torch.autocast("cpu", enabled=False):
        logits = (query * query.shape[-1] ** -0.5) @ key.mT
        logits = logits if bias is None else logits + bias
        return logits.softmax(-1) @ value


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of (B, S, H, D) by (1, S, 1, D) tables."""
    turn = torch.complex(cos[..., 0::2].float(), sin[..., 1::2].float())
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turn).flatten(-2)


class FlowModel(torch.nn.Module):
    """The transformer with its text encoder, as trained together."""

    def __init__(self, transformer: WanTransformer3DModel, text_encoder: UMT5EncoderModel) -> None:
        super().__init__()
        self.transformer = transformer
        self.text_encoder = text_encoder

    attention_type = TrainingAttention

    def use_training_attention(self) -> "FlowModel":
        """Switch to merged padding and float32 rotation tables."""
        self.attention = self.attention_type()
        for block in self.transformer.blocks:
            block.attn1.processor = block.attn2.processor = self.attention
        rope = self.transformer.rope
        rope.freqs_cos, rope.freqs_sin = rope.freqs_cos.float(), rope.freqs_sin.float()
        return self

    def compile_blocks(self, backend: str = "inductor") -> "FlowModel":
        """Fuse what surrounds the matrix products, which makes a step 1.8 times as fast on a CPU.

        The first step of every few sizes then takes minutes.
        """
        # batches of one and of many, clips of many sizes, with gradients and without
        torch._dynamo.config.recompile_limit = 32
        for block in self.transformer.blocks:
            block.compile(backend=backend)
        return self

    def forward(
        self, latents: torch.Tensor, sigma: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        """Velocity (B, C, t, h, w) at noise level sigma (B,) for (B, L) token ids."""
        embeddings = self.encode_text(ids, mask)
        return self.transformer(latents, sigma * 1000, embeddings, return_dict=False)[0]

    def encode_text(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Embeddings (B, L + 1, D) of (B, L) token ids, with the bias that layers add for them."""
        embeddings = self.text_encoder(ids, mask).last_hidden_state
        embeddings, self.attention.bias = merge_padding(embeddings, mask)
        return embeddings


def sample_sigma(count: int, shift: float, generator: torch.Generator) -> torch.Tensor:
    """Noise levels (B,): logit-normal, a fifth of them uniform, shifted towards noise."""
    normal = torch.sigmoid(torch.randn(count, generator=generator))
    uniform = torch.rand(count, generator=generator)
    u = torch.where(torch.rand(count, generator=generator) < 0.2, uniform, normal)
    return (shift * u / (1 + (shift - 1) * u)).clamp(1e-3, 1.0)


def flow_loss(
    model: FlowModel,
    latents: torch.Tensor,
    tokens: tuple[torch.Tensor, torch.Tensor],
    shift: float,
    seed: int,
) -> torch.Tensor:
    """Mean squared velocity error of (B, C, t, h, w) clean latents under (ids, mask)."""
    generator = torch.Generator().manual_seed(seed)
    sigma = sample_sigma(len(latents), shift, generator)
    noise = torch.randn(latents.shape, generator=generator)
    level = sigma.view(-1, 1, 1, 1, 1)
    with fast_products():
        velocity = model((1 - level) * latents + level * noise, sigma, *tokens)
    return (velocity.float() - (noise - latents)).square().mean()
