"""The text model of multimodal checkpoints, as transformers saves these and as they were released."""

import pytest
import torch
import transformers
from families import CASES
from safetensors.torch import load_file, save_file
from tiny import SIZES, edit_config, random_, tokens

from torchft import hub, models
from torchft.errors import UserError
from torchft.files import read_json

VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
SIGLIP = VISION | {"model_type": "siglip_vision_model", "image_size": 28, "patch_size": 14}
PIXTRAL = VISION | {"model_type": "pixtral", "image_size": 28, "patch_size": 14}
PARTS = {
    "gemma3": ("Gemma3ForConditionalGeneration", "gemma3_text", SIGLIP),
    "mistral": ("Mistral3ForConditionalGeneration", "mistral", PIXTRAL),
    "ministral3": ("Mistral3ForConditionalGeneration", "ministral3", PIXTRAL),
}


def multimodal(folder, case):
    """transformers' model of images and text, saved in ``folder``."""
    architecture, kind, vision = PARTS[case]
    cls = getattr(transformers, architecture)
    text = {k: v for k, v in (SIZES | CASES[case]).items() if k != "architectures"} | {"model_type": kind}
    config = cls.config_class(
        text_config=text, vision_config=vision, tie_word_embeddings=text.get("tie_word_embeddings", case == "gemma3")
    )
    config._attn_implementation = "eager"
    theirs = random_(cls(config))
    theirs.save_pretrained(folder)
    return theirs


@pytest.mark.parametrize("case", PARTS)
@pytest.mark.parametrize("names", ["as saved", "newer"])
def test_text_model_is_loaded_and_exported_alone(tmp_path, case, names):
    theirs = multimodal(tmp_path / "whole", case)
    if names == "newer":  # the other way in which text models are nested
        file = tmp_path / "whole" / "model.safetensors"
        held = load_file(file)
        renamed = {n.replace("language_model.model.", "model.language_model."): t for n, t in held.items()}
        assert renamed.keys() != held.keys()
        save_file(renamed, file, metadata={"format": "pt"})
    ours = models.load(tmp_path / "whole", dtype=torch.float32)
    batch = tokens()
    with torch.no_grad():
        want = theirs(batch).logits
        torch.testing.assert_close(ours(batch), want, atol=1e-4, rtol=1e-4)
        hub.save(ours, tmp_path / "text")
        config = read_json(tmp_path / "text" / "config.json")
        cls = getattr(transformers, config["architectures"][0])
        again, info = cls.from_pretrained(
            tmp_path / "text", attn_implementation="eager", dtype=torch.float32, output_loading_info=True
        )
        assert not any(info.values())
        torch.testing.assert_close(again(batch).logits, want, atol=1e-4, rtol=1e-4)


def test_the_wholes_word_on_tied_embeddings_counts():
    text = {k: v for k, v in (SIZES | CASES["mistral"]).items() if k != "architectures"} | {"model_type": "mistral"}
    whole = {"architectures": ["Mistral3ForConditionalGeneration"], "tie_word_embeddings": True}
    theirs = transformers.Mistral3Config(text_config=text | {"tie_word_embeddings": False}, tie_word_embeddings=True)
    assert theirs.tie_word_embeddings  # which is what its lm_head follows
    model = models.build(whole | {"text_config": text | {"tie_word_embeddings": False}})
    assert model.lm_head is None


def test_the_wholes_quantisation_counts(tmp_path):
    """It stands beside the text model's section, not in it."""
    multimodal(tmp_path, "mistral")
    fp8 = {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None}
    edit_config(tmp_path, quantization_config=fp8)
    with pytest.raises(UserError, match=r"quantised weights .quant_method 'fp8'.*take the original checkpoint"):
        models.load(tmp_path)
    edit_config(tmp_path, quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]})
    hub.save(models.load(tmp_path), tmp_path / "out")
    assert "quantization_config" not in read_json(tmp_path / "out" / "config.json")


def test_a_text_model_that_we_have_not():
    json = {"architectures": ["Mistral3ForConditionalGeneration"], "text_config": {"model_type": "mistral4"}}
    with pytest.raises(UserError, match="model_type 'mistral4'; torchft trains mistral, ministral3"):
        models.build(json)


def test_released_gemma3_leaves_defaults_out():
    text = {"hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34}
    more = {"rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024}
    model = models.build({"architectures": ["Gemma3ForConditionalGeneration"], "text_config": text | more})
    assert model.config == models.gemma3.CONFIGS["gemma-3-4b-pt"]


@pytest.mark.parametrize(
    ("case", "architecture", "kind"),
    [
        ("gemma4_e2b", "Gemma4ForConditionalGeneration", "gemma4_text"),
        ("gemma4_12b", "Gemma4UnifiedForConditionalGeneration", "gemma4_unified_text"),
    ],
)
def test_gemma4s_text_model(tmp_path, case, architecture, kind):
    """Tables of each layer, and configs that do not speak of them, inside the wrappers that are released."""
    cls = getattr(transformers, architecture)
    text = {k: v for k, v in (SIZES | CASES[case]).items() if k != "architectures"}
    text |= {"model_type": kind, "pad_token_id": 0}
    config = cls.config_class(text_config=text, vision_config=None, audio_config=None, tie_word_embeddings=True)
    config._attn_implementation = "eager"
    theirs = random_(cls(config))
    theirs.save_pretrained(tmp_path)
    with torch.no_grad():
        got = models.load(tmp_path, dtype=torch.float32)(tokens())
        torch.testing.assert_close(got, theirs(tokens()).logits, atol=1e-4, rtol=1e-4)
