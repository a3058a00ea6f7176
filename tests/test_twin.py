"""What a cache finds out in the middle of a user's pass: unnoticed by hooks, recorders, training and random numbers.

And whatever the layers are made of that it asks: adapters, quantized weights, weights that are offloaded.
"""

import pytest
import torch
from accelerate import cpu_offload
from optimum import quanto
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import DynamicCache

from architectures import causal_lm_types
from merging_cache import MergingDynamicCache
from merging_cache.model import cache_argument
from merging_cache.twin import matrix_of, twin_of
from models import WINDOW, assert_same_cache, llama, prompt, tiny_model
from test_architectures import NotTriedError, tried

# a second reading of the first prompt, and a rotary embedding that is tried out
DEFAULTS = {"scorer": {"name": "probe", "probe_tokens": 16}, "budget": {"name": "profile", "probe_tokens": 16}}
LOOKING = {
    "defaults": DEFAULTS | {"merger": "refit"},
    "kvzip": {"scorer": "kvzip", "merger": "mass"},
    "leave_one_out": {"scorer": "leave_one_out", "merger": "drop"},
    "expected_attention": {"scorer": "expected_attention", "merger": "drop"},
    "kvzip plus": {"scorer": {"name": "kvzip", "plus": True}, "merger": "drop"},
}


def cache_for(model, **options):
    return MergingDynamicCache(model=model, compression_ratio=0.5, **WINDOW | options)


def everything_noticed(model, cache, ids, **given):
    """Every call of every module that hooks see in a prompt, with what it was given, and the random numbers after."""
    calls, hooks = [], []

    def note(name):
        def before(module, args, kwargs):
            shapes = [tuple(one.shape) for one in (*args, *kwargs.values()) if isinstance(one, torch.Tensor)]
            calls.append((name, "before", shapes))

        def after(module, args, output):
            calls.append((name, "after"))

        return before, after

    def anywhere(module, args, output):
        if type(module).__module__ != "transformers.activations":  # some files make one for each call
            calls.append(type(module).__name__)

    everywhere = nn.modules.module.register_module_forward_hook(anywhere)
    for name, module in model.named_modules():
        before, after = note(name)
        hooks += [module.register_forward_pre_hook(before, with_kwargs=True), module.register_forward_hook(after)]
    torch.manual_seed(3)
    try:
        output = model(ids, **cache_argument(cache), **given)
    finally:
        for hook in (*hooks, everywhere):
            hook.remove()
    return calls, torch.rand(4), output


def attributes(model):
    """All that modules hold, by identity, but what a link is made of."""
    return {
        (name, key): id(value)
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if key != "_output_capturing_hooks_installed"
    }


@torch.no_grad()
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model_type", causal_lm_types())
def test_nobody_notices(model_type):
    """The first prompt of a model, over every architecture that takes the defaults."""
    try:
        model, ids, _, expected, _ = tried(model_type)
    except NotTriedError as why:
        pytest.skip(str(why))
    try:
        plain = everything_noticed(model, DynamicCache(config=model.config), ids)
    except RuntimeError:  # GLM of DeepSeek's attention, in older transformers
        pytest.skip("keeps keys in its modules, and can read one prompt only")
    before, seen = attributes(model), 0
    for options in LOOKING.values():
        try:
            cache = cache_for(model, **options)
            calls, drawn, output = everything_noticed(model, cache, ids)
        except ValueError:
            continue
        seen += 1
        assert calls == plain[0]
        assert torch.equal(drawn, plain[1])
        assert torch.equal(output.logits, expected)
        cache.release()
    after = attributes(model)
    assert after.keys() == before.keys()
    assert not {
        key for key in after if key[1] not in ("_forward_hooks", "_forward_pre_hooks") and after[key] != before[key]
    }
    if not seen:
        pytest.skip("refused")


@torch.no_grad()
@pytest.mark.parametrize("options", LOOKING.values(), ids=LOOKING)
@pytest.mark.parametrize("wanted", ["output_attentions", "output_hidden_states"])
def test_recorded_outputs_are_those_of_the_pass(wanted, options):
    """As an argument and as the model's setting."""
    for told in (True, False):
        models = [llama("eager"), llama("eager")]
        given = {wanted: True} if told else {}
        for model in models:
            setattr(model.config, wanted, not told)
        caches = DynamicCache(config=models[0].config), cache_for(models[1], **options)
        outputs = [
            model(prompt(60), **cache_argument(cache), **given) for model, cache in zip(models, caches, strict=True)
        ]
        recorded = [getattr(output, wanted.removeprefix("output_")) for output in outputs]
        assert len(recorded[0]) >= 2
        assert all(torch.equal(*pair) for pair in zip(*recorded, strict=True))


