"""All causal LM architectures of the installed transformers: prefill unchanged, and one exact step after the fold.

And, where the model is linked, the queries that its attention was given.
"""

import contextlib
import inspect
import sys
import warnings

import pytest
import torch
import transformers
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, DynamicCache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from architectures import causal_lm_types, tiny_config, tiny_model
from merging_cache import MergingDynamicCache, Reading, Scorer, merging_attention
from merging_cache.model import cache_argument, can_link
from merging_cache.model.link import is_linked
from models import SameInAllHeads

LENGTH, WINDOW = 48, 16
TESTED, EXACT, QUERIES, ALL = "5.24.0", 145, 125, 197  # where the numbers of architectures are known

# why an architecture is not among those that fold, by what stops it first
NOT_BUILT = "cannot be built small from its config class alone"
NOT_RUN = "does not run with transformers' own DynamicCache as built here"
NEEDS_IMAGES = "widens the mask of its second pass by the tokens of an image, of which there is none here"
NO_FULL_ATTENTION = "has no layer of full attention over cached keys and values"
POSITION_BIAS = "adds a bias or a window by a key's place in the cache: refused"
MIXES_HEADS = "reads the values of several KV heads together: refused"
ENFORCES_POSITIONS = "its own forward checks positions against the length of the cache: refused there"


def built(model_type):
    """A tiny model on sdpa, or on eager attention if it has no other."""
    try:
        return tiny_model(model_type)
    except ValueError as error:
        if "sdpa" not in str(error) and "scaled_dot" not in str(error):
            raise
        return tiny_model(model_type, attention="eager")


class NotTriedError(Exception):
    """This architecture cannot be tried here, and why."""


def tried(model_type, attention=None):
    """A tiny model, a prompt and one more token for it, the logits of the prompt, and what else it has to be told."""
    if model_type == "git":
        raise NotTriedError(NEEDS_IMAGES)
    try:
        model = built(model_type) if attention is None else tiny_model(model_type, attention=attention)
    except Exception as error:
        raise NotTriedError(NOT_BUILT) from error
    ids = torch.randint(5, 90, (1, LENGTH + 1), generator=torch.Generator().manual_seed(1))
    prompt, last = ids[:, :-1], ids[:, -1:]
    full = DynamicCache(config=model.config)
    # OPT counts positions in the mask, so they have to be told
    told = {"position_ids": torch.tensor([[LENGTH]])} if model_type == "opt" else {}
    try:
        expected = model(prompt, **cache_argument(full)).logits
        mask = torch.ones(1, LENGTH + 1, dtype=torch.long)
        model(last, **cache_argument(full), attention_mask=mask, **told)
    except Exception as error:
        raise NotTriedError(NOT_RUN) from error
    return model, prompt, last, expected, told


def why_refused(error):
    """The reason that a refusal gives."""
    if "reads the values of several KV heads together" in str(error):
        return MIXES_HEADS
    assert "position bias" in str(error) or "place in the cache" in str(error), error
    return POSITION_BIAS


