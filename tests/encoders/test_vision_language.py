"""One tower: pictures and texts in one row of tokens, read as transformers reads them, saved plainly, trained whole."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

from nearfield.conformance.cases import Case, difference
from nearfield.conformance.tiny_models import VISION_LANGUAGE, save_tiny_vlm
from nearfield.encoders import EncoderConfig, load_encoder
from nearfield.encoders.identity import model_fingerprint
from nearfield.encoders.images import (
    FAMILIES,
    check_one_tower,
    family_of,
    image_token_id,
    row_features,
    row_ids,
)
from nearfield.encoders.load import build_encoder, save_encoder
from nearfield.encoders.packing import embed
from nearfield.encoders.tokenize import prompt_tokens, token_ids
from nearfield.encoders.trials import packing_kind, unused_parameters
from nearfield.errors import BadInputError
from nearfield.methods.carol import CAROLConfig
from nearfield.objectives import InfoNCEConfig
from nearfield.training.chunks import Cut
from nearfield.training.launch import Launch

CPU = torch.device("cpu")
WITH_VIDEOS = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava_onevision")
"""Those whose processor plain transformers does not make without torchvision."""


def noise(seed: int, width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


ITEMS: list[tuple[str, Image.Image | None]] = [
    ("word1 word2 word3", noise(0, 20, 30)),
    ("word4", None),
    ("", noise(1, 40, 16)),
    ("word5 <image> word6 word7", noise(2, 31, 33)),
    ("<image>\nword8", noise(3, 9, 12)),
    ("word9 word10 word11 word12 word13 word14", None),
]
TEXTS = [text for text, _ in ITEMS]
PICTURES = [picture for _, picture in ITEMS]
SIZES = [None if picture is None else picture.size for picture in PICTURES]


def built(folder: Path, architecture: str, **changes: Any) -> SentenceTransformer:
    """A tiny model as a recipe builds it, in float64."""
    side = changes.pop("side", "right")
    model = save_tiny_vlm(folder / "base", architecture, side=side)
    settings = {"pooling": "last", "append_eos": True, "normalize": True, **changes}
    return build_encoder(EncoderConfig.model_validate({"model": str(model), **settings}), "cpu").model.double()


def embeddings(model: SentenceTransformer, chosen: list[int], prompt: str = "") -> torch.Tensor:
    """Embeddings of some items in one chunk, by the rows that training makes."""
    rows = row_ids(model, [TEXTS[i] for i in chosen], [SIZES[i] for i in chosen], prompt)
    with torch.no_grad():
        return embed(model.eval(), row_features(model, rows, [PICTURES[i] for i in chosen], CPU))


def inputs(chosen: list[int]) -> list[Any]:
    """Items as sentence-transformers takes them."""
    return [
        {key: value for key, value in (("image", PICTURES[i]), ("text", TEXTS[i])) if value is not None and value != ""}
        for i in chosen
    ]


@pytest.mark.parametrize("architecture", VISION_LANGUAGE)
def test_rows_are_the_tokens_that_the_processor_makes(architecture: str, tmp_path: Path) -> None:
    model = built(tmp_path, architecture)
    for prompt in ("", "word20 word21: "):
        rows = row_ids(model, TEXTS, SIZES, prompt)
        for number, row in enumerate(rows):
            features = model.preprocess(inputs([number]), prompt=prompt or None)
            assert row.tolist() == features["input_ids"][0].tolist()
            assert row[-1] == model.tokenizer.eos_token_id
        features = row_features(model, rows, PICTURES, CPU)
        assert features["attention_mask"].sum(dim=1).tolist() == [len(row) for row in rows]
    # As many places as the model has vectors for.
    shown = [row for row, picture in zip(rows, PICTURES, strict=True) if picture is not None]
    pixels = {k: v for k, v in features.items() if k not in ("input_ids", "attention_mask", "mm_token_type_ids")}
    pixels = {k: v for k, v in pixels.items() if k not in ("modality", "prompt_length")}
    vectors = model[0].auto_model.get_image_features(**pixels).pooler_output
    if isinstance(vectors, (list, tuple)):
        vectors = torch.cat(list(vectors))
    assert vectors.shape[0] == sum(int((row == image_token_id(model)).sum()) for row in shown)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("architecture", VISION_LANGUAGE)
def test_an_item_is_the_last_state_of_its_row_wherever_it_stands(architecture: str, side: str, tmp_path: Path) -> None:
    model = built(tmp_path, architecture, side=side, normalize=False)
    # Texts that are padded on the left have later positions, whose angles transformers rounds to float32.
    near = 1e-9 if side == "right" else 2e-6
    alone = torch.cat([embeddings(model, [number]) for number in range(len(ITEMS))])
    for order in ([0, 1, 2, 3, 4, 5], [5, 3, 1, 0, 2, 4]):
        torch.testing.assert_close(embeddings(model, order), alone[order], rtol=0, atol=near)
    texts = [1, 5]
    torch.testing.assert_close(embeddings(model, texts), alone[texts], rtol=0, atol=near)
    # Against the transformer itself, one row at a time and without padding.
    for number, row in enumerate(row_ids(model, TEXTS, SIZES, "")):
        features = row_features(model, [row], [PICTURES[number]], CPU)
        given = {k: v for k, v in features.items() if k not in ("modality", "prompt_length", "attention_mask")}
        with torch.no_grad():
            states = model[0].auto_model(**given, return_dict=True).last_hidden_state
        torch.testing.assert_close(alone[number], states[0, -1], rtol=0, atol=1e-9)


@pytest.mark.parametrize("architecture", VISION_LANGUAGE)
def test_the_saved_model_is_a_plain_one(architecture: str, tmp_path: Path) -> None:
    model = built(tmp_path, architecture).float()
    with_text, texts, alone = inputs([0, 3, 4]), [TEXTS[1], TEXTS[5]], [PICTURES[0], PICTURES[2]]
    expected = [model.encode(with_text, prompt="word9 "), model.encode(texts), model.encode(alone)]
    np.testing.assert_allclose(expected[0], embeddings(model, [0, 3, 4], "word9 ").numpy(), atol=1e-6)
    save_encoder(model, tmp_path / "saved")
    kinds = [module["type"] for module in json.loads((tmp_path / "saved" / "modules.json").read_text())]
    assert all(kind.startswith("sentence_transformers.") for kind in kinds)
    loaded = [load_encoder(str(tmp_path / "saved"), device="cpu").model]
    if architecture not in WITH_VIDEOS:
        pillow = {"processor_kwargs": {"backend": "pil"}} if importlib.util.find_spec("torchvision") else {}
        loaded.append(SentenceTransformer(str(tmp_path / "saved"), device="cpu", **pillow))
    for one in loaded:
        assert {"text", "image"} < set(one.modalities)
        found = [one.encode(with_text, prompt="word9 "), one.encode(texts), one.encode(alone)]
        for ours, theirs in zip(found, expected, strict=True):
            np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("architecture", WITH_VIDEOS)
def test_what_plain_transformers_asks_of_a_processor_with_videos_is_saved(architecture: str, tmp_path: Path) -> None:
    save_encoder(built(tmp_path, architecture).float(), tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "processor_config.json").read_text())
    assert hasattr(__import__("transformers"), saved["processor_class"])
    assert saved["video_processor"]["video_processor_type"].endswith("VideoProcessor")
    # Settings of videos that a model came with are kept.
    saved["video_processor"]["max_frames"] = 7
    (tmp_path / "saved" / "processor_config.json").write_text(json.dumps(saved))
    save_encoder(load_encoder(str(tmp_path / "saved"), device="cpu").model, tmp_path / "again")
    again = json.loads((tmp_path / "again" / "processor_config.json").read_text())
    assert again["video_processor"]["max_frames"] == 7


@pytest.mark.parametrize("architecture", VISION_LANGUAGE)
def test_chunks_have_the_gradient_of_one_forward(architecture: str) -> None:
    """Texts, pictures and both in one batch, cut in any way, kept or encoded twice, in float64."""
    case = Case.make(InfoNCEConfig(temperature=0.1, both_directions=True)).in_vision_language_model(architecture)
    loss, gradient = case.reference()
    names = {name for name, value in gradient.items() if float(value.abs().max()) > 0}
    assert any("vision" in name or "visual" in name for name in names)
    for budget, keep in ((16, False), (90, True), (90, False), (10**6, True)):
        engine = case.engine(Launch(), "single", dropout=False)
        work = case.work(engine, budget)
        result, ours = case.gradient(engine, work, keep_graph=keep)
        assert len(work.chunks) > 1 or budget == 10**6
        assert abs(result.loss - loss) < 1e-10 * abs(loss)
        assert difference(ours, gradient) < 1e-10


def test_a_chunk_is_counted_by_what_is_computed() -> None:
    case = Case.make(InfoNCEConfig()).in_vision_language_model("qwen2_vl")
    engine = case.engine(Launch(), "single", dropout=False)
    work, lengths = engine.work(case.batch, Cut(90))
    features = engine.make_features(work.pool)
    for chunk, tokens in zip(work.chunks, work.tokens, strict=True):
        made = features(chunk)
        assert made["input_ids"].numel() == tokens
        assert made["attention_mask"].sum(dim=1).tolist() == lengths[chunk].tolist()
    mixed = [len({item % 3 == 0 for item in work.pool.items[chunk]}) == 2 for chunk in work.chunks]
    assert any(mixed), "texts and pictures share chunks"


def test_words_are_deleted_where_there_is_no_picture() -> None:
    case = Case.make(InfoNCEConfig()).in_vision_language_model("qwen2_vl")
    engine = case.engine(Launch(), "single", dropout=False)
    pool = engine.pool(case.batch)
    lengths, pictured = engine.lengths(pool), pool.items % 3 > 0
    torch.manual_seed(0)
    features = engine.make_features(replace(pool, deleted=np.full(len(pool.items), 0.5)))
    kept = features(np.arange(len(pool.items)))["attention_mask"].sum(dim=1).numpy()
    assert kept[pictured].tolist() == lengths[pictured].tolist()
    assert kept[~pictured].sum() < lengths[~pictured].sum()


def test_an_objective_that_decodes_texts_takes_no_pictures() -> None:
    case = Case.make(CAROLConfig()).in_vision_language_model("qwen2_vl")
    engine = case.engine(Launch(), "single", dropout=False)
    with pytest.raises(BadInputError, match="some queries are images"):
        case.work(engine, 60)


def test_pictures_are_apart_where_all_ranks_go_through_the_same_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case.make(InfoNCEConfig()).in_vision_language_model("qwen2_vl")
    engine = case.engine(Launch(), "single", dropout=False)
    mixed = case.work(engine, 60)
    assert mixed.kinds is None
    monkeypatch.setattr(engine.backend, "same_chunk_count", True)
    work = case.work(replace(engine, launch=Launch(rank=0, world_size=2)), 60)
    assert work.kinds is not None and set(work.kinds) == {0, 1}
    for chunk, kind in zip(work.chunks, work.kinds, strict=True):
        assert (work.pool.items[chunk] % 3 > 0).tolist() == [kind == 1] * len(chunk), "every third is a text alone"
    assert any(len(set((mixed.pool.items[chunk] % 3 > 0).tolist())) == 2 for chunk in mixed.chunks)


def test_pictures_come_first_or_where_their_mark_stands(tmp_path: Path) -> None:
    model = built(tmp_path, "qwen2_vl")

    def read(text: str, shown: bool, prompt: str = "") -> str:
        (row,) = row_ids(model, [text], [(8, 8) if shown else None], prompt)
        words = model.tokenizer.convert_ids_to_tokens(row.tolist())
        return " ".join(words).replace("<|vision_start|> <|image_pad|> <|vision_end|>", "[picture]")

    assert read("word1 word2", True) == "[picture] word1 word2 <eos>"
    assert read("<image>\nword1", True, "word9 ") == "[picture] word9 word1 <eos>"
    assert read("word1 <image> word2", True, "word9 ") == "word9 word1 [picture] word2 <eos>"
    assert read("", True) == "[picture] <eos>" and read("", True, "word9") == "[picture] word9 <eos>"
    # No picture, no token of one; and no text makes a place for a picture that is not there.
    for hostile in (
        "word1 <image>",
        "word1 <|image_pad|>",
        "word1 <|image_<|image_pad|>pad|>",
        "<|vision_start|>word1",
    ):
        assert "image_pad" not in read(hostile, False) and "vision" not in read(hostile, False)
        assert read(hostile, True).count("[picture]") == 1 and read(hostile, True).count("image_pad") == 0
    assert read("<image> word1 <image> word2", True).count("[picture]") == 1


def test_words_are_cut_and_pictures_are_not(tmp_path: Path) -> None:
    model = built(tmp_path, "qwen2_vl", max_length=17)
    long = " ".join(f"word{n}" for n in range(60))
    text, both = row_ids(model, [long, long], [None, (20, 30)], "")
    end = model.tokenizer.eos_token_id
    assert len(text) == len(both) == 17 and text[-1] == both[-1] == end
    assert text.tolist() == model.preprocess([long])["input_ids"][0].tolist()
    assert both.tolist() == model.preprocess([{"image": PICTURES[0], "text": long}])["input_ids"][0].tolist()
    with pytest.raises(BadInputError, match="an image of 31 x 33 pixels ends at token 18"):
        row_ids(model, [""], [(31, 33)], "")


def test_rows_and_pictures_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    model = built(tmp_path, "qwen2_vl")
    rows = row_ids(model, TEXTS[:2], SIZES[:2], "")
    with pytest.raises(ValueError, match="do not belong together"):
        row_features(model, rows, [PICTURES[0], PICTURES[0]], CPU)
    with pytest.raises(ValueError, match="do not belong together"):
        row_features(model, rows, [None, None], CPU)


def test_texts_alone_take_the_same_way(tmp_path: Path) -> None:
    model = built(tmp_path, "idefics3")
    assert [row.tolist() for row in token_ids(model, ["word1"], "word9 ")] == [
        model.preprocess(["word1"], prompt="word9 ")["input_ids"][0].tolist()
    ]
    assert prompt_tokens(model, "word9 ") == 0
    assert token_ids(model, [], "") == []
    assert packing_kind(model, CPU) is None, "tokens of pictures have places that packed rows do not know"


def test_a_language_head_is_left_behind(tmp_path: Path) -> None:
    from transformers import AutoModelForImageTextToText

    base = save_tiny_vlm(tmp_path / "base", "qwen2_vl")
    whole = AutoModelForImageTextToText.from_pretrained(base)
    with torch.no_grad():
        whole.lm_head.weight.normal_(0, 0.2)
    whole.save_pretrained(base)
    model = load_encoder(str(base), device="cpu").model
    assert not any("lm_head" in name for name, _ in model.named_parameters())
    row = torch.tensor([[50, 60, 70]])
    with torch.no_grad():
        ours = model[0].auto_model(input_ids=row).last_hidden_state
        theirs = whole.model(input_ids=row).last_hidden_state
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("architecture", ["llava", "llava_next", "llava_onevision"])
def test_weights_without_effect_are_not_trained(architecture: str, tmp_path: Path) -> None:
    model = built(tmp_path, architecture)
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen and all(".vision_tower." in name for name in frozen)
    rows = row_ids(model, TEXTS, SIZES, "")
    embed(model, row_features(model, rows, PICTURES, CPU)).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (name in frozen), name
    assert unused_parameters(model) == []


def test_low_rank_adapters_go_on_and_are_merged(tmp_path: Path) -> None:
    adapter = {"kind": "lora", "r": 2, "alpha": 4, "targets": "all-linear"}
    model = built(tmp_path, "qwen2_vl", adapter=adapter).float()
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained and all("lora" in name for name in trained)
    assert any("visual" in name for name in trained) and any("language_model" in name for name in trained)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    expected = model.encode(inputs([0, 3]))
    save_encoder(model, tmp_path / "merged")
    merged = load_encoder(str(tmp_path / "merged"), device="cpu").model
    np.testing.assert_allclose(merged.encode(inputs([0, 3])), expected, atol=1e-5)


def as_on_a_hub(folder: Path, processor: str) -> None:
    """The files of a processor as checkpoints of earlier versions of transformers have them."""
    saved = json.loads((folder / "processor_config.json").read_text())
    images = saved.pop("image_processor")
    images["image_processor_type"] = images["image_processor_type"].removesuffix("Pil")
    saved.pop("video_processor", None)
    (folder / "preprocessor_config.json").write_text(json.dumps({**images, "processor_class": processor}))
    (folder / "processor_config.json").write_text(json.dumps({**saved, "processor_class": processor}))
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": "{{ messages }} of a chat"}))


@pytest.mark.parametrize(
    ("architecture", "processor"),
    [("qwen2_vl", "Qwen2VLProcessor"), ("smolvlm", "SmolVLMProcessor"), ("llava", "LlavaProcessor")],
)
def test_checkpoints_of_earlier_versions_are_read_alike(architecture: str, processor: str, tmp_path: Path) -> None:
    expected = embeddings(built(tmp_path, architecture), [0, 1, 2, 3])
    base = tmp_path / "base"
    as_on_a_hub(base, processor)
    settings = {"model": str(base), "pooling": "last", "append_eos": True, "normalize": True}
    model = build_encoder(EncoderConfig.model_validate(settings), "cpu").model.double()
    torch.testing.assert_close(embeddings(model, [0, 1, 2, 3]), expected, rtol=0, atol=0)


def test_the_token_that_begins_a_text_stands_there_once(tmp_path: Path) -> None:
    """Llama's tokenizers put one before each text; a text that begins with its name gets no second one."""
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    base = save_tiny_vlm(tmp_path / "base", "llava")
    tokenizer = AutoTokenizer.from_pretrained(base)
    number = tokenizer.convert_tokens_to_ids("word199")
    tokenizer.bos_token = "word199"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="word199 $A", pair="word199 $A $B", special_tokens=[("word199", number)]
    )
    tokenizer.save_pretrained(base)
    settings = {"model": str(base), "pooling": "last", "append_eos": True, "max_length": 24}
    model = build_encoder(EncoderConfig.model_validate(settings), "cpu").model
    long = " ".join(f"word{n}" for n in range(60))
    for text, picture in (*ITEMS, ("word199 word1", None), ("word199", PICTURES[0]), (long, None), (long, PICTURES[0])):
        (row,) = row_ids(model, [text], [None if picture is None else picture.size], "")
        item = {key: value for key, value in (("image", picture), ("text", text)) if value}
        assert row.tolist() == model.preprocess([item])["input_ids"][0].tolist()
        assert row[0] == number and (row == number).sum() == 1
        assert row[-1] == model.tokenizer.eos_token_id and len(row) <= 24


