"""The package as a whole: importing it changes nothing, the rooms keep apart, folding long layers is frugal."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import merging_cache
from merging_cache import LayerStates, MergingConfig
from merging_cache.mergers import nearest
from merging_cache.model import cache_argument
from models import CACHES, greedy, llama, prompt

pytestmark = pytest.mark.core
PACKAGE = Path(merging_cache.__file__).parent


@pytest.mark.slow
def test_importing_changes_nothing_in_transformers():
    script = """
import transformers, sys
from transformers import cache_utils, masking_utils, modeling_utils, AttentionInterface
from transformers.models.llama import modeling_llama

def snapshot():
    state = {}
    for name, module in sorted(sys.modules.items()):
        if name.startswith("transformers.") and hasattr(module, "__dict__"):
            for key, value in list(vars(module).items()):
                if isinstance(value, type):
                    methods = sorted((k, id(v)) for k, v in vars(value).items() if callable(v))
                    state[name, key] = (id(value), tuple(methods))
                elif callable(value):
                    state[name, key] = id(value)
    return state

tables = [dict(cache_utils.DYNAMIC_LAYER_TYPE_MAPPING)] if hasattr(cache_utils, "DYNAMIC_LAYER_TYPE_MAPPING") else []
attention = {**modeling_utils.ALL_ATTENTION_FUNCTIONS}
before = snapshot()
import merging_cache
merging_cache.MergingDynamicCache()
merging_cache.MergingQuantizedCache("fp8")
after = snapshot()
assert {key: after[key] for key in before} == before
assert {**modeling_utils.ALL_ATTENTION_FUNCTIONS} == attention
if tables:
    assert dict(cache_utils.DYNAMIC_LAYER_TYPE_MAPPING) == tables[0]
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


def test_other_caches_are_untouched_by_ours():
    from transformers import DynamicCache

    model, ids = llama(), prompt(40)
    before = greedy(model, ids, **cache_argument(DynamicCache(config=model.config)))
    greedy(model, ids, **cache_argument(CACHES["dynamic"](model, compression_ratio=0.5)))
    after = greedy(model, ids, **cache_argument(DynamicCache(config=model.config)))
    assert torch.equal(torch.stack(before.logits), torch.stack(after.logits))


FOLD_32K = """
import threading, time, sys
import psutil, torch
from merging_cache import LayerStates, MergingConfig
torch.set_num_threads(2)
tokens = 32768
states = LayerStates(torch.randn(1, 8, tokens, 128), torch.randn(1, 8, tokens, 128), layer_idx=0)
fold = MergingConfig(scorer="keydiff", merger="similarity").build()
process = psutil.Process()
before, peak, done = process.memory_info().rss, 0, threading.Event()

def watch():
    global peak
    while not done.is_set():
        peak = max(peak, process.memory_info().rss)
        time.sleep(0.002)

watcher = threading.Thread(target=watch)
watcher.start()
slots = fold(states, tokens // 2)
done.set()
watcher.join()
outputs = slots.keys.nbytes + slots.values.nbytes
print((peak - before - outputs) / 2**30)
"""


@pytest.mark.slow
def test_folding_32k_tokens_takes_little_memory():
    """8 KV heads of dimension 128 in fp32, half of 32,768 tokens: less than 0.7 GiB beyond inputs and outputs."""
    done = subprocess.run([sys.executable, "-c", FOLD_32K], check=True, timeout=600, capture_output=True, text=True)
    added = float(done.stdout)
    print(f"added {added:.3f} GiB")
    assert added < 0.7


class LargestResult(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation returned."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.slow
@pytest.mark.parametrize("routing", ["exact", "local"])
@pytest.mark.parametrize("precisions", [(), (nearest.Int8,), (nearest.BFloat16,)], ids=str)
def test_routing_grows_with_the_length_not_its_square(routing, precisions, monkeypatch):
    monkeypatch.setattr(nearest, "TILE", 1 << 14)
    monkeypatch.setattr(nearest, "precisions", lambda device: precisions)
    states = LayerStates(torch.randn(1, 2, 4096, 8), torch.randn(1, 2, 4096, 8))
    fold = MergingConfig(merger={"name": "similarity", "routing": routing, "window": 32}).build()
    with LargestResult() as largest:
        fold(states, 2048)
    assert largest.elements <= 2 * states.keys.numel()  # all products of one head would be 64 times as many as keys


@pytest.mark.gpu
def test_on_a_gpu_everything_stays_there():
    model = llama().cuda()
    for kind in ("dynamic", "quanto", "fp8"):
        cache = CACHES[kind](model, compression_ratio=0.5)
        output = greedy(model, prompt(64).cuda(), **cache_argument(cache))
        assert cache.layers[0].keys.device.type == "cuda"
        again = CACHES[kind](model, compression_ratio=0.5)
        assert torch.equal(
            torch.stack(output.logits), torch.stack(greedy(model, prompt(64).cuda(), **cache_argument(again)).logits)
        )


@pytest.mark.gpu
def test_offloading_on_a_gpu_changes_nothing():
    from merging_cache import MergingDynamicCache

    model, ids = llama().cuda(), prompt(64).cuda()
    outputs = [
        greedy(model, ids, **cache_argument(MergingDynamicCache(config=model.config, offloading=offloading)))
        for offloading in (False, True)
    ]
    assert torch.equal(torch.stack(outputs[0].logits), torch.stack(outputs[1].logits))
