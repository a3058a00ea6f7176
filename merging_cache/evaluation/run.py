"""Runs a sweep: every cache reads the same contexts and is asked the same questions, cell by cell."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from ..model import settings
from .config import TEXT, EvaluationConfig, Variant, fingerprint
from .english import English
from .example import Example
from .measure import Encoder, Measurer
from .needle_words import NeedleWords
from .ready_made import read_examples
from .results import Results
from .ruler import RULER, NeedleInAHaystack, fit
from .wording import Wording

Cell = dict[str, Any]  # {"task": ..., "context_length": ..., "variant": {...}}


def shipped_model() -> Path:
    """The folder of the small model that ships with this project."""
    here = Path(__file__).parent
    return next(path for path in (here / "needle", here.parents[1] / "examples" / "needle") if path.is_dir())


class Evaluation:
    """A sweep over a model: `run` measures what is missing, `results` holds what was measured.

    Started in several processes (`accelerate launch`, `torchrun`) they share the examples, batch by batch, or with
    `tp_plan` the model: each then holds the caches of its own KV heads. Models below 50 million parameters on a CPU are
    run in one thread, which stays so in the process.

    Args:
        config: what to measure.
        output: a folder for `results.jsonl`, gone on with where it exists; `None` keeps results in memory.

    Raises:
        ValueError: for what cannot be done, before any model is loaded: files that are missing, contexts longer than
            the model allows, tasks that cannot be made.

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
        self._path = str(shipped_model()) if config.model is None else config.model
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(self._path, padding_side="left")
            model_config = AutoConfig.from_pretrained(self._path).get_text_config(decoder=True)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"there is no model {self._path!r}, neither as a folder nor on the hub: {error}"
            ) from error
        known = [most for most in settings(model_config, "max_position_embeddings") if most is not None]
        self._most = min(known, default=None)
        for length in config.lengths:
            self._check_length(length, "context_length")
        chat = bool(self.tokenizer.chat_template) if config.chat is None else config.chat
        if chat and not self.tokenizer.chat_template:
            raise ValueError(f"chat is True, but the tokenizer of {self._path!r} has no chat template")
        self.encoder = Encoder(self.tokenizer, chat, config.question_in_context)
        if output and config.data and Path(config.data).resolve() in (output.resolve(), *output.resolve().parents):
            raise ValueError(f"the output {output} is inside the data {config.data}, of which it would become a part")
        self.examples = self._read_examples() if config.data is not None else self._make_examples()
        self._encoded = {key: [self.encoder(one) for one in examples] for key, examples in self.examples.items()}
        self.windows = {length: self._read_text(length) for length in config.lengths} if config.text else {}
        if not self.examples and not self.windows:
            raise ValueError("there is nothing to ask: every task needs a file; give it, or a text")
        path = output / "results.jsonl" if output and self.state.is_main_process else None
        self.results = Results(path, config.setting | {"model": fingerprint(self._path), "chat": chat})
        self.cells = self._make_cells()
        self._measurer: Measurer | None = None
        self._rehearsed: list[Any] = []

    # What is asked ----------------------------------------------------------------------------------------------------

    def _check_length(self, length: int, what: str) -> None:
        if self._most is not None and length > self._most:
            raise ValueError(f"{what} is {length}, but {self.name} allows at most {self._most} tokens")

    @property
    def wording(self) -> Wording:
        """The words that the model knows: the needle model's own, or English."""
        if NeedleWords.are(self.tokenizer.get_vocab()):
            return NeedleWords()
        config = self.config
        return English(*(Path(file) if file else None for file in (config.haystack, config.squad, config.hotpotqa)))

    def _make_examples(self) -> dict[tuple[str, int], list[Example]]:
        """The examples of every task and length."""
        config, wording, made = self.config, self.wording, {}
        for length in config.lengths:
            for name in config.tasks or [name for name in RULER if wording.has(RULER[name].needs)]:
                task = RULER[name]
                if config.depth is not None and isinstance(task, NeedleInAHaystack):
                    task = task.at(config.depth)
                made[name, length] = [
                    fit(name, wording, self.encoder.length, length, seed=config.seed, index=index, task=task)
                    for index in range(config.examples)
                ]
        return made

    def _read_examples(self) -> dict[tuple[str, int], list[Example]]:
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
                made.setdefault((example.task, length or tokens), []).append(example)
        return made

    def _read_text(self, length: int) -> list[list[int]]:
        """Stretches of `length` tokens of the text, evenly spread over it."""
        try:
            text = Path(self.config.text).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{self.config.text} could not be read as a text: {error}") from error
        beginning, ids = self.encoder.beginning, self.encoder.tokens(text)
        each = length - len(beginning)
        available = len(ids) // each
        if not available:
            raise ValueError(f"{self.config.text} has {len(ids)} tokens, fewer than the context length of {length}")
        count = min(self.config.examples, available)
        starts = [each * (index * available // count) for index in range(count)]
        return [beginning + ids[start : start + each] for start in starts]

    # How it is measured -----------------------------------------------------------------------------------------------

    def _make_cells(self) -> list[Cell]:
        """Every cell of the sweep."""
        asked: list[Cell] = [{"task": task, "context_length": length} for task, length in self.examples]
        text = fingerprint(self.config.text)
        asked += [{"task": TEXT, "context_length": length, "text": text} for length in self.windows]
        return [cell | {"variant": variant.to_dict()} for cell in asked for variant in self.config.variants]

    def prepare(self) -> list[Cell]:
        """Load the model, and put one example through every cache that is still to be measured.

        What the model cannot do raises now, and what is built on first use is built.

        Returns:
            the cells that are to be measured; for none nothing is loaded.

        Raises:
            ValueError, TypeError, ImportError, OSError: what transformers or a cache has against it.
        """
        missing = [cell for cell in self.cells if cell not in self.results]
        (missing,) = broadcast_object_list([missing])  # the main process knows
        if not missing:
            return []
        if self._measurer is None:
            self._measurer = Measurer(self._load_model(), self.encoder)
        for cell in missing:
            kind = (cell["task"] == TEXT, cell["variant"])
            if kind not in self._rehearsed:
                self._rehearsed.append(kind)
                list(self._measure_of(cell)(self._asked(cell)[:1], Variant(**cell["variant"])))
        return missing

    def run(self, progress: bool = True) -> Results:
        """Measure every cell that the results do not hold yet."""
        missing = self.prepare()
        quiet = not (progress and self.state.is_main_process)
        with tqdm(total=len(missing), unit="cell", desc="measuring", disable=quiet or not missing) as bar:
            for cell in missing:
                bar.set_postfix_str(f"{cell['task']}, {Variant(**cell['variant']).label}")
                measured = self._measure(cell)
                if self.state.is_main_process:
                    self.results.add(cell, measured)
                bar.update()
        return self.results

    def leave(self) -> None:
        """Leave the group of processes, all of them together; nothing is measured after that.

        The threads that carry messages between processes end here: one that still runs while Python exits aborts it.
        """
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
        if model.device.type == "cpu" and model.num_parameters() < 50_000_000:
            torch.set_num_threads(1)  # waking other threads takes longer than a small model's work
        return model

    def _asked(self, cell: Cell) -> Sequence[Any]:
        task, length = cell["task"], cell["context_length"]
        if task == TEXT:
            return self.windows[length]
        return list(zip(self.examples[task, length], self._encoded[task, length], strict=True))

    def _measure_of(self, cell: Cell) -> Callable[..., Iterator[dict[str, Any]]]:
        return self._measurer.text if cell["task"] == TEXT else self._measurer.answers

    def _measure(self, cell: Cell) -> dict[str, list]:
        """What was measured of every example of a cell, in order; complete on the main process."""
        asked, variant, batches = self._asked(cell), Variant(**cell["variant"]), self._batches(cell)
        if self.config.tp_plan is None:  # whole batches, so that who measures one changes nothing
            batches = batches[self.state.process_index :: self.state.num_processes]
        rows = []
        for batch in batches:
            rows += zip(batch, self._measure_of(cell)([asked[index] for index in batch], variant), strict=True)
        if self.state.num_processes > 1:
            rows = gather_object(rows)
        of_examples: dict[int, list[dict[str, Any]]] = {}
        for index, row in rows:
            of_examples.setdefault(index, []).append(row)
        examples = [together(of_examples[index]) for index in sorted(of_examples)]
        return {name: [one[name] for one in examples] for name in examples[0]}

    def _batches(self, cell: Cell) -> list[list[int]]:
        """Indices of examples that are measured together: contexts of like lengths, questions of the same.

        A question that is padded would give its row more slots when it is folded.
        """
        sizes = [(0, 0)] * len(self._asked(cell))  # windows of a text are alike
        if cell["task"] != TEXT:
            sizes = [(len(encoded.asked), -len(encoded.read)) for _, encoded in self._asked(cell)]
        batches, most = [], self.config.batch_size
        order = sorted(range(len(sizes)), key=sizes.__getitem__)
        for _, group in itertools.groupby(order, key=lambda index: sizes[index][0]):
            alike = list(group)
            batches += [alike[first : first + most] for first in range(0, len(alike), most)]
        return batches


def tensor_parallel(plan: str) -> dict[str, Any]:
    """How `from_pretrained` is told to split a model over the processes; older transformers took the plan itself."""
    try:
        from transformers.distributed import DistributedConfig

        return {"distributed_config": DistributedConfig(tp_plan=plan)}
    except (ImportError, TypeError):
        return {"tp_plan": plan}


def together(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """What the processes that share a model measured of one example, each of its own KV heads."""
    whole = dict(parts[0])
    for name in ("bytes", "merged", "dropped"):
        whole[name] = sum(part[name] for part in parts) / (1 if name == "bytes" else len(parts))
    return whole
