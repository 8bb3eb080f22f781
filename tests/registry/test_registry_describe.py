from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from model_files import (
    HIDDEN,
    KEYS,
    LAYERS,
    PARAMETERS,
    VOCABULARY,
    llama_tensors,
    write_adapter,
    write_gguf,
    write_json,
    write_model,
    write_sharded,
)
from safetensors.numpy import load_file, save_file

from registry.describe import describe
from registry.digest import digest_of, hash_files, identity
from registry.errors import SourceError
from registry.inspection import card_licence
from registry.spec import (
    INPUT_USD_PER_MTOK_PER_BILLION,
    OUTPUT_USD_PER_MTOK_PER_BILLION,
    ExpertSpec,
    Kind,
    Price,
)

ADAPTER_PARAMETERS = LAYERS * 2 * (HIDDEN + HIDDEN + KEYS + HIDDEN)


def draft(source: object, kind: Kind = Kind.MODEL, **fields: Any) -> ExpertSpec:
    return ExpertSpec(**{"name": "x", "kind": kind, "source": str(source)} | fields)


@pytest.fixture
def base(tmp_path: Path) -> ExpertSpec:
    return describe(draft(write_model(tmp_path / "base"), name="base"))


def adapter(folder: Path, base: ExpertSpec | None, **fields: Any) -> ExpertSpec:
    return describe(draft(folder, Kind.ADAPTER, base="base", **fields), base)


