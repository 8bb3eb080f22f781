"""Hidden states of experts: those of transformers' own forward, at the right places, alone as in a batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine_models import make_tokenizer, save_adapter, save_tiny_model
from latent_models import save_tiny

from coe.engine_config import EnginesConfig, HFConfig
from coe.errors import ContextLengthExceeded, EngineError, Rejected, UnknownModel, Unsupported
from coe.latent import states as module
from coe.latent.prompts import Prompt
from coe.latent.states import StateReader
from registry.spec import ExpertSpec, Kind
from registry.store import Snapshot

ENGINES = EnginesConfig(hf=HFConfig(device="cpu", dtype="float32"))
N_LAYERS = 3
TEXTS = [
    "the capital of france",
    "is",
    "the end of the answer is paris, the end",
    "Ünïcode 👩‍🔬 of\r\nfrance  ",
    " the",
]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    root = tmp_path_factory.mktemp("states")
    save_tiny_model(root / "tiny", tokenizer, num_hidden_layers=N_LAYERS)
    save_adapter(root / "lora", root / "tiny")
    return root


@pytest.fixture
def snapshot(folder: Path) -> Snapshot:
    specs = [
        ExpertSpec(name="tiny", kind=Kind.MODEL, source=str(folder / "tiny")),
        ExpertSpec(name="short", kind=Kind.MODEL, source=str(folder / "tiny"), context_length=8),
        ExpertSpec(name="lora", kind=Kind.ADAPTER, source=str(folder / "lora"), base="tiny"),
        ExpertSpec(name="fake", kind=Kind.MODEL, source="fake://echo"),
        ExpertSpec(name="away", kind=Kind.REMOTE, source="https://host/v1"),
        ExpertSpec(name="both", kind=Kind.COMPOSED, members=("tiny", "lora"), architecture="logits"),
    ]
    return Snapshot(1, {spec.name: spec for spec in specs})


def open_reader(name: str, snapshot: Snapshot, *, raw: bool = False) -> StateReader:
    return StateReader.open(name, snapshot, ENGINES, raw=raw, find=lambda spec: Path(spec.source))


def hidden_of(folder: Path, ids: list[int], adapter: Path | None = None) -> list[np.ndarray]:
    """Transformers' own hidden states (tokens, d): after the embedding, after each layer; the last one is normed."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter).eval()
    with torch.no_grad():
        states = model(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states
    return [each[0].numpy() for each in states]


@pytest.mark.parametrize("name", ["tiny", "lora"])
def test_states_are_those_of_the_model_with_its_adapter(folder: Path, snapshot: Snapshot, name: str) -> None:
    with open_reader(name, snapshot, raw=True) as reader:
        prompts = reader.tokens([Prompt(text) for text in TEXTS])
        found = {one.row: one.states for one in reader.each(prompts, (1, 2, 0))}
    for row, prompt in enumerate(prompts):
        expected = hidden_of(folder / "tiny", prompt.ids, folder / "lora" if name == "lora" else None)
        assert found[row].shape == (3, len(prompt.ids), 32)
        for states, layer in zip(found[row], (1, 2, N_LAYERS), strict=True):
            np.testing.assert_allclose(states, expected[layer], atol=2e-5)


@pytest.mark.parametrize("architecture", ["Gemma3ForCausalLM", "MistralForCausalLM", "Qwen3ForCausalLM"])
def test_states_of_other_architectures(tmp_path: Path, tokenizer: Any, architecture: str) -> None:
    """Layers with and without a sliding window, in a padded batch."""
    save_tiny(tmp_path / "tiny", architecture, tokenizer)
    snapshot = Snapshot(1, {"tiny": ExpertSpec(name="tiny", kind=Kind.MODEL, source=str(tmp_path / "tiny"))})
    with open_reader("tiny", snapshot, raw=True) as reader:
        prompts = reader.tokens([Prompt(text) for text in TEXTS])
        for one in reader.each(prompts, (1, 3)):
            expected = hidden_of(tmp_path / "tiny", prompts[one.row].ids)
            np.testing.assert_allclose(one.states, [expected[1], expected[3]], atol=1e-4)


def test_an_architecture_whose_layers_are_not_known_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=len(tokenizer), n_positions=64)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    snapshot = Snapshot(1, {"other": ExpertSpec(name="other", kind=Kind.MODEL, source=str(tmp_path / "other"))})
    with pytest.raises(Unsupported, match="'other' is a GPT2LMHeadModel.*supported are LlamaForCausalLM"):
        open_reader("other", snapshot)