def broken(model: SentenceTransformer, fault: str) -> None:
    """Let a model read pictures wrongly."""
    transformer = model[0].auto_model
    features, forward = transformer.get_image_features, transformer.forward

    def image_features(*args: Any, **kwargs: Any) -> Any:
        output = features(*args, **kwargs)
        parts = list(output.pooler_output)
        if fault == "blind":
            parts = [torch.ones_like(part) for part in parts]
        if fault == "swapped":
            joined = torch.cat(parts).flip(0)
            parts = list(joined.split([len(part) for part in parts]))
        output.pooler_output = parts
        return output

    def unmasked(*args: Any, **kwargs: Any) -> Any:
        kwargs["attention_mask"] = torch.ones_like(kwargs["attention_mask"])
        return forward(*args, **kwargs)

    transformer.get_image_features = image_features
    if fault == "unmasked":
        transformer.forward = unmasked


@pytest.mark.parametrize(
    ("fault", "complaint"),
    [
        ("blind", "another image gives the same embedding"),
        ("swapped", "beside others than alone"),
        ("unmasked", "beside others than alone"),
    ],
)
def test_a_model_that_reads_pictures_wrongly_is_noticed(fault: str, complaint: str, tmp_path: Path) -> None:
    model = built(tmp_path, "qwen2_vl", side="left")
    check_one_tower(model, "here")
    broken(model, fault)
    with pytest.raises(BadInputError, match=complaint):
        check_one_tower(model, "here")


