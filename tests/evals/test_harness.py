"""The model of lm-evaluation-harness: tasks from local files, on the pruned path."""

from __future__ import annotations

import json
import sys

import pytest
import torch

import spkv

lm_eval = pytest.importorskip("lm_eval")
pytest.importorskip("lm_eval.models.huggingface")

CHOICES = """
task: spkv_choices
dataset_path: json
dataset_kwargs: {data_files: {test: %s}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{context}}"
doc_to_choice: "{{choices}}"
doc_to_target: 0
target_delimiter: ""
metric_list: [{metric: acc}]
"""
WORDS = """
task: spkv_words
dataset_path: json
dataset_kwargs: {data_files: {test: %s}}
test_split: test
output_type: generate_until
doc_to_text: "{{context}}"
doc_to_target: "{{choices[0]}}"
generation_kwargs: {until: ["~~~"], max_gen_toks: 8, do_sample: false}
metric_list: [{metric: exact_match}]
"""


@pytest.fixture
def model_path(words_model, tokenizer, tmp_path):
    spkv.save(words_model, tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


@pytest.fixture
def documents(tmp_path, monkeypatch):
    """Two tasks on the same questions; the harness keeps its caches under the test's directory."""
    for name in ("HF_HOME", "HF_DATASETS_CACHE"):
        monkeypatch.setenv(name, str(tmp_path / "cache"))
    made = [{"context": f"{n} a context that is longer than the window;" * 2, "choices": ["yes", " no!", "?"]}
            for n in range(3)]  # fmt: skip
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(document) + "\n" for document in made))
    (tmp_path / "tasks").mkdir()
    for name, text in (("choices", CHOICES), ("words", WORDS)):
        (tmp_path / "tasks" / f"{name}.yaml").write_text(text % (tmp_path / "data.jsonl"))
    return made


def evaluate(model_path, tmp_path, tasks, **arguments):
    from spkv.evals import harness  # noqa: F401  (registers the model)

    return lm_eval.simple_evaluate(
        model="spkv",
        model_args={"pretrained": model_path, **arguments},
        tasks=tasks,
        task_manager=lm_eval.tasks.TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False),
        batch_size=2,
        bootstrap_iters=0,
    )


def log_likelihoods(model, tokenizer, documents):
    found = []
    for document in documents:
        context = tokenizer(document["context"]).input_ids
        for choice in document["choices"]:
            ids = torch.tensor([context + tokenizer(choice).input_ids])
            with torch.no_grad():
                logs = model(ids, use_cache=False).logits[0, len(context) - 1 : -1].log_softmax(-1)
            found.append(logs.gather(1, ids[0, len(context) :, None]).sum().item())
    return found


@pytest.mark.parametrize("arguments", [{}, {"oracle": True}, {"threshold": 0.8}, {"dense": True}])
def test_likelihoods_are_those_of_the_masked_forward(
    words_model, tokenizer, model_path, documents, tmp_path, arguments
):
    result = evaluate(model_path, tmp_path, ["spkv_choices"], **arguments)
    given = [float(answer[0][0]) for sample in result["samples"]["spkv_choices"] for answer in sample["resps"]]
    model = spkv.load(model_path, threshold=arguments.get("threshold"))
    if arguments.get("dense"):
        with spkv.dense(model):
            expected = log_likelihoods(model, tokenizer, documents)
    else:
        spkv.attachment(model).oracle = True
        expected = log_likelihoods(model, tokenizer, documents)
        with spkv.dense(model):
            assert given != pytest.approx(log_likelihoods(model, tokenizer, documents), abs=1e-2)
    assert given == pytest.approx(expected, abs=1e-3)
    assert 0 <= result["results"]["spkv_choices"]["acc,none"] <= 1


def test_answers_are_those_of_generate(tokenizer, model_path, documents, tmp_path):
    result = evaluate(model_path, tmp_path, ["spkv_words"])
    model = spkv.load(model_path)
    for sample in result["samples"]["spkv_words"]:
        ids = torch.tensor([tokenizer(sample["doc"]["context"]).input_ids])
        out = model.generate(ids, max_new_tokens=8, do_sample=False)
        assert sample["resps"][0][0] == tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def test_the_command_line_knows_the_model(model_path, documents, tmp_path, capsys, monkeypatch):
    from spkv.evals.harness import main

    before = list(sys.argv)
    main([
        "run", "--model", "spkv", "--model_args", f"pretrained={model_path},threshold=0.3", "--tasks", "spkv_choices",
        "--include_path", str(tmp_path / "tasks"), "--batch_size", "1",
    ])  # fmt: skip
    assert "spkv_choices" in capsys.readouterr().out
    assert sys.argv == before


def test_arguments_that_exclude_each_other_are_named(model_path):
    from spkv.evals.harness import SPKVLM

    with pytest.raises(ValueError, match="dense keeps every pair as it is"):
        SPKVLM(model_path, dense=True, threshold=0.3)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is the device that is asked for")
def test_a_device_that_is_not_there_is_told(model_path, caplog):
    from spkv.evals.harness import SPKVLM

    SPKVLM(model_path, device="cuda:3")
    assert "There is no CUDA device for cuda:3: the model runs on the CPU." in caplog.text
    caplog.clear()
    SPKVLM(model_path, device="cpu")
    SPKVLM(model_path)
    assert "CUDA" not in caplog.text
