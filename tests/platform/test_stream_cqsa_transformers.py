"""Models of transformers under the streaming strategy: exact or refused by name, never wrong."""

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch.nn import functional as F

from fulgurite.errors import ConfigError
from fulgurite.strategies import StreamCQSAStrategy
from fulgurite.testing.attention_judge import (
    TOLERANCE,
    ImplementationStrategy,
    compare_values,
    judge_architecture,
    judge_mode,
    name_implementations,
    record_attention,
)
from fulgurite.testing.transformers_models import (
    ARCHITECTURES,
    MODES,
    build_model,
    measure_influence,
    select_architectures,
)

transformers = pytest.importorskip("transformers")

# Sinks, local and global layers, another width of values, relative positions, cross attention.
TWO = ("llama", "modernbert")
EIGHT_MORE = (
    *("gpt_oss", "deepseek_v3", "t5", "mistral", "gemma2", "llama4_text", "bert", "pegasus_x"),
)
TEN = (*TWO, *(pytest.param(name, marks=pytest.mark.slow) for name in EIGHT_MORE))


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def stream():
    return StreamCQSAStrategy("32KiB")


def eager():
    return ImplementationStrategy("eager")


def judge(name, make_strategy, *modes):
    (architecture,) = select_architectures([name])
    cells = judge_architecture(architecture, make_strategy, modes or None)
    return {cell.mode: cell.verdict for cell in cells}


def list_bad(cells):
    return [
        f"{cell.architecture} {cell.mode}: {cell.verdict} {cell.difference} {cell.detail}"
        for cell in cells
        if cell.verdict in ("wrong", "crashed")
    ]


def measure_exact(cells):
    """The part of the common modes that is exact, of what models can do and let be chosen."""
    counted = [
        cell.verdict == "exact"
        for cell in cells
        if cell.mode in MODES and cell.verdict != "unsupported" and cell.is_reachable
    ]
    return sum(counted) / len(counted)


# --- the strategy -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TEN)
def test_ten_architectures_are_exact_or_refused(name):
    (architecture,) = select_architectures([name])
    cells = judge_architecture(architecture, stream, MODES)
    assert list_bad(cells) == []
    assert measure_exact(cells) >= 0.9
    (plain,) = [cell for cell in cells if cell.mode == "plain"]
    assert plain.calls >= 2
    assert plain.schedule != "whole"  # so small a budget


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("gptj", marks=pytest.mark.slow),
        "bloom",
        pytest.param("xlnet", marks=pytest.mark.slow),
        pytest.param("mpnet", marks=pytest.mark.slow),
    ],
)
def test_models_that_compute_attention_themselves_are_refused(name):
    assert set(judge(name, stream, "plain", "left_padding").values()) == {"refused"}


class Clip(LightningModule):
    def __init__(self, *, fails=False):
        super().__init__()
        text = {
            "vocab_size": 99, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
            "num_attention_heads": 2, "max_position_embeddings": 16, "eos_token_id": 2,
        }  # fmt: skip
        vision = {
            "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
            "num_attention_heads": 2, "image_size": 16, "patch_size": 4,
        }  # fmt: skip
        config = transformers.CLIPConfig(text_config=text, vision_config=vision)
        self.model = transformers.CLIPModel(config).eval()
        self.model.set_attn_implementation({"text_config": "eager", "vision_config": "sdpa"})
        self.fails = fails

    def predict_step(self, batch, batch_idx):
        logits = self.model(
            input_ids=torch.arange(3, 15)[None],
            pixel_values=torch.linspace(-1, 1, 3 * 16 * 16).view(1, 3, 16, 16),
        ).logits_per_image
        if self.fails:
            raise RuntimeError("a step of the user fails")
        return logits

    def predict_dataloader(self):
        return [0]


