"""Which models a cache refuses or treats otherwise, and why: those whose attention would go wrong on folded slots.

Goes by what a config tells; knows nothing of layers.
"""

from collections.abc import Iterable
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

# DiffLlama pairs each head's keys with another's values; Doge masks tokens by all heads' values together
MIXES_HEADS = ("diffllama", "doge")
# JetMoe attends to every stored head several times, in an order of its own, so no mass can be added to one of them
REPEATS_HEADS = ("jetmoe",)


def settings(config: PreTrainedConfig, name: str, layers: Iterable[int] | None = None) -> list[Any]:
    """What a config says under `name` for each of these layers, by default for all; once where layers do not differ.

    From transformers 5.24 on a config may differ by layer, and then says nothing for all of them together.
    """
    if not getattr(config, "is_heterogeneous", False):
        return [getattr(config, name, None)]
    of_layers = config.per_layer_config
    return [getattr(of_layers[layer], name, None) for layer in (range(len(of_layers)) if layers is None else layers)]


def most_positions(config: PreTrainedConfig) -> int | None:
    """How many tokens the model has positions for; `None` where its config does not say."""
    return min((most for most in settings(config, "max_position_embeddings") if most is not None), default=None)


def takes_masks(config: PreTrainedConfig) -> bool:
    """Whether the link can fit masks to this model's slots, so that they may have mass and heads may differ."""
    return config.model_type not in REPEATS_HEADS and not reads_stored_keys(config)


def can_reread(config: PreTrainedConfig) -> bool:
    """Whether the model can read a prompt once more behind itself.

    Not one that it reads in an encoder, nor tokens that lie in a plane, as those of images do.
    """
    decoder = config.get_text_config(decoder=True)
    ropes = [rope for name in ("rope_parameters", "rope_scaling") for rope in settings(decoder, name)]
    return not config.is_encoder_decoder and not any("mrope_section" in (rope or ()) for rope in ropes)


def check_rereadable(config: PreTrainedConfig, stages: Iterable[str]) -> None:
    """Refuse stages for which a prompt is read once more behind itself, where it cannot be.

    Args:
        config: the model's.
        stages: their names.

    Raises:
        ValueError: if it cannot be.
    """
    if not can_reread(config):
        raise ValueError(
            f"{config.model_type} cannot read a prompt again behind itself: it reads it in an encoder, or puts tokens "
            f"in a plane. Choose other stages than {' and '.join(stages)}, such as scorer='keydiff' and budget='adakv'"
        )


def reads_stored_keys(config: PreTrainedConfig) -> bool:
    """Whether the model reads what its layers store before it hands them the next tokens (Dory's first loops do)."""
    return getattr(config, "recurrent_kv_cache_mode", None) == "last_loop"


def check_fixable(config: PreTrainedConfig | None) -> None:
    """Refuse to leave room behind what a layer stores, where the model would read it.

    Raises:
        ValueError: if it would.
    """
    if config is not None and reads_stored_keys(config):
        raise ValueError(
            f"{config.model_type} reads stored keys by itself, room that is left included, so its cache cannot be "
            "fixed; go on with this one"
        )


def check_supported(
    config: PreTrainedConfig, layers: Iterable[int], merges_values: bool, fits_masks: bool, folds_late: bool
) -> None:
    """Refuse models whose attention would go wrong on folded slots, from what their config tells.

    Args:
        config: the text model's.
        layers: the indices of those that fold.
        merges_values: whether values are averaged.
        fits_masks: whether masks are to be fitted to slots: heads differ in length, or slots have mass.
        folds_late: whether the fold waits for the first single token.

    Raises:
        ValueError: for attention that reads several KV heads' states at one place together; for a bias or a window by
            the distance of a key's place in the cache, which is no longer the distance of its token; for merging
            the values of multi-head latent attention (MLA), which carry rotary positions; and for slots that need the
            linked attention, or a late fold, where the model reads stored keys by itself.
    """
    kind, layers = config.model_type, list(layers)

    def says(name: str) -> bool:
        return any(value is not None and value is not False for value in settings(config, name, layers))

    if kind in MIXES_HEADS:
        raise ValueError(
            f"{kind} reads the values of several KV heads together, but after a fold every head stores other tokens. "
            "Use compression_ratio=0, or another model"
        )
    relative = ("relative_attention_num_buckets", "rel_extent")  # T5 and its kin, Inkling
    alibi = any(getattr(attention, "alibi", False) for attention in settings(config, "attn_config", layers))  # MPT
    if kind == "bloom" or says("alibi") or alibi or any(map(says, relative)):
        raise ValueError(
            f"{kind} adds a position bias to its attention logits, computed from a key's place in the cache; on folded "
            "slots that would be another token's position. Use compression_ratio=0, or a model with rotary or absolute "
            "positions"
        )
    if any("local" in (kinds or ()) for kinds in settings(config, "attention_layers", layers)):  # GPT-Neo
        raise ValueError(
            f"{kind} masks its local layers by a key's place in the cache, which after a fold is not the place of its "
            "token. Use compression_ratio=0, or another model"
        )
    if says("kv_lora_rank") and merges_values:
        raise ValueError(
            f"{kind} has multi-head latent attention (MLA), and what it caches as values carries rotary positions, "
            "which must not be averaged. Use merger='drop'"
        )
    if kind in REPEATS_HEADS and fits_masks:
        raise ValueError(
            f"{kind} attends to every stored head several times, in an order of its own, so nothing can be added to "
            "the logits of one head; choose budget='uniform' and a merger without mass, such as 'similarity'"
        )
    if reads_stored_keys(config) and (fits_masks or folds_late):
        raise ValueError(
            f"{kind} with recurrent_kv_cache_mode='last_loop' reads the stored keys and values by itself, before a "
            "fold that waits for the first single token, and without the mass of slots or the gaps of heads that "
            "differ. Use fold_at='prefill', budget='uniform' and a merger without mass, such as 'drop' or 'similarity'"
        )


def config_of(config: PreTrainedConfig | None, model: PreTrainedModel | None) -> PreTrainedConfig | None:
    """The config to build a cache for, from whichever was given."""
    if model is None:
        return config
    if not hasattr(model, "config"):
        raise TypeError(f"model is {type(model).__name__}; give a transformers model, such as AutoModelForCausalLM's")
    if config is not None and config is not model.config:
        raise ValueError("config and model are both given, but config is not model.config; leave config out")
    return model.config
