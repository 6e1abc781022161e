"""Does it matter? Take one edge of one head away and see what the word's vector becomes."""

import torch
from regard_minilm import folder  # or a name on the hub
from transformers import AutoModel, AutoTokenizer

import regard
from regard import Cut, Edges, Heads

model, tokenizer = AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
text = "The animal didn't cross the road because it was tired"
inputs = tokenizer(text, return_tensors="pt")
tokens = tokenizer.convert_ids_to_tokens(inputs["input_ids"][0])
it, animal = tokens.index("it"), tokens.index("animal")

with torch.no_grad():
    before = model(**inputs).last_hidden_state[0, it]
    with regard.watch(model, cut=[Cut(3, Edges([(it, animal)]) & Heads([1]))]):
        after = model(**inputs).last_hidden_state[0, it]
print(f"without 3.1: it → animal the vector of it changes by {(after - before).norm():.2f}")
print(f"of a length of {before.norm():.2f}")
