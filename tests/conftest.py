"""Settings and fixtures of the whole suite."""

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of what tests start; workers run side by side, a thread each

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read once, when Triton is first imported

import transformers
from hypothesis import HealthCheck, settings

NEEDLE = Path(__file__).parents[1] / "examples" / "needle"

torch.set_num_threads(1)
transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
settings.register_profile("suite", deadline=None, max_examples=40, suppress_health_check=list(HealthCheck))
settings.load_profile("suite")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _unknown_models() -> None:
    """Models that tests share have been taught nothing by other tests."""
    from merging_cache.model import link

    link._memories.clear()


@pytest.fixture(scope="module")
def needle() -> tuple[transformers.PreTrainedModel, transformers.PreTrainedTokenizerBase]:
    """The small trained model that ships with the project."""
    model = transformers.AutoModelForCausalLM.from_pretrained(NEEDLE)
    return model.eval(), transformers.AutoTokenizer.from_pretrained(NEEDLE)


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of weights for the scorers that learn, by their names, as the tiny Llama needs them."""
    from test_query_scorers import gate_weights, kvzap_weights

    folder = tmp_path_factory.mktemp("weights")
    kvzap_weights(folder / "kvzap", "mlp")
    gate_weights(folder / "fast_kvzip")
    return folder
