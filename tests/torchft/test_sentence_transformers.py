"""What folders of sentence-transformers say, of all ages: read, written again, and, where the library is installed, as
the library itself does it."""

import json

import pytest
import torch
import torch.nn.functional as F
import transformers
from vocabularies import write

from torchft import models, tokenizers
from torchft.errors import UserError
from torchft.losses.contrastive import info_nce
from torchft.sentence_transformers import Embedder, read_embedder, save_modules

WORDS = "red green blue one two three ask tell : a b c".split()  # noqa: SIM905
TRANSFORMER = {"type": "sentence_transformers.models.Transformer", "path": ""}
POOLING = {"type": "sentence_transformers.models.Pooling", "path": "1_Pooling"}
NORMALIZE = {"type": "sentence_transformers.models.Normalize", "path": "2_Normalize"}
NEW = [
    {"type": "sentence_transformers.base.modules.transformer.Transformer", "path": ""},
    {"type": "sentence_transformers.sentence_transformer.modules.pooling.Pooling", "path": "1_Pooling"},
]


def described(folder, *, modules=(TRANSFORMER, POOLING), pooling=None, own=None, about=None, tokenizer=None):
    """``folder`` with the files that say how its hidden states become embeddings."""
    write(folder, modules=list(modules))
    write(folder / "1_Pooling", config=pooling or {"pooling_mode_mean_tokens": True})
    if own is not None:
        write(folder, sentence_bert_config=own)
    if about is not None:
        write(folder, config_sentence_transformers=about)
    if tokenizer is not None:
        write(folder, tokenizer_config=tokenizer)
    return folder


def test_an_older_folder(tmp_path):
    folder = described(
        tmp_path,
        modules=(TRANSFORMER, POOLING, NORMALIZE),
        pooling={"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False, "include_prompt": True},
        own={"max_seq_length": 256, "do_lower_case": False},
        about={"prompts": {"query": "ask: ", "passage": "tell: "}, "default_prompt_name": None},
        tokenizer={"model_max_length": 512},
    )
    found = read_embedder(folder)
    assert (found.pooling, found.similarity, found.is_normalized, found.max_seq_len) == ("cls", "cosine", True, 256)
    assert found.settings_of_texts() == {"query_prompt": "ask: ", "document_prompt": "tell: ", "text_len": 256}


def test_a_newer_folder(tmp_path):
    about = {"prompts": {"query": "", "document": "", "all": "b "}, "default_prompt_name": "all"}
    about["similarity_fn_name"] = "dot"
    new = {"embedding_dimension": 16, "pooling_mode": "lasttoken", "include_prompt": True}
    folder = described(tmp_path, modules=NEW, pooling=new, about=about, own={}, tokenizer={"model_max_length": 7})
    found = read_embedder(folder)
    assert (found.pooling, found.similarity, found.by_angle, found.max_seq_len) == ("last", "dot", False, 7)
    assert found.settings_of_texts() == {"query_prompt": "b ", "document_prompt": "b ", "text_len": 7}


def test_a_folder_that_says_nothing(tmp_path):
    assert read_embedder(tmp_path) == Embedder() and Embedder().settings_of_texts() == {}
    no_limit = described(tmp_path, tokenizer={"model_max_length": 10**30})
    assert read_embedder(no_limit).max_seq_len is None


def test_what_is_written_is_read(tmp_path):
    whole = Embedder(
        pooling="mean", similarity="dot", is_normalized=False, max_seq_len=9,
        prompts={"query": "größer: ", "document": ""}, default_prompt="query",
    )  # fmt: skip
    for i, embedder in enumerate([whole, whole.choose(pooling="cls", similarity="cosine"), Embedder(pooling="last")]):
        (tmp_path / str(i)).mkdir()
        save_modules(tmp_path / str(i), embedder, dim=4, pad_token="[PAD]")
        assert read_embedder(tmp_path / str(i)) == embedder
    assert Embedder().choose(similarity="dot").by_angle is False


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"modules": [TRANSFORMER, POOLING, {"type": "a.Dense", "path": "2_Dense"}]}, "has Dense, which torchft does"),
        ({"pooling": {"pooling_mode_max_tokens": True}}, "asks for pooling pooling_mode_max_tokens"),
        ({"pooling": {"pooling_mode": "mean", "include_prompt": False}}, "include_prompt is false"),
        ({"own": {"do_lower_case": True}}, "do_lower_case is true"),
        ({"about": {"similarity_fn_name": "manhattan"}}, "similarity_fn_name is 'manhattan'; torchft has cosine and"),
        ({"about": {"prompts": {"query": "a"}, "default_prompt_name": "b"}}, "is 'b', but prompts has only query"),
    ],
)
def test_what_torchft_does_not_have_is_named(tmp_path, change, message):
    folder = described(tmp_path, **{"about": {"prompts": {"query": "ask: "}}} | change)
    with pytest.raises(UserError, match=message):
        read_embedder(folder)


def small_bert(folder):
    write(folder)
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    (folder / "vocab.txt").write_text("\n".join(vocab) + "\n")
    transformers.BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    config = transformers.BertConfig(
        vocab_size=len(vocab), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=32, initializer_range=0.5,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.BertModel(config).save_pretrained(folder)
    return folder


def test_the_library_itself(tmp_path):
    """Its embeddings of queries and documents, their cut ends and its similarity are those that a run would train."""
    st = pytest.importorskip("sentence_transformers")
    first = st.SentenceTransformer(
        str(small_bert(tmp_path / "base")), device="cpu", similarity_fn_name="dot",
        prompts={"query": "ask : ", "document": "tell : "},
    )  # fmt: skip
    first.max_seq_length = 8
    first.save(str(tmp_path / "saved"))
    found = read_embedder(tmp_path / "saved")
    settings = found.settings_of_texts()
    assert settings == {"query_prompt": "ask : ", "document_prompt": "tell : ", "text_len": 8}
    save_modules(tmp_path / "saved", found, dim=16, pad_token="[PAD]")  # and what we write says the same
    theirs = st.SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    texts = ["red green", "one two three a b c a b c", "blue : c"]
    model, tokenizer = models.load(tmp_path / "saved", dtype=torch.float32), tokenizers.load(tmp_path / "saved")
    ours = []
    for kind, encode in (("query", theirs.encode_query), ("document", theirs.encode_document)):
        with torch.no_grad():
            rows = [tokenizer.encode_within(settings[f"{kind}_prompt"] + t, settings["text_len"]) for t in texts]
            ours.append(torch.cat([model(torch.tensor([row])).mean(1) for row in rows]))
        assert (torch.tensor(encode(texts)) - ours[-1]).abs().max() < 1e-5
    q, d = ours
    scores = theirs.similarity(q, d)
    want = F.cross_entropy(scores / 0.5, torch.arange(3), reduction="none")
    got = info_nce(q, d, torch.arange(3), temperature=0.5, by_angle=found.by_angle)
    assert (got - want).abs().max() < 1e-4
    assert (info_nce(q, d, torch.arange(3), temperature=0.5) - want).abs().max() > 1e-2


def test_the_files_are_whole_json(tmp_path):
    save_modules(tmp_path, Embedder(pooling="mean", prompts={"query": "π "}), dim=4, pad_token="p")
    about = json.loads((tmp_path / "config_sentence_transformers.json").read_text(encoding="utf-8"))
    assert about == {"prompts": {"query": "π "}, "default_prompt_name": None, "similarity_fn_name": "cosine"}
    assert json.loads((tmp_path / "tokenizer_config.json").read_text()) == {"pad_token": "p"}
