"""Tiny random models of many families. In each, every size is different, so that a mixed-up axis cannot pass by luck.

    model = build("llama_gqa")
    @pytest.mark.parametrize("name", FAMILIES)

Every parameter and every saved buffer is drawn anew: no bias is zero, no norm is the identity.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import transformers
from torch import Tensor, nn

VOCAB = 61
LABELS = 7
IMAGE = 30

Recipe = Callable[[], nn.Module]


def build(name: str, seed: int = 0) -> nn.Module:
    """The model ``name`` of the zoo in evaluation mode, the same for the same seed."""
    return randomised(_RECIPES[name](), seed)


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """``model`` in evaluation mode with every parameter and saved buffer drawn anew, no entry of them zero.

    Norms scale by about one, other vectors lie around zero; matrices keep the scale of what they map.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        saved = model.state_dict(keep_vars=True)
        # A tied weight has two names and is drawn once.
        for path, tensor in {id(t): (path, t) for path, t in saved.items() if t.is_floating_point()}.values():
            owner, _, name = path.rpartition(".")
            norm = "norm" in type(model.get_submodule(owner)).__name__.lower()
            tensor.copy_(_draw(name, tensor, norm, generator))
    return model.eval()


def _draw(name: str, tensor: Tensor, norm: bool, generator: torch.Generator) -> Tensor:
    if name == "running_var" or (norm and name.endswith("weight")):
        around_one = 0.7 + 0.6 * torch.rand(tensor.shape, generator=generator)
        # A norm that starts at zero scales by one plus its weight.
        return around_one if tensor.any() else around_one - 1.0
    drawn = torch.randn(tensor.shape, generator=generator)
    # Away from zero, so that no entry passes for one that was removed.
    drawn = drawn.sign() * (drawn.abs() + 0.05)
    return drawn * (0.3 if tensor.dim() < 2 else tensor[0].numel() ** -0.5)


def _hub(cls: str, **config: Any) -> Recipe:
    """A model of transformers, without dropout, whose special tokens are in its vocabulary."""

    def make() -> nn.Module:
        model_class = getattr(transformers, cls)
        made = model_class.config_class(**config)
        for key, value in made.to_dict().items():
            if "drop" in key and isinstance(value, int | float):
                setattr(made, key, 0.0)
        model = model_class(made)
        assert isinstance(model, nn.Module)
        return model

    return make


_TEXT: dict[str, Any] = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_SHORT = {**_TEXT, "num_hidden_layers": 2, "max_position_embeddings": 67, "intermediate_size": 44}
_GQA = {**_SHORT, "hidden_size": 32, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 6}
_MHA = {**_SHORT, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 10}
# For families in which hidden is heads × head_dim.
_WIDE = {**_SHORT, "hidden_size": 40, "num_attention_heads": 5}
_WIDE_GQA = {**_SHORT, "hidden_size": 48, "num_attention_heads": 8, "num_key_value_heads": 2}
_GPT = {**_TEXT, "n_embd": 48, "n_layer": 2, "n_head": 4, "n_inner": 52, "n_positions": 67}
_FALCON = {
    **_TEXT, "hidden_size": 40, "num_hidden_layers": 2, "num_attention_heads": 5, "ffn_hidden_size": 52,
    "max_position_embeddings": 67,
}  # fmt: skip
# torch's grouped matrix product wants rows of a multiple of 16 bytes: hidden and the experts' ffn are multiples of 4.
_EXPERTS = {"intermediate_size": 20, "num_experts_per_tok": 3}
_T5 = {
    **_TEXT, "d_model": 30, "d_kv": 8, "d_ff": 44, "num_layers": 2, "num_decoder_layers": 3, "num_heads": 5,
    "relative_attention_num_buckets": 14, "relative_attention_max_distance": 20, "decoder_start_token_id": 0,
}  # fmt: skip
_IMAGES = {"num_labels": LABELS, "image_size": IMAGE, "patch_size": 6, "num_hidden_layers": 2}


class MLP(nn.Module):
    """A gated MLP between an input and an output that stay."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(12, 20)
        self.up = nn.Linear(12, 20, bias=False)
        self.down = nn.Linear(20, 14)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


class ConcatAndSplit(nn.Module):
    """A residual stream whose blocks lay two branches end to end, and cut one projection in two."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(12, 18)
        self.left = nn.Linear(18, 10)
        self.right = nn.Linear(18, 16)
        self.joined = nn.Linear(26, 18)
        self.both = nn.Linear(18, 44)
        self.width = 22
        self.gated = nn.Linear(self.width, 18)
        self.head = nn.Linear(18, 14)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.joined(torch.cat([torch.relu(self.left(x)), self.right(x)], dim=-1))
        gate, up = self.both(x).split(self.width, dim=-1)
        x = x + self.gated(torch.tanh(gate) * up)
        return self.head(x)


