"""Trains the small model of `examples/needle/` from nothing, on one CPU core or a GPU.

    python examples/train_needle.py --out examples/needle

A 3-layer Llama learns to look things up in its context. Attention does not discover that by itself from the tasks
alone, so training starts with the purest form of it (a random string, then the same string again; names whose code is
told again and again) in rows of 20 words, where a guess at the right place is often right. Whenever the model looks up
reliably the rows grow, and at 128 words the real tasks begin, in contexts that grow with the steps.
"""

import argparse
import math
import random
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from merging_cache.evaluation.needle_words import ATTRIBUTES, CODES, FILLER, GLUE, NAMES, NeedleWords, count_words
from merging_cache.evaluation.ruler import RULER, NeedleInAHaystack, VariableTracking, fit
from needle_tasks import make_context

TOKENS_PER_STEP = 4096
LOOKS_UP = 0.85  # accuracy on pure look-up at which the tasks begin
CONTEXTS = [(0.06, 64), (0.15, 128), (0.3, 256), (0.5, 400), (2, 600)]  # until this share of the tasks, words
HARD = {"niah_multivalue": 3, "niah_multiquery": 3, "cwe": 5, "fwe": 4, "vt": 2, "qa_2": 3}  # trained more often
PAD, UNKNOWN, START = "<pad>", "<unk>", "<s>"


def build_tokenizer() -> PreTrainedTokenizerFast:
    words = [PAD, UNKNOWN, START, *GLUE, *CODES, *NAMES, *FILLER]
    vocabulary = {word: index for index, word in enumerate(dict.fromkeys(words))}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        unk_token=UNKNOWN,
        eos_token=".",
        padding_side="left",
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=1024,
        initializer_range=0.06,  # about 1 / sqrt(hidden_size): attention patterns form soon
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config)


# A training row is a list of words and, beside each, how much its prediction counts. The few words of a code or a vote
# count more than those of a long passage, or they would be lost among them.
Row = tuple[list[str], list[float]]
CODE, WORD = 1.0, 0.5
WEIGHTS = {"single": CODE, "multi-key": CODE, "copy": WORD, "frequent": 2.0}