def test_a_folder_says_all_there_is_to_know(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m")
    (folder / "README.md").write_text("---\nlicense: apache-2.0\ntags: [a]\n---\n# A model\n")
    spec = describe(draft(folder, description="good"))
    assert spec == draft(
        folder,
        description="good",
        architecture="LlamaForCausalLM",
        parameters_total=PARAMETERS,
        parameters_active=PARAMETERS,
        size_bytes=4 * PARAMETERS,
        context_length=64,
        licence="apache-2.0",
        price=Price.of_parameters(PARAMETERS),
        files=hash_files(folder),
        digest=digest_of(hash_files(folder)),
    )
    assert describe(spec) == spec


def test_a_gguf_says_it_too(tmp_path: Path) -> None:
    spec = describe(draft(write_gguf(tmp_path / "m.gguf")))
    assert (spec.architecture, spec.context_length, spec.licence) == ("llama", 128, "mit")
    assert (spec.parameters_total, spec.size_bytes) == (PARAMETERS, 4 * PARAMETERS)


@pytest.mark.parametrize(
    ("card", "licence"),
    [("no front matter", None), ("---\n- a\n---\n", None), ("---\nlicense: [a]\n---", None), ("---\n{\n---\n", None)],
)
def test_cards_without_a_licence(tmp_path: Path, card: str, licence: str | None) -> None:
    folder = write_model(tmp_path / "m")
    (folder / "README.md").write_text(card)
    assert describe(draft(folder)).licence is licence
    assert describe(draft(folder, licence="gemma")).licence == "gemma"


@pytest.mark.parametrize(
    ("config", "context"),
    [
        ({"n_positions": 10}, 10),
        ({"text_config": {"max_position_embeddings": 20}}, 20),
        ({"max_position_embeddings": None, "n_ctx": 30}, 30),
        ({"max_position_embeddings": -1}, None),
    ],
)
def test_context_length_under_its_many_names(tmp_path: Path, config: dict[str, Any], context: int | None) -> None:
    folder = write_model(tmp_path / "m", config={"model_type": "llama"} | config)
    spec = describe(draft(folder))
    assert (spec.context_length, spec.architecture) == (context, "llama")


def test_an_embedding_model_reads_its_own_limit(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m")
    assert describe(draft(folder, Kind.EMBEDDING)).context_length == 64
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": 32})
    assert describe(draft(folder, Kind.EMBEDDING)).context_length == 32
    assert describe(draft(folder)).context_length == 64


@pytest.mark.parametrize("packed", [False, True])
def test_a_mixture_of_experts_is_priced_by_the_parameters_a_token_uses(tmp_path: Path, packed: bool) -> None:
    tensors = llama_tensors()
    if packed:
        tensors["model.layers.0.mlp.experts.gate_up_proj"] = np.zeros((4, 3, HIDDEN), np.float32)
    else:
        tensors |= {
            f"model.layers.0.mlp.experts.{n}.up_proj.weight": np.zeros((3, HIDDEN), np.float32) for n in range(4)
        }
    tensors["model.layers.0.mlp.shared_experts.up_proj.weight"] = np.zeros((3, HIDDEN), np.float32)
    config = {"model_type": "moe", "text_config": {"num_experts": 4, "num_experts_per_tok": 2}}
    spec = describe(draft(write_model(tmp_path / "m", tensors, config)))
    assert spec.parameters_total == PARAMETERS + 5 * 3 * HIDDEN
    assert spec.parameters_active == PARAMETERS + 3 * 3 * HIDDEN
    assert spec.price == Price.of_parameters(spec.parameters_active)


def test_a_mixture_of_experts_in_gguf(tmp_path: Path) -> None:
    spec = describe(draft(write_gguf(tmp_path / "m.gguf", experts=(4, 1))))
    assert spec.parameters_total is not None
    assert spec.parameters_total - (spec.parameters_active or 0) == 3 * 3 * HIDDEN


def test_prices_are_proportional_to_active_parameters() -> None:
    price = Price.of_parameters(2_000_000_000)
    assert price.input_usd_per_mtok == 2 * INPUT_USD_PER_MTOK_PER_BILLION
    assert price.output_usd_per_mtok == 2 * OUTPUT_USD_PER_MTOK_PER_BILLION > price.input_usd_per_mtok
    assert price.cost_usd(1e6, 1e6) == price.input_usd_per_mtok + price.output_usd_per_mtok
    assert Price.of_parameters(1).input_usd_per_mtok > 0


def test_what_is_stated_must_be_true(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m")
    assert describe(draft(folder, parameters_total=PARAMETERS, context_length=64)).context_length == 64
    with pytest.raises(SourceError, match=f"`parameters_total` is stated as 7, but the files .* say {PARAMETERS}"):
        describe(draft(folder, parameters_total=7))
    with pytest.raises(SourceError, match="`context_length` is stated as 65"):
        describe(draft(folder, context_length=65))
    with pytest.raises(SourceError, match="but the spec states sha256:0"):
        describe(draft(folder, digest="sha256:0"))


def test_a_shorter_context_may_be_stated(tmp_path: Path) -> None:
    assert describe(draft(write_model(tmp_path / "m"), context_length=8)).context_length == 8
    no_limit = write_model(tmp_path / "n", config={"model_type": "mamba"})
    assert describe(draft(no_limit, context_length=8)).context_length == 8


def test_parameters_of_packed_weights_may_be_stated(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m", config={"model_type": "llama", "quantization_config": {"bits": 4}})
    assert describe(draft(folder, parameters_total=10**9)).parameters_total == 10**9


@pytest.mark.parametrize("config", [{}, {"architectures": [], "model_type": 3}])
def test_a_config_must_name_its_architecture(tmp_path: Path, config: dict[str, Any]) -> None:
    with pytest.raises(SourceError, match="names neither `architectures` nor `model_type`"):
        describe(draft(write_model(tmp_path / "m", config=config)))


def test_remote_experts_state_their_context() -> None:
    stated = draft("https://host/v1", Kind.REMOTE, context_length=100)
    spec = describe(stated)
    assert (spec.model, spec.price, spec.parameters_total) == ("x", None, None)
    assert describe(stated.model_copy(update={"model": "other"})).digest != spec.digest
    with pytest.raises(SourceError, match="needs `context_length`"):
        describe(draft("https://host/v1", Kind.REMOTE))


def test_fake_experts_are_what_is_stated() -> None:
    base = describe(draft("fake://echo", name="base", context_length=100, parameters_active=10**9, size_bytes=5))
    assert base.price == Price.of_parameters(10**9) and base.context_length == 100
    on_it = describe(draft("fake://upper", Kind.ADAPTER, base="base", context_length=50), base)
    assert (on_it.context_length, on_it.size_bytes, on_it.price) == (50, 5, base.price)
    assert describe(draft("fake://echo")).price is None


def test_a_composed_expert_is_its_members() -> None:
    spec = describe(draft("", Kind.COMPOSED, members=("a", "b")))
    assert spec.digest and spec.digest != describe(draft("", Kind.COMPOSED, members=("a", "c"))).digest


def test_an_adapter_adds_to_its_base(tmp_path: Path, base: ExpertSpec) -> None:
    spec = adapter(write_adapter(tmp_path / "a"), base)
    assert spec.parameters_total == ADAPTER_PARAMETERS and spec.size_bytes == 4 * ADAPTER_PARAMETERS
    assert spec.parameters_active == PARAMETERS + ADAPTER_PARAMETERS
    assert (spec.architecture, spec.context_length) == ("LlamaForCausalLM", 64)
    assert [file.name for file in spec.files] == ["adapter_config.json", "adapter_model.safetensors"]


def test_an_adapter_of_another_task_is_not_registered(tmp_path: Path, base: ExpertSpec) -> None:
    with pytest.raises(SourceError, match="has task_type 'SEQ_CLS'; only CAUSAL_LM can be served: it classifies texts"):
        adapter(write_adapter(tmp_path / "a", task_type="SEQ_CLS"), base)
    assert adapter(write_adapter(tmp_path / "b", task_type="CAUSAL_LM"), base).kind is Kind.ADAPTER


def test_an_adapter_costs_what_its_base_costs_in_proportion(tmp_path: Path, base: ExpertSpec) -> None:
    folder = write_adapter(tmp_path / "a")
    default = adapter(folder, base)
    assert default.price == Price.of_parameters(PARAMETERS + ADAPTER_PARAMETERS)
    dear = base.model_copy(update={"price": Price(input_usd_per_mtok=1, output_usd_per_mtok=2)})
    price = adapter(folder, dear).price
    assert price is not None
    assert price.input_usd_per_mtok == pytest.approx(1 + ADAPTER_PARAMETERS / PARAMETERS, rel=1e-5)
    free = Price(input_usd_per_mtok=0, output_usd_per_mtok=0)
    assert adapter(folder, base, price=free).price == free


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (
            {"model.layers.1.self_attn.v_proj": (HIDDEN, HIDDEN)},
            r"module model\.layers\.1\.self_attn\.v_proj needs a weight of shape \(8, 8\), but the base has \(4, 8\)",
        ),
        (
            {"model.layers.7.self_attn.q_proj": (HIDDEN, HIDDEN)},
            r"module model\.layers\.7\.self_attn\.q_proj is not in",
        ),
        ({f"model.layers.{n}.other": (1, 1) for n in range(3)}, r"\(and 2 more modules\)"),
    ],
)
@pytest.mark.parametrize("gguf", [False, True])
def test_an_adapter_of_other_shapes_is_refused(
    tmp_path: Path, base: ExpertSpec, shapes: dict[str, tuple[int, int]], message: str, gguf: bool
) -> None:
    if gguf:
        base = describe(draft(write_gguf(tmp_path / "m.gguf"), name="base"))
    with pytest.raises(SourceError, match=rf"adapter .* does not fit its base 'base': .*{message}"):
        adapter(write_adapter(tmp_path / "a", shapes), base)


def test_an_adapter_fits_a_gguf_base(tmp_path: Path) -> None:
    gguf = describe(draft(write_gguf(tmp_path / "m.gguf"), name="base"))
    spec = adapter(write_adapter(tmp_path / "a"), gguf)
    assert spec.architecture == "llama" and spec.context_length == 128


def test_wrapped_names_match_by_their_end(tmp_path: Path, base: ExpertSpec) -> None:
    shapes = {"model.language_model.layers.0.self_attn.q_proj": (HIDDEN, HIDDEN)}
    assert adapter(write_adapter(tmp_path / "a", shapes), base).parameters_total == 2 * 2 * HIDDEN
    tensors = llama_tensors() | {"vision.layers.0.self_attn.q_proj.weight": np.zeros((1, 1), np.float32)}
    two_towers = describe(draft(write_model(tmp_path / "two", tensors), name="base"))
    with pytest.raises(SourceError, match="is not in the base"):
        adapter(write_adapter(tmp_path / "b", shapes), two_towers)


def test_fused_experts_are_left_to_the_engine(tmp_path: Path, base: ExpertSpec) -> None:
    assert adapter(write_adapter(tmp_path / "a", {"model.layers.0.mlp.experts.gate_up_proj": (3, HIDDEN)}), base)


def test_transposed_weights_of_gpt2(tmp_path: Path) -> None:
    tensors = {"transformer.h.0.attn.c_attn.weight": np.zeros((HIDDEN, 24), np.float32)}
    base = describe(draft(write_model(tmp_path / "gpt2", tensors), name="base"))
    shapes = {"transformer.h.0.attn.c_attn": (24, HIDDEN)}
    assert adapter(write_adapter(tmp_path / "a", shapes, fan_in_fan_out=True), base)
    with pytest.raises(SourceError, match=r"\(24, 8\), but the base has \(8, 24\)"):
        adapter(write_adapter(tmp_path / "b", shapes), base)


def test_adapters_of_embeddings(tmp_path: Path, base: ExpertSpec) -> None:
    folder = write_adapter(tmp_path / "a")
    name = "base_model.model.model.embed_tokens.lora_embedding_"
    save_file(
        {f"{name}A": np.zeros((2, 16), np.float32), f"{name}B": np.zeros((HIDDEN, 2), np.float32)},
        folder / "adapter_model.safetensors",
    )
    assert adapter(folder, base).parameters_total == 2 * (16 + HIDDEN)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"lm_head.weight": (2, 2)}, "has no LoRA weights"),
        ({"base_model.model.m.lora_A.weight": (2, 2)}, "module m has only lora_A"),
        (
            {
                "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": (2, HIDDEN),
                "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight": (HIDDEN, 3),
            },
            r"lora_A \(2, 8\) and lora_B \(8, 3\), whose ranks differ",
        ),
        (
            {
                "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": (2,),
                "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight": (HIDDEN, 2),
            },
            "whose ranks differ",
        ),
    ],
)
def test_broken_adapters(tmp_path: Path, base: ExpertSpec, tensors: dict[str, Any], message: str) -> None:
    folder = write_adapter(tmp_path / "a")
    save_file({n: np.zeros(s, np.float32) for n, s in tensors.items()}, folder / "adapter_model.safetensors")
    with pytest.raises(SourceError, match=message):
        adapter(folder, base)