class _ConvBlock(nn.Module):
    def __init__(self, channels: int, inner: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, inner, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        same = channels == out and stride == 1
        shortcut = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))
        self.shortcut = nn.Identity() if same else shortcut

    def forward(self, x: Tensor) -> Tensor:
        inner = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(inner)) + self.shortcut(x))


class ResNet(nn.Module):
    """Two stages of residual blocks with batch norm, pooled to one vector per image."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12), nn.ReLU())
        self.stages = nn.Sequential(_ConvBlock(12, 10, 12, 1), _ConvBlock(12, 16, 20, 2), _ConvBlock(20, 14, 20, 1))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(20, LABELS)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.flatten(self.pool(self.stages(self.stem(x))), 1))


class DepthwiseSeparable(nn.Module):
    """MobileNet's inverted bottleneck: expand, filter each channel, gate by a pooled summary, project back."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.expand = nn.Sequential(nn.Conv2d(8, 22, 1, bias=False), nn.BatchNorm2d(22), nn.Hardswish())
        self.depthwise = nn.Sequential(nn.Conv2d(22, 22, 3, padding=1, groups=22, bias=False), nn.BatchNorm2d(22))
        self.squeeze = nn.Conv2d(22, 6, 1)
        self.excite = nn.Conv2d(6, 22, 1)
        self.project = nn.Sequential(nn.Conv2d(22, 8, 1, bias=False), nn.BatchNorm2d(8))
        self.head = nn.Linear(8, LABELS)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        inner = nn.functional.hardswish(self.depthwise(self.expand(x)))
        gate = torch.sigmoid(self.excite(torch.relu(self.squeeze(inner.mean((2, 3), keepdim=True)))))
        return self.head((x + self.project(inner * gate)).mean((2, 3)))