def repetition_row(rng: random.Random, length: int) -> Row:
    """A random string again and again: every word after the first round is to be predicted.

    The string's length is drawn anew each time, or the model would learn to look a fixed number of words back.
    """
    string = rng.sample(NAMES + CODES, rng.randint(4, length // 2))
    words = (string * (length // len(string) + 1))[:length]
    return words, [WORD * (index > len(string)) for index in range(length)]


def told_again_row(rng: random.Random, length: int) -> Row:
    """Names whose codes are told again and again: every code after the first time is to be predicted."""
    names = rng.sample(NAMES, rng.randint(2, max(2, length // 12)))
    codes = dict(zip(names, rng.sample(CODES, len(names)), strict=True))
    words, weights, told = [], [], set()
    while len(words) < length:
        name = rng.choice(names)
        words += ["code", name, codes[name], "."]
        weights += [0.0] * 2 + [CODE * (name in told), 0.0]
        told.add(name)
    return words, weights


def task_row(rng: random.Random, length: int) -> Row:
    """A context of the real tasks, then many of its questions, each answered."""
    pairs = rng.choice([1, 4, 8, 16, 24, 32])
    pairs = min(pairs, max(1, length // 16))
    candidates = 8 if length >= 128 else rng.choice([0, 4])
    passage = rng.randint(6, 12) if length >= 128 else rng.choice([0, 4])
    context = make_context(rng, length, pairs, passage, candidates)
    words = context.text.split()
    weights = [0.0] * len(words)
    lookups = [question for question in context.questions if question.kind in ("single", "multi-key")]
    others = [question for question in context.questions if question.kind not in ("single", "multi-key")]
    asked = rng.sample(lookups, min(4, len(lookups))) + others
    rng.shuffle(asked)
    for question in asked:
        prompt, answer = question.prompt.split(), [*question.answer.split(), "."]
        words += prompt + answer
        weights += [0.0] * len(prompt) + [WEIGHTS[question.kind]] * (len(answer) - 1) + [WORD]
    return words, weights


def ruler_row(rng: random.Random, length: int) -> Row:
    """A context of one of RULER's tasks, then questions about it, each answered."""
    (name,), length = rng.choices(list(RULER), [HARD.get(name, 1) for name in RULER]), min(max(length, 96), 580)
    task = RULER[name]
    if isinstance(task, NeedleInAHaystack) and task.haystack == "prose" and length >= 128:
        task = replace(task, num_keys=rng.choice([1, 4, 8]) if task.num_values == 1 else 3)  # more to ask about
    if isinstance(task, VariableTracking):
        task = replace(task, num_chains=rng.randint(1, max(1, min(4, length // 64))))
    example = fit(name, NeedleWords(), count_words, length, seed=rng.getrandbits(32), task=task)
    words = example.context.split()
    weights = [0.0] * len(words)
    asked = questions_about(rng, words)
    if not asked:  # nothing is told but how often
        asked = [(example.question.split()[2:], sorted(example.answers) if name == "cwe" else example.answers)]
    for prompt, answer in rng.sample(asked, min(4, len(asked))):
        words += ["question", ":", *prompt, *answer, "."]
        weights += [0.0] * (len(prompt) + 2) + [CODE] * len(answer) + [WORD]
    return words, weights


def questions_about(rng: random.Random, words: list[str]) -> list[tuple[list[str], list[str]]]:
    """Everything that can be asked about the facts of a context, and the answers, with what is met on the way."""
    codes: dict[tuple[str, ...], list[list[str]]] = {}
    holders: dict[str, list[str]] = {}
    facts: dict[tuple[str, str], str] = {}
    for sentence in " ".join(words).replace("page ", "").split(" ."):
        match sentence.split():
            case ["code", key, value]:
                codes.setdefault((key,), []).append([value])
            case ["code", key, code, one, other]:
                codes.setdefault((key,), []).append([code, one, other])
            case ["code", code, one, other, *value]:
                codes.setdefault((code, one, other), []).append(value)
            case ["set", variable, value]:
                holders.setdefault(value, []).append(variable)
            case [name, attribute, value] if attribute in ATTRIBUTES and name in NAMES:
                facts[name, attribute] = value

    asked = [(["code", *key], values[0]) for key, values in codes.items() if len(values) == 1]
    single = [(key[0], values[0][0]) for key, values in codes.items() if len(values) == len(key) == len(values[0]) == 1]
    if len(single) >= 4:
        pairs = rng.sample(single, 4)
        asked.append((["each", "code", *(key for key, _ in pairs)], [word for pair in pairs for word in pair]))
        if rng.random() < 0.5:
            asked = asked[-1:]
    for key, values in codes.items():
        if len(values) > 1:
            asked.append((["all", "code", *key], sorted(value[0] for value in values)))
    for number in sorted(set(holders) & set(CODES)):
        chain, held = [], number
        while held in holders:
            held = holders[held][0]
            chain.append(held)
        asked.append((["set", number], chain))
    hops = [(name, value) for (name, attribute), value in facts.items() if attribute == "friend"]
    for name, friend in hops:
        for attribute in ATTRIBUTES:
            if (friend, attribute) in facts and attribute != "friend":
                asked.append(([attribute, name, "friend"], [friend, attribute, facts[friend, attribute]]))
    if facts:
        asked += [([name, attribute], [value]) for (name, attribute), value in rng.sample(list(facts.items()), 6)]
    return asked


def draw_rows(rng: random.Random, progress: float | None, reach: int) -> tuple[list[Row], torch.Tensor]:
    """One step's rows, and for each whether it is a look-up of codes (told again) or not.

    Pure look-up of `reach` words where `progress` is None, else tasks, of which the share `progress` is done.
    """
    if progress is None:
        length, kinds = rng.randint(reach // 2, reach), [repetition_row, told_again_row]
        size = length
    else:
        longest = next(words for end, words in CONTEXTS if progress < end)
        length = rng.choice([longest, longest, rng.randint(48, longest)])
        kinds = [task_row] * 4 + [ruler_row] * 10 + [told_again_row, repetition_row]
        size = max(length + 72, 128)  # questions come on top
    drawn = [rng.choice(kinds) for _ in range(max(2, TOKENS_PER_STEP // size))]
    return [kind(rng, length) for kind in drawn], torch.tensor([kind is told_again_row for kind in drawn])


def collate(rows: list[Row], vocabulary: dict[str, int], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows to right-padded `input_ids` and the weights of their prediction, both `[B, L]`."""
    width = max(len(words) for words, _ in rows)
    ids = [[vocabulary[word] for word in words] + [pad] * (width - len(words)) for words, _ in rows]
    weights = [row_weights + [0.0] * (width - len(row_weights)) for _, row_weights in rows]
    return torch.tensor(ids), torch.tensor(weights)


def learning_rate(step: int, steps: int, warmup: int = 50) -> float:
    """The factor on the peak learning rate: linear warm-up, then a cosine down to 2 %."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def build_optimizers(model: LlamaForCausalLM, peak: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for embeddings, output head and norms."""
    matrices = [p for name, p in model.named_parameters() if p.dim() == 2 and name.startswith("model.layers")]
    others = [p for name, p in model.named_parameters() if p.dim() != 2 or not name.startswith("model.layers")]
    muon = torch.optim.Muon(
        [{"params": matrices, "peak": 2 * peak}], lr=peak, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"
    )
    adam = torch.optim.AdamW([{"params": others, "peak": peak}], lr=peak, betas=(0.9, 0.95), weight_decay=0.0)
    return [muon, adam]


def train(steps: int, seed: int, device: str, out: Path, peak: float = 2e-3) -> None:
    torch.manual_seed(seed)
    rng = random.Random(seed)
    tokenizer = build_tokenizer()
    vocabulary = tokenizer.get_vocab()
    model = build_model(tokenizer).to(device).train()
    optimizers = build_optimizers(model, peak)

    accuracy = {"codes": Running(), "words": Running()}
    started, tasks_begin, reach = time.time(), None, 20
    bar = tqdm(range(steps), unit="step", mininterval=10)
    for step in bar:
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * learning_rate(step, steps)
        progress = None if tasks_begin is None else (step - tasks_begin) / (steps - tasks_begin)
        rows, looks_up_codes = draw_rows(rng, progress, reach)
        ids, weights = (tensor.to(device) for tensor in collate(rows, vocabulary, tokenizer.pad_token_id))

        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
        wanted = weights[:, 1:] > 0
        logits, labels, weight = model.lm_head(hidden[wanted]), ids[:, 1:][wanted], weights[:, 1:][wanted]
        loss = (cross_entropy(logits, labels, reduction="none") * weight).sum() / weight.sum()
        model.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()

        right = (logits.argmax(-1) == labels).cpu()
        is_code = looks_up_codes[:, None].expand_as(wanted)[wanted.cpu()]
        accuracy["codes"].add(right[is_code])
        accuracy["words"].add(right[~is_code])
        if tasks_begin is None and min(running.mean for running in accuracy.values()) > LOOKS_UP:
            tqdm.write(f"looks up within {reach} words at step {step}")
            reach = reach * 3 // 2
            accuracy = {"codes": Running(), "words": Running()}  # to be earned again on longer rows
            if reach > 128:
                tasks_begin = step
        if step % 100 == 99:
            bar.set_postfix(loss=loss.item(), width=ids.shape[1], **{k: v.mean for k, v in accuracy.items()})
        if step % 500 == 499 or step == steps - 1:
            save(model, tokenizer, out)
    print(f"trained {steps} steps in {(time.time() - started) / 60:.1f} minutes; loss {loss.item():.4f}")


@dataclass
class Running:
    """A running mean that starts at 0, so that what it measures has to be earned."""

    mean: float = 0.0

    def add(self, right: torch.Tensor) -> None:
        if len(right):
            self.mean += 0.03 * (right.float().mean().item() - self.mean)


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    model.generation_config = GenerationConfig(
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, do_sample=False
    )
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "needle")
    parser.add_argument("--steps", type=int, default=7000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; one is fastest for a model this small")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    train(arguments.steps, arguments.seed, arguments.device, arguments.out)
