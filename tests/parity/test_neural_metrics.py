"""BERTScore, BLEURT and CLIPScore against their own libraries, on a small real BERT and on random small models."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from engine.cli.app import main
from engine.errors import UsageError
from engine.scoring.base import Items, MetricInputs, UnavailableError, preprocess
from engine.scoring.neural import BertScore, Bleurt, ClipScore, RefClipScore
from engine.scoring.profiles import make_metric
from tests.helpers.processes import one_at_a_time
from tests.helpers.tiny import make_tokenizer, save_pictures
from train.demo.volumes import SMALL_BERT, fetch_assets

MINILM = Path("build/small-bert")
CANDIDATES = ["CT of the chest.", "sagittal t2-weighted MRI", "", "x-ray", "..."]
REFERENCES = [("Chest CT, axial.",), ("Sagittal T2-weighted MRI of the spine.",), ("",), ("",), ("a", "b")]
ITEMS = Items([str(i) for i in range(5)], CANDIDATES, REFERENCES)


@pytest.fixture(autouse=True, scope="module")
def small_bert() -> None:
    with one_at_a_time(MINILM.with_name("small-bert.lock")):
        fetch_assets(MINILM, SMALL_BERT)


def test_path_containing_t5_is_not_a_t5_model(tmp_path, monkeypatch):
    names = iter(["_t5_", "plain", "more"])
    monkeypatch.setattr("tempfile._get_candidate_names", lambda: names)
    folder = tmp_path / "part5" / "bert"
    folder.parent.mkdir()
    folder.symlink_to(MINILM.absolute())
    here = BertScore(MetricInputs(weights={"bertscore": folder})).measure(ITEMS)
    there = BertScore(MetricInputs(weights={"bertscore": MINILM})).measure(ITEMS)
    np.testing.assert_array_equal(here.per_image, there.per_image)


@pytest.mark.parametrize("idf", [False, True])
@pytest.mark.parametrize("layer", [None, 4])
def test_bertscore_equals_bert_score_library(idf, layer):
    from bert_score import BERTScorer

    metric = BertScore(MetricInputs(weights={"bertscore": MINILM}), idf=idf, layer=layer)
    found = metric.measure(ITEMS)
    references = [[preprocess(one) for one in several] for several in REFERENCES]
    scorer = BERTScorer(
        model_type=str(MINILM),
        num_layers=layer or 6,
        idf=idf,
        idf_sents=[one for several in references for one in several] if idf else None,
        nthreads=0,
    )
    pairs = [(preprocess(one), several) for one, several in zip(CANDIDATES, references, strict=True)]
    expected = np.array([max(scorer.score([c], [r])[2].item() for r in several) for c, several in pairs])
    expected[2] = 1.0  # the organisers' rule for two captions that are empty as written
    np.testing.assert_allclose(found.per_image, expected, atol=1e-6)
    assert found.per_image[3] == found.per_image[4] == 0.0
    assert np.isfinite(found.value)
    signature = metric.signature()
    assert f"layer:{layer or 6}|idf:{'references' if idf else 'no'}|proxy:not the organisers' model" in signature
    assert "model:small-bert@" in signature


def test_bertscore_of_a_pair_does_not_depend_on_the_batch(tmp_path):
    """With bert-score it does: it pads batches with zeros, which win if all cosines are negative."""
    from bert_score import BERTScorer
    from transformers import BertModel

    folder = folder_of(tmp_path, {}, 512, positions=64)
    model = BertModel.from_pretrained(folder)
    model.embeddings.token_type_embeddings.weight.data.zero_()  # it is added to every token and makes cosines positive
    model.save_pretrained(folder)
    metric = BertScore(MetricInputs(weights={"bertscore": folder}, batch_size=3))
    candidates = ["ct", "mri of the brain", "mass", "chest lesion", "the left kidney and the right kidney of"]
    references = [("mass",), ("chest ct", "mass"), ("the mass of the left lung in the chest",), ("ct mri",), ("mri",)]
    scorer = BERTScorer(model_type=str(folder), num_layers=2, nthreads=0)
    found = metric.measure(Items(list("abcde"), candidates, references)).per_image
    pairs = list(zip(candidates, references, strict=True))
    alone = [max(scorer.score([c], [r])[2].item() for r in several) for c, several in pairs]
    np.testing.assert_allclose(found, alone, atol=1e-6)
    together = scorer.score(candidates, [list(several) for several in references])[2].numpy()
    assert np.abs(together - alone).max() > 1e-3  # otherwise this test could not fail


def test_idf_weights_follow_the_paper():
    """Three references of tokens {a,b}, {a,c}, {d}: ln((N + 1) / (df + 1))."""
    from bert_score.utils import get_idf_dict

    class Words:
        model_max_length = 512

        def encode(self, text, **_):
            return text.split()

    from unittest import mock

    with mock.patch("bert_score.utils.sent_encode", lambda _, text: text.split()):
        weights = get_idf_dict(["cls a b sep", "cls a c sep", "cls d sep"], Words(), nthreads=0)
    assert weights["a"] == pytest.approx(0.287682, abs=1e-6)
    assert weights["b"] == pytest.approx(0.693147, abs=1e-6)
    assert weights["unseen"] == pytest.approx(1.386294, abs=1e-6)
    assert weights["cls"] == 0.0


def test_missing_layer_is_refused():
    with pytest.raises(UsageError, match="has layers 1 to 6"):
        BertScore(MetricInputs(weights={"bertscore": MINILM}), layer=40).measure(ITEMS)


def test_bleurt_takes_the_best_reference(tmp_path):
    from bleurt_pytorch import BleurtConfig, BleurtForSequenceClassification

    torch.manual_seed(0)
    config = BleurtConfig(
        vocab_size=100, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, num_labels=1
    )
    BleurtForSequenceClassification(config).save_pretrained(tmp_path)
    make_tokenizer(tmp_path).save_pretrained(tmp_path)
    metric = Bleurt(MetricInputs(weights={"bleurt": tmp_path}))
    found = metric.measure(ITEMS)
    one, other = (metric.measure(Items(["4"], ["..."], [(reference,)])).value for reference in REFERENCES[4])
    assert found.per_image[4] == pytest.approx(max(one, other), abs=1e-5)
    assert "bleurt|model:" in metric.signature()


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory) -> Path:
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    text = {"vocab_size": 100, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "eos_token_id": 3}
    vision = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    common = {"intermediate_size": 32, "projection_dim": 8}
    CLIPModel(CLIPConfig(text_config=text | common, vision_config=vision | common, projection_dim=8)).save_pretrained(
        folder
    )
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


@pytest.fixture
def clip_tokenizer(clip_folder, tmp_path, monkeypatch):
    """Replaces the text part of CLIP's processor with BLIP's tokenizer, because no package has a CLIP vocabulary."""
    from transformers import CLIPImageProcessor

    tokenizer = make_tokenizer(tmp_path)

    class Processor:
        images = CLIPImageProcessor.from_pretrained(clip_folder)

        def __call__(self, text=None, images=None, **options):
            if images is not None:
                return self.images(images, **options)
            return tokenizer(text, return_token_type_ids=False, **options)

    monkeypatch.setattr("transformers.CLIPProcessor.from_pretrained", lambda _: Processor())
    return tokenizer


@pytest.mark.usefixtures("clip_tokenizer")
@pytest.mark.parametrize(
    ("depth", "levels", "signed"),
    [
        ("clip", [255, 255, 255], ""),
        ("scale", [0, 128, 255], "|high-bit-depth:scale"),
        ("1000,5000", [0, 64, 128], "|high-bit-depth:1000,5000"),
    ],
)
def test_clipscore_reads_16_bit_images_as_the_run_did(depth, levels, signed, clip_folder, tmp_path):
    values = np.repeat(np.array([[1000, 2000, 3000]], np.uint16), 3, 0)
    for name, content in (("deep", values), ("plain", np.repeat(np.array([levels], np.uint8), 3, 0))):
        (tmp_path / name).mkdir()
        Image.fromarray(content).save(tmp_path / name / "a.png")
    (tmp_path / "run.csv").write_text("ID,Caption\na,chest ct\n")
    files = ("--run", tmp_path / "run.csv", "--references", tmp_path / "run.csv")
    given = ("score", *files, "--metrics", "clipscore", "--weights", f"clipscore={clip_folder}", "--device", "cpu")
    found = []
    for arguments in (("--images", tmp_path / "deep", "--high-bit-depth", depth), ("--images", tmp_path / "plain")):
        words = map(str, (*given, *arguments, "--out", tmp_path / "scores.json"))
        result = CliRunner().invoke(main, list(words))
        assert result.exit_code == 0, result.output
        found.append(json.loads((tmp_path / "scores.json").read_text())["details"]["scores"]["clipscore"])
    deep, plain = found
    assert deep["value"] == pytest.approx(plain["value"], abs=1e-6)
    assert f"|text:raw{signed}|transformers" in deep["signature"]
    assert ("1 image has more than 8 bits" in deep.get("note", "")) == (depth == "clip")


@pytest.mark.usefixtures("clip_tokenizer")
def test_clipscore_reads_the_frame_of_the_run(clip_folder, tmp_path, monkeypatch):
    frames = []

    def decode(_, *, frame, **__):
        frames.append(frame)
        return Image.new("RGB", (32, 32))

    monkeypatch.setattr("engine.scoring.neural.decode_image", decode)
    metric = make_metric("clipscore", MetricInputs(weights={"clipscore": clip_folder}), {"dicom_frame": 3})
    metric.measure(Items(["a"], ["ct"], [("ct",)], [tmp_path / "a.dcm"]))
    assert frames == [3]
    assert "|dicom-frame:3|" in metric.signature()


def test_clipscore_is_a_scaled_cosine_of_features(clip_folder, clip_tokenizer, tmp_path):
    from transformers import CLIPImageProcessor, CLIPModel

    paths = sorted(save_pictures(tmp_path, 5).glob("?.png"))
    items = Items(ITEMS.ids, CANDIDATES, REFERENCES, paths)
    setting = MetricInputs(weights={"clipscore": clip_folder}, batch_size=2)
    found = ClipScore(setting).measure(items)
    model = CLIPModel.from_pretrained(clip_folder).eval()

    def text_features(captions):
        texts = ["A photo depicts " + caption for caption in captions]
        inputs = clip_tokenizer(texts, padding=True, return_token_type_ids=False, return_tensors="pt")
        return torch.nn.functional.normalize(model.get_text_features(**inputs).detach(), dim=-1)

    processor = CLIPImageProcessor.from_pretrained(clip_folder)
    pixels = processor([Image.open(path).convert("RGB") for path in paths], return_tensors="pt")
    image = torch.nn.functional.normalize(model.get_image_features(**pixels).detach(), dim=-1)
    cosine = (image * text_features(CANDIDATES)).sum(-1).numpy()
    np.testing.assert_allclose(found.per_image, 2.5 * np.maximum(cosine, 0), atol=1e-5)
    referenced = RefClipScore(setting).measure(items)
    closest = [
        max((text_features([c]) @ text_features(list(several)).T).max().item(), 0)
        for c, several in zip(CANDIDATES, REFERENCES, strict=True)
    ]
    a, b = found.per_image, np.array(closest)
    np.testing.assert_allclose(
        referenced.per_image, np.where(a + b > 0, 2 * a * b / np.maximum(a + b, 1e-9), 0), atol=1e-5
    )


def folder_of(tmp_path: Path, config: dict, tokenizer_limit: int | None, positions: int) -> Path:
    """Write a random BERT with few positions, and a tokenizer with another limit or none."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    sizes = {"vocab_size": 100, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    BertModel(BertConfig(**sizes, intermediate_size=32, max_position_embeddings=positions, **config)).save_pretrained(
        tmp_path
    )
    make_tokenizer(tmp_path).save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    settings.pop("model_max_length", None)
    path.write_text(json.dumps(settings | ({"model_max_length": tokenizer_limit} if tokenizer_limit else {})))
    return tmp_path


@pytest.mark.parametrize("limit", [None, 512])
def test_captions_longer_than_the_model_are_truncated(limit, tmp_path):
    metric = BertScore(MetricInputs(weights={"bertscore": folder_of(tmp_path, {}, limit, positions=16)}))
    long = "chest x-ray " * 40
    found = metric.measure(Items(["a", "b"], [long, "x"], [("chest x-ray",), ("x",)]))
    assert np.isfinite(found.per_image).all()
    assert found.note == "1 text longer than the model's 16 tokens: truncated"


def test_weights_of_another_model_are_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    folder = folder_of(tmp_path, {}, 512, positions=64)
    weights = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if not name.startswith("encoder.layer.1.")}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UnavailableError, match=r"belong to a different model: \d+ are missing \(encoder\.layer\.1"):
        BertScore(MetricInputs(weights={"bertscore": folder})).measure(ITEMS)
    with pytest.raises(UnavailableError, match="belong to a different model"):
        Bleurt(MetricInputs(weights={"bleurt": folder})).measure(ITEMS)
