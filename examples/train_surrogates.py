"""Trains what the scorers kvzap and fast_kvzip score with, for the needle model, in the layout of published weights.

    python examples/train_surrogates.py --out surrogates

Both predict from a token's hidden state how much of the attention it will draw from what is asked later. Here that is
measured on training contexts: the largest attention weight that any question, with its answer, gives to the token.
kvzap learns its logarithm by least squares, fast_kvzip's gates learn the weight itself by gradient descent. Then

    MergingDynamicCache(model=model, scorer={"name": "kvzap", "weights": "surrogates/kvzap"})
"""

import argparse
import json
import random
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import binary_cross_entropy
from tqdm import trange

from merging_cache import load_model
from merging_cache.linalg import solve_positive_definite
from merging_cache.scorers import FastKVzipScorer
from needle_tasks import make_context

LEAST = 1e-6  # the smallest attention weight that is told from none
RIDGE = 1e-3
GATE_DIM, GATE_SINKS = 16, 16


@torch.no_grad()
def observe(model, tokenizer, contexts: int, words: int, seed: int) -> tuple[list[Tensor], list[Tensor]]:
    """For each layer the hidden states `[N, hidden]` of all contexts' tokens and the attention `[N, H]` they drew."""
    rng = random.Random(f"surrogates {seed}")
    attention_modules = [layer.self_attn for layer in model.model.layers]
    hidden, drawn = ([[] for _ in attention_modules] for _ in range(2))
    inputs = {}
    hooks = [
        module.register_forward_pre_hook(
            lambda module, args, kwargs: inputs.__setitem__(module.layer_idx, kwargs["hidden_states"]), with_kwargs=True
        )
        for module in attention_modules
    ]
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")  # the only one that shows its weights
    try:
        for _ in trange(contexts, desc="observing", leave=False):
            context = make_context(rng, words, pairs=rng.choice([8, 24]))
            asked = rng.sample(context.questions, len(context.questions))
            later = " ".join(f"{question.prompt} {question.answer} ." for question in asked)
            length = tokenizer(context.text, return_tensors="pt").input_ids.shape[1]
            ids = tokenizer(f"{context.text} {later}", return_tensors="pt").input_ids[:, : tokenizer.model_max_length]
            output = model(ids, output_attentions=True)
            heads = model.config.num_key_value_heads
            for index, weights in enumerate(output.attentions):  # [1, Hq, q, L]
                received = weights[0, :, length:, :length].amax(dim=1)
                drawn[index].append(received.unflatten(0, (heads, -1)).amax(dim=1).mT)
                hidden[index].append(inputs[index][0, :length])
    finally:
        model.set_attn_implementation(before)
        for hook in hooks:
            hook.remove()
    return [torch.cat(part) for part in hidden], [torch.cat(part) for part in drawn]


def fit_kvzap(hidden: Tensor, drawn: Tensor) -> dict[str, Tensor]:
    """The linear layer from hidden states to the logarithm of the attention drawn, by ridge regression."""
    inputs = torch.cat([hidden, torch.ones_like(hidden[:, :1])], dim=1).double()
    gram = inputs.mT @ inputs
    gram.diagonal().add_(RIDGE * len(inputs))
    solution = solve_positive_definite(gram, inputs.mT @ drawn.clamp_min(LEAST).log().double()).float()
    return {"weight": solution[:-1].mT.contiguous(), "bias": solution[-1].clone()}


def fit_gates(hidden: Tensor, drawn: Tensor, group: int, steps: int, seed: int) -> dict[str, Tensor]:
    """The gates of one layer, trained to let through what drew attention."""
    generator = torch.Generator().manual_seed(seed)
    width, heads = hidden.shape[1], drawn.shape[1]
    shapes = {
        "q_proj.weight": (heads * group * GATE_DIM, width),
        "q_proj.bias": (heads * group * GATE_DIM,),
        "k_proj.weight": (heads * GATE_DIM, width),
        "q_norm.weight": (GATE_DIM,),
        "k_norm.weight": (GATE_DIM,),
        "k_base": (heads, 1, GATE_SINKS, GATE_DIM),
        "b": (heads, 1, group),
    }
    weights = {name: torch.randn(shape, generator=generator) * width**-0.5 for name, shape in shapes.items()}
    weights |= {name: torch.ones(shapes[name]) for name in ("q_norm.weight", "k_norm.weight")}
    for tensor in weights.values():
        tensor.requires_grad_()
    gates = FastKVzipScorer(weights="being trained")
    optimizer = torch.optim.Adam(weights.values(), lr=1e-2)
    for _ in trange(steps, desc="gates", leave=False):
        batch = torch.randint(len(hidden), (2048,), generator=generator)
        passed = gates.predict(hidden[batch].unsqueeze(0), weights)[0].mT
        loss = binary_cross_entropy(passed, drawn[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return {name: tensor.detach().contiguous() for name, tensor in weights.items()}


def train_surrogates(
    model, tokenizer, folder: Path, contexts: int = 60, words: int = 512, steps: int = 200, seed: int = 0
) -> dict[str, Path]:
    """Train both kinds and save them; returns the folder of each by its scorer's name."""
    hidden, drawn = observe(model, tokenizer, contexts, words, seed)
    group = model.config.num_attention_heads // model.config.num_key_value_heads
    linear = [fit_kvzap(*layer) for layer in zip(hidden, drawn, strict=True)]
    gates = [fit_gates(*layer, group, steps, seed) for layer in zip(hidden, drawn, strict=True)]
    folders = {"kvzap": folder / "kvzap", "fast_kvzip": folder / "fast_kvzip"}
    for name, prefix, layers in (("kvzap", "layers.", linear), ("fast_kvzip", "", gates)):
        folders[name].mkdir(parents=True, exist_ok=True)
        tensors = {f"{prefix}{i}.{key}": tensor for i, layer in enumerate(layers) for key, tensor in layer.items()}
        save_file(tensors, folders[name] / "model.safetensors")
    shape = {"input_dim": hidden[0].shape[1], "output_dim": drawn[0].shape[1], "n_modules": len(linear)}
    (folders["kvzap"] / "config.json").write_text(json.dumps({"model_type": "kvzap", **shape}, indent=2) + "\n")
    return folders


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(Path(__file__).parent / "needle"))
    parser.add_argument("--out", type=Path, required=True, help="the folder to save to")
    parser.add_argument("--contexts", type=int, default=60)
    parser.add_argument("--words", type=int, default=512, help="words of each context")
    parser.add_argument("--steps", type=int, default=200, help="of training the gates")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = load_model(options.model)
    sizes = {"contexts": options.contexts, "words": options.words, "steps": options.steps, "seed": options.seed}
    for name, folder in train_surrogates(model, tokenizer, options.out, **sizes).items():
        print(f"{name}: {folder}")


if __name__ == "__main__":
    main()
