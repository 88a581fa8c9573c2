"""Following instructions: what is trained, what is scored, and what the command says to bad files."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from pipelines import arithmetic, instructions, language
from pipelines.instructions import Instruction
from pipelines.language import IGNORED, Config, Language, joined, same_result
from pipelines.tiny.decoder import byte_tokenizer, untrained
from surm_seg import train
from surm_seg.errors import BadConfig, BadInput

RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a very small Llama with random weights and a tokenizer of bytes."""
    folder = tmp_path_factory.mktemp("llama")
    tokenizer = byte_tokenizer()
    torch.manual_seed(0)
    untrained(tokenizer, 2, 32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def task(model: str) -> Language:
    """On generated questions, in eval mode."""
    made = language.create(Config(model=model, fraction=0.01), 0)
    made.model.eval()
    return made


def record(answer: str, instruction: str = "Is it?\n\nAnswer format: true/false") -> dict[str, str]:
    return {"instruction": instruction, "input": "", "output": f"the correct answer is {answer}", "answer": answer}


@pytest.fixture
def commonsense(tmp_path: Path) -> Path:
    """The published layout, with two of the test sets."""
    folder = tmp_path / "commonsense"
    write(folder / "commonsense_170k.json", [record(answer) for answer in ("true", "false") * 4])
    write(folder / "boolq" / "test.json", [record("true"), record("false"), record("true")])
    which = "Which?\n\nAnswer1: a Answer2: b Answer3: c\n\nAnswer format: answer1/answer2/answer3"
    write(folder / "ARC-Easy" / "test.json", [record("answer2", which), record("answer3", which)])
    return folder


def write(path: Path, records: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(records))


def command(model: str, output: Path, *words: str) -> int:
    short = ["--epochs", "0", "--steps", "2", "--batch_size", "4", "--precision", "float32", "--quiet"]
    return train.main(["--task", "language", "--model", model, "--output", str(output), *short, *words])


def test_the_whole_command_trains_saves_and_scores(model: str, commonsense: Path, tmp_path: Path) -> None:
    assert command(model, tmp_path / "run", "--name", "commonsense", "--data", str(commonsense)) == 0
    summary = json.loads((tmp_path / "run/scores/summary.json").read_text())
    assert summary["n"] == {"boolq": 3, "ARC-Easy": 2} and {"accuracy", "accuracy_ARC-Easy"} <= set(summary["metrics"])
    lines = list(csv.DictReader((tmp_path / "run/scores/predictions.csv").read_text().splitlines()))
    right = [line["answer"] == line["target"] for line in lines if line["set"] == "boolq"]
    assert len(lines) == 5 and np.mean(right) == pytest.approx(summary["metrics"]["accuracy"])


def test_a_resumed_run_is_the_one_that_was_never_cut(model: str, tmp_path: Path) -> None:
    words = ["--name", "uuid", "--pairs", "4", "--max_new_tokens", "4", "--schedule", "constant"]
    assert command(model, tmp_path / "whole", *words, "--steps", "4") == 0
    assert command(model, tmp_path / "cut", *words) == 0
    assert command(model, tmp_path / "cut", *words, "--steps", "4", "--resume", "--allow", "steps") == 0
    whole, cut = ((tmp_path / run / "metrics.jsonl").read_text().splitlines() for run in ("whole", "cut"))
    losses = [[json.loads(line)["loss"] for line in lines] for lines in (whole, cut)]
    assert losses[0] == losses[1] and len(losses[0]) == 4


def test_only_the_output_and_its_end_are_trained(task: Language) -> None:
    example = Instruction("2 + 2?\n", "four", "four")
    row = task.encode(example, RNG)
    trained = row["target"][0] != IGNORED
    text = task.tokenizer.decode(row["target"][0][trained])
    assert text == f"four{task.tokenizer.eos_token}" and torch.equal(
        row["input_ids"][trained[None]], row["target"][0][trained]
    )
    assert task.tokenizer.decode(row["input_ids"][0][~trained]) == f"{task.tokenizer.bos_token}2 + 2?\n"


def test_the_loss_is_a_mean_over_tokens_however_they_are_padded_and_spread(task: Language) -> None:
    samples = [task.sample(i, RNG) for i in range(6)]
    assert len({one["input_ids"].shape[1] for one in samples}) > 1
    whole = task.loss(joined(samples))
    by_row = torch.stack([task.sums(one) for one in samples]).sum(0)
    assert torch.allclose(whole, task.loss_of(by_row), rtol=1e-5)
    loss, tokens = by_row.tolist()
    text = sum(len(example.output) + 1 for example in task.splits.train[:6])
    assert tokens == text and whole.item() == pytest.approx(loss / text, rel=1e-5)


def test_a_long_prompt_loses_its_beginning_and_a_long_output_its_end(task: Language) -> None:
    task.max_length = 8
    row = task.encode(Instruction("abcdefghij", "xyz", "xyz"), RNG)
    assert task.tokenizer.decode(row["input_ids"][0]) == f"ghijxyz{task.tokenizer.eos_token}"
    row = task.encode(Instruction("abc", "0123456789", "0"), RNG)
    assert task.tokenizer.decode(row["input_ids"][0]) == "c0123456"


def test_prompts_padded_together_are_answered_as_alone(task: Language) -> None:
    examples = [Instruction(text, "a", "a") for text in ("x\n", "a much longer prompt than the first\n", "middle\n")]
    alone = [task.answers(task.encode(example, None))[0] for example in examples]
    together = task.answers(task.collate([task.encode(example, None) for example in examples]))
    assert torch.equal(together, torch.stack(alone)) and together.shape == (3, task.new_tokens)


def test_generation_stops_at_the_end_token(task: Language) -> None:
    end = task.tokenizer.eos_token_id
    rows = np.array([[*task.tokenizer("seven", add_special_tokens=False).input_ids, end, 65, 66]], dtype=np.float32)
    assert task.said(rows[0], Instruction("", "", "")) == "seven"
    embedding = task.model.get_input_embeddings().weight
    with torch.no_grad():  # whatever is asked, the end is what is said: its direction is where everything points
        embedding[end] = 100 * task.model(**_prompt(task), output_hidden_states=True).hidden_states[-1][0, -1]
    answers = task.answers(task.encode(Instruction("x\n", "a", "a"), None))
    assert (answers == end).all() and answers.shape == (1, task.new_tokens)


def _prompt(task: Language) -> dict[str, torch.Tensor]:
    return task.inputs(task.encode(Instruction("x\n", "a", "a"), None))


def test_the_option_chosen_is_the_one_of_the_highest_likelihood(model: str, commonsense: Path) -> None:
    task = language.create(Config(name="commonsense", model=model, data=str(commonsense)), 0)
    task.model.eval()
    examples = [*task.splits.tests["boolq"], *task.splits.tests["ARC-Easy"]]
    chosen = task.answered(examples)
    for number, example in zip(chosen, examples, strict=True):
        likelihoods = [_log_likelihood(task, example.prompt, output) for output in example.outputs]
        assert number == int(np.argmax(likelihoods)) and len(likelihoods) == len(example.options)
        stated = task.log_likelihood([example])[0]
        assert stated == pytest.approx(likelihoods[example.options.index(example.answer)], rel=1e-4)


@torch.no_grad()
def _log_likelihood(task: Language, prompt: str, output: str) -> float:
    """Token after token, straight from the model's probabilities."""
    tokens = task.tokenizer(prompt).input_ids
    total = 0.0
    for token in [*task.tokenizer(output, add_special_tokens=False).input_ids, task.tokenizer.eos_token_id]:
        total += float(task.model(input_ids=torch.tensor([tokens])).logits[0, -1].log_softmax(-1)[token])
        tokens = [*tokens, token]
    return total


@pytest.mark.parametrize(
    ("said", "answer", "right"),
    [
        ("3 + 4 makes 7", "7", 1), ("so 1,234.0", "1234", 1), ("7 of 8", "7", 0), ("none", "7", 0),
        ("it is -2.", "-2", 1), ("The answer is B", "B", 1), ("A or B", "A", 0),
        ("It is 1/2.", "1/2", 1), ("It is 11/2.", "1/2", 0), ("or .5", ".5", 1), ("Yes", "yes", 1),
        ("the answer is Two  apples.", "two apples", 1), ("yes or no", "yes", 0), ("", "yes", 0),
    ],
)  # fmt: skip
def test_of_a_result_the_last_number_counts(said: str, answer: str, right: int) -> None:
    assert same_result(said, answer) == (float(right),)


def test_generated_questions_are_right_and_no_split_repeats_another() -> None:
    names = {arithmetic.in_words(number): number for number in range(1000)}
    assert len(names) == 1000
    seen: dict[str, set[object]] = {}
    for split in arithmetic.SIZES:
        for question, answer in arithmetic.examples(split):
            words = question.rstrip("?").replace("Which is larger, ", "").replace("What is ", "")
            kind, compute = next(
                (k, c) for k, c in {" plus ": int.__add__, " times ": int.__mul__, " or ": max}.items() if k in words
            )
            a, b = (names[word] for word in words.split(kind))
            assert names[answer] == compute(a, b)
            seen.setdefault(split, set()).add((kind, min(a, b), max(a, b)))
    assert [len(facts) for facts in seen.values()] == list(arithmetic.SIZES.values())
    assert len(set.union(*seen.values())) == sum(arithmetic.SIZES.values())


def test_lists_and_lines_are_read_alike(tmp_path: Path) -> None:
    records = [{"instruction": "3 + 4?", "input": "", "output": "It is 7", "answer": 7}] * 4
    for folder, text in (("list", json.dumps(records)), ("lines", "\n".join(map(json.dumps, records)))):
        (tmp_path / folder).mkdir()
        for name in ("train", "test"):
            (tmp_path / folder / f"{name}.json{'l' * (folder == 'lines')}").write_text(text)
    first, second = (instructions.read("math", str(tmp_path / folder)) for folder in ("list", "lines"))
    assert first == second and first.train[0].answer == "7" and first.train[0].options == ()


def test_marks_that_editors_write_are_no_ends_of_lines(tmp_path: Path) -> None:
    records = [{"instruction": "3\u2028+\x85 4?", "answer": "7"}] * 4
    for name, text in (
        ("train.jsonl", "\r\n".join(json.dumps(one, ensure_ascii=False) for one in records)),
        ("test.json", json.dumps(records)),
    ):
        (tmp_path / name).write_text(text, encoding="utf-8-sig")
    found = instructions.read("math", str(tmp_path))
    assert found.train == found.tests["test"] and "3\u2028+\x85 4?" in found.train[3].prompt


def test_bad_data_is_named_with_its_remedy(tmp_path: Path, commonsense: Path) -> None:
    def refused(name: str, data: Path | str) -> str:
        with pytest.raises(BadInput) as error:
            instructions.read(name, str(data))
        return f"[{error.value.code}] {error.value}"

    for missing in ("", tmp_path / "absent", tmp_path):
        assert "LLM-Adapters" in refused("math", missing)
    file = commonsense / "boolq" / "test.json"
    write(file, [record("true"), {"instruction": "Is it?"}])
    assert f"{file}, record 2 has no answer" in refused("commonsense", commonsense)
    write(file, [record("true") | {"instruction": 5}])
    assert f"{file}, record 1 has an instruction that is no text" in refused("commonsense", commonsense)
    write(file, [record("maybe")])
    assert "[label]" in (said := refused("commonsense", commonsense)) and "'maybe'" in said
    write(file, [record("answer4", "Which?\n\nAnswer format: answer1/answer2")])
    assert "answer1, answer2" in refused("commonsense", commonsense)
    file.write_text("[{")
    assert "[json]" in refused("commonsense", commonsense)


def test_bad_options_are_named_with_their_remedy(model: str, tmp_path: Path) -> None:
    with pytest.raises(BadConfig, match="mean arithmetic"):
        language.create(Config(name="arithmetics", model=model), 0)
    with pytest.raises(BadConfig, match="pairs 0 must be 1 or more"):
        Config(pairs=0)
    for name in ("uuid", "arithmetic"):
        with pytest.raises(BadConfig, match=f"is not read with --name {name}, whose examples are generated"):
            language.create(Config(name=name, data=str(tmp_path), model=model), 0)
    with pytest.raises(BadConfig, match="no role"):
        language.create(Config(model=model, roles=("queue",)), 0)
    with pytest.raises(BadInput, match="cannot be loaded"):
        language.create(Config(model=str(tmp_path / "absent")), 0)
