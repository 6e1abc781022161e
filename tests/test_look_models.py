"""`regard look` on models that generate, and on encoder-decoders."""

import re
from types import SimpleNamespace

import pytest
import torch

transformers = pytest.importorskip("transformers", reason='needs pip install "regard[look]"')


import regard  # noqa: E402
from regard.analysis.look import look  # noqa: E402
from regard.analysis.text_model import Encoded, TextModel, load  # noqa: E402
from small_tokenizers import byte_tokenizer  # noqa: E402
from test_look import answered, printed, refused  # noqa: E402
from texts import TROPHY  # noqa: E402


def test_generated_tokens_are_read_too(folders, tmp_path):
    arguments = (TROPHY, "--model", folders / "gpt2", "--generate", 12)
    page = printed(*arguments)
    assert "» " in page.split("gpt2 ·")[0]
    assert re.search(r"^generated +reads on average +strongest head$", page, re.M)
    assert sum(line.startswith("layer ") for line in page.splitlines()) == 2
    found = answered(*arguments, "--save", tmp_path / "out")
    recording = regard.Recording.load(tmp_path / "out")
    begun = recording.about["generated"]
    assert recording.about["text"].startswith(TROPHY)
    assert begun < recording.layers[0].q_len <= begun + 12
    words = look(recording).words
    written = [i for i, word in enumerate(words) if word.tokens.start >= begun]
    assert written
    assert {link["from_index"] for link in found["links"]} >= {
        i for i in written if not words[i].special and i > 0
    }
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folders / "gpt2", attn_implementation="eager"
    )
    ids = load(str(folders / "gpt2")).encode(TROPHY).ids
    grown = model.generate(
        torch.tensor([ids]), max_new_tokens=12, do_sample=False, pad_token_id=1,
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
    )  # fmt: skip
    maps = model(grown, output_attentions=True).attentions
    for i, exact in enumerate(maps):
        torch.testing.assert_close(recording.weights(i), exact[0].detach(), atol=1e-4, rtol=0)
    too_many = refused(TROPHY, "--model", folders / "gpt2", "--generate", 127)
    assert "and 127 to generate, but gpt2 has positions for 128" in too_many


def test_an_encoder_decoder_shows_both_sides(folders):
    alone = answered(TROPHY, "--model", folders / "t5", "--from", "it")
    assert {head["kind"] for head in alone["heads"]} == {"self"}
    assert {head["layer"] for head in alone["heads"]} == {0, 1}
    arguments = (TROPHY, "--model", folders / "t5", "--generate", 8)
    found = answered(*arguments)
    kinds = {head["layer"]: head["kind"] for head in found["heads"]}
    assert sorted(kinds.values()) == ["cross", "cross", "decoder", "decoder", "encoder", "encoder"]
    recording = load(str(folders / "t5"), generate=True).record(TROPHY, generate=8)
    seen = look(recording)
    source, said = seen.sides
    assert said.first == len(source.words)
    assert [word.text for word in [*source.words, *said.words]] == found["words"]
    for link in found["links"]:
        kind = kinds[link["layer"]]
        assert (link["from_index"] >= said.first) is (kind != "encoder")
        assert (link["to_index"] >= said.first) is (kind == "decoder")
    whole = printed(*arguments)
    assert "» " in whole
    assert "what it reads writes the next word" in whole  # whose row it is of cross-attention
    new = next(seen.labels[i] for i in seen.generated if not seen.words[i].special)
    page = printed(*arguments, "--from", new)
    assert f"{new} reads (decoder)" in page
    assert f"{new} reads (cross)" in page


def test_characters_of_several_generated_tokens():
    """Their bytes are decoded when they are whole; each token covers the character."""
    its = byte_tokenizer()
    reader = TextModel("x", SimpleNamespace(), its, "causal")
    before = Encoded("it", its("it")["input_ids"])
    before.tokens, before.offsets, before.special = ["it"], [(0, 2)], [False]
    assert len(before.ids) == 1
    new = its(" a👍, the")["input_ids"]
    after = reader.continued(before, [*new, 1])
    assert after.text == "it a👍, the"
    spans = [after.text[a:b] for a, b in after.offsets]
    assert spans.count("👍") == 4
    assert "".join(dict.fromkeys(spans)).replace(" ", "") == "ita👍,the"
    assert after.special == [False] * (len(new) + 1) + [True]
    assert after.offsets[-1] == (len(after.text), len(after.text))
