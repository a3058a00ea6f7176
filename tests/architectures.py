"""Tiny models of every causal LM architecture of the installed transformers, built from their config classes alone."""

import contextlib
import copy
import functools
import warnings

import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCABULARY = 97
MOST_PARAMETERS = 5_000_000

# what makes a config small, under every name in use; only attributes that a config has are set
SMALL = {
    "vocab_size": VOCABULARY,
    "unpadded_vocab_size": VOCABULARY,
    "hidden_size": 64,
    "n_embd": 64,
    "d_model": 64,
    "dim": 64,
    "embedding_size": 64,
    "word_embed_proj_dim": 64,
    "intermediate_size": 96,
    "ffn_dim": 96,
    "n_inner": 96,
    "d_ff": 96,
    "ffn_hidden_size": 96,
    "inner_hidden_size": 96,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "shared_intermediate_size": 32,
    "intermediate_size_mlp": 96,
    "num_attention_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96,
    "num_key_value_heads": 2,
    "num_kv_heads": 2,
    "head_dim": 16,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 16,
    "kv_channels": 16,
    "attention_head_dim": 16,
    "rotary_dim": 8,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_topk": 2,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "qk_head_dim": 24,
    "v_head_dim": 16,
    "max_position_embeddings": 512,
    "n_positions": 512,
    "n_ctx": 512,
    "max_seq_len": 512,
    "sliding_window": 16,
    "window_size": 16,
    "attention_chunk_size": 16,
    "attention_window": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_d_ssm": 128,
    "mamba_d_state": 16,
    "mamba_num_heads": 8,
    "mamba_head_dim": 16,
    "n_mamba_heads": 2,
    "mamba_ngroups": 1,
    "ssm_state_size": 16,
    "state_size": 16,
    "conv_kernel": 4,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "lightning_head_dim": 16,
    "hidden_size_per_layer_input": 16,
    "vocab_size_per_layer_input": VOCABULARY,
    "type_vocab_size": 2,
    "audio_vocab_size": VOCABULARY,
    "num_codebooks": 2,
    "lru_width": 64,
    "index_topk": 8,
    "index_n_heads": 2,
    "index_head_dim": 16,
    "num_nextn_predict_layers": 0,
    "num_zero_experts": 0,
    "router_topk": 2,
}
LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers")
PER_LAYER_LISTS = ("layer_types", "layers_block_type", "mlp_layer_types", "no_rope_layers", "attn_types", "moe_layers")


WITH_IMAGES = ("hy_v4_vl",)  # generate text, too, but transformers has no causal LM of this name


def causal_lm_types() -> list[str]:
    """The model types that generate text, sorted."""
    return sorted(name for name in (*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *WITH_IMAGES) if name in CONFIG_MAPPING)


EVEN_IF_NONE = {"head_dim", "num_key_value_heads"}

# what the general rule gets wrong, by model type
SPECIAL = {
    "bamba": {"attn_layer_indices": [1]},
    "deepseek_v2": {"num_experts_per_tok": 2, "topk_method": "greedy"},
    # sizes of its sliding-window layers are not those of the others; its full attention is not sparse here
    "dots3_note_text": {"use_dsa": False, "layer_types": ["sliding_attention", "full_attention"]}
    | {"num_attention_heads": 4, "num_key_value_heads": 4, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "head_dim": 8}
    | {"swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "swa_q_lora_rank": 32, "swa_kv_lora_rank": 48}
    | {"swa_qk_nope_head_dim": 16, "swa_head_dim": 24, "swa_v_head_dim": 16, "shared_experts_intermediate_size": 32},
    # both layers are run twice
    "dory": {"n_input_layers": 0, "n_recurrent_layers": 2, "n_output_layers": 0},
    "inkling2_loop_text": {"n_layers_per_attn_res_block": 1, "loop_layer_index_start": 1, "loop_layer_index_end": 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "prophetnet": {"num_encoder_layers": 2, "num_decoder_layers": 2, "num_encoder_attention_heads": 4},
}
# attributes whose change would make a config contradict itself
KEEP = {
    "gemma4_assistant": {"hidden_size_per_layer_input"},
    "gemma4_unified_assistant": {"hidden_size_per_layer_input"},
}


def small_values(config, layers: int) -> dict:
    """What to change in a config to make it small: only attributes it has."""
    values = {}
    for name in (*SMALL, *LAYERS, *PER_LAYER_LISTS):
        try:
            current = getattr(config, name)
        except Exception:  # missing, or one that differs between layers and says so
            continue
        if name in PER_LAYER_LISTS:
            if isinstance(current, (list, tuple)) and len(current) >= layers:
                kinds = list(dict.fromkeys(current))
                values[name] = [kinds[index % len(kinds)] for index in range(layers)]
        elif name in LAYERS:
            if isinstance(current, int):
                values[name] = layers
        elif name == "head_dim" and hasattr(config, "qk_rope_head_dim"):
            values[name] = SMALL["qk_rope_head_dim"]  # latent attention: the part that turns
        elif name == "num_key_value_heads" and hasattr(config, "qk_rope_head_dim"):
            values[name] = SMALL["num_attention_heads"]
        elif not isinstance(current, (list, tuple, dict)) and (current is not None or name in EVEN_IF_NONE):
            values[name] = SMALL[name]
    return values


def set_what_can_be(config, values: dict) -> None:
    for name, value in values.items():
        # properties without a setter follow from other attributes
        with contextlib.suppress(Exception):
            setattr(config, name, value)


@functools.cache
def _tiny_config(model_type: str, layers: int):
    config_class = CONFIG_MAPPING[model_type]
    defaults = config_class()
    values = small_values(defaults, layers) | SPECIAL.get(model_type, {})
    values = {name: value for name, value in values.items() if name not in KEEP.get(model_type, ())}
    try:
        config = config_class(**values)
    except Exception:
        config = copy.deepcopy(defaults)
        set_what_can_be(config, values)
    for part in (config.get_text_config(decoder=True), getattr(config, "vision_config", None)):
        if part is not None and part is not config:
            set_what_can_be(part, small_values(part, layers))
    return config


def tiny_config(model_type: str, layers: int = 2):
    """A small config of this model type, of its own class."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return copy.deepcopy(_tiny_config(model_type, layers))


def tiny_model(model_type: str, layers: int = 2, attention: str = "sdpa", seed: int = 0) -> PreTrainedModel:
    """A small random causal LM of this model type, in fp32 and eval mode.

    Raises:
        ValueError: if the config could not be made small.
    """
    torch.manual_seed(seed)
    config = tiny_config(model_type, layers)
    family = AutoModelForImageTextToText if model_type in WITH_IMAGES else AutoModelForCausalLM
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with torch.device("meta"):
            size = sum(p.numel() for p in family.from_config(copy.deepcopy(config)).parameters())
        if size > MOST_PARAMETERS:
            raise ValueError(f"{model_type} has {size:,} parameters, which is not tiny")
        model = family.from_config(config, attn_implementation=attention, dtype=torch.float32)
    return model.eval()
