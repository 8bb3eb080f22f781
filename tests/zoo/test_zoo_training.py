"""The training loop on a tiny llama: the standard loss, which falls; a resumed run equals an uninterrupted one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from examples.zoo.families import Row
from examples.zoo.lower_layers import LowerLayers
from examples.zoo.training import Progress, Recipe, _loss, _schedule, _shared_prefix, encode, forget, train

TEMPLATE = "system: be brief\n{% for m in messages %}{{ m['content'] }}\n{% endfor %}answer: "
RECIPE = Recipe(steps=6, seed=0, batch=2)
ROWS = [Row(f"how much is {i}?", f"{i} it is") for i in range(12)]

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """Bytes as tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = ["<pad>", "<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    bare = Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, []))
    bare.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bare.decoder = decoders.ByteLevel()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=bare, pad_token="<pad>", eos_token="<eos>")
    wrapped.chat_template = TEMPLATE
    return wrapped


def adapted(tokenizer: Any, **of_lora: Any) -> Any:
    """A tiny llama with fresh LoRA weights, always the same."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        attn_implementation="eager",
    )
    of_lora = {"target_modules": ["q_proj", "v_proj"]} | of_lora
    lora = LoraConfig(r=4, init_lora_weights=False, task_type="CAUSAL_LM", **of_lora)
    return get_peft_model(LlamaForCausalLM(config), lora)


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def test_a_prompt_is_rendered_by_the_template_and_an_answer_ends(tokenizer: Any) -> None:
    prompt, answer = encode(tokenizer, "hi", "yo")
    assert tokenizer.decode(prompt) == "system: be brief\nhi\nanswer: "
    assert tokenizer.decode(answer) == "yo<eos>"


def test_the_loss_is_that_of_the_answers_alone_and_sharing_the_prefix_changes_nothing(tokenizer: Any) -> None:
    model = adapted(tokenizer)
    encoded = [encode(tokenizer, row.prompt, row.answer) for row in ROWS[8:12]]
    assert _shared_prefix([prompt for prompt, _ in encoded]) == len("system: be brief\nhow much is ")
    loss = _loss(model, tokenizer, encoded)
    loss.backward()
    shared = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()

    total, n_tokens = torch.zeros(()), 0
    for prompt, answer in encoded:
        logits = model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        total = total + torch.nn.functional.cross_entropy(logits, torch.tensor(answer), reduction="sum")
        n_tokens += len(answer)
    (total / n_tokens).backward()
    torch.testing.assert_close(loss, total / n_tokens)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(shared[name], parameter.grad, atol=1e-6, rtol=1e-4)


def test_lower_layers_that_are_computed_once_change_neither_loss_nor_gradient(tokenizer: Any, tmp_path: Path) -> None:
    model = adapted(tokenizer, target_modules=["v_proj", "up_proj"], layers_to_transform=[1])
    decoder = model.get_base_model().model
    encoded = [encode(tokenizer, row.prompt, row.answer) for row in ROWS[8:12]]
    loss = _loss(model, tokenizer, encoded)
    loss.backward()
    whole = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()

    computed: list[int] = []
    decoder.layers[0].register_forward_hook(lambda module, args, output: computed.append(len(args[0])))
    lower = LowerLayers(decoder, 1, tmp_path / "lower.safetensors")
    for _ in range(2):
        with lower.removed():
            assert len(decoder.layers) == decoder.config.num_hidden_layers == 1
            again = _loss(model, tokenizer, encoded, lower)
            again.backward()
        torch.testing.assert_close(again, loss)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                torch.testing.assert_close(whole[name], parameter.grad, atol=1e-6, rtol=1e-4)
        model.zero_grad()
    assert computed == [4]
    lower.save()
    lower = LowerLayers(decoder, 1, tmp_path / "lower.safetensors")
    with lower.removed():
        torch.testing.assert_close(_loss(model, tokenizer, encoded, lower), loss)
    assert computed == [4]
    torch.testing.assert_close(_loss(model, tokenizer, encoded), loss)
    assert computed[1:] == [1, 4]


def test_training_of_the_upper_layers_alone_leaves_the_others_as_they_are(tokenizer: Any, tmp_path: Path) -> None:
    recipe = Recipe(steps=4, seed=0, batch=2, learning_rate=1e-2, first_layer=1)
    model = adapted(tokenizer, layers_to_transform=[1])
    before = weights(model)
    seen: list[Progress] = []
    train(model, tokenizer, ROWS[:2] * 4, recipe, checkpoints=tmp_path / "run", report=seen.append)
    assert seen[-1].loss < seen[0].loss
    assert all(not torch.equal(before[name], now) for name, now in weights(model).items())
    assert len(model.get_base_model().model.layers) == 2
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["run.lower-1.safetensors"]
    forget(tmp_path / "run")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("prompts", "shared"), [([[1, 2, 3], [1, 2, 4]], 2), ([[1, 2], [1, 2]], 1), ([[1], [2]], 0), ([[1]], 0)]
)
def test_the_last_prompt_token_is_never_shared(prompts: list[list[int]], shared: int) -> None:
    assert _shared_prefix(prompts) == shared


def test_training_lowers_the_loss_and_says_how_long_is_left(tokenizer: Any, tmp_path: Path) -> None:
    seen: list[Progress] = []
    recipe = Recipe(steps=40, seed=0, batch=2, learning_rate=1e-2)
    seconds = train(
        adapted(tokenizer), tokenizer, ROWS[:2] * 40, recipe, checkpoints=tmp_path / "run", report=seen.append
    )
    assert seen[-1].loss < 0.98 * seen[0].loss  # the most an adapter on random frozen weights can do
    assert [progress.step for progress in seen] == list(range(1, 41))
    assert seen[-1].seconds_left == 0.0
    assert seen[-1].seconds == seconds > 0
    forget(tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_interrupted_run_ends_with_the_weights_of_a_whole_one(tokenizer: Any, tmp_path: Path) -> None:
    whole = adapted(tokenizer)
    train(whole, tokenizer, ROWS, RECIPE, checkpoints=tmp_path / "whole", report=lambda _: None)

    def interrupt(progress: Progress) -> None:
        if progress.step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(
            adapted(tokenizer),
            tokenizer,
            ROWS,
            RECIPE,
            checkpoints=tmp_path / "cut",
            report=interrupt,
            checkpoint_every=2,
        )
    resumed, steps = adapted(tokenizer), []
    train(resumed, tokenizer, ROWS, RECIPE, checkpoints=tmp_path / "cut", report=lambda p: steps.append(p.step))
    assert steps == [5, 6]  # from the checkpoint after step 4
    again = adapted(tokenizer)
    train(again, tokenizer, ROWS, RECIPE, checkpoints=tmp_path / "cut", report=lambda p: steps.append(p.step))
    assert steps == [5, 6]  # no steps left, for example after an interruption while scoring
    for name, weight in weights(again).items():
        torch.testing.assert_close(weights(resumed)[name], weight)
    for name, weight in weights(whole).items():
        torch.testing.assert_close(weights(resumed)[name], weight)


def test_a_checkpoint_of_another_recipe_is_not_taken(tokenizer: Any, tmp_path: Path) -> None:
    def interrupt(progress: Progress) -> None:
        if progress.step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(adapted(tokenizer), tokenizer, ROWS, RECIPE, checkpoints=tmp_path, report=interrupt, checkpoint_every=1)
    steps: list[int] = []
    other = Recipe(steps=6, seed=1, batch=2)
    train(adapted(tokenizer), tokenizer, ROWS, other, checkpoints=tmp_path, report=lambda p: steps.append(p.step))
    assert steps == [1, 2, 3, 4, 5, 6]


def test_too_few_rows_are_refused(tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="6 steps of 2 need 12 rows, not 3"):
        train(adapted(tokenizer), tokenizer, ROWS[:3], RECIPE, checkpoints=tmp_path, report=lambda _: None)


def test_the_learning_rate_rises_then_falls() -> None:
    rates = [_schedule(step, Recipe(steps=100, seed=0)) for step in range(100)]
    assert rates.index(max(rates)) == 6 - 1
    assert rates[0] == pytest.approx(1 / 6)
    assert rates[-1] == pytest.approx(0.1, abs=0.01)