def test_an_expert_without_a_chat_template_is_read_raw(tmp_path: Path, folder: Path, tokenizer: Any) -> None:
    plain = make_tokenizer()
    plain.chat_template = None
    save_tiny_model(tmp_path / "tiny", plain)
    snapshot = Snapshot(1, {"tiny": ExpertSpec(name="tiny", kind=Kind.MODEL, source=str(tmp_path / "tiny"))})
    with open_reader("tiny", snapshot) as reader, pytest.raises(Rejected, match="'tiny' has no chat template.*--raw"):
        reader.tokens([Prompt("is")])
    with open_reader("tiny", snapshot, raw=True) as reader:
        assert len(reader.tokens([Prompt("is")])) == 1


def test_prompts_are_encoded_in_pieces(snapshot: Snapshot, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_reader("tiny", snapshot) as reader:
        whole = reader.tokens([Prompt(text) for text in TEXTS])
        monkeypatch.setattr(module, "_ENCODED_AT_ONCE", 2)
        pieces = reader.tokens([Prompt(text) for text in TEXTS])
        assert [one.ids for one in pieces] == [one.ids for one in whole]
        assert all((a.spans == b.spans).all() for a, b in zip(whole, pieces, strict=True))
        monkeypatch.setattr(module, "MOST_TOKENS", 20)
        with pytest.raises(Rejected, match="more than 20 tokens: read fewer rows"):
            reader.tokens([Prompt(text) for text in TEXTS])


def test_an_adapter_changes_the_states_and_the_last_layer_is_not_normed(snapshot: Snapshot) -> None:
    found = {}
    for name in ("tiny", "lora"):
        with open_reader(name, snapshot, raw=True) as reader:
            found[name] = reader.read(reader.tokens([Prompt(TEXTS[0])]), (N_LAYERS, 0)).values[0, 0]
    assert np.abs(found["tiny"] - found["lora"]).max() > 0.1
    last, normed = found["tiny"]
    np.testing.assert_allclose(normed, last / np.sqrt((last**2).mean() + 1e-6), atol=1e-4)


def test_places_are_the_last_token_the_end_of_the_span_and_the_mean(snapshot: Snapshot) -> None:
    text = "the capital of france is"
    with open_reader("tiny", snapshot, raw=True) as reader:
        [prompt] = reader.tokens([Prompt(text, (4, 11))])
        [one] = reader.each([prompt], (2,))
        read = reader.read([prompt], (2,), ("mean", "span", "last"))
    end = prompt.last_of_span()
    assert prompt.spans[end][1] >= 11 > prompt.spans[end][0] and end < len(prompt.ids) - 1
    np.testing.assert_array_equal(read.at("last", 2)[0], one.states[0, -1])
    np.testing.assert_array_equal(read.at("span", 2)[0], one.states[0, end])
    np.testing.assert_allclose(read.at("mean", 2)[0], one.states[0].mean(0), rtol=1e-6)


@pytest.mark.parametrize("raw", [True, False])
def test_spans_of_a_raw_text_and_of_a_rendered_one_are_the_same_characters(snapshot: Snapshot, raw: bool) -> None:
    with open_reader("tiny", snapshot, raw=raw) as reader:
        for text in TEXTS:
            span = (text.index(text.split()[-1]), len(text.rstrip()))
            [prompt] = reader.tokens([Prompt(text, span)])
            start, end = prompt.spans[prompt.last_of_span()]
            assert start < span[1] <= end, text
            after = prompt.spans[prompt.last_of_span() + 1 :]
            assert all(begin < 0 or begin >= span[1] for begin, _ in after), text


def test_a_chat_prompt_ends_with_the_generation_prompt(snapshot: Snapshot) -> None:
    with open_reader("tiny", snapshot) as reader:
        [prompt] = reader.tokens([Prompt("is", (0, 2))])
        assert reader.tokenizer.decode(prompt.ids) == "<|im_start|>user\nis<|im_end|>\n<|im_start|>assistant\n"
    assert 0 < prompt.last_of_span() < len(prompt.ids) - 3 and tuple(prompt.spans[-1]) == (-1, -1)


def test_a_span_is_in_the_users_text_where_the_template_has_the_same_words(snapshot: Snapshot) -> None:
    with open_reader("tiny", snapshot) as reader:
        [prompt] = reader.tokens([Prompt("assistant", (0, 9))])
        before = reader.tokenizer.decode(prompt.ids[: prompt.last_of_span() + 1])
    assert before == "<|im_start|>user\nassistant"


def test_a_template_that_changes_the_text_leaves_no_span(tmp_path: Path, tokenizer: Any) -> None:
    loud = make_tokenizer()
    loud.chat_template = "{% for m in messages %}{{ m.content | upper }}{% endfor %}!"
    save_tiny_model(tmp_path / "tiny", loud)
    snapshot = Snapshot(1, {"tiny": ExpertSpec(name="tiny", kind=Kind.MODEL, source=str(tmp_path / "tiny"))})
    with open_reader("tiny", snapshot) as reader:
        prompts = reader.tokens([Prompt("is it", (0, 2), name="rows:1")])
        assert reader.read(prompts, (1,)).values.shape == (1, 1, 1, 32)
        with pytest.raises(Rejected, match="rows:1: no token has the characters 0 to 2"):
            reader.read(prompts, (1,), ("span",))


@pytest.mark.parametrize("name", ["tiny", "lora"])
def test_a_batch_reads_and_answers_as_each_prompt_alone(
    snapshot: Snapshot, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_reader(name, snapshot) as reader:
        prompts = reader.tokens([Prompt(text, (0, 1)) for text in TEXTS[:3]], answer_tokens=6)
        places = ("last", "span", "mean")
        together = reader.read(prompts, (1, 3), places, answer_tokens=6)
        monkeypatch.setattr(module, "TOKENS_AT_ONCE", 1)
        alone = reader.read(prompts, (1, 3), places, answer_tokens=6)
    np.testing.assert_allclose(together.values, alone.values, atol=2e-5)
    assert together.answers == alone.answers and any(together.answers)


def test_progress_counts_every_prompt(snapshot: Snapshot) -> None:
    seen: list[tuple[int, int]] = []
    with open_reader("tiny", snapshot, raw=True) as reader:
        prompts = reader.tokens([Prompt(text) for text in TEXTS])
        reader.read(prompts, (1,), on_progress=lambda done, total: seen.append((done, total)))
    assert seen == [(n, len(TEXTS)) for n in range(1, len(TEXTS) + 1)]


def test_a_batch_holds_no_more_tokens_than_allowed() -> None:
    lengths = [5, 900, 3, 3000, 700, 700]
    batches = list(module.batches(lengths))
    assert sorted(row for rows in batches for row in rows) == list(range(6))
    assert batches[0] == [3]  # longer than a batch: alone
    assert all(len(rows) * max(lengths[row] for row in rows) <= module.TOKENS_AT_ONCE for rows in batches[1:])


@pytest.mark.parametrize(
    ("name", "error", "text"),
    [
        ("away", Unsupported, "behind an endpoint"),
        ("both", Unsupported, "name one of its members"),
        ("fake", Unsupported, "no weights"),
        ("tinny", UnknownModel, "did you mean 'tiny'"),
    ],
)
def test_experts_without_states(snapshot: Snapshot, name: str, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        open_reader(name, snapshot)


def test_what_cannot_be_read_is_named(snapshot: Snapshot, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_reader("short", snapshot, raw=True) as reader:
        with pytest.raises(ContextLengthExceeded, match=r"^rows:7: the prompt has \d+ tokens .* context of 8 tokens"):
            reader.tokens([Prompt("is", name="rows:6"), Prompt(TEXTS[2], name="rows:7")])
        with pytest.raises(ContextLengthExceeded):
            reader.tokens([Prompt("is")], answer_tokens=8)
        with pytest.raises(Rejected, match=r"rows:1: .*empty"):
            reader.tokens([Prompt("", name="rows:1")])
        with monkeypatch.context() as patch:
            patch.setattr("coe.latent.prompts.chat.encode_text", lambda *_, **__: pytest.fail("tokenized"))
            with pytest.raises(Rejected, match=r"rows:3: a text of 900,000 characters has more tokens than the 8 that"):
                reader.tokens([Prompt("is " * 300_000, name="rows:3")])
        prompts = reader.tokens([Prompt("is", name="rows:2")])
        for layer in (-1, N_LAYERS + 1):
            with pytest.raises(Rejected, match=f"layers 1 to {N_LAYERS}; there is no layer {layer}"):
                reader.read(prompts, (layer,))
        with pytest.raises(Rejected, match="rows:2: it has no span"):
            reader.read(prompts, (1,), ("span",))
        monkeypatch.setattr(module, "MOST_BYTES", 127)
        with pytest.raises(Rejected, match="MiB"):
            reader.read(prompts, (1,))
        monkeypatch.setattr(module, "MOST_PROMPT_TOKENS", 1)
        with pytest.raises(Rejected, match=r"rows:3: it has \d tokens; states of up to 1 are read"):
            reader.tokens([Prompt("is of", name="rows:3")])


def test_states_that_are_not_finite_are_an_error_of_the_expert(
    snapshot: Snapshot,
) -> None:
    with open_reader("tiny", snapshot, raw=True) as reader:
        prompts = reader.tokens([Prompt("is")])
        reader._decoder.norm.weight.data.fill_(torch.nan)
        with pytest.raises(EngineError, match="the hidden states of 'tiny' are not finite: its weights are damaged"):
            reader.read(prompts, (0,))
        assert np.isfinite(reader.read(prompts, (1,)).values).all()
