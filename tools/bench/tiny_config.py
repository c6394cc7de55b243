"""A tiny config of any class of transformers, by rules over the names of its fields; no table per architecture.

Every integer field is a knob. The rules propose a small value for each; where the class or its forward refuses them
together, families of knobs (all widths, all windows, ...) go back to what the class itself proposes, or are scaled
down instead, until a model is built that is small and runs.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Path = tuple[str, ...]

_SIZES = ("widths", "ffn", "lists", "head_dim", "experts ffn", "ranks")
_ALIKE = (*_SIZES, "rope", "heads", "kv heads")

# The first pattern that the whole name of a field matches says what the field is: its family, and its small value.
RULES: tuple[tuple[str, str, int], ...] = tuple(
    (family, pattern, value)
    for family, rows in {
        "types": {r"type_vocab_size|num_labels|num_channels|in_channels|out_channels|.*_channels_in": -1},
        "vocab": {
            r"(.*_)?vocab_size(_per_layer_input)?|unpadded_vocab_size": 61,
            r"ngram_vocab_size_base|entity_vocab_size|codebook_size|encoder_hash_byte_group_vocab": 61,
        },
        "kv heads": {
            r"(.*_)?num_key_value_heads|num_kv_heads|kv_n_heads|n_kv_heads|multi_query_group_num": 2,
            r"linear_num_key_heads|num_query_groups": 2, r"(.*_)?kv_heads": 1,
        },
        "heads": {
            r"(.*_)?(num_attention_heads|attention_heads|num_heads|n_heads?|num_value_heads)": 4,
            r"(num_)?(encoder|decoder|self|cross)_attention_heads|n_mamba_heads|mamba_n_heads|attention_head_count": 4,
        },
        "rope": {r"qk_rope_head_dim|rotary_dim|index_head_dim_rope": 4},
        "head_dim": {
            r"(.*_)?(head_dim|head_size|key_dim|d_head|dim_head|d_kv|kv_channels|headdim|head_dim_k|head_dim_v)": 8,
            r"qk_head_dim": 12, r"attention_head_size|per_head_dim": 8,
        },
        "experts ffn": {r"(moe|expert|shared_expert|.*_shared_expert|shared|moe_shared_expert)_"
                        r"(intermediate_size|ffn_hidden_size|ffn_dim|hidden_dim)": 20,
                        r"shared_experts_intermediate_size": 20},
        "experts": {
            r"num_experts_per_tok(en)?|moe_top_?k|num_selected_experts|moe_k|top_k(_experts)?|experts_top_k": 2,
            r"(moe_)?num_(local_)?experts|n_routed_experts|zero_expert_num": 8,
            r"n_shared_experts|num_shared_experts": 1,
            r"n_group|num_expert_group": 2, r"topk_group": 1, r"expert_capacity": 64,
        },
        "ffn": {
            r"(.*_)?(intermediate_size|ffn_dim|d_ff|ffn_hidden_size|n_inner|dff|dim_ff|mlp_dim|feed_forward_size)"
            r"(_mlp)?": 48,
            r"hidden_dim": 48, r"d_inner": 48,
        },
        "widths": {
            r"(.*_)?(hidden_size|d_model|n_embd|embed_dim|embedding_size|emb_dim|embedding_dim|dim)": 32,
            r"d_latents|lru_width": 32, r"num_filters": 4,  # doubled from stage to stage
            r"(.*_)?(hidden_size|embed_dim)_\w+|projection_(dim|size)|prediction_head_size|word_embed_proj_dim": 32,
            r"(.*_)?(output|input|out_hidden|pooler|pooler_output|entity_emb)_(dim|size)|entity_emb_size": 32,
            r"mamba_d_ssm|attention_hidden_size|cross_attention_hidden_size|out_hidden_size": 32,
        },
        "layers": {
            r"(.*_)?num_(hidden_|encoder_|decoder_|residual_|adapter_)?layers|n_layers?|depth|num_blocks": 2,
            r"(.*_)?(encoder|decoder|hidden)_layers|num_self_attends_per_block|num_feedforward_networks": 2,
            r"num_layers_per_stack|num_(sparse_)?(encoder|decoder)_layers": 2,
            r"max_window_layers|first_k_dense_replace|num_dense_layers|.*_start_index|mlp_only_until": 1,
            r"num_kv_shared_layers|num_nextn_predict_layers": 0,
        },
        "periods": {
            r"(.*_)?(layer_period|sparse_step|layer_interval|layer_step|sliding_window_pattern|layer_group_size)": 2,
            r"(.*_)?full_attention_interval|global_attn_every_n_layers|.*_every_n_layers": 2,
            r".*_layer_offset": 1,
        },
        "ranks": {r"(.*_)?(lora_)?rank|.*_lowrank|.*dt_rank|time_step_rank|.*_bottleneck_size": 8},
        "state": {r"(.*_)?(d_state|state_size)": 6, r"(.*_)?n_?groups": 1, r"num_mem_blocks": 1},
        "positions": {
            r"max_(2d_|source_|target_|encoder_|decoder_)?position(_embedding)?s|n_positions|n_ctx|max_seq_len|"
            r"(max_(encoder_|decoder_)?position_embeddings)|context_length|max_sequence_length|model_max_length": 64,
            r"original_max_position_embeddings": 64, r"(.*_)?position_buckets": 16,
        },
        "windows": {
            r"(.*_)?(sliding_window|local_attention|attention_window|window_size|chunk_size|attention_window_size)": 8,
            r"sliding_window_size|keep_window_size|attention_chunk_size|index_topk(_blocks)?": 8,
            r"num_landmarks|segment_means_seq_len|rel_extent|index_block_size": 8,
            r"block_size": 4,  # so that example inputs have more than one block
            r"(lsh|local)_attn_chunk_length": 8,
        },
        "budgets": {r".*_budget": 8, r".*_compress_ratio": 2},
        "images": {r"(.*_)?image_size|crop_size": 64},
        "latents": {r"num_latents": 12, r"prompt_length|num_prompts": 5},
        "others": {r"seed|.*version": -1},
    }.items()
    for pattern, value in rows.items()
)  # fmt: skip


def narrow(width: int) -> int:
    """A small number of channels, the same for the same one, so that what fits together still does."""
    return width if width <= 8 else 8 * (1 + -(-width // 64))


_LISTS: tuple[tuple[str, str, Callable[[Sequence[Any]], list[Any]]], ...] = (
    ("depths", r"depths|num_block_repeats|stage_num_blocks|layers_per_stage|n_attn_blocks|stage_numb_of_layers",
     lambda v: [1] * len(v)),
    ("lists", r"(.*_)?(hidden_sizes|embed_dims|width\w*|embed_dim|channels|attn_unit_dims)",
     lambda v: [narrow(width) for width in v]),
    ("images", r"(.*_)?image_size", lambda v: [64] * len(v)),
    ("lists heads", r"(.*_)?(num_heads|num_attention_heads)", lambda v: [2 if at else 1 for at in range(len(v))]),
)  # fmt: skip


@dataclass(frozen=True)
class Knob:
    """One field of a config: where, what it means, what the class proposes, and what the rules do."""

    path: Path
    family: str
    default: Any
    small: Any

    def scaled(self, factor: int) -> Any:
        """The default divided by ``factor``, two at least; for a list, each entry."""
        if isinstance(self.default, float):
            return self.default / factor
        if isinstance(self.default, int):
            return max(2, self.default // factor)
        if isinstance(self.default, list) and all(isinstance(v, int) for v in self.default):
            return [max(1, v // factor) for v in self.default]
        return self.small


def knobs_of(config: Any) -> list[Knob]:
    """Every field of ``config`` and of its sub-configs that the rules would change."""
    return list(_knobs(config.to_dict(), ()))


def _knobs(values: Mapping[str, Any], at: Path) -> Iterator[Knob]:
    count = next((values[n] for n in ("num_hidden_layers", "n_layer", "num_layers", "n_layers") if _is(values, n)), 0)
    lists = {n: v for n, v in values.items() if isinstance(v, list) and len(v) == count and count > 2}
    places = _representatives(lists)
    vocabulary = next((v for n, v in values.items() if n == "vocab_size" and isinstance(v, int)), 0)
    for name, value in values.items():
        path = (*at, name)
        if isinstance(value, dict):
            if value and all(str(key).isdigit() for key in value) and name != "id2label":
                layers = len(places) or 2
                yield Knob(path, "layers", value, {k: _layer(v) for k, v in value.items() if int(k) < layers})
            elif name not in ("id2label", "label2id", "rope_parameters", "rope_scaling"):
                yield from _knobs(value, path)
            elif name == "rope_parameters" and not value and (kinds := values.get("layer_types")):
                ropes = {kind: {"rope_type": "default", "rope_theta": 10000.0} for kind in kinds}
                yield Knob(path, "missing rope", value, ropes)
        elif name in lists:
            yield Knob(path, "layers", value, [_entry(name, value[place], vocabulary) for place in places])
        elif isinstance(value, list | tuple) and len(value) > 1 and (whole := _whole(value, values)):
            yield Knob(path, "widths", list(value), [v * whole[1] // whole[0] for v in value])
        elif isinstance(value, list):
            yield from _of_list(path, value, len(places))
        elif value is None and (missing := _small(name, 0, vocabulary)) is not None and missing[0] in _MISSED:
            yield Knob(path, f"missing {missing[0]}", None, missing[1])
        elif value is None and name in ("pad_token_id", "mask_token_id"):
            yield Knob(path, "missing ids", None, _token(name, 0))
        elif name == "is_decoder" and value is False:
            yield Knob(path, "missing decoder", False, True)
        elif value is None and re.fullmatch(r"clip_\w+", name):
            yield Knob(path, "missing clip", None, 8)
        elif name == "layer_types" and value is None:
            yield Knob(path, "missing layers", None, ["conv", "full_attention"])
        elif value is None and (first := _first_of(name, values)) is not None:
            yield Knob(path, "missing default", None, first)
        elif isinstance(value, float) and re.fullmatch(r"width_(coefficient|multiplier)", name):
            yield Knob(path, "multipliers", value, value)
        elif isinstance(value, int) and not isinstance(value, bool):
            small = _small(name, value, vocabulary)
            if re.fullmatch(r"stem_(\w*channels|hidden_size)", name):
                small = ("lists", narrow(value))
            if name == "head_dim" and isinstance(part := values.get("qk_nope_head_dim"), int) and value > part:
                small = ("head_dim", 12)  # the whole head, with and without rotation
            if small is not None and name in _COUNTS and lists:
                small = (small[0], len(places))
            if small is not None and small[1] != value and (value > small[1] or name.endswith("_token_id")):
                yield Knob(path, small[0], value, small[1])


_MISSED = ("vocab", "experts", "experts ffn", "heads", "kv heads", "head_dim", "ffn", "budgets")
"""What a class may leave open and its model then need."""
_COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")


def _is(values: Mapping[str, Any], name: str) -> bool:
    return isinstance(values.get(name), int)


def _layer(values: Any) -> Any:
    """What one layer has of its own, made small; sizes that were the same still are."""
    if not isinstance(values, dict):
        return values
    small = {path[-1]: value for path, value in _alike(list(_knobs(values, ())), _ALIKE).items()}
    return values | small


def _entry(name: str, value: Any, vocabulary: int) -> Any:
    """What a layer has in a list of one entry for each."""
    small = _small(name, value, vocabulary) if isinstance(value, int) and not isinstance(value, bool) else None
    return value if small is None else min(value, small[1])


def _representatives(lists: Mapping[str, Sequence[Any]]) -> list[int]:
    """Layers of which each differs from those before in some per-layer list: two at least, five at most."""
    rows = list(zip(*([repr(v) for v in values] for values in lists.values()), strict=True))
    first = [place for place, row in enumerate(rows) if row not in rows[:place]][:5]
    others = [place for place in range(len(rows)) if place not in first]
    return sorted((first + others)[: max(2, len(first))])


def _of_list(path: Path, value: list[Any], layers: int) -> Iterator[Knob]:
    name = path[-1]
    for family, pattern, small in _LISTS:
        if re.fullmatch(pattern, name) and value and all(isinstance(v, int) for v in value):
            yield Knob(path, family, value, small(value))
            return
    if re.search(r"layer|idx|interval", name) and len(value) > 0 and all(isinstance(v, int) for v in value):
        yield Knob(path, "layers", value, [1])


def _small(name: str, value: int, vocabulary: int) -> tuple[str, int] | None:
    if re.fullmatch(r".*_(token_id|token_index|index)", name):
        return ("ids", _token(name, value)) if value >= 61 else None
    for family, pattern, small in RULES:
        if re.fullmatch(pattern, name):
            return None if small < 0 else (family, small)
    return None


def _whole(parts: Sequence[Any], values: Mapping[str, Any]) -> tuple[int, int] | None:
    """The width of which these are the parts, and the small one, where the small one has the same parts."""
    if not all(isinstance(v, int) and not isinstance(v, bool) for v in parts):
        return None
    for name, value in values.items():
        family, small = (isinstance(value, int) and _small(name, value, 0)) or ("", 0)
        if family == "widths" and value == sum(parts) and all(v * small % value == 0 for v in parts):
            return value, small
    return None


def _first_of(name: str, values: Mapping[str, Any]) -> Any:
    """For ``default_language``, the first of ``languages``."""
    choices = values.get(f"{name.removeprefix('default_')}s") if name.startswith("default_") else None
    return choices[0] if isinstance(choices, list | tuple) and choices else None


def _token(name: str, value: int) -> int:
    """An id in the small vocabulary, another one for another name."""
    return 3 + (sum(map(ord, name)) * 7 + value) % 50


def knobs_asked(fields: Iterable[Path], values: Mapping[str, Any]) -> list[Knob]:
    """Fields that a model reads and its config class does not have: as they are elsewhere in ``values``, or small."""
    found = []
    for path in dict.fromkeys(fields):
        value = _elsewhere(path[-1], values)
        if value is None and (small := _small(path[-1], 1 << 20, 0)) is not None:
            value = small[1]
        if value is not None:
            found.append(Knob(path, "asked", None, value))
    return found


def _elsewhere(name: str, values: Mapping[str, Any]) -> int | float | None:
    for key, value in values.items():
        found = _elsewhere(name, value) if isinstance(value, dict) else value if key == name else None
        if isinstance(found, int | float):
            return found
    return None


def proposals(knobs: Sequence[Knob], asked: Callable[[], Sequence[Knob]] = tuple) -> Iterator[dict[Path, Any]]:
    """Values for the knobs, the smallest first; then with one or two families left alone, or scaled down.

    ``asked``: finds more knobs, when the first proposals were not enough.
    """
    missing = [k for k in knobs if k.family.startswith("missing")]
    given = [k for k in knobs if k not in missing]
    families = list(dict.fromkeys(k.family for k in given))
    yield {k.path: k.small for k in given}
    yield _alike(given)
    yield {k.path: k.small for k in given if len(k.path) == 1}
    yield {k.path: k.small for k in (*given, *missing)}
    yield _alike(given) | {k.path: k.small for k in missing}
    yield _alike(given, _ALIKE)
    yield _alike(given, _ALIKE) | {k.path: k.small for k in missing}
    for family in dict.fromkeys(k.family for k in missing):
        yield {k.path: k.small for k in (*given, *(m for m in missing if m.family == family))}
    if more := asked():
        yield {k.path: k.small for k in (*given, *more)}
        yield {k.path: k.small for k in (*given, *missing, *more)}
    knobs = given
    for family in families:
        yield {k.path: k.small for k in knobs if k.family != family}
    for factor in (8, 16, 4, 32, 2):
        scaled = {k.path: k.scaled(factor) if k.family in (*_SIZES, "multipliers") else k.small for k in knobs}
        yield scaled
        for family in families:
            yield {path: v for path, v in scaled.items() if not _in(knobs, path, (family,))}
    for pair in itertools.combinations(families, 2):
        yield {k.path: k.small for k in knobs if k.family not in pair}
    for knob in knobs:
        yield {k.path: k.small for k in knobs if k is not knob}
    for factor in (8, 4, 16):
        for family in families:
            yield {k.path: k.scaled(factor) if k.family == family else k.small for k in knobs}


def _alike(knobs: Sequence[Knob], families: Sequence[str] = (*_SIZES, "rope")) -> dict[Path, Any]:
    """The small values, the same for sizes of one sub-config that the class makes the same."""
    first: dict[tuple[Path, int], int] = {}
    found: dict[Path, Any] = {}
    for knob in knobs:
        sized = knob.family in families and isinstance(knob.default, int)
        found[knob.path] = first.setdefault((knob.path[:-1], knob.default), knob.small) if sized else knob.small
    return found


def _in(knobs: Sequence[Knob], path: Path, families: Sequence[str]) -> bool:
    return any(k.path == path and k.family in families for k in knobs)


def arguments(values: Mapping[Path, Any], types: Mapping[Path, str]) -> dict[str, Any]:
    """Keyword arguments for the config class: nested where the path is; ``types``: the model types of sub-configs."""
    found: dict[str, Any] = {}
    for path, value in values.items():
        owner = found
        for depth, part in enumerate(path[:-1], start=1):
            owner = owner.setdefault(part, {})
            if path[:depth] in types:
                owner.setdefault("model_type", types[path[:depth]])
        owner[path[-1]] = value
    return found


def types_of(values: Mapping[str, Any], at: Path = ()) -> dict[Path, str]:
    """The model types that a config as a dict names for its sub-configs."""
    found: dict[Path, str] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            if isinstance(value.get("model_type"), str):
                found[(*at, name)] = value["model_type"]
            found |= types_of(value, (*at, name))
    return found