def test_a_model_that_cannot_be_tried_out_is_refused(tmp_path: Path) -> None:
    model = built(tmp_path, "qwen2_vl")
    model[0].auto_model.config.image_token_id = 3
    with pytest.raises(BadInputError, match="cannot be tried out"):
        check_one_tower(model, "here")


def test_what_was_not_tried_out_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = save_tiny_vlm(tmp_path / "base", "idefics3")
    save_encoder(load_encoder(str(base), device="cpu").model, tmp_path / "saved")
    monkeypatch.delitem(FAMILIES, "idefics3")
    assert family_of(load_encoder(str(tmp_path / "saved"), device="cpu").model) is None
    with pytest.raises(BadInputError, match="idefics3 reads images and texts in one transformer") as refused:
        build_encoder(EncoderConfig(model=str(tmp_path / "saved")), "cpu")
    assert "qwen2_vl" in str(refused.value.hint)


@pytest.mark.parametrize(
    "setting",
    [
        {"attention": "bidirectional"},
        {"layers": 1},
        {"layer_mix": {"from_layer": 0}},
        {"fresh": {}},
        {"pool_prompt": False},
        {"image_tower": {"architecture": "vit"}},
        {"adapter": {"kind": "bottleneck"}},
    ],
    ids=lambda setting: next(iter(setting)),
)
def test_what_one_tower_cannot_have_is_refused(setting: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="cannot be set for a model that reads images and texts"):
        built(tmp_path, "qwen2_vl", **setting)


def test_a_saved_template_of_another_maker_stays(tmp_path: Path) -> None:
    base = save_tiny_vlm(tmp_path / "base", "idefics3")
    model = load_encoder(str(base), device="cpu").model
    own = model[0].processor.chat_template + " word7"
    model[0].processor.chat_template = own
    assert isinstance(model[0], Transformer) and isinstance(model[1], Pooling)
    model.save_pretrained(str(tmp_path / "saved"), create_model_card=False)
    loaded = load_encoder(str(tmp_path / "saved"), device="cpu").model
    assert loaded[0].processor.chat_template == own
    (row,) = row_ids(loaded, ["word1"], [None], "")
    assert row.tolist() == loaded.preprocess(["word1"])["input_ids"][0].tolist()
    # Vectors that were kept are those of one template.
    known = model_fingerprint(loaded)
    loaded[0].processor.chat_template = own + " word8"
    assert model_fingerprint(loaded) != known