EMBEDDING = "model.embed_tokens.weight"


def with_copies(folder: Path, copies: dict[str, Any]) -> Path:
    """An adapter with copies of base weights, as peft saves them with `save_embedding_layers=True`."""
    tensors = load_file(write_adapter(folder) / "adapter_model.safetensors")
    save_file(tensors | copies, folder / "adapter_model.safetensors")
    return folder


@pytest.mark.parametrize("write", [write_model, write_sharded])
def test_copies_of_base_weights_must_equal_them(tmp_path: Path, write: Any) -> None:
    base = describe(draft(write(tmp_path / "base"), name="base"))
    weight = llama_tensors()[EMBEDDING]
    same = {f"base_model.model.{EMBEDDING}": weight, "base_model.model.lm_head.base_layer.weight": weight}
    assert adapter(with_copies(tmp_path / "same", same), base).size_bytes
    assert adapter(with_copies(tmp_path / "wide", {EMBEDDING: weight.astype(np.float64)}), base)
    with pytest.raises(
        SourceError, match=r"embed_tokens.weight differs from model.embed_tokens.weight of the base: an"
    ):
        adapter(with_copies(tmp_path / "other", {EMBEDDING: np.nextafter(weight, np.float32(9))}), base)
    with pytest.raises(SourceError, match=r"lm_head.weight differs from lm_head.weight of the base"):
        adapter(with_copies(tmp_path / "head", {"base_model.model.lm_head.weight": -weight}), base)


