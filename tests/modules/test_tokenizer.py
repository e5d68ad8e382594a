import builtins
import importlib.util
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ldm.modules import tokenizer as T
from ldm.modules.prompts import parse_weights, tokenise
from ldm.util import UserError


@pytest.fixture(scope="module")
def clip():
    return T.CLIPTokenizer(pad="zero")


@pytest.fixture(scope="module")
def open_clip_tokenizer():
    """OpenCLIP's tokenizer module on its own: importing the whole package takes seconds."""
    folder = importlib.util.find_spec("open_clip").submodule_search_locations[0]
    spec = importlib.util.spec_from_file_location("open_clip_tokenizer_alone", Path(folder) / "tokenizer.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.SimpleTokenizer()


ALPHABETS = (
    "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ",
    "0123456789",
    " \t\n\r\x0b\x0c\u00a0\u2003\u3000",
    "".join(map(chr, range(0x20))) + "\x7f\x85\ufeff\u200b\u200d\u202e\ufffd",
    "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~",
    "äöüßéèêñçøåæœıİſKŁžþÿ",
    "一只戴着帽子的猫在水彩画里奔跑山水墨笔東京都",
    "日本語ひらがなカタカナ한국어텍스트अआइهذا نصעבריתไทย",
    "😀😂🐱👩\u200d🎨👍🏽🇩🇪🏳️\u200d🌈✨🔥",
    "½²③Ⅳ٣५𝟘ﬁ",
    "\ud800\udfff\U0010ffff\ue000",
)
FRAGMENTS = (
    "&amp;", "&lt;b&gt;", "&amp;amp;quot;", "&#x27;s", "&#128512;", "&nbsp;", "&eacute", "<end_of_text>",
    "<START_OF_TEXT>", "<|endoftext|>", "it's", "WE'LL", "they've", "'ſ", "Ã©tÃ©", "â€œquoteâ€\x9d", "l’été", "ﬀ",
    "don´t", "a photo of a", "4k, 8k, trending on artstation", "supercalifragilisticexpialidocious", "</w>", "\u0301",
    "...",
)  # fmt: skip


def random_text(rng):
    parts = []
    for _ in range(rng.randint(0, 12)):
        if rng.random() < 0.3:
            parts.append(rng.choice(FRAGMENTS))
        else:
            alphabet = rng.choice(ALPHABETS)
            parts.append("".join(rng.choice(alphabet) for _ in range(rng.randint(1, 9))))
        if rng.random() < 0.4:
            parts.append(" ")
    return "".join(parts)


def test_equals_open_clip_on_10000_random_strings(clip, open_clip_tokenizer):
    rng = random.Random(0)
    texts = [random_text(rng) for _ in range(10_000)]
    wrong = [t for t in texts if clip.encode(t) != open_clip_tokenizer.encode(t)]
    assert wrong == []
    assert torch.equal(clip(texts[:2000]), open_clip_tokenizer(texts[:2000]))
    assert sum(len(clip.encode(t)) > 75 for t in texts[:2000]) > 50  # truncation was seen


def test_whole_unicode_range_equals_open_clip(clip, open_clip_tokenizer):
    points = [c for c in range(0x30000) if not 0xD800 <= c < 0xE000]
    for i in range(0, len(points), 97):
        text = "x".join(map(chr, points[i : i + 97]))
        assert clip.encode(text) == open_clip_tokenizer.encode(text), hex(points[i])


def test_padding_of_both_families():
    sd1, sd2 = T.CLIPTokenizer(pad="end"), T.CLIPTokenizer(pad="zero")
    ids = sd1.encode("a photo of a cat")
    assert ids == [320, 1125, 539, 320, 2368]
    assert sd1("a photo of a cat").tolist() == [[49406, *ids] + [49407] * 71]
    assert sd2(["a photo of a cat"]).tolist() == [[49406, *ids, 49407] + [0] * 70]
    assert sd1("").tolist() == [[49406] + [49407] * 76]
    long = sd1("cat " * 100)
    assert long.shape == (1, 77) and long[0, 75] == 2368 and long[0, 76] == 49407


def test_decode_inverts_encode(clip):
    assert clip.decode(clip.encode("Two CATS, 3 dogs & été 猫")) == "two cats , 3 dogs & été 猫 "


def test_truncated_words(clip):
    assert clip.truncated_words("cat " * 75) == []
    assert clip.truncated_words("cat " * 75 + "red, green") == ["red,", "green"]
    # a word that is cut in the middle counts as cut
    assert clip.truncated_words("cat " * 74 + "antidisestablishmentarianism now") == [
        "antidisestablishmentarianism",
        "now",
    ]


def test_missing_package_or_file_is_said(monkeypatch, tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        T.CLIPTokenizer(str(tmp_path / "none.gz"))
    (tmp_path / "bad.gz").write_bytes(b"no gzip")
    with pytest.raises(UserError, match="is not CLIP's"):
        T.CLIPTokenizer(str(tmp_path / "bad.gz"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install open_clip_torch"):
        T.CLIPTokenizer()
    with pytest.raises(ValueError, match="expected end or zero"):
        T.CLIPTokenizer(pad="eos")


@pytest.mark.parametrize("package", ["ftfy", "regex"])
def test_missing_dependency_is_said(monkeypatch, package):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == package:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match="pip install ftfy regex"):
        T.CLIPTokenizer().encode("x")


def test_open_clip_is_not_imported():
    code = (
        "import sys; from ldm.modules.tokenizer import *; CLIPTokenizer()('x'); assert 'open_clip' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# --- BERT -------------------------------------------------------------------------------------------------------------

VOCAB = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "a",
    "photo",
    "of",
    "cat",
    "##s",
    "##ing",
    "paint",
    "ete",
    ",",
    "-",
]
VOCAB += ["猫", "!", "##p", "##h", "p", "h", "##o", "'"]


@pytest.fixture
def vocab(tmp_path):
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join(VOCAB) + "\n", encoding="utf-8")
    return str(path)


def test_wordpiece_equals_transformers(vocab):
    from transformers import BertTokenizer

    theirs = BertTokenizer(vocab, do_lower_case=True)
    ours = T.WordPieceTokenizer(vocab, max_length=12)
    texts = [
        "A photo of cats", "Été, PAINTING 猫猫!", "", "[MASK] a\x00\ufffd\tcat\u00a0's", "unknown words here", "pho-ph",
        "a cat " * 20,
    ]  # fmt: skip
    rng = random.Random(1)
    texts += [random_text(rng).encode("utf-8", "ignore").decode() for _ in range(300)]
    want = theirs(texts, truncation=True, max_length=12, padding="max_length", return_tensors="pt")["input_ids"]
    assert torch.equal(ours(texts), want)


def test_wordpiece_says_what_was_cut(vocab):
    ours = T.WordPieceTokenizer(vocab, max_length=5)
    assert ours("a cat").tolist() == [[2, 5, 8, 3, 0]]
    assert ours.truncated_words("a photo of") == []
    assert ours.truncated_words("a photo cats painting") == ["cats", "painting"]  # cats = cat ##s


def test_bert_vocabulary_is_looked_for_offline(monkeypatch, tmp_path, vocab):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(UserError, match="models/bert-base-uncased/vocab.txt"):
        T.WordPieceTokenizer()
    cached = tmp_path / "hub" / "models--google-bert--bert-base-uncased" / "snapshots" / "0" / "vocab.txt"
    cached.parent.mkdir(parents=True)
    cached.write_text(Path(vocab).read_text(encoding="utf-8"), encoding="utf-8")
    assert T.find_bert_file() == cached
    here = tmp_path / "models" / "bert-base-uncased" / "vocab.txt"
    here.parent.mkdir(parents=True)
    here.write_text("cat\n")
    with pytest.raises(UserError, match=r"no line \[UNK\]"):
        T.WordPieceTokenizer()
    with pytest.raises(UserError, match="does not exist"):
        T.WordPieceTokenizer(str(tmp_path / "none.txt"))


# --- prompt weights ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "runs"),
    [
        ("", [("", 1)]),
        ("a red car", [("a red car", 1)]),
        ("a (red) car", [("a ", 1), ("red", 1.1), (" car", 1)]),
        ("a ((red)) car", [("a ", 1), ("red", 1.21), (" car", 1)]),
        ("a [red] car", [("a ", 1), ("red", 1 / 1.1), (" car", 1)]),
        ("a (red:1.3) (car: .5 )", [("a ", 1), ("red", 1.3), (" ", 1), ("car", 0.5)]),
        ("(a (b:1.5) [c])", [("a ", 1.1), ("b", 1.65), (" ", 1.1), ("c", 1)]),
        ("(red)(car)", [("redcar", 1.1)]),
        ("(red car", [("red car", 1.1)]),
        ("[red (car", [("red ", 1 / 1.1), ("car", 1)]),
        ("red) car]", [("red) car]", 1)]),
        (r"\(red\) \[car\] \\ a\b", [(r"(red) [car] \ a\b", 1)]),
        (r"(hat \(blue\):1.2)", [("hat (blue)", 1.2)]),
        ("ratio 3:4, time 10:30) (x:y)", [("ratio 3:4, time 10:30) ", 1), ("x:y", 1.1)]),
        ("(a:1.2.3)", [("a:1.2.3", 1.1)]),
        ("(line\nbreak:2)", [("line\nbreak", 2)]),
        ("()", [("", 1)]),
        ("(a:-1)", [("a", -1)]),
    ],
)
def test_parse_weights(prompt, runs):
    got = parse_weights(prompt)
    assert [t for t, _ in got] == [t for t, _ in runs]
    assert [w for _, w in got] == pytest.approx([w for _, w in runs])


def test_runs_are_tokenised_apart_and_keep_their_place(clip):
    out = tokenise(clip, "a photo of a (cat:1.3), (very) big")
    assert out.ids == clip.encode("a photo of a") + clip.encode("cat") + clip.encode(",") + clip.encode("very big")
    assert out.weights == pytest.approx([1, 1, 1, 1, 1.3, 1, 1.1, 1])
    assert out.words_after(4) == ["cat", ",", "very", "big"]
    assert out.words_after(8) == []
    assert tokenise(clip, "(cat:1.3)", weights=False).ids == clip.encode("(cat:1.3)")
