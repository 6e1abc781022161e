"""`--generate N --beams B` of `regard look` and `record`: what the best beam wrote is read."""

import json
import math

import pytest
import torch

transformers = pytest.importorskip("transformers", reason='needs pip install "regard[look]"')

from click.testing import CliRunner  # noqa: E402

import regard  # noqa: E402
from regard import Recording  # noqa: E402
from regard.analysis.generated import beams_of  # noqa: E402
from regard.cli import main  # noqa: E402
from texts import TROPHY  # noqa: E402

CLASSES = {"gpt2": "AutoModelForCausalLM", "t5": "AutoModelForSeq2SeqLM"}


def truth(folder, name):
    """transformers' own search: its best sequence, and log-probabilities by one eager forward."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = getattr(transformers, CLASSES[name]).from_pretrained(
        folder, attn_implementation="eager"
    )
    ids = torch.tensor([tokenizer(TROPHY)["input_ids"]])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=7, num_beams=3, do_sample=False,
        num_return_sequences=3, return_dict_in_generate=True, output_scores=True,
        pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id or 0,
    )  # fmt: skip
    best = out.sequences[:1]
    given = {"input_ids": ids, "decoder_input_ids": best} if name == "t5" else {"input_ids": best}
    with torch.no_grad():
        seen = model(**given, output_attentions=True)
    chances = seen.logits[0, :-1].log_softmax(-1).gather(1, best[0, 1:, None])[:, 0]
    maps = seen.decoder_attentions if name == "t5" else seen.attentions
    begun = 1 if name == "t5" else ids.shape[1]
    return tokenizer, out, best[0], chances[begun - 1 :], maps


@pytest.mark.parametrize("name", CLASSES)
def test_the_best_beam_is_recorded(name, folders, tmp_path):
    tokenizer, out, best, chances, maps = truth(folders / name, name)
    asked = ["record", str(folders / name), TROPHY, str(tmp_path / "r"), "--generate", "7"]
    result = CliRunner().invoke(main, [*asked, "--beams", "3", "--dtype", "model"])
    assert result.exit_code == 0, result.output
    recording = Recording.load(tmp_path / "r")
    side = recording.about["decoder"] if name == "t5" else recording.about
    assert side["tokens"] == tokenizer.convert_ids_to_tokens(best.tolist())
    kept = [chance for chance in side["probabilities"] if chance is not None]
    torch.testing.assert_close(torch.tensor(kept), chances.exp(), rtol=1e-4, atol=1e-6)
    layers = [i for i, layer in enumerate(recording.layers)
              if layer.kind == "self" and layer.q_len == len(best)]  # fmt: skip
    for layer, exact in zip(layers[-len(maps) :], maps, strict=True):
        torch.testing.assert_close(recording.weights(layer), exact[0], rtol=0, atol=1e-4)
    beams = recording.about["beams"]
    assert [beam["score"] for beam in beams] == pytest.approx(out.sequences_scores.tolist())
    assert beams[0]["score"] == pytest.approx(float(chances.mean()), abs=1e-4)
    assert beams == beams_of(recording.about)
    new = best[-len(chances) :].tolist()
    assert beams[0]["text"] == tokenizer.decode(new, skip_special_tokens=True)


def test_look_prints_what_the_other_beams_wrote(folders, tmp_path):
    asked = ["look", TROPHY, "--model", str(folders / "gpt2"), "--generate", "7", "--beams", "3"]
    more = ["--save", str(tmp_path / "r")]
    said = json.loads(CliRunner().invoke(main, [*asked, "--json", *more]).stdout)["generated"]
    assert len(said["beams"]) == 3
    assert said["beams"][0]["text"] == said["text"]
    mean = sum(math.log(chance) for chance in Recording.load(tmp_path / "r").about["probabilities"])
    assert said["beams"][0]["score"] == pytest.approx(mean / 7, abs=1e-4)
    shown = CliRunner().invoke(main, asked, env={"COLUMNS": "60"}).stdout.splitlines()
    assert [line[:10] for line in shown[1:3]] == [
        f"beam {beam['score']:.2f}" for beam in said["beams"][1:]
    ]
    assert max(map(len, shown)) <= 60
    found = regard.look(str(folders / "gpt2"), TROPHY, generate=7, beams=3)
    assert found.found.beams == said["beams"]


def test_what_is_no_beam_is_left_out():
    """Anybody may have written a recording."""
    assert beams_of(
        {"beams": [{"text": "a", "score": -1.0}, {"text": 3}, None, {"score": 0.0}]}
    ) == [{"text": "a", "score": -1.0}]
    assert beams_of({"beams": 3}) == beams_of({}) == []