def test_copies_cannot_be_compared_with_a_gguf_base(tmp_path: Path) -> None:
    base = describe(draft(write_gguf(tmp_path / "m.gguf"), name="base"))
    with pytest.raises(SourceError, match="embed_tokens.weight cannot be compared with model.embed_tokens.weight of"):
        adapter(with_copies(tmp_path / "a", {EMBEDDING: llama_tensors()[EMBEDDING]}), base)


@pytest.mark.parametrize("gguf", [False, True])
def test_a_tied_head_can_be_adapted(tmp_path: Path, base: ExpertSpec, gguf: bool) -> None:
    """The files of a base with tied embeddings have no head."""
    if gguf:
        base = describe(draft(write_gguf(tmp_path / "m.gguf"), name="base"))
    assert adapter(write_adapter(tmp_path / "a", {"lm_head": (VOCABULARY, HIDDEN)}), base).parameters_total == 48
    with pytest.raises(SourceError, match=r"lm_head needs a weight of shape \(17, 8\), but the base has \(16, 8\)"):
        adapter(write_adapter(tmp_path / "b", {"lm_head": (VOCABULARY + 1, HIDDEN)}), base)


def test_layers_that_the_engine_does_not_load_need_no_adapter(tmp_path: Path) -> None:
    """Such as those that predict further tokens, and those of other towers."""
    tensors = llama_tensors() | {
        "model.layers.2.self_attn.q_proj.weight": np.zeros((HIDDEN, HIDDEN), np.float32),
        "vision.blocks.0.attn.q_proj.weight": np.zeros((3, 3), np.float32),
    }
    settings = {"model_type": "llama", "max_position_embeddings": 64}
    folder = write_adapter(tmp_path / "a", target_modules=["q_proj", "v_proj"])
    two = describe(draft(write_model(tmp_path / "two", tensors, settings | {"num_hidden_layers": 2}), name="base"))
    assert adapter(folder, two)
    three = describe(draft(write_model(tmp_path / "three", tensors, settings | {"num_hidden_layers": 3}), name="base"))
    with pytest.raises(SourceError, match="model.layers.2.self_attn.q_proj is targeted by the config and has no LoRA"):
        adapter(folder, three)