def predict(module, strategy):
    trainer = Trainer(
        accelerator="cpu", strategy=strategy, logger=False, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    return trainer.predict(module)[0]


@pytest.mark.parametrize("fails", [False, True])
def test_submodels_get_their_own_implementations_back(fails):
    torch.manual_seed(0)
    module, original = Clip(fails=fails), F.scaled_dot_product_attention
    before = name_implementations(module)
    assert {before["model.text_model"], before["model.vision_model"]} == {"eager", "sdpa"}
    strategy = StreamCQSAStrategy("16KiB", intercept_sdpa=True)
    if fails:
        with pytest.raises(RuntimeError, match="a step of the user fails"):
            predict(module, strategy)
    else:
        torch.testing.assert_close(predict(module, strategy), predict(module, "auto"))
        assert strategy.backend.calls == 2
    assert name_implementations(module) == before
    assert F.scaled_dot_product_attention is original


def test_a_refused_model_gets_its_implementation_back():
    (architecture,) = select_architectures(["gptj"])
    model, original = build_model(architecture), F.scaled_dot_product_attention
    before = name_implementations(model)
    assert judge_mode(architecture, model, "plain", stream).verdict == "refused"
    assert name_implementations(model) == before
    assert F.scaled_dot_product_attention is original


@pytest.mark.slow
def test_the_whole_zoo_is_exact_or_refused():
    cells = [cell for x in ARCHITECTURES for cell in judge_architecture(x, stream)]
    assert len({cell.architecture for cell in cells}) == len(ARCHITECTURES)
    assert list_bad(cells) == []
    assert measure_exact(cells) >= 0.9
    plain = [cell for cell in cells if cell.mode == "plain" and cell.verdict == "exact"]
    assert all(cell.calls and cell.schedule != "whole" for cell in plain)


# --- the judge itself ---------------------------------------------------------------------------


def test_the_zoo_is_large_and_its_names_are_its_own():
    names = [architecture.name for architecture in ARCHITECTURES]
    assert len(names) == len(set(names)) >= 80


@pytest.mark.parametrize("name", [*TWO, *EIGHT_MORE, "vit", "wav2vec2", "whisper"])
def test_attention_matters(name):
    (architecture,) = select_architectures([name])
    assert measure_influence(architecture, build_model(architecture)) > 1e-2


@pytest.mark.slow
def test_attention_matters_in_the_whole_zoo():
    influences = {x.name: measure_influence(x, build_model(x)) for x in ARCHITECTURES}
    assert min(influences.values()) > 1e-3, influences


@pytest.mark.slow  # exact architectures are judged so above, streamed
@pytest.mark.parametrize(
    "name", ["llama", *(pytest.param(n, marks=pytest.mark.slow) for n in ("mistral", "bert", "t5"))]
)
def test_implementations_of_transformers_agree(name):
    """Tells rounding from errors: far below the tolerance, in every mode."""
    modes = [mode for mode in MODES if name == "llama" or "generate" not in mode]
    assert set(judge(name, eager, *modes).values()) == {"exact"}


@pytest.mark.slow
def test_implementations_of_transformers_agree_in_the_whole_zoo():
    modes = ("plain", "right_padding", "left_padding", "packed", "prefix")
    cells = [
        cell
        for architecture in ARCHITECTURES
        for cell in judge_architecture(architecture, lambda: ImplementationStrategy("eager"), modes)
    ]
    assert list_bad(cells) == []
    assert max(cell.difference or 0.0 for cell in cells) < TOLERANCE / 1000


def register(name, attention, *, with_masks=True):
    transformers.AttentionInterface.register(name, attention)
    if with_masks:
        masks = transformers.masking_utils.sdpa_mask
        transformers.AttentionMaskInterface.register(name, masks)
    return lambda: ImplementationStrategy(name)


def attend(module, query, key, value, attention_mask=None, **keywords):
    return transformers.integrations.sdpa_attention.sdpa_attention_forward(
        module, query, key, value, attention_mask, **keywords
    )


def test_dropped_padding_and_documents_are_wrong():
    """As transformers does to an attention function without a function for masks."""
    verdicts = judge("llama", register("mask_dropped", attend, with_masks=False), *MODES)
    assert verdicts == {
        "plain": "exact",
        "right_padding": "exact",  # a causal model never sees it
        "left_padding": "wrong",
        "packed": "wrong",
        "generate": "exact",
        "generate_left_padding": "wrong",
    }
    verdicts = judge("bert", register("mask_dropped", attend, with_masks=False))
    assert verdicts == {"plain": "exact", "right_padding": "wrong", "left_padding": "wrong"}


def test_a_window_off_by_one_is_wrong():
    def attend_narrowly(module, query, key, value, attention_mask=None, **keywords):
        if attention_mask is not None and query.shape[2] > 1:
            window = keywords["sliding_window"] - 1
            distance = torch.arange(query.shape[2])[:, None] - torch.arange(key.shape[2])
            attention_mask = attention_mask & (distance < window)
        return attend(module, query, key, value, attention_mask, **keywords)

    verdicts = judge("mistral", register("window_off", attend_narrowly), "plain", "generate")
    assert verdicts == {"plain": "wrong", "generate": "wrong"}


@pytest.mark.slow  # a dropped mask is found above
def test_dropped_softcap_sinks_and_biases_are_wrong():
    def attend_without(module, query, key, value, attention_mask=None, **keywords):
        for name in ("softcap", "s_aux", "position_bias"):
            keywords.pop(name, None)
        return attend(module, query, key, value, attention_mask, **keywords)

    for name in ("gemma2", "gpt_oss", "t5"):
        make_strategy = register("dropped", attend_without)
        assert set(judge(name, make_strategy, "plain", "generate").values()) == {"wrong"}


def test_a_lost_gradient_is_wrong():
    def attend_without_gradient(module, query, key, value, attention_mask=None, **keywords):
        return attend(module, query, key.detach(), value, attention_mask, **keywords)

    make_strategy = register("no_gradient_of_keys", attend_without_gradient)
    assert judge("llama", make_strategy, "plain", "generate") == {
        "plain": "wrong", "generate": "exact",
    }  # fmt: skip


def test_lost_causality_is_wrong():
    def attend_to_all(module, query, key, value, attention_mask=None, **keywords):
        return attend(module, query, key, value, attention_mask, **keywords | {"is_causal": False})

    make_strategy = register("sees_the_future", attend_to_all)
    assert judge("llama", make_strategy, "plain", "causality") == {
        "plain": "wrong", "causality": "wrong",
    }  # fmt: skip


def test_refusals_crashes_and_what_models_cannot_do_are_told_apart():
    def refuse(*_, **__):
        raise ConfigError("No attention today.", "Try another.")

    def crash(*_, **__):
        raise TypeError("a bug")

    assert judge("llama", register("refuses", refuse), "plain") == {"plain": "refused"}
    assert judge("llama", register("crashes", crash), "plain") == {"plain": "crashed"}
    assert judge("nystromformer", stream, "right_padding") == {"right_padding": "unsupported"}


def test_an_implementation_left_behind_is_a_crash():
    class Forgetful(ImplementationStrategy):
        def teardown(self):
            self._before.clear()
            super().teardown()

    (architecture,) = select_architectures(["llama"])
    (cell,) = judge_architecture(architecture, lambda: Forgetful("eager"), ["plain"])
    assert cell.verdict == "crashed"
    assert "not put back" in cell.detail


def test_small_gradients_are_not_compared_with_their_rounding():
    reference = {"grad a": torch.tensor([1.0]), "grad bias": torch.tensor([1e-17])}
    assert compare_values(reference | {"grad bias": torch.tensor([0.0])}, reference)[0] < 1e-12
    assert compare_values({"grad a": torch.tensor([1.0])}, reference)[0] < 1e-12  # no gradient
    assert compare_values({"grad bias": reference["grad bias"]}, reference) == (1.0, "grad a")


def test_it_records_what_a_model_gives_to_attention():
    (architecture,) = select_architectures(["pegasus_x"])
    calls, self_computed = record_attention(architecture, build_model(architecture))
    assert {call.module for call in calls} == {"PegasusXAttention"}
    assert self_computed == ["PegasusXGlobalLocalAttention"]
    (architecture,) = select_architectures(["gemma2"])
    calls, _ = record_attention(architecture, build_model(architecture), "left_padding")
    assert [call.mask for call in calls] == ["bool (2, 1, 48, 48)"] * 2
    assert "softcap=1" in calls[0].keywords
    assert "sliding_window=16" in calls[0].keywords