@torch.no_grad()
@pytest.mark.parametrize("options", LOOKING.values(), ids=LOOKING)
@pytest.mark.parametrize("family", ["gpt2", "phi"])
def test_dropout_is_drawn_as_ever(family, options):
    model = tiny_model(family).train()
    logits = []
    for cache in (DynamicCache(config=model.config), None):
        try:
            cache = cache or cache_for(model, **options)
            torch.manual_seed(1)
            logits.append(model(prompt(60), **cache_argument(cache)).logits)
        except ValueError as refusal:
            assert family == "gpt2"
            assert "rotary" in str(refusal)
            return
    assert torch.equal(*logits)


def test_modules_that_are_there_twice_stay_one():
    inner = nn.Linear(3, 3)
    twin = twin_of(nn.Sequential(inner, nn.ReLU(), inner))
    assert twin[0] is twin[2]
    assert twin[0] is not inner
    assert twin[0].weight is inner.weight


def test_hooks_that_stay_do_what_they_did():
    """In their order, with what the ones before them made of inputs and outputs."""
    module, seen = nn.Linear(2, 2), []
    module.register_forward_pre_hook(lambda _, args: (args[0] + 1,))
    module.register_forward_pre_hook(lambda _, args, kwargs: (args, kwargs | {}), with_kwargs=True)
    module.register_forward_pre_hook(lambda _, args: args[0] * 2)
    module.register_forward_hook(lambda _, args, output: seen.append(args))
    module.register_forward_hook(lambda _, args, kwargs, output: output - 3, with_kwargs=True)
    states = torch.randn(4, 2)
    expected, before = module(states), seen.pop()
    assert torch.equal(twin_of(module, hooks_of=(__name__,))(states), expected)
    assert torch.equal(seen.pop()[0], before[0])
    assert torch.equal(twin_of(module)(states), nn.functional.linear(states, module.weight, module.bias))
    assert not seen


# What layers are made of ----------------------------------------------------------------------------------------------


class Packed(nn.Module):
    """A linear layer that has whole numbers and scales, and no weight, as GPTQ, AWQ and bitsandbytes have."""

    def __init__(self, layer):
        super().__init__()
        scales = layer.weight.abs().amax(dim=1, keepdim=True) / 127
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.register_buffer("numbers", (layer.weight / scales).round().to(torch.int8).mT.contiguous())
        self.register_buffer("scales", scales.mT.clone())
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach())

    def unpacked(self):
        layer = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None)
        layer.weight.copy_((self.numbers.float() * self.scales).mT)
        if self.bias is not None:
            layer.bias.copy_(self.bias)
        return layer

    def forward(self, states):
        return nn.functional.linear(states, (self.numbers.float() * self.scales).mT, self.bias)