@torch.no_grad()
def outcome(model_type):
    """`"exact"`, or why this architecture was not tried; an `AssertionError` if it went wrong."""
    try:
        model, prompt, last, expected, told = tried(model_type)
    except NotTriedError as why:
        return str(why)
    mask = torch.ones(1, LENGTH + 1, dtype=torch.long)
    options = {"compression_ratio": 0.5, "merger": "drop", "scorer": SameInAllHeads(), "recent_tokens": WINDOW}
    try:
        with warnings.catch_warnings(record=True):
            cache = MergingDynamicCache(config=model.config, **options)
    except ValueError as error:
        return why_refused(error)
    logits = model(prompt, **cache_argument(cache)).logits
    folded = [layer for layer in cache.folding_layers if layer.num_stored]
    if not folded:
        return NO_FULL_ATTENTION
    assert torch.equal(logits, expected), f"prefill differs by {(logits - expected).abs().max()}"
    assert all(layer.num_slots == LENGTH // 2 for layer in folded)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        generated, filled = (MergingDynamicCache(config=model.config, **options) for _ in range(2))
        told_all = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 1, "pad_token_id": 0}
        model.generate(prompt, do_sample=False, **told_all, **cache_argument(generated))
        Reading(model, prompt).fill(filled)
    for mine, theirs in zip(generated.folding_layers, filled.folding_layers, strict=True):
        assert mine.num_stored == theirs.num_stored, "a reading fills another number of layers"
        if mine.num_stored:
            pairs = [(getattr(mine, name), getattr(theirs, name)) for name in ("keys", "values", "positions")]
            assert all(torch.equal(*pair) for pair in pairs), "a reading fills a cache otherwise than a prefill"

    # the same step with the full cache and a mask over what was dropped; sliding windows lie inside what is kept
    kept = folded[0].positions[0, 0]
    mask[0, [position for position in range(LENGTH) if position not in kept]] = 0
    full = DynamicCache(config=model.config)
    model(prompt, **cache_argument(full))
    masked = model(last, **cache_argument(full), attention_mask=mask, **told).logits
    try:
        step = model(last, **cache_argument(cache)).logits
    except ValueError as error:
        assert "position_ids" in str(error)
        return ENFORCES_POSITIONS
    difference = (step - masked).abs().max().item()
    assert difference < 1e-4 * max(1.0, masked.abs().max().item()), f"the step after the fold differs by {difference}"
    return "exact"


@pytest.mark.filterwarnings("ignore")
def test_every_architecture_is_exact_or_refused():
    outcomes, wrong = {}, {}
    for model_type in causal_lm_types():
        try:
            outcomes[model_type] = outcome(model_type)
        except Exception as error:
            wrong[model_type] = f"{type(error).__name__}: {error}"
    assert not wrong
    exact = sorted(name for name, how in outcomes.items() if how == "exact")
    others = {name: how for name, how in outcomes.items() if how != "exact"}
    print(f"{len(exact)} exact: {' '.join(exact)}")
    for name, how in others.items():
        print(f"{name}: {how}")
    refused = {name for name, how in others.items() if how in (POSITION_BIAS, MIXES_HEADS, ENFORCES_POSITIONS)}
    inkling = {"inkling_text", "inkling2_text", "inkling2_loop_text"}
    assert refused <= {"bloom", "mpt", "prophetnet", "gpt_neo", "diffllama", "doge", *inkling}
    assert len(exact) >= 105
    if transformers.__version__ == TESTED:  # what examples/README.md says
        assert (len(exact), len(outcomes)) == (EXACT, ALL)


@pytest.mark.filterwarnings("ignore")
def test_defaults_are_refused_only_where_something_folds():
    """A merger that the model does not allow is no matter where no layer folds."""
    for model_type in causal_lm_types():
        try:
            config = tiny_config(model_type)
            kinds = {type(layer).__name__ for layer in DynamicCache(config=config).layers}
        except Exception:
            continue
        try:
            cache = MergingDynamicCache(config=config)
        except ValueError as error:
            assert kinds & {"DynamicLayer", "LinearAttentionAndFullAttentionLayer"}, (model_type, error)
        else:
            assert cache.merging.compression_ratio == 0.5


# The linked model -----------------------------------------------------------------------------------------------------

# architectures whose queries do not reach a cache: every one refuses and says so
OUTSIDE = "its attention does not go through the attention interface"
OTHER_KEYS = "it attends to other keys than it caches (latent attention)"
NO_QUERIES = {
    OTHER_KEYS: """axk1 bailing_hybrid deepseek_v2 deepseek_v3 dots3_note_text glm4_moe_lite kimi_linear longcat_flash
        minicpm3 sarvam_mla youtu""",
    OUTSIDE: """big_bird bloom falcon gpt_neox_japanese megatron-bert mpt mvp prophetnet rembert roformer rwkv trocr
        xglm xlnet""",
    POSITION_BIAS: "gpt_neo inkling2_loop_text inkling2_text inkling_text",
    MIXES_HEADS: "diffllama doge",
}
OUTSIDE_BEFORE = {"codegen", "gptj"}  # transformers 5.24


