"""Runs a sweep: every context is read once, and every cache is filled from that and asked the same questions."""

import itertools
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from ..model import model_folder, most_positions
from ..reading import clock
from .config import EvaluationConfig, Variant, fingerprint
from .cores import Cores
from .english import English
from .example import Example
from .measure import Batch, Encoder, Item, Measurer, batches_of
from .needle_words import NeedleWords
from .plan import Seconds, counted, duration, spread
from .prose import ProseTask
from .ready_made import read_examples
from .results import Results, key_of
from .ruler import NeedleInAHaystack
from .tasks import TASKS
from .wording import Wording

Cell = dict[str, Any]  # {"task": ..., "context_length": ..., "variant": {...}}
REHEARSED = 64  # tokens of a context that every cache is tried out on before the work starts
TIMED = 4  # caches that tell how long all of them take
ANSWERS = 256  # tokens of questions and answers behind a context of prose, at most


def shipped_model() -> Path:
    """The folder of the small model that ships with this project."""
    here = Path(__file__).parent
    return next(path for path in (here / "needle", here.parents[1] / "examples" / "needle") if path.is_dir())


class Evaluation:
    """A sweep over a model: `run` measures what is missing, `results` holds what was measured.

    Started in several processes (`accelerate launch`, `torchrun`) they share the contexts, batch by batch, or with
    `tp_plan` the model: each then holds the caches of its own KV heads. On a CPU all evaluations that run at a time
    share its cores, unless `OMP_NUM_THREADS` is set, and models below 50 million parameters are run in one thread. The
    number of threads stays so in the process.

    Args:
        config: what to measure.
        output: a folder for `results.jsonl`, gone on with where it exists; `None` keeps results in memory.

    Raises:
        ValueError: for what cannot be done, before any model is loaded: files that are missing, contexts longer than
            the model allows, tasks that cannot be made.
        ImportError: if the package that ships the model is not installed.

    Example:
        >>> from merging_cache.evaluation import Evaluation, EvaluationConfig, Summary
        >>> config = EvaluationConfig(tasks=["niah_single_1"], context_length=128, examples=2, scorers=["keydiff"],
        ...     mergers=["auto"], compression_ratios=[0.5])
        >>> evaluation = Evaluation(config)
        >>> results = evaluation.run(progress=False)
        >>> rows = Summary(results, evaluation.cells).rows(["niah_single_1"], 128)
        >>> [row.variant.label for row in rows]
        ['full cache', 'keydiff drop 50%', 'keydiff auto 50%']
    """

    def __init__(self, config: EvaluationConfig, output: Path | None = None) -> None:
        self.config = config
        self.state = PartialState(cpu=not torch.accelerator.is_available())
        self.name = "the shipped needle model" if config.model is None else config.model
        self._path = str(shipped_model()) if config.model is None else model_folder(config.model)
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(self._path, padding_side="left")
            model_config = AutoConfig.from_pretrained(self._path).get_text_config(decoder=True)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"there is no model {self._path!r}, neither as a folder nor on the hub: {error}"
            ) from error
        self._most = most_positions(model_config)
        for length in config.lengths:
            self._check_length(length, "context_length")
        chat = bool(self.tokenizer.chat_template) if config.chat is None else config.chat
        if chat and not self.tokenizer.chat_template:
            raise ValueError(f"chat is True, but the tokenizer of {self._path!r} has no chat template")
        self.encoder = Encoder(self.tokenizer, chat, config.question_in_context)
        if output and config.data and Path(config.data).resolve() in (output.resolve(), *output.resolve().parents):
            raise ValueError(f"the output {output} is inside the data {config.data}, of which it would become a part")
        # by task and length, each example as its questions
        self.examples = self._read_examples() if config.data is not None else self._make_examples()
        if not self.examples:
            raise ValueError("there is nothing to ask: every task needs a file; give it")
        self.batches = batches_of(list(self._items()), config.rows_at_a_time)
        path = output / "results.jsonl" if output and self.state.is_main_process else None
        setting = {"model": fingerprint(self._path, self.name), "chat": chat, **self._prose}
        self.results = Results(path, config.setting | setting)
        self.cells = [
            {"task": task, "context_length": length, "variant": variant.to_dict()}
            for task, length in self.examples
            for variant in config.variants
        ]
        self._measurer: Measurer | None = None
        self._cores: Cores | None = None
        self._rehearsed: list[Any] = []

    # What is asked ----------------------------------------------------------------------------------------------------

    def _check_length(self, length: int, what: str) -> None:
        if self._most is not None and length > self._most:
            raise ValueError(f"{what} is {length}, but {self.name} allows at most {self._most} tokens")

    @property
    def wording(self) -> Wording:
        """The words that the model knows: the needle model's own, or English."""
        config = self.config
        if NeedleWords.are(self.tokenizer.get_vocab()):
            given = [name for name in ("haystack", "squad", "hotpotqa") if getattr(config, name)]
            if given:
                raise ValueError(f"{given[0]} is given, but {self.name} knows a few hundred words and none of a file's")
            return NeedleWords()
        files = (Path(file) if file else None for file in (config.squad, config.hotpotqa))
        return English([Path(path) for path in config.haystack], *files)

    @property
    def _prose(self) -> dict[str, str]:
        """The prose that an installation brings along, for the setting: it differs from Python to Python."""
        ours = self.config.haystack or self.config.data is not None or isinstance(self.wording, NeedleWords)
        return (
            {} if ours else {"prose": f"the language reference of Python {sys.version_info[0]}.{sys.version_info[1]}"}
        )

    def _make_examples(self) -> dict[tuple[str, int], list[list[Example]]]:
        """The examples of every task and length."""
        config, wording, made = self.config, self.wording, {}
        for length in config.lengths:
            for name in config.tasks or [name for name in TASKS if wording.has(TASKS[name].needs)]:
                task = TASKS[name]
                if config.depth is not None and isinstance(task, NeedleInAHaystack):
                    task = task.at(config.depth)
                if isinstance(task, ProseTask):
                    self._check_length(length + ANSWERS, f"context_length, with {ANSWERS} tokens of {name} behind it,")
                made[name, length] = [
                    task.examples(name, wording, self.encoder.length, length, config.seed, index)
                    for index in range(config.examples)
                ]
        return made

    def _read_examples(self) -> dict[tuple[str, int], list[list[Example]]]:
        """Ready-made ones; those of a file are of the length of the longest."""
        config, made = self.config, {}
        is_file = Path(config.data).exists()
        for length in [0] if is_file else config.lengths:
            folder = config.data_folder if is_file else config.data_folder or str(length)
            examples = read_examples(config.data, config.tasks, config.examples, config.seed, folder)
            longest = max(examples, key=self.encoder.length)
            tokens = self.encoder.length(longest)
            self._check_length(tokens, f"the length of an example of {longest.task} in {config.data}")
            for example in examples:
                if not self.encoder(example).asked:
                    raise ValueError(f"{config.data}: a question of {example.task} is {example.question!r}, no token")
                made.setdefault((example.task, length or tokens), []).append([example])
        return made

    def _items(self) -> Iterator[Item]:
        """Every example of every task, in tokens."""
        for (task, length), of_task in self.examples.items():
            for index, examples in enumerate(of_task):
                yield Item(task, length, index, examples, [self.encoder(example) for example in examples])

    # How it is measured -----------------------------------------------------------------------------------------------

    def missing(self) -> dict[int, list[Variant]]:
        """By the number of a batch, the caches that are still to be measured on some of its examples."""
        found = {}
        for number, batch in enumerate(self.batches):
            variants = [variant for variant in self.config.variants if self._lacks(batch, variant)]
            if variants:
                found[number] = variants
        return found

    def _missing_for_all(self) -> dict[int, list[Variant]]:
        (missing,) = broadcast_object_list([self.missing()])  # the main process knows
        return missing

    def _lacks(self, batch: Batch, variant: Variant) -> bool:
        return any(item.index not in self.results[self._cell(item, variant)] for item in batch.items)

    def _cell(self, item: Item, variant: Variant) -> Cell:
        return {"task": item.task, "context_length": item.context_length, "variant": variant.to_dict()}

    def prepare(self) -> dict[int, list[Variant]]:
        """Load the model, and try out every cache that is still to be measured, on the beginning of a context.

        What the model cannot do raises now, and what is built on first use is built.

        Returns:
            what is to be measured (see `missing`); for nothing nothing is loaded.

        Raises:
            ValueError, TypeError, ImportError, OSError: what transformers or a cache has against it.
        """
        missing = self._missing_for_all()
        if not missing:
            return {}
        if self._measurer is None:
            self._measurer = Measurer(self._load_model(), self.encoder, self.config.generate)
        self._rehearse(missing)
        return missing

    def _rehearse(self, missing: dict[int, list[Variant]]) -> None:
        """Fill every kind of cache, whatever its size, with a few tokens, and put them through the model once more."""
        kinds = {}
        for variant in itertools.chain.from_iterable(missing.values()):
            kind = {
                name: value
                for name, value in variant.to_dict().items()
                if name not in ("compression_ratio", "max_tokens")
            }
            if kind not in self._rehearsed:
                self._rehearsed.append(kind)
                kinds[variant.key] = variant
        if not kinds:
            return
        model, batch = self._measurer.model, self.batches[min(missing)]
        item = batch.items[0]
        few = [replace(one, read=one.read[:REHEARSED]) for one in item.encoded[:1]]
        short = Batch([tuple(few[0].read)], [replace(item, encoded=few, examples=item.examples[:1])])
        questioned = Measurer(model, self.encoder, generates=False).read(short)
        for variant in kinds.values():
            list(questioned.measure(variant))

    def run(self, progress: bool = True) -> Results:
        """Measure every example of every cell that the results do not hold yet.

        Says before how much that is and about how long it takes, by what a few caches took, which are done then.
        """
        missing = self.prepare()
        quiet = not (progress and self.state.is_main_process)
        total = sum(map(len, missing.values()))
        with tqdm(total=total, unit="cache", desc="measuring", disable=quiet or not total) as bar:
            seconds = Seconds()
            if missing:
                first = next(self._rounds(missing))
                self._measure(first, {number: spread(missing[number], TIMED) for number in first}, seconds, bar)
            left = self._missing_for_all() if missing else {}
            if left and not quiet:
                bar.write(self.plan(left, seconds), file=sys.stderr)
            for numbers in self._rounds(left):
                self._measure(numbers, left, seconds, bar)
        return self.results

    def plan(self, missing: dict[int, list[Variant]], seconds: Seconds) -> str:
        """How much is to be done, and about how long it takes by what was measured, in a sentence."""
        caches = sum(map(len, missing.values()))
        batches = {number: self.batches[number] for number in missing}
        rows, cells = sum(len(one.rows) for one in batches.values()), 0
        for number, variants in missing.items():
            cells += len(batches[number].items) * len(variants)
        longest = max(one.num_tokens for one in batches.values())
        takes = (len(missing) * seconds.per_reading + caches * seconds.per_cache) / self._shares
        return (
            f"to do: {counted(rows, 'context')} of up to {longest:,} tokens to read, in "
            f"{counted(len(missing), 'reading')}, {counted(caches, 'cache')} to fill and to ask, "
            f"{counted(cells, 'result')} in all; about {duration(takes)} ({seconds.per_reading:.2g} s a reading, "
            f"{seconds.per_cache:.2g} s a cache)"
        )

    @property
    def _shares(self) -> int:
        """How many batches are measured at a time: whole ones, so that who measures one changes nothing.

        With tensor parallelism all processes share each.
        """
        return 1 if self.config.tp_plan is not None else self.state.num_processes

    def _rounds(self, missing: dict[int, list[Variant]]) -> Iterator[list[int]]:
        """The numbers of the batches that are measured at a time."""
        numbers = list(missing)
        for first in range(0, len(numbers), self._shares):
            yield numbers[first : first + self._shares]

    def _measure(self, numbers: Sequence[int], missing: dict[int, list[Variant]], seconds: Seconds, bar: tqdm) -> None:
        """Read a batch in each process, and measure one cache after another, all processes in step."""
        mine = numbers[self.state.process_index % self._shares :][:1]
        variants = missing[mine[0]] if mine else []
        if self._cores is not None:
            torch.set_num_threads(self._cores.share)
        if variants:
            folds = [variant.merging.build(linked=True) for variant in variants if not variant.is_full]
            questioned = self._measurer.read(self.batches[mine[0]], any(fold.needs_hidden_states for fold in folds))
            seconds.readings += 1
            seconds.reading += questioned.reading.seconds
        for step in range(max(len(missing[number]) for number in numbers)):
            rows = []
            if step < len(variants):
                bar.set_postfix_str(variants[step].label)
                started = clock(self._measurer.model.device)
                rows = [
                    (self._cell(item, variants[step]), item.index, measured)
                    for item, measured in questioned.measure(variants[step])
                ]
                seconds.caches += 1
                seconds.cache += clock(self._measurer.model.device) - started
            rows = gather_object(rows) if self.state.num_processes > 1 else rows
            if self.state.is_main_process:
                for cell, index, measured in together(rows):
                    self.results.add(cell, index, measured)
            bar.update(sum(step < len(missing[number]) for number in numbers))

    def leave(self) -> None:
        """Leave the group of processes, all of them together; nothing is measured after that.

        The threads that carry messages between processes end here: one that still runs while Python exits aborts it.
        """
        if self._cores is not None:
            self._cores.leave()
        if self.state.num_processes > 1:
            self.state.wait_for_everyone()
            self.state.destroy_process_group()

    def _load_model(self) -> PreTrainedModel:
        config = self.config
        named = {name: getattr(config, name) for name in ("attn_implementation", "device_map")}
        options = {name: value for name, value in named.items() if value is not None}
        if config.tp_plan is not None:
            options |= tensor_parallel(config.tp_plan)
        model = AutoModelForCausalLM.from_pretrained(self._path, dtype=config.dtype, **options).eval()
        if config.device_map is None and config.tp_plan is None:
            model = model.to(self.state.device)
        if model.device.type == "cpu":
            if model.num_parameters() < 50_000_000:
                torch.set_num_threads(1)  # waking other threads takes longer than a small model's work
            elif "OMP_NUM_THREADS" not in os.environ:
                self._cores = Cores()
        return model


def tensor_parallel(plan: str) -> dict[str, Any]:
    """How `from_pretrained` is told to split a model over the processes; older transformers took the plan itself."""
    try:
        from transformers.distributed import DistributedConfig

        return {"distributed_config": DistributedConfig(tp_plan=plan)}
    except (ImportError, TypeError):
        return {"tp_plan": plan}


def together(rows: Sequence[tuple[Cell, int, dict[str, Any]]]) -> Iterator[tuple[Cell, int, dict[str, Any]]]:
    """What was measured of each example; processes that share a model measured it each of their own KV heads."""
    of_examples: dict[tuple[str, int], list[tuple[Cell, int, dict[str, Any]]]] = {}
    for row in rows:
        of_examples.setdefault((key_of(row[0]), row[1]), []).append(row)
    for same in of_examples.values():
        cell, index, measured = same[0]
        parts = [part for _, _, part in same]
        sums = {name: sum(part[name] for part in parts) for name in ("bytes", "merged", "dropped")}
        yield cell, index, measured | sums | {name: sums[name] / len(parts) for name in ("merged", "dropped")}