def replaced(model, change):
    """The model with all linear layers of its attention changed."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if name.endswith("_proj") and isinstance(child, nn.Linear | Packed):
                setattr(module, name, change(child))
    return model


ASKING = LOOKING | {
    "critical_kv": {"scorer": "critical_kv", "merger": "drop", "budget": "adakv"},
    "leverage": {"scorer": "leverage", "merger": "drop"},
}


def assert_same_folds(models, options, atol):
    """Both fold a prompt into the same, and neither has to do without anything."""
    caches = [cache_for(model, **options) for model in models]
    for model, cache in zip(models, caches, strict=True):
        model(prompt(60), **cache_argument(cache))
        assert not cache.report().fallbacks
    assert_same_cache(*caches, atol=atol)


def dequantized(model, plain):
    """The plain model, with the weights that the other one was quantized to."""
    for mine, other in zip(model.modules(), plain.modules(), strict=True):
        if isinstance(mine, nn.Linear):
            other.weight.copy_(mine.weight.dequantize())
    return plain


@torch.no_grad()
@pytest.mark.parametrize("options", ASKING.values(), ids=ASKING)
@pytest.mark.parametrize("family", ["llama", "qwen2"])  # without biases, and with some
def test_layers_without_a_weight(family, options):
    """As the model of the unpacked weights."""
    packed = replaced(tiny_model(family), Packed)
    unpacked = replaced(replaced(tiny_model(family), Packed), Packed.unpacked)
    assert_same_folds((packed, unpacked), options, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("options", ASKING.values(), ids=ASKING)
def test_weights_that_quanto_quantized(options):
    models = llama(), llama()
    quanto.quantize(models[0], weights=quanto.qint8)
    quanto.freeze(models[0])
    assert_same_folds((models[0], dequantized(*models)), options, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("options", ASKING.values(), ids=ASKING)
def test_weights_that_torchao_quantized(options):
    quantization = pytest.importorskip("torchao.quantization")

    models = llama(), llama()
    quantization.quantize_(models[0], quantization.Int8WeightOnlyConfig())
    assert_same_folds((models[0], dequantized(*models)), options, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("options", ASKING.values(), ids=ASKING)
def test_weights_that_are_offloaded(options):
    offloaded, model = cpu_offload(llama(), torch.device("cpu")), llama()
    caches = [cache_for(one, **options) for one in (offloaded, model)]
    outputs = [one(prompt(60), **cache_argument(cache)) for one, cache in zip((offloaded, model), caches, strict=True)]
    assert torch.equal(outputs[0].logits, outputs[1].logits)
    assert_same_cache(*caches)
    assert not caches[0].report().fallbacks
    assert all(parameter.is_meta for parameter in offloaded.parameters())


def adapted(model, *names):
    """With LoRA on all of its attention, one adapter for each name."""

    config = LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    model = get_peft_model(model, config, adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora" in name:
                parameter.mul_(3)
    return model.eval()


@torch.no_grad()
@pytest.mark.parametrize("options", ASKING.values(), ids=ASKING)
def test_adapters_are_part_of_their_layers(options):
    """As the model that they were merged into."""
    adapting, merged, plain = adapted(llama().double(), "one"), adapted(llama().double(), "one"), llama().double()
    merged = merged.merge_and_unload()
    caches = [cache_for(model, **options) for model in (adapting, merged, plain)]
    for model, cache in zip((adapting, merged, plain), caches, strict=True):
        model(prompt(60), **cache_argument(cache))
    assert_same_cache(*caches[:2], atol=1e-4)
    assert not torch.equal(caches[0].layers[0].positions, caches[2].layers[0].positions)


@torch.no_grad()
@pytest.mark.parametrize("name", ["kvzip", "expected_attention"])
def test_every_row_has_its_own_adapter(name):
    """As it would be alone, with that one. What asks for the output projection is given that of the active adapter."""
    options = LOOKING[name]
    model, ids = adapted(llama(), "one", "two"), prompt(60, batch=2)
    together = cache_for(model, attention_mask=torch.ones_like(ids), **options)
    logits = model(ids, **cache_argument(together), adapter_names=["one", "two"]).logits
    assert not together.report().fallbacks
    for row, name in enumerate(("one", "two")):
        model.set_adapter(name)
        alone = cache_for(model, **options)
        torch.testing.assert_close(model(ids[row : row + 1], **cache_argument(alone)).logits[0], logits[row])
        for mine, theirs in zip(together.layers, alone.layers, strict=True):
            slots = theirs.num_stored  # what a row has less of than others, it lacks in front
            assert (mine.positions[row, :, :-slots] == -1).all()
            assert torch.equal(mine.positions[row, :, -slots:], theirs.positions[0])
            there = theirs.positions[0] >= 0
            for part in ("keys", "values"):
                pair = (getattr(mine, part)[row, :, -slots:][there], getattr(theirs, part)[0][there])
                torch.testing.assert_close(*pair, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_matrix_of_a_layer(bias, dtype):
    layer = nn.Linear(5, 3, bias=bias).to(dtype)
    like = torch.empty(0, dtype=dtype)
    assert torch.equal(matrix_of(layer, like), layer.weight.mT.float())
    with torch.no_grad():
        torch.testing.assert_close(matrix_of(Packed(layer.float()), like.float()), layer.weight.mT, atol=0.01, rtol=0)
    assert matrix_of(nn.ReLU(), like) is None
    assert matrix_of(layer.to("meta"), like) is None


# What stages do without -----------------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_report_says_what_stages_do_without():
    model = tiny_model("gpt2")
    cache = cache_for(model, scorer="snapkv", merger="mass")
    model(prompt(60), **cache_argument(cache))
    (fallback,) = cache.report().fallbacks
    assert fallback.startswith("Without the rotary embedding: merger; the rotary position embedding of GPT2Attention")
    assert fallback in str(cache.report())
    cache = cache_for(llama(), scorer="snapkv", merger="mass")
    assert not cache.report().fallbacks