class Listener(SameInAllHeads):
    """`SameInAllHeads` that keeps the queries it is shown."""

    needs_queries = True
    query_window = LENGTH

    def __init__(self):
        self.shown = {}

    def score(self, states):
        self.shown[states.layer_idx] = states
        return super().score(states)


def recorded_queries(model, ids):
    """What each attention module gives to the attention function, by a recorder of this test's own."""
    seen = {}
    config = model.config.get_text_config(decoder=True)
    implementation = config._attn_implementation

    def record(module, query, *args, **kwargs):
        seen.setdefault(module, []).append(query)
        file = vars(sys.modules[type(module).__module__])
        if implementation == "eager":
            return file["eager_attention_forward"](module, query, *args, **kwargs)
        return file.get("ALL_ATTENTION_FUNCTIONS", ALL_ATTENTION_FUNCTIONS)[implementation](
            module, query, *args, **kwargs
        )

    name = f"recording_{implementation}"
    AttentionInterface.register(name, record)
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[implementation])
    model.set_attn_implementation(name)
    model(ids, **cache_argument(DynamicCache(config=model.config)))
    model.set_attn_implementation(implementation)
    return seen


@torch.no_grad()
def linked_outcome(model_type, attention=None):
    """`"queries"` if they arrived, or why this architecture refuses; an `AssertionError` if it went wrong."""
    try:
        model, prompt, last, expected, _ = tried(model_type, attention)
    except NotTriedError as why:
        return str(why)
    options = {"compression_ratio": 0.5, "merger": "drop", "recent_tokens": WINDOW}
    scorer = Listener()
    with warnings.catch_warnings(record=True):
        try:
            cache = MergingDynamicCache(model=model, scorer=scorer, **options)
        except ValueError as error:
            if "does not go through transformers' attention interface" in str(error):
                return OUTSIDE
            return why_refused(error)
    try:
        logits = model(prompt, **cache_argument(cache)).logits
    except ValueError as error:
        assert "its queries cannot be compared with what is cached" in str(error), error
        return OTHER_KEYS
    assert torch.equal(logits, expected), "the linked prefill differs"
    if not any(layer.num_stored for layer in cache.folding_layers):
        return NO_FULL_ATTENTION
    try:
        model(last, **cache_argument(cache))
    except ValueError as error:
        if "must see the attention of" in str(error):
            assert type(model).__name__ in str(error)
            return OUTSIDE
        assert "position_ids" in str(error), error
    cache.release(model)
    assert not is_linked(model.config.get_text_config(decoder=True))
    seen = recorded_queries(model, prompt)
    folded = [layer for layer in cache.folding_layers if layer.num_slots]
    assert folded
    for layer in folded:
        states = scorer.shown[layer.layer_idx]
        # some models run the same module for several layers of the cache
        true = [query for query in seen[states.module] if query.shape == states.queries.shape]
        if model_type == "jetmoe":  # its heads are not grouped by the KV head they read
            heads = states.keys.shape[1]
            true = [query.unflatten(1, (-1, heads)).transpose(1, 2).flatten(1, 2) for query in true]
        assert any(torch.allclose(states.queries, query, rtol=1e-4, atol=1e-5) for query in true)
    return "queries"


