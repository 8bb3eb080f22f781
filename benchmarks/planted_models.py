"""Tiny models with planted knowledge: one knows a letter for each of many invented words, the other how to answer.

The task is a small one that needs both: a question has two words, and the answer is the names of their letters' numbers
("a" is "one", ... "h" is "eight"). `knows` answers with the two letters. `answers` writes two numbers, each as likely,
and has never seen which word has which. They differ in architecture, width, depth and tokenizer. A composition is
trained on some of the words and tested on others, so that it can be right only by reading what `knows` holds.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any, Final

import yaml

LETTERS: Final = "abcdefgh"
NUMBERS: Final = ("one", "two", "three", "four", "five", "six", "seven", "eight")
N_WORDS, N_TRAIN = 320, 240
"""Invented words, and those of them that a composition is trained on."""
ROWS: Final = {"train": 480, "valid": 120}
"""Questions to train on, and to test on: of the first words, and of the others."""
BATCH: Final = 32
MEMBERS: Final = ("answers", "knows", "unknowing", "again")
"""`unknowing`: like `knows`, taught letters at random. `again`: a copy of `answers`."""
_TEMPLATE: Final = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
_SPECIAL: Final = ["<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
_COMMON: Final = {"num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 128}

Row = tuple[str, str]


def words(seed: int) -> dict[str, str]:
    """Invented words and their letters, each letter as often, in an order that says nothing."""
    random = Random(f"words/{seed}")
    found = dict[str, None]()
    while len(found) < N_WORDS:
        found["".join(random.choice(part) for part in ("bdfgklmn", "aeiou", "prstvz", "aeiou", "bdgklmn"))] = None
    letters = [LETTERS[number % len(LETTERS)] for number in range(N_WORDS)]
    random.shuffle(letters)
    return dict(zip(found, letters, strict=True))


def questions(letters: Mapping[str, str], random: Random, answer: Callable[[str], str]) -> Iterator[Row]:
    """Questions about two of the words, and their answers, without end."""
    known = [*letters]
    while True:
        asked = random.sample(known, 2)
        yield " ".join(asked), " ".join(answer(letters[word]) for word in asked)


def number_of(letter: str) -> str:
    """The answer that is right for a letter."""
    return NUMBERS[LETTERS.index(letter)]


def make_members(folder: Path, seed: int) -> Path:
    """Make the models of a seed in a folder, unless they are there; returns the configuration that lists them."""
    service = folder / "service.yaml"
    if service.exists():
        return service
    letters = words(seed)
    random = Random(f"chance/{seed}")
    _taught(folder / "answers", "Llama", questions(letters, random, lambda _: random.choice(NUMBERS)), 200, seed)
    _taught(folder / "knows", "Qwen2", questions(letters, random, str), 1000, seed + 1)
    _taught(folder / "unknowing", "Qwen2", questions(letters, random, lambda _: random.choice(LETTERS)), 200, seed + 2)
    experts = [
        {
            "name": name,
            "kind": "model",
            "engine": "hf",
            "source": str(folder / ("answers" if name == "again" else name)),
        }
        for name in MEMBERS
    ]
    (folder / "experts.yaml").write_text(yaml.safe_dump({"experts": experts}))
    engines = {"hf": {"device": "cpu", "dtype": "float32", "threads": 1}}
    service.write_text(yaml.safe_dump({"experts": ["experts.yaml"], "engines": engines}))
    return service


def write_rows(folder: Path, seed: int) -> None:
    """`train.jsonl` and `valid.jsonl` for `coe latent train`."""
    letters, random = [*words(seed).items()], Random(f"rows/{seed}")
    for name, known in (("train", letters[:N_TRAIN]), ("valid", letters[N_TRAIN:])):
        rows = islice(questions(dict(known), random, number_of), ROWS[name])
        lines = ({"id": str(i), "prompt": prompt, "answer": answer} for i, (prompt, answer) in enumerate(rows))
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def _taught(folder: Path, architecture: str, rows: Iterator[Row], steps: int, seed: int) -> None:
    """Make a model and train all its weights to continue questions with their answers."""
    import torch
    import transformers
    from torch.nn.functional import cross_entropy

    small = architecture == "Llama"
    tokenizer = _tokenizer(LETTERS if small else None)
    sizes = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 4} if small else {
        "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 6}  # fmt: skip
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    torch.manual_seed(seed)
    config = getattr(transformers, f"{architecture}Config")(vocab_size=len(tokenizer), **_COMMON, **sizes, **ids)
    model = getattr(transformers, f"{architecture}ForCausalLM")(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for _ in range(steps):
        inputs, labels = _tensors(tokenizer, [*islice(rows, BATCH)])
        logits = model(input_ids=inputs, attention_mask=(inputs != tokenizer.pad_token_id).long()).logits
        loss = cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _tensors(tokenizer: Any, rows: Sequence[Row]) -> tuple[Any, Any]:
    """Ids of questions and answers, and labels of the answers; padded at the end."""
    import torch

    texts = []
    for question, answer in rows:
        messages = [{"role": "user", "content": question}]
        asked = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        prompt = tokenizer(asked, add_special_tokens=False).input_ids
        texts.append((prompt, [*tokenizer(answer, add_special_tokens=False).input_ids, tokenizer.eos_token_id]))
    width = max(len(prompt) + len(right) for prompt, right in texts)
    inputs = torch.full((len(texts), width), tokenizer.pad_token_id)
    labels = torch.full((len(texts), width), -100)
    for row, (prompt, right) in enumerate(texts):
        inputs[row, : len(prompt) + len(right)] = torch.tensor([*prompt, *right])
        labels[row, len(prompt) : len(prompt) + len(right)] = torch.tensor(right)
    return inputs, labels


def _tokenizer(letters: str | None) -> Any:
    """A token for each character; without `letters` also one for each syllable."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    merges = [] if letters else [(a, b) for a in "bdfgklmnprstvz" for b in "aeiou"]
    pieces = [*_SPECIAL, "<|pad|>", *pre_tokenizers.ByteLevel.alphabet(), *("".join(pair) for pair in merges)]
    raw = Tokenizer(models.BPE({piece: i for i, piece in enumerate(dict.fromkeys(pieces))}, merges))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens([*_SPECIAL, "<|pad|>"])
    made = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<|user|>", eos_token="<|end|>", pad_token="<|pad|>")
    made.chat_template = _TEMPLATE
    return made
