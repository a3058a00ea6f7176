"""Scorers: how important each token is. `SCORERS` is the table of their names; adding one is a file and a line here."""

from .auto import AutoScorer
from .base import SCORERS, FunctionScorer, Scorer, build_scorer
from .cap import CapScorer
from .chunk_kv import ChunkKVScorer
from .compactor import CompactorScorer
from .critical_kv import CriticalKVScorer
from .cur import CURScorer
from .expected_attention import ExpectedAttentionScorer
from .fast_kvzip import FastKVzipScorer
from .keydiff import KeyDiffScorer
from .knorm import KnormScorer
from .kvpress import KVPressScorer
from .kvzap import KVzapScorer
from .kvzip import KVzipScorer
from .lagkv import LagKVScorer
from .leave_one_out import LeaveOneOutScorer
from .leverage import LeverageScorer
from .non_causal import NonCausalScorer
from .observed_attention import ObservedAttentionScorer
from .probe import ProbeScorer
from .pyramidkv import PyramidKVScorer
from .qfilter import QFilterScorer
from .random import RandomScorer
from .snapkv import SnapKVScorer
from .streaming_llm import StreamingLLMScorer
from .tova import TOVAScorer
from .value_norm import ValueNormScorer

SCORERS |= {
    "auto": AutoScorer,
    "cap": CapScorer,
    "chunk_kv": ChunkKVScorer,
    "compactor": CompactorScorer,
    "critical_kv": CriticalKVScorer,
    "cur": CURScorer,
    "expected_attention": ExpectedAttentionScorer,
    "fast_kvzip": FastKVzipScorer,
    "keydiff": KeyDiffScorer,
    "knorm": KnormScorer,
    "kvzap": KVzapScorer,
    "kvzip": KVzipScorer,
    "lagkv": LagKVScorer,
    "leave_one_out": LeaveOneOutScorer,
    "leverage": LeverageScorer,
    "non_causal": NonCausalScorer,
    "observed_attention": ObservedAttentionScorer,
    "probe": ProbeScorer,
    "pyramidkv": PyramidKVScorer,
    "qfilter": QFilterScorer,
    "random": RandomScorer,
    "snapkv": SnapKVScorer,
    "streaming_llm": StreamingLLMScorer,
    "tova": TOVAScorer,
    "value_norm": ValueNormScorer,
}

__all__ = [
    "SCORERS",
    "AutoScorer",
    "CURScorer",
    "CapScorer",
    "ChunkKVScorer",
    "CompactorScorer",
    "CriticalKVScorer",
    "ExpectedAttentionScorer",
    "FastKVzipScorer",
    "FunctionScorer",
    "KVPressScorer",
    "KVzapScorer",
    "KVzipScorer",
    "KeyDiffScorer",
    "KnormScorer",
    "LagKVScorer",
    "LeaveOneOutScorer",
    "LeverageScorer",
    "NonCausalScorer",
    "ObservedAttentionScorer",
    "ProbeScorer",
    "PyramidKVScorer",
    "QFilterScorer",
    "RandomScorer",
    "Scorer",
    "SnapKVScorer",
    "StreamingLLMScorer",
    "TOVAScorer",
    "ValueNormScorer",
    "build_scorer",
]