@pytest.mark.filterwarnings("ignore")
def test_queries_arrive_or_are_refused():
    outcomes, wrong = {}, {}
    for model_type in causal_lm_types():
        try:
            outcomes[model_type] = linked_outcome(model_type)
        except Exception as error:
            wrong[model_type] = f"{type(error).__name__}: {error}"
    arrived = sorted(name for name, how in outcomes.items() if how == "queries")
    refused = {name for name, how in outcomes.items() if how in NO_QUERIES}
    print(f"{len(arrived)} hand over their queries: {' '.join(arrived)}")
    listed = {name: reason for reason, names in NO_QUERIES.items() for name in names.split()}
    for name in sorted(refused):
        print(f"{name}: {listed.get(name)}")
    assert not wrong
    assert refused <= listed.keys() | OUTSIDE_BEFORE
    assert len(arrived) >= 98
    if transformers.__version__ == TESTED:
        assert refused == set(listed)
        assert (len(arrived), len(outcomes)) == (QUERIES, ALL)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model_type", ["gpt_oss", "gemma2"])
def test_eager_attention_with_sinks_and_with_caps(model_type):
    assert linked_outcome(model_type, attention="eager") == "queries"


# What a link changes: nothing -----------------------------------------------------------------------------------------


def logits_of(model, cache, pieces):
    """Of several passes with one cache, of each the last three, as prompt lookup keeps them."""
    kept = {"logits_to_keep": 3} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    return [model(piece, **cache_argument(cache), **kept).logits for piece in pieces]


@torch.no_grad()
def link_outcome(model, ids):
    """`"the same"`, or why this model cannot be linked; an `AssertionError` where the link changes something."""
    if not can_link(model):
        return OUTSIDE
    pieces = ids.split([LENGTH - 5, 5, 1], dim=1)
    try:
        plain = logits_of(model, DynamicCache(config=model.config), pieces)
    except RuntimeError:  # modules with a cache of their own know one sequence (in transformers 5.4)
        return NOT_RUN
    with merging_attention(model), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        linked = logits_of(model, DynamicCache(config=model.config), pieces)
        whole = logits_of(model, MergingDynamicCache(config=model.config, compression_ratio=0), pieces)
    for theirs, others, ours in zip(plain, linked, whole, strict=True):
        assert torch.equal(others, theirs), f"a plain cache differs by {(others - theirs).abs().max()}"
        assert torch.equal(ours, theirs), f"ratio 0 differs by {(ours - theirs).abs().max()}"
    return "the same"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_linking_changes_nothing(attention):
    """Neither for a model's own cache nor for ratio 0: a prompt, several tokens, and one."""
    outcomes, wrong = {}, {}
    for model_type in causal_lm_types():
        try:
            model, prompt, last, *_ = tried(model_type, attention)
            outcomes[model_type] = link_outcome(model, torch.cat([prompt, last], dim=1))
        except NotTriedError as why:
            outcomes[model_type] = str(why)
        except Exception as error:
            wrong[model_type] = f"{type(error).__name__}: {error}"
    same = [name for name, how in outcomes.items() if how == "the same"]
    print(f"{len(same)} are the same: {' '.join(same)}")
    assert not wrong
    assert len(same) >= 75


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    ("model_type", "options"),
    [
        ("gpt2", {"reorder_and_upcast_attn": True}),
        ("gemma4_text", {"num_kv_shared_layers": 2}),
        ("gemma4_unified_text", {"num_kv_shared_layers": 2}),
    ],
)
def test_linking_changes_nothing_where_a_file_asks_for_the_name(model_type, options, attention, dtype):
    if model_type not in CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {model_type}")
    config = tiny_config(model_type, 4)
    for name, value in options.items():
        setattr(config, name, value)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=dtype).eval()
    ids = torch.randint(5, 90, (1, LENGTH + 1), generator=torch.Generator().manual_seed(1))
    assert link_outcome(model, ids) == "the same"


# Heads that keep different tokens -------------------------------------------------------------------------------------


class OtherInEachHead(Scorer):
    """Random scores of each layer and head's own."""

    def score(self, states):
        generator = torch.Generator().manual_seed(states.layer_idx)
        return torch.rand(states.keys.shape[1:3], generator=generator).expand(states.keys.shape[:3])


