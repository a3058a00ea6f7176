"""Each head its own fraction of the tokens, as the model itself needs them."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..learner import Gather, Learner, Lesson
from ..stage import check_calibrated_for, option
from ..states import LayerStates, Survivors
from .base import Budget
from .uniform import UniformBudget

PROFILE_FILE = "profile.json"  # in the folder of a calibration
STEPS = 100  # a profile says what heads keep where all of them keep 0, 1, .. STEPS hundredths


@dataclass
class ProfileBudget(Learner, Budget):
    """Every head keeps the fraction of its tokens that the model looks at; the scorer says which.

    How many tokens a head needs is a property of the model, which hardly differs from text to text. It is learned from
    the model's first prompts, of which `probe_tokens` are read again (see `Learner`): one threshold over all layers and
    heads, on how much the layers' outputs would change without each token, gives each head its fraction, whatever the
    ratio. Later caches of the model know it before they read, so their layers fold one by one as they are read, and
    with `max_tokens` a row gives what it gives alone. All heads together keep what the ratio says, or a slot less in
    each layer; less, too, where a short first piece of a prompt said something else.

    Args:
        weights: the folder of a calibration (`calibrate`), whose profile is taken; then nothing is read again.
        probe_tokens: how many tokens are read again, see `ProbeScorer`.
    """

    ragged = True

    weights: str = ""
    probe_tokens: int = option(128, minimum=1)

    def __post_init__(self) -> None:
        self.weights = str(self.weights)  # a path will do
        super().__post_init__()

    @property
    def reads_again(self) -> bool:
        return not self.weights

    def check_model(self, config: Any, layers: Sequence[int]) -> None:
        if self.weights:
            check_calibrated_for(self.weights, config, layers)
            heads, own = getattr(config, "num_key_value_heads", None), self.known(layers).tables
            if isinstance(heads, int) and any(one.shape[1] != heads for one in own):
                raise ValueError(
                    f"{self.weights} is a profile of {own[0].shape[1]} KV heads to a layer, but this model has "
                    f"{heads}; is it another model's?"
                )

    def known(self, layers: Sequence[int]) -> "Profile | None":
        """The profile in `weights`.

        Raises:
            ValueError: if there is none, or it is one of other layers than these.
        """
        return Profile.from_json_file(Path(self.weights) / PROFILE_FILE, layers) if self.weights else None

    def learn(self, layers: Sequence[LayerStates], gather: Gather, different: float = 1.0) -> list[Tensor]:
        scores = [layer.statistics.tokens[0].cpu() for layer in layers]
        of_all, mine = gather(torch.cat(scores))
        return list(table_of(of_all)[mine].split([len(one) for one in scores]))

    def allocate(self, scores: Tensor, states: LayerStates, num_slots: int) -> Survivors:
        if states.lesson is None:
            return UniformBudget().allocate(scores, states, num_slots)
        stay = int((scores == torch.inf).sum(dim=-1).max())
        free = max(1, states.seen - stay)
        shares = shares_of(states.lesson.double(), max(0.0, (num_slots - stay) / free))
        counts = stay + rounded(shares * free)  # [B or 1, H]
        order = scores.flip(-1).sort(dim=-1, descending=True, stable=True).indices
        rank = torch.empty_like(order).scatter_(
            -1, order, torch.arange(order.shape[-1], device=order.device).expand_as(order)
        )
        kept = rank.flip(-1) < counts.clamp_min(1).to(scores.device).unsqueeze(-1)
        return Survivors.of_mask(kept if states.valid is None else kept & states.valid)


def rounded(numbers: Tensor) -> Tensor:
    """Whole numbers `[..., N]` of the same sum in each row, rounded down, none of which is off by one or more."""
    whole = (numbers.double().cumsum(-1) + 1e-6).floor()
    return whole.diff(prepend=torch.zeros_like(whole[..., :1])).long()


@dataclass(frozen=True)
class Profile(Lesson):
    """How much of its tokens each head keeps, by how much all keep on average.

    Args:
        tables: by layer `[B, H, STEPS + 1]`, the fraction of its tokens that each head keeps where all layers and heads
            keep 0, 1, .. `STEPS` hundredths of theirs; of each row of the batch, or one row that stands for all.
    """

    @classmethod
    def from_json_file(cls, path: Path, layers: Sequence[int]) -> "Profile":
        """Read what `to_json_file` wrote.

        Raises:
            ValueError: if it cannot be read, or is of other layers.
        """
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            found = {int(layer): torch.tensor(heads, dtype=torch.double) for layer, heads in content["layers"].items()}
            fits = all(one.dim() == 2 and one.shape[1] == STEPS + 1 for one in found.values())
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} could not be read as a profile: {error}; write one with calibrate()") from error
        if not fits or sorted(found) != sorted(layers):
            raise ValueError(
                f"{path} is a profile of layers {sorted(found)}, but those that fold here are {sorted(layers)}; is it "
                "another model's?"
            )
        return cls([found[layer].unsqueeze(0) for layer in layers])

    def to_json_file(self, path: Path, layers: Sequence[int]) -> None:
        """Write that of the first row, under these indices of layers, as `[H][STEPS + 1]` of each."""
        heads = {
            layer: [[round(share, 4) for share in head] for head in table[0].tolist()]
            for layer, table in zip(layers, self.tables, strict=True)
        }
        content = {"kept": [step / STEPS for step in range(STEPS + 1)], "layers": heads}
        path.write_text(json.dumps(content) + "\n", encoding="utf-8")


def shares_of(table: Tensor, keep: float) -> Tensor:
    """`[..., H]`, what each head keeps where all keep `keep` on average, by a table `[..., H, STEPS + 1]`."""
    step = min(STEPS - 1, int(keep * STEPS))
    return torch.lerp(*table[..., step : step + 2].unbind(-1), keep * STEPS - step)


def table_of(scores: Tensor) -> Tensor:
    """`[N, STEPS + 1]`, the fraction of its tokens that each head keeps by one threshold over scores `[N, n]`.

    Where many scores are equal no threshold is right: then of these each head keeps the same part.
    """
    keep = torch.linspace(0, 1, STEPS + 1, dtype=torch.double)
    if not scores.shape[1]:
        return keep.expand(len(scores), -1)
    scores = scores.cpu().double().sort(dim=1).values
    ranked = scores.flatten().sort(descending=True).values
    threshold = ranked[(keep * len(ranked)).long().clamp_max(len(ranked) - 1)].expand(len(scores), -1).contiguous()
    above, reached = (
        1 - torch.searchsorted(scores, threshold, right=right) / scores.shape[1] for right in (True, False)
    )
    more, less = (reached - above).mean(dim=0), keep - above.mean(dim=0)
    return above + (less / more) * (reached - above)
