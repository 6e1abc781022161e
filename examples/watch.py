"""Watch a model: what every layer reads most, as the model runs as it always does."""

from regard_minilm import folder  # or a name on the hub
from transformers import AutoModel, AutoTokenizer

import regard
from regard import Entropy, Received, TopK

model, tokenizer = AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
inputs = tokenizer("The trophy didn't fit in the suitcase.", return_tensors="pt")

with regard.watch(model, observe=[TopK(3), Received(), Entropy()]) as seen:
    model(**inputs)

for layer in seen:
    key = layer[Received].mean.mean(1)[0].argmax()
    most = tokenizer.convert_ids_to_tokens(inputs["input_ids"][0, key].item())
    print(f"{layer.name}: reads {most} most; {layer[Entropy]}")