def test_only_lora_is_supported(tmp_path: Path, base: ExpertSpec) -> None:
    with pytest.raises(SourceError, match="has peft_type 'IA3'; only LORA"):
        adapter(write_adapter(tmp_path / "a", peft_type="IA3"), base)


def test_an_adapter_needs_a_base_with_weights(tmp_path: Path, base: ExpertSpec) -> None:
    folder = write_adapter(tmp_path / "a")
    with pytest.raises(SourceError, match="the base 'base' of 'x' is needed"):
        adapter(folder, None)
    for other in (draft("fake://echo"), draft("https://host/v1", Kind.REMOTE), adapter(folder, base)):
        with pytest.raises(SourceError, match="has no weights for an adapter"):
            adapter(folder, other)
    with pytest.raises(SourceError, match="an adapter is a folder"):
        adapter(write_gguf(tmp_path / "a.gguf"), base)


def test_hashing_tells_its_progress(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    spec = describe(draft(write_model(tmp_path / "m")), on_bytes=lambda done, total: told.append((done, total)))
    size = sum(record.size_bytes for record in spec.files)
    assert told[-1] == (size, size) and [done for done, _ in told] == sorted(done for done, _ in told)


def test_an_engine_is_a_part_of_what_an_expert_is_and_nothing_changes_without_one() -> None:
    """The digests equal those in registries and saved routers from before experts could name an engine."""
    echo = describe(ExpertSpec(name="echo", kind=Kind.MODEL, source="fake://echo", context_length=64))
    assert echo.digest == "sha256:6ff38b9bb348ac586393e65fd12e3ec0b0d5c482785628b40686a04fa343dc95"
    own = ExpertSpec(name="echo", kind=Kind.MODEL, source="fake://echo", context_length=64)
    assert identity(own, {}) == "sha256:8d323c184a387a2987521232189fcde96a11f72b212d688e524642d54b49c9a6"
    assert identity(echo, {}) == echo.digest
    elsewhere = describe(own.model_copy(update={"engine": "loud"}))
    assert elsewhere.engine == "loud" and elsewhere.digest != echo.digest
    assert len({identity(spec, {}) for spec in (echo, elsewhere, echo.model_copy(update={"engine": "loud"}))}) == 3


def test_parsers_are_a_part_of_what_an_expert_is() -> None:
    plain = ExpertSpec(name="echo", kind=Kind.MODEL, source="fake://echo", digest="sha256:a")
    parsed = [plain.model_copy(update={f: "granite"}) for f in ("tool_call_parser", "reasoning_parser")]
    assert len({identity(spec, {}) for spec in (plain, *parsed)}) == 3


@pytest.mark.parametrize(
    "header", ["license: 2020-99-99", "license: " + "[" * 50_000, "a: &a [x, x]\nlicense: !!int x", "license: mit"]
)
def test_a_hostile_model_card_states_no_licence(tmp_path: Path, header: str) -> None:
    (tmp_path / "README.md").write_text(f"---\n{header}\n---\n")
    assert card_licence(tmp_path) == ("mit" if header.endswith("mit") else None)
