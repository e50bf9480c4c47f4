import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from benchmarks import from_scratch


def test_a_model_of_bytes_is_written_with_its_tokenizer(tmp_path, capsys):
    from_scratch.main(["--make-model", str(tmp_path / "new"), "--size", "tiny", "--bytes", "--positions", "64"])
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "new")
    assert printed == {"model": "new", "parameters": model.num_parameters(), "vocabulary": 257}
    assert model.config.max_position_embeddings == 64
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "new")
    text = " Größe\tλ \x00 <|endoftext|"
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert len(ids) == len(text.encode())
    assert tokenizer.decode(ids) == text


def test_the_size_is_what_its_name_says():
    with torch.device("meta"):
        model = LlamaForCausalLM(from_scratch.configuration("38m", vocabulary=49152, positions=8192, end=0))
    assert model.num_parameters() == pytest.approx(38e6, rel=0.02)