@contextlib.contextmanager
def hiding(model, hidden):
    """Inside, each layer's KV heads do not see the tokens that `hidden[layer_idx]` `[B, H, L]` names."""
    config = model.config.get_text_config(decoder=True)
    implementation = config._attn_implementation

    def attend(module, query, key, value, attention_mask, *args, **kwargs):
        if (lost := hidden.get(getattr(module, "layer_idx", None))) is not None and lost.shape[2] + 1 == key.shape[2]:
            order = torch.arange(query.shape[1]) // (query.shape[1] // lost.shape[1])
            if type(module).__name__.startswith("JetMoe"):
                order = torch.arange(query.shape[1]) % lost.shape[1]  # the heads of each KV head are not neighbours
            bias = torch.nn.functional.pad(lost[:, order, None].float() * torch.finfo(query.dtype).min, (0, 1))
            if attention_mask is not None and attention_mask.dtype == torch.bool:
                attention_mask = torch.zeros(attention_mask.shape).masked_fill(~attention_mask, -torch.inf)
            attention_mask = bias if attention_mask is None else attention_mask + bias
        file = vars(sys.modules[type(module).__module__])
        if implementation == "eager":
            return file["eager_attention_forward"](module, query, key, value, attention_mask, *args, **kwargs)
        interface = file.get("ALL_ATTENTION_FUNCTIONS", ALL_ATTENTION_FUNCTIONS)
        return interface[implementation](module, query, key, value, attention_mask, *args, **kwargs)

    name = f"hiding_{implementation}"
    AttentionInterface.register(name, attend)
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[implementation])
    model.set_attn_implementation(name)
    yield
    model.set_attn_implementation(implementation)


@torch.no_grad()
def outcome_of_heads(model_type, budget):
    """`"exact"` if a step after the fold is that of the full cache with each head's lost tokens hidden from it."""
    try:
        model, prompt, last, _, told = tried(model_type)
        if not can_link(model) or model_type in ("hrm_text", "zamba2"):  # whose modules serve several layers
            return "the reference of this test does not reach its attention"
        with warnings.catch_warnings(record=True):
            cache = MergingDynamicCache(
                model=model, scorer=OtherInEachHead(), budget=budget, merger="drop", recent_tokens=WINDOW
            )
        model(prompt, **cache_argument(cache))
        step = model(last, **cache_argument(cache), **told).logits
    except (NotTriedError, ValueError) as error:
        return str(error)
    cache.release()
    folded = [layer for layer in cache.folding_layers if layer.num_slots]
    if not folded:
        return NO_FULL_ATTENTION
    hidden = {}
    for layer in folded:
        kept = layer.positions.clamp_min(0)
        lost = torch.ones(*kept.shape[:2], LENGTH + 1, dtype=torch.bool).scatter_(2, kept, False)
        absent = (layer.positions == 0).any(-1, keepdim=True)  # -1, where heads differ, was taken for 0
        lost[..., :1] = ~absent
        hidden[layer.layer_idx] = lost[..., :LENGTH]
    full = DynamicCache(config=model.config)
    with hiding(model, hidden):
        model(prompt, **cache_argument(full))
        expected = model(last, **cache_argument(full), **told).logits
    difference = (step - expected).abs().max().item()
    assert difference < 1e-4 * max(1.0, expected.abs().max().item()), f"the step after the fold differs by {difference}"
    return "exact"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("budget", ["uniform", "adakv", "global", "profile"])
def test_heads_keep_tokens_of_their_own(budget):
    exact, wrong = [], {}
    for model_type in causal_lm_types():
        try:
            if outcome_of_heads(model_type, budget) == "exact":
                exact.append(model_type)
        except Exception as error:
            wrong[model_type] = f"{type(error).__name__}: {error}"
    print(f"{len(exact)} exact: {' '.join(exact)}")
    assert not wrong
    assert len(exact) >= 98