_RECIPES: dict[str, Recipe] = {
    # Plain modules
    "mlp": MLP,
    "concat_and_split": ConcatAndSplit,
    "resnet": ResNet,
    "depthwise_separable": DepthwiseSeparable,
    # Decoders, Llama's kin
    "llama_mha": _hub("LlamaForCausalLM", **_MHA),
    "llama_gqa": _hub("LlamaForCausalLM", **_GQA),
    "llama_mqa": _hub("LlamaForCausalLM", **_GQA | {"num_key_value_heads": 1}, tie_word_embeddings=True),
    "mistral": _hub("MistralForCausalLM", **_GQA, sliding_window=5),
    "qwen2": _hub("Qwen2ForCausalLM", **_WIDE_GQA),
    "qwen3": _hub("Qwen3ForCausalLM", **_GQA),
    "gemma2": _hub("Gemma2ForCausalLM", **_GQA, query_pre_attn_scalar=7, sliding_window=5),
    "gemma3_text": _hub(
        "Gemma3ForCausalLM",
        **_GQA,
        query_pre_attn_scalar=7,
        sliding_window=5,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "phi": _hub("PhiForCausalLM", **_WIDE, partial_rotary_factor=0.75),
    "phi3": _hub("Phi3ForCausalLM", **_WIDE_GQA),
    "stablelm": _hub(
        "StableLmForCausalLM", **_WIDE, num_key_value_heads=5, partial_rotary_factor=0.75, use_qkv_bias=True
    ),
    "cohere": _hub("CohereForCausalLM", **_WIDE_GQA | {"num_key_value_heads": 8}, logit_scale=1.5),
    "olmo2": _hub("Olmo2ForCausalLM", **_WIDE_GQA),
    "starcoder2": _hub("Starcoder2ForCausalLM", **_WIDE_GQA, sliding_window=None),
    "granite": _hub("GraniteForCausalLM", **_WIDE_GQA, residual_multiplier=0.7, embedding_multiplier=1.3),
    # Decoders, older
    "gpt2": _hub("GPT2LMHeadModel", **_GPT),
    "gpt_neox": _hub("GPTNeoXForCausalLM", **_WIDE, rotary_pct=0.75),
    "gptj": _hub("GPTJForCausalLM", **_GPT, rotary_dim=10),
    "gpt_bigcode": _hub("GPTBigCodeForCausalLM", **_GPT),
    "codegen": _hub("CodeGenForCausalLM", **_GPT | {"n_head": 8}, rotary_dim=4),
    "falcon_new": _hub(
        "FalconForCausalLM",
        **_FALCON | {"hidden_size": 48, "num_attention_heads": 8},
        num_kv_heads=2,
        new_decoder_architecture=True,
    ),
    "falcon_old": _hub("FalconForCausalLM", **_FALCON, multi_query=False, parallel_attn=False, bias=True),
    "falcon_alibi": _hub("FalconForCausalLM", **_FALCON, multi_query=False, parallel_attn=False, bias=True, alibi=True),
    "falcon_mqa": _hub("FalconForCausalLM", **_FALCON, multi_query=True),
    "bloom": _hub("BloomForCausalLM", **_TEXT, hidden_size=15, n_layer=2, n_head=5),
    "opt": _hub(
        "OPTForCausalLM",
        **_TEXT,
        hidden_size=40,
        word_embed_proj_dim=22,
        num_hidden_layers=2,
        ffn_dim=52,
        num_attention_heads=5,
        max_position_embeddings=67,
    ),
    "mpt": _hub("MptForCausalLM", **_TEXT, d_model=15, n_heads=5, n_layers=2, max_seq_len=67),
    # Mixtures of experts
    "mixtral": _hub("MixtralForCausalLM", **_GQA | _EXPERTS, num_local_experts=5),
    # The other way to run experts: no product by groups, so that they may have any size.
    "mixtral_batched": _hub(
        "MixtralForCausalLM", **_GQA | _EXPERTS, num_local_experts=5, experts_implementation="batched_mm"
    ),
    "olmoe": _hub("OlmoeForCausalLM", **_WIDE_GQA | _EXPERTS, num_experts=7, norm_topk_prob=True),
    # Encoders
    "bert": _hub("BertForMaskedLM", **_WIDE, type_vocab_size=2),
    "roberta": _hub("RobertaForMaskedLM", **_WIDE, type_vocab_size=2),
    "electra": _hub("ElectraForMaskedLM", **_WIDE, type_vocab_size=2, embedding_size=22),
    "modernbert": _hub("ModernBertForMaskedLM", **_WIDE, local_attention=6, cls_token_id=1, sep_token_id=2),
    "deberta_v2": _hub(
        "DebertaV2ForMaskedLM",
        **_WIDE,
        relative_attention=True,
        pos_att_type=["c2p", "p2c"],
        position_buckets=9,
        share_att_key=True,
        norm_rel_ebd="layer_norm",
        position_biased_input=False,
        type_vocab_size=0,
    ),
    # Encoders with decoders
    "t5": _hub("T5ForConditionalGeneration", **_T5),
    "t5_gated": _hub("T5ForConditionalGeneration", **_T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False),
    "bart": _hub(
        "BartForConditionalGeneration",
        **_TEXT,
        d_model=30,
        encoder_layers=2,
        decoder_layers=2,
        encoder_ffn_dim=44,
        decoder_ffn_dim=52,
        encoder_attention_heads=5,
        decoder_attention_heads=3,
        max_position_embeddings=67,
        decoder_start_token_id=2,
        forced_eos_token_id=2,
    ),
    # Images
    "vit": _hub("ViTForImageClassification", **_IMAGES, hidden_size=40, num_attention_heads=5, intermediate_size=52),
    "dinov2": _hub("Dinov2ForImageClassification", **_IMAGES, hidden_size=20, num_attention_heads=5, mlp_ratio=3),
    "resnet_hub": _hub(
        "ResNetForImageClassification", num_labels=LABELS, embedding_size=10, hidden_sizes=[16, 24], depths=[1, 2]
    ),
}

FAMILIES: dict[str, Callable[[], nn.Module]] = {name: partial(build, name) for name in _RECIPES}

TWINS = frozenset(
    [
        "mistral",
        "qwen2",
        "llama_mqa",
        "llama_mha",
        "starcoder2",
        "granite",
        "cohere",
        "phi",
        "stablelm",
        "gemma3_text",
        "olmo2",
        "falcon_old",
        "falcon_mqa",
        "falcon_alibi",
        "gpt_neox",
        "gptj",
        "codegen",
        "opt",
        "roberta",
        "electra",
        "t5",
    ]
)
"""Families whose blocks are those of another one, but for sizes, norms or the order of calls; theirs are thorough."""

UNLIKE = (
    "mlp", "resnet", "llama_gqa", "gemma2", "gpt2", "falcon_new", "mixtral", "bert", "t5_gated", "vit",
)  # fmt: skip
"""One family of each way to build a block; the others are built of the same operators in other sizes."""
"""Each name to a function that builds its model."""
